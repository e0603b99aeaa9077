/* pack.h: one tile of 16 rows of a weight matrix, from f32 into a packed format and back. Formats: formats.h. */
#ifndef DM_PACK_H
#define DM_PACK_H

#include "scales.h"

/* One row's n columns into every 16th place. */
DM_INLINE void spread_row(float *columns_C16, const void *row, size_t n, int is_bf16) {
    for (size_t c = 0; c < n; c++) {
        columns_C16[16 * c] = is_bf16 ? widen_bf16_one(((const uint16_t *)row)[c]) : ((const float *)row)[c];
    }
}

/* The rows first_row ... of a matrix as [columns][16], columns a multiple of 32; what is not given is 0. A group of
 * columns at a time, because 16 rows of them fit the first cache. */
static void open_tile(float *columns_C16, const dm_pack_matrix *matrix, size_t first_row) {
    const size_t left = matrix->rows_present > first_row ? matrix->rows_present - first_row : 0;
    const size_t rows = left < 16 ? left : 16, given = matrix->columns_present;
    const size_t columns = dm_round_up(matrix->columns, DM_GROUP), item_bytes = matrix->is_bf16 ? 2 : 4;
    const uint8_t *from = (const uint8_t *)matrix->weights + first_row * matrix->row_stride * item_bytes;
    if (rows < 16) __builtin_memset(columns_C16, 0, columns * 16 * sizeof(float));
    for (size_t first = 0; first < given; first += DM_GROUP) {
        for (size_t r = 0; r < rows; r++) {
            const uint8_t *row = from + (r * matrix->row_stride + first) * item_bytes;
            const size_t n = given - first;
            float *to = columns_C16 + 16 * first + r;
            if (n >= DM_GROUP && matrix->is_bf16) {
                spread_row(to, row, DM_GROUP, 1);
            } else if (n >= DM_GROUP) {
                spread_row(to, row, DM_GROUP, 0);
            } else {
                spread_row(to, row, n, matrix->is_bf16 != 0);
            }
        }
    }
    __builtin_memset(columns_C16 + given * 16, 0, (columns - given) * 16 * sizeof(float));
}

DM_INLINE i32v is_nonfinite(f32v x) { return abs_bits(x) >= DM_INFINITY_BITS; }

/* How many of 16 n weights are not finite. */
static size_t count_nonfinite(const float *weights, size_t n) {
    size_t bad = 0;
    for (size_t first = 0; first < n; first += DM_GROUP) {
        i32v count = {0};
        const size_t last = n - first < DM_GROUP ? n : first + DM_GROUP;
        for (size_t i = 16 * first; i < 16 * last; i += DM_LANES) count -= is_nonfinite(load_f32(weights + i));
        bad += (size_t)sum_i32(count);
    }
    return bad;
}

/* Makes 0 of weights that are not finite; returns how many there were. */
static size_t drop_nonfinite(float *weights, size_t n) {
    const size_t bad = count_nonfinite(weights, n);
    for (size_t i = 0; bad > 0 && i < 16 * n; i += DM_LANES) {
        const f32v w = load_f32(weights + i);
        store_f32(weights + i, select_f32(is_nonfinite(w), (f32v){0}, w));
    }
    return bad;
}

/* The scales of 16 whole rows, of their finite weights; infinite where f16 cannot hold one. */
static void row_scales(float *scale_16, const dm_pack_job *job, int format) {
    drop_nonfinite(job->columns_C16, job->C);
    for (size_t r = 0; r < 16; r += DM_LANES) {
        const lane_group row = {job->columns_C16 + r, job->importance_C, job->C};
        store_f32(scale_16 + r, choose_scale(&row, format, job->scales));
    }
}

static size_t pack_tile_f32(void *tile, const dm_pack_job *job) {
    __builtin_memcpy(tile, job->columns_C16, job->C * 16 * sizeof(float));
    return count_nonfinite(job->columns_C16, job->C);
}

static size_t pack_tile_bf16(void *tile, const dm_pack_job *job) {
    uint16_t *packed = tile;
    size_t bad = drop_nonfinite(job->columns_C16, job->C);
    for (size_t i = 0; i < job->C * 16; i++) {
        packed[i] = narrow_bf16(job->columns_C16[i]);
        bad += (packed[i] & 0x7f80) == 0x7f80;
    }
    for (size_t i = job->C * 16; i < dm_tile_bytes(DM_BF16, job->C, 0) / 2; i++) packed[i] = 0;
    return bad;
}

/* Scale s of the rows from r on: given, or taken from the weights. */
DM_INLINE f32v scale_of_rows(const dm_pack_job *job, size_t r, size_t s, int format) {
    const size_t present = job->rows_present > r ? job->rows_present - r : 0;
    const f32v none = {0};
    if (present == 0) return none;
    const size_t first = s * job->group;
    const size_t n = job->group == 0 || first + job->group > job->C ? job->C - first : job->group;
    f32v scale;
    if (job->group == 0 && job->scale_R != NULL) {
        scale = load_f32_part(job->scale_R + r, present);
        scale = round_f16(select_f32(is_nonfinite(scale), (f32v)all_i32(DM_INFINITY_BITS), scale));
    } else {
        const float *importance = job->importance_C == NULL ? NULL : job->importance_C + first;
        const lane_group group = {job->columns_C16 + 16 * first + r, importance, n};
        scale = choose_scale(&group, format, job->scales);
    }
    return select_f32(lane_numbers() < (int32_t)(present < 16 ? present : 16), scale, none);
}

/* Returns the number of scales that f16 cannot hold, which become 0. */
DM_INLINE size_t pack_scales(uint16_t *scales, const dm_pack_job *job, int format) {
    size_t bad = 0;
    const size_t groups = dm_scale_groups(job->C, job->group);
    for (size_t s = 0; s < groups; s++) {
        for (size_t r = 0; r < 16; r += DM_LANES) {
            f32v scale = scale_of_rows(job, r, s, format);
            bad += (size_t)sum_i32(-is_nonfinite(scale));
            const u16_lanes bits = narrow_f16_lanes(select_f32(is_nonfinite(scale), (f32v){0}, scale));
            __builtin_memcpy(scales + s * 16 + r, &bits, sizeof bits);
        }
    }
    for (size_t i = groups * 16; i < dm_scale_bytes(job->C, job->group) / 2; i++) scales[i] = 0;
    return bad;
}

/* q = rint(w / d) in the range; 0 where d is. The low bits of the sum are those of q. */
DM_INLINE u32v code_bits(const float *weights, f32v divisor, code_range range) {
    const f32v ratio = load_f32(weights) / divisor;
    return (u32v)(max_f32(all_f32(range.lowest), min_f32(all_f32(range.highest), ratio)) + 0x1.8p23f) - 0x4b400000u;
}

/* Four vectors of q8 per half of a group, or of q4 per group: byte b of word j has column 4 j + b, in its high half
 * column 16 + 4 j + b. Adding the offsets last carries nothing. */
DM_INLINE void pack_codes(uint8_t *vectors, const float *weights, f32v divisor, int format) {
    const code_range range = range_of(format);
    for (size_t j = 0; j < (format == DM_Q8 ? 8 : 4); j++) {
        u32v word = all_u32(format == DM_Q8 ? 0x80808080u : 0x88888888u);
        for (size_t b = 0; b < 4; b++) {
            const float *column = weights + 16 * (4 * j + b);
            word += code_bits(column, divisor, range) << (uint32_t)(8 * b);
            if (format == DM_Q4) word += code_bits(column + 16 * 16, divisor, range) << (uint32_t)(8 * b + 4);
        }
        __builtin_memcpy(vectors + 64 * j, &word, sizeof word);
    }
}

DM_INLINE size_t pack_tile_quantized(uint8_t *tile, const dm_pack_job *job, int format) {
    const uint16_t *scales = (const uint16_t *)(const void *)tile;
    size_t bad = drop_nonfinite(job->columns_C16, job->C);
    bad += pack_scales((uint16_t *)(void *)tile, job, format);
    uint8_t *vectors = tile + dm_scale_bytes(job->C, job->group);
    for (size_t g = 0; g < dm_divide_up(job->C, DM_GROUP); g++, vectors += format == DM_Q8 ? 512 : 256) {
        for (size_t r = 0; r < 16; r += DM_LANES) {
            const f32v scale = widen_f16(scales + dm_scale_index(g, job->group) * 16 + r);
            const f32v divisor = select_f32(scale == 0.0f, (f32v)all_i32(DM_INFINITY_BITS), scale);
            pack_codes(vectors + 4 * r, job->columns_C16 + 16 * DM_GROUP * g + r, divisor, format);
        }
    }
    return bad;
}

static size_t pack_tile_q8(void *tile, const dm_pack_job *job) { return pack_tile_quantized(tile, job, DM_Q8); }

static size_t pack_tile_q4(void *tile, const dm_pack_job *job) { return pack_tile_quantized(tile, job, DM_Q4); }

static void unpack_tile_f32(float *weights_RC, const void *tile, size_t rows, size_t C, size_t group) {
    (void)group;
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < C; c++) weights_RC[r * C + c] = ((const float *)tile)[c * 16 + r];
    }
}

static void unpack_tile_bf16(float *weights_RC, const void *tile, size_t rows, size_t C, size_t group) {
    (void)group;
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < C; c++) weights_RC[r * C + c] = widen_bf16_one(((const uint16_t *)tile)[c * 16 + r]);
    }
}

static void unpack_tile_q8(float *weights_RC, const void *tile, size_t rows, size_t C, size_t group) {
    const uint16_t *scales = tile;
    const uint8_t *vectors = (const uint8_t *)tile + dm_scale_bytes(C, group);
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < C; c++) {
            float d = widen_f16_one(scales[dm_scale_index(c / DM_GROUP, group) * 16 + r]);
            weights_RC[r * C + c] = d * (float)(vectors[c / 4 * 64 + 4 * r + c % 4] - 128);
        }
    }
}

static void unpack_tile_q4(float *weights_RC, const void *tile, size_t rows, size_t C, size_t group) {
    const uint16_t *scales = tile;
    const uint8_t *vectors = (const uint8_t *)tile + dm_scale_bytes(C, group);
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < C; c++) {
            float d = widen_f16_one(scales[dm_scale_index(c / DM_GROUP, group) * 16 + r]);
            size_t place = c % 16;
            uint8_t byte = vectors[c / DM_GROUP * 256 + place / 4 * 64 + 4 * r + place % 4];
            int32_t nibble = c % DM_GROUP < 16 ? byte & 15 : byte >> 4;
            weights_RC[r * C + c] = d * (float)(nibble - 8);
        }
    }
}

#endif
