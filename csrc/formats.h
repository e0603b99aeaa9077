/* formats.h: sizes and places of the packed formats. They are the same on every ISA level.
 *
 * Weights: a matrix is tiles of 16 rows, each a multiple of 64 bytes.
 *   f32   [C][16] float
 *   bf16  [C][16] uint16
 *   q8    [groups][16] float16 scales, padded to 64; per 32 columns eight vectors of 64 bytes
 *   q4    the same with four vectors
 * Vector j, row r, byte b stands at 64 j + 4 r + b. q8: W[r][4j + b] + 128. q4: low nibble W[r][4j + b] + 8, high
 * nibble W[r][16 + 4j + b] + 8. This is the operand order of vpdpbusd, sdot and AMX tiles.
 *
 * KV block: 64 positions of one head, K then V.
 *   f32, f16  K: four tiles of 16 positions, [P][16]; V: [64][P]
 *   q8        K: four tiles, per 32 dims eight vectors as above (signed, no offset) and 16 float scales;
 *             V: [64][P rounded up to 32] int8, then [64][P / 32 rounded up] float scales
 */
#ifndef DM_FORMATS_H
#define DM_FORMATS_H
#include "dist_moe.h"

#define DM_KEY_GROUP_BYTES (8 * 64 + 16 * sizeof(float))

static inline size_t dm_divide_up(size_t n, size_t divisor) { return (n + divisor - 1) / divisor; }
static inline size_t dm_round_up(size_t n, size_t multiple) { return dm_divide_up(n, multiple) * multiple; }

static inline size_t dm_scale_groups(size_t columns, size_t group) {
    return group == 0 ? 1 : dm_divide_up(columns, group);
}

/* Bytes of a tile's scales, which stand before its vectors. */
static inline size_t dm_scale_bytes(size_t columns, size_t group) {
    return dm_round_up(dm_scale_groups(columns, group) * 16 * sizeof(uint16_t), 64);
}

/* Which scale belongs to the columns 32 g ... */
static inline size_t dm_scale_index(size_t g, size_t group) { return group == 0 ? 0 : g * DM_GROUP / group; }

static inline size_t dm_tile_bytes(int format, size_t columns, size_t group) {
    switch (format) {
        case DM_F32: return columns * 64;
        case DM_BF16: return dm_round_up(columns * 32, 64);
        case DM_Q8: return dm_scale_bytes(columns, group) + dm_divide_up(columns, DM_GROUP) * 512;
        default: return dm_scale_bytes(columns, group) + dm_divide_up(columns, DM_GROUP) * 256;
    }
}

static inline int dm_is_quantized(int format) { return format == DM_Q8 || format == DM_Q4; }

/* Bytes of the K part of a KV block. */
static inline size_t dm_key_bytes(int format, size_t P) {
    switch (format) {
        case DM_KV_F32: return DM_BLOCK_POSITIONS * P * 4;
        case DM_KV_F16: return DM_BLOCK_POSITIONS * P * 2;
        default: return 4 * dm_divide_up(P, DM_GROUP) * DM_KEY_GROUP_BYTES;
    }
}

/* Attention of `rows` query heads at a time: the queries; a state or a triple (m, l and o of every row); and scratch:
 * m, l, two factors and 64 scores per row, then a block's K or V as floats. */
static inline size_t dm_query_bytes(size_t rows, size_t P) {
    return dm_round_up(rows, 16) * dm_round_up(P, DM_GROUP) * sizeof(float);
}

/* Rows of o: kernels work on 8, 4, 2 or 1 of them. */
static inline size_t dm_value_rows(size_t rows) {
    const size_t rest = rows % 8;
    return rows - rest + (rest > 4 ? 8 : rest == 3 ? 4 : rest);
}

static inline size_t dm_triple_floats(size_t rows, size_t P) {
    return dm_round_up(rows, 16) * 2 + dm_value_rows(rows) * dm_round_up(P, 16);
}

static inline size_t dm_attention_scratch(size_t rows, size_t P) {
    return (dm_round_up(rows, 16) * (4 + DM_BLOCK_POSITIONS) + DM_BLOCK_POSITIONS * P) * sizeof(float);
}

#endif
