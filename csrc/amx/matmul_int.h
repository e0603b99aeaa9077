/* matmul_int.h: q4 and q8 weights by AMX tiles: per 32 columns one tdpbssd gives the exact int32 dot products of 16
 * rows and up to 16 tokens; AVX-512 scales and adds them, one conversion and one fma each.
 *
 *   tdpbssd   16 x 16 dots of 32 signed bytes, 16 cycles; a tile of zeros, two loads and a store besides
 *   vectors   48 operations, 24 cycles: these are the bound
 *
 * The operand's bytes are the left tile where they lie. The right tile is 8 vectors of weights, whose offset is taken
 * away while they are unpacked into scratch, so the dots need no correction. Few tokens go to vpdpbusd.
 */
#ifndef DM_AMX_MATMUL_INT_H
#define DM_AMX_MATMUL_INT_H

#define matmul_q8 vnni_matmul_q8
#define matmul_q4 vnni_matmul_q4
#include "../x86/matmul_int.h"
#undef matmul_q8
#undef matmul_q4

/* Below this many tokens vpdpbusd is faster. */
#define AMX_TOKENS 7

/* Tokens of one tile, and of one pass over the weights. */
#define AMX_BLOCK 16
#define AMX_PASS 64

/* Groups of 32 columns, in the order of the packed matrix: so many are unpacked for all blocks, each so many steps
 * before it is multiplied. (8 to 32 and 1 to 8 tried.) */
#define STRIP 16
#define AHEAD 2

#define GROUP_TILE_BYTES 512
#define UNPACKED (-1)

/* How far ahead of the unpacking the matrix is asked for. */
#define PREFETCH_AHEAD 2048

/* Tile registers: two of each, so that one is filled while the other is read. */
#define EVEN_DOTS 0
#define ODD_DOTS 1
#define EVEN_X 4
#define ODD_X 5
#define EVEN_W 6
#define ODD_W 7

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* GCC's intrinsic reads 8 bytes of the configuration as far as the optimizer knows, and its tile loads none at all. */
DM_INLINE void configure_tiles(const tile_config *config) { __asm__ volatile("ldtilecfg %0" : : "m"(*config)); }
DM_INLINE void compiler_barrier(void) { __asm__ volatile("" : : : "memory"); }

/* Tiles for `tokens` tokens; nothing is read or written beyond them. */
DM_INLINE void configure_for(size_t tokens) {
    tile_config config = {.palette = 1};
    for (size_t i = 0; i < 8; i++) {
        config.row_bytes[i] = i == EVEN_X || i == ODD_X ? DM_GROUP : 64;
        config.rows[i] = (uint8_t)(i == EVEN_W || i == ODD_W ? DM_GROUP / 4 : tokens);
    }
    configure_tiles(&config);
}

/* What all strips of a pass share. */
typedef struct amx_job {
    int8_t *weights; /* [STRIP][GROUP_TILE_BYTES], a ring */
    size_t groups, groups_per_scale, group_bytes, scale_bytes, tile_bytes, q_stride, tokens, rows, out_stride;
} amx_job;

/* One block of tokens. */
typedef struct amx_block {
    float *out_TR;
    const int8_t *q;
    const float *scale_GT; /* [groups][AMX_BLOCK] */
} amx_block;

/* A group of a matrix. */
typedef struct amx_place {
    const uint8_t *tile;
    size_t g, row;
} amx_place;

/* Bit matrices of vgf2p8affineqb: the low (high) nibble's bits 0-2, and bit 3 in 3-7; a constant flips those: n - 8. */
#define LOW_NIBBLE 0x0102040808080808
#define HIGH_NIBBLE 0x1020408080808080
#define NIBBLE_SIGN 0xf8

DM_INLINE void unpack_group_q4(int8_t *weights, const uint8_t *vectors) {
    const __m512i low = _mm512_set1_epi64(LOW_NIBBLE), high = _mm512_set1_epi64((int64_t)HIGH_NIBBLE);
    for (size_t j = 0; j < 4; j++) {
        __m512i both = _mm512_load_si512(vectors + 64 * j);
        _mm512_store_si512(weights + 64 * j, _mm512_gf2p8affine_epi64_epi8(both, low, NIBBLE_SIGN));
        _mm512_store_si512(weights + 256 + 64 * j, _mm512_gf2p8affine_epi64_epi8(both, high, NIBBLE_SIGN));
    }
}

DM_INLINE void unpack_group_q8(int8_t *weights, const uint8_t *vectors) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (size_t j = 0; j < 8; j++) {
        _mm512_store_si512(weights + 64 * j, _mm512_xor_si512(_mm512_load_si512(vectors + 64 * j), sign));
    }
}

/* 1.5 * 2^23: an integer below 2^22 added to these bits is that number added to this float. */
#define MAGIC_BITS 0x4b400000
#define MAGIC 0x1.8p23f

DM_INLINE void next_group(amx_place *place, const amx_job *job) {
    if (++place->g < job->groups) return;
    *place = (amx_place){place->tile + job->tile_bytes, 0, place->row + 16};
}

/* The dot products of one group begin; those of the group before it are stored. */
DM_INLINE void multiply(int32_t *before_TR, const int8_t *q, const int8_t *weights, size_t q_stride, size_t step) {
    if (step % 2 == 0) {
        _tile_loadd(EVEN_X, q, q_stride);
        _tile_loadd(EVEN_W, weights, 64);
        _tile_zero(EVEN_DOTS);
        _tile_dpbssd(EVEN_DOTS, EVEN_X, EVEN_W);
        _tile_stored(ODD_DOTS, before_TR, 64);
    } else {
        _tile_loadd(ODD_X, q, q_stride);
        _tile_loadd(ODD_W, weights, 64);
        _tile_zero(ODD_DOTS);
        _tile_dpbssd(ODD_DOTS, ODD_X, ODD_W);
        _tile_stored(EVEN_DOTS, before_TR, 64);
    }
}

DM_INLINE void store_last(int32_t *dots_TR, size_t step) {
    if (step % 2 == 0) {
        _tile_stored(EVEN_DOTS, dots_TR, 64);
    } else {
        _tile_stored(ODD_DOTS, dots_TR, 64);
    }
}

DM_INLINE void unpack_group(int8_t *weights, const amx_place *place, const amx_job *job, int format) {
    const size_t offset = job->scale_bytes + place->g * job->group_bytes, ahead = offset + PREFETCH_AHEAD;
    prefetch(place->tile + ahead + (ahead < job->tile_bytes ? 0 : job->scale_bytes), format == DM_Q4 ? 256 : 512);
    if (format == DM_Q4) unpack_group_q4(weights, place->tile + offset);
    if (format == DM_Q8) unpack_group_q8(weights, place->tile + offset);
}

/* sum[t] += scale * scale_x[t] * dots[t]. Next to tile instructions only one port has fused multiply-adds and
 * conversions, and the other one has additions: three quarters of the conversions are made of these. */
DM_INLINE void add_dots(f32v *sum, const int32_t *dots_TR, const float *scale_T, f32v scale, size_t width) {
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) {
        i32v raw = (i32v)_mm512_load_si512(dots_TR + 16 * i);
        f32v dot = i % 4 == 3 ? __builtin_convertvector(raw, f32v) : (f32v)((u32v)raw + MAGIC_BITS) - MAGIC;
        sum[i] = fma_lanes(scale * all_f32(scale_T[i]), dot, sum[i]);
    }
}

/* Stores a finished tile of rows and starts the next one. */
DM_INLINE void finish_rows(f32v *sum, float *out_TR, const amx_job *job, size_t row, size_t width) {
    const size_t rows = job->rows - row;
    const __mmask16 present = rows < 16 ? (__mmask16)((1u << rows) - 1) : 0xffff;
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) {
        if (i < job->tokens) _mm512_mask_storeu_ps(out_TR + i * job->out_stride + row, present, (__m512)sum[i]);
        sum[i] = (f32v){0};
    }
}

/* `count` groups for one block, unpacked first if format is one. A group is unpacked AHEAD steps before it is
 * multiplied, stored one step and added two steps after that. */
DM_INLINE void run_strip(float *sum_TR, const amx_job *job, const amx_block *block, amx_place place, size_t count,
                         size_t width, int format) {
    int32_t dots[2][AMX_BLOCK * 16] __attribute__((aligned(64)));
    amx_place packed = place, added = place;
    size_t g = place.g, unpacked = 0;
    f32v sum[AMX_BLOCK];
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) sum[i] = load_f32(sum_TR + 16 * i);
    for (size_t step = 0; step < count + 2; step++) {
        for (; format != UNPACKED && unpacked < count && unpacked <= step + AHEAD; unpacked++) {
            unpack_group(job->weights + unpacked % STRIP * GROUP_TILE_BYTES, &packed, job, format);
            next_group(&packed, job);
        }
        compiler_barrier();
        if (step < count) {
            multiply(dots[(step + 1) % 2], block->q + g * DM_GROUP, job->weights + step % STRIP * GROUP_TILE_BYTES,
                     job->q_stride, step);
            g = g + 1 < job->groups ? g + 1 : 0;
        } else if (step == count) {
            store_last(dots[(step + 1) % 2], count - 1);
        }
        if (step < 2) continue;
        const uint16_t *scale_R = (const uint16_t *)added.tile + added.g / job->groups_per_scale * 16;
        prefetch((const uint8_t *)scale_R + job->tile_bytes, 1);
        add_dots(sum, dots[step % 2], block->scale_GT + added.g * AMX_BLOCK, widen_f16(scale_R), width);
        if (added.g + 1 == job->groups) finish_rows(sum, block->out_TR, job, added.row, width);
        next_group(&added, job);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) store_f32(sum_TR + 16 * i, sum[i]);
}

/* The vector part has four sizes; what it computes beyond the tokens is not used. */
DM_INLINE void run_any(float *sum_TR, const amx_job *job, const amx_block *block, amx_place place, size_t count,
                       int format) {
    if (job->tokens > 12) {
        run_strip(sum_TR, job, block, place, count, 16, format);
    } else if (job->tokens > 8) {
        run_strip(sum_TR, job, block, place, count, 12, format);
    } else {
        run_strip(sum_TR, job, block, place, count, 8, format);
    }
}

static void run_q4(float *sum_TR, const amx_job *job, const amx_block *block, amx_place place, size_t count) {
    run_any(sum_TR, job, block, place, count, DM_Q4);
}

static void run_q8(float *sum_TR, const amx_job *job, const amx_block *block, amx_place place, size_t count) {
    run_any(sum_TR, job, block, place, count, DM_Q8);
}

static void run_unpacked(float *sum_TR, const amx_job *job, const amx_block *block, amx_place place, size_t count) {
    run_any(sum_TR, job, block, place, count, UNPACKED);
}

/* The scales of `tokens` tokens from t on, transposed. */
DM_INLINE void gather_scales(float *scale_GT, const dm_rows *x, size_t t, size_t tokens, size_t groups) {
    const __mmask16 present = (__mmask16)((1u << tokens) - 1);
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(numbers, _mm512_set1_epi32((int)x->group_stride));
    const float *scale = x->scale + t * x->group_stride;
    for (size_t g = 0; g < groups; g++) {
        _mm512_store_ps(scale_GT + g * AMX_BLOCK,
                        _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, places, scale + g, 4));
    }
}

/* All rows: one block goes through the matrix at once, several take turns in strips of groups. */
DM_INLINE void amx_rows(float (*sum_TR)[AMX_BLOCK * 16], const amx_job *job, const amx_block *block,
                        const uint8_t *packed, size_t blocks, int format) {
    const size_t total = dm_divide_up(job->rows, 16) * job->groups, strip = blocks == 1 ? total : STRIP;
    for (size_t first = 0; first < total; first += strip) {
        const size_t count = total - first < strip ? total - first : strip, tile = first / job->groups;
        const amx_place place = {packed + tile * job->tile_bytes, first % job->groups, tile * 16};
        if (format == DM_Q4) {
            run_q4(sum_TR[0], job, block, place, count);
        } else {
            run_q8(sum_TR[0], job, block, place, count);
        }
        for (size_t b = 1; b < blocks; b++) run_unpacked(sum_TR[b], job, block + b, place, count);
    }
}

/* At most AMX_PASS tokens in blocks of one size; the last may begin inside the one before it. */
static void amx_pass(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                     size_t group, int format, void *scratch) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP);
    const size_t blocks = dm_divide_up(T, AMX_BLOCK), tokens = dm_divide_up(T, blocks);
    float sum_TR[AMX_PASS / AMX_BLOCK][AMX_BLOCK * 16] __attribute__((aligned(64)));
    int8_t weights[STRIP * GROUP_TILE_BYTES] __attribute__((aligned(64)));
    const amx_job job = {.weights = weights,
                         .groups = groups,
                         .groups_per_scale = group == 0 ? groups : group / DM_GROUP,
                         .group_bytes = format == DM_Q4 ? 256 : 512,
                         .scale_bytes = dm_scale_bytes(x->columns, group),
                         .tile_bytes = dm_tile_bytes(format, x->columns, group),
                         .q_stride = x->q_stride,
                         .tokens = tokens,
                         .rows = rows,
                         .out_stride = out_stride};
    amx_block block[AMX_PASS / AMX_BLOCK];
    for (size_t b = 0; b < blocks; b++) {
        const size_t first = (b + 1) * tokens <= T ? b * tokens : T - tokens;
        float *scale_GT = (float *)scratch + b * groups * AMX_BLOCK;
        gather_scales(scale_GT, x, first, tokens, groups);
        block[b] = (amx_block){out_TR + first * out_stride, x->q + first * x->q_stride, scale_GT};
        __builtin_memset(sum_TR[b], 0, sizeof sum_TR[b]);
    }
    configure_for(tokens);
    amx_rows(sum_TR, &job, block, packed, blocks, format);
    _tile_release();
}

DM_INLINE void matmul_amx(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                          size_t out_stride, size_t group, int format, void *scratch) {
    const size_t passes = dm_divide_up(T, AMX_PASS);
    for (size_t pass = 0; pass < passes; pass++) {
        const size_t first = T * pass / passes, last = T * (pass + 1) / passes;
        const dm_rows part = {.q = x->q + first * x->q_stride,
                              .scale = x->scale + first * x->group_stride,
                              .columns = x->columns,
                              .q_stride = x->q_stride,
                              .group_stride = x->group_stride};
        amx_pass(out_TR + first * out_stride, packed, &part, last - first, rows, out_stride, group, format, scratch);
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    if (T < AMX_TOKENS) {
        vnni_matmul_q8(out_TR, packed, x, T, rows, out_stride, group, scratch);
    } else {
        matmul_amx(out_TR, packed, x, T, rows, out_stride, group, DM_Q8, scratch);
    }
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    if (T < AMX_TOKENS) {
        vnni_matmul_q4(out_TR, packed, x, T, rows, out_stride, group, scratch);
    } else {
        matmul_amx(out_TR, packed, x, T, rows, out_stride, group, DM_Q4, scratch);
    }
}

#endif
