/* pack.h: one tile of 16 rows of a weight matrix, from f32 into a packed format and back. Formats: formats.h. */
#ifndef DM_PACK_H
#define DM_PACK_H

#include "scales.h"

static size_t pack_tile_f32(void *tile, const dm_pack_job *job) {
    float *packed = tile;
    size_t bad = 0;
    for (size_t c = 0; c < job->C; c++) {
        for (size_t r = 0; r < 16; r++) {
            float w = r < job->rows_present ? job->weights_RC[r * job->row_stride + c] : 0.0f;
            packed[c * 16 + r] = w;
            bad += !is_finite(w);
        }
    }
    return bad;
}

static size_t pack_tile_bf16(void *tile, const dm_pack_job *job) {
    uint16_t *packed = tile;
    size_t bad = 0;
    for (size_t c = 0; c < job->C; c++) {
        for (size_t r = 0; r < 16; r++) {
            float w = r < job->rows_present ? job->weights_RC[r * job->row_stride + c] : 0.0f;
            packed[c * 16 + r] = is_finite(w) ? narrow_bf16(w) : 0;
            bad += !is_finite(w) || !is_finite(widen_bf16_one(packed[c * 16 + r]));
        }
    }
    for (size_t i = job->C * 16; i < dm_tile_bytes(DM_BF16, job->C, 0) / 2; i++) packed[i] = 0;
    return bad;
}

/* Scale s of row r: given, or taken from the weights. Adds to *bad what cannot be represented. */
static uint16_t choose_scale(const dm_pack_job *job, size_t r, size_t s, int format, size_t *bad) {
    if (r >= job->rows_present) return 0;
    const float *row = job->weights_RC + r * job->row_stride;
    size_t first = s * job->group;
    size_t n = job->group == 0 || first + job->group > job->C ? job->C - first : job->group;
    extremes found = find_extremes(row + first, n);
    *bad += found.bad;
    uint16_t bits = 0x7c00;
    if (job->group != 0 || job->scale_R == NULL)
        bits = choose_scale_bits(row + first, job->importance_C == NULL ? NULL : job->importance_C + first, n, format,
                                 job->scales, found);
    else if (is_finite(job->scale_R[r]))
        bits = narrow_f16(job->scale_R[r]);
    if ((bits & 0x7c00) != 0x7c00) return bits;
    *bad += 1;
    return 0;
}

/* q = rint(w / d) in [lowest, highest] of row r, columns 32 g ...; 0 where there is no weight. Clamping before rounding
 * gives the same and keeps the rounding in range. */
static void quantize_weights(int8_t q[DM_GROUP], const dm_pack_job *job, const uint16_t *scales, size_t r, size_t g,
                             float lowest, float highest) {
    size_t first = g * DM_GROUP;
    size_t n = r < job->rows_present ? job->C - first : 0;
    float d = widen_f16_one(scales[dm_scale_index(g, job->group) * 16 + r]);
    for (size_t i = 0; i < DM_GROUP; i += DM_LANES) {
        f32v w = i < n ? load_f32_part(job->weights_RC + r * job->row_stride + first + i, n - i) : (f32v){0};
        w = select_f32(abs_bits(w) < DM_INFINITY_BITS, w, (f32v){0});
        f32v ratio = d == 0.0f ? (f32v){0} : w / d;
        ratio = select_f32(ratio < lowest, all_f32(lowest), ratio);
        ratio = select_f32(ratio > highest, all_f32(highest), ratio);
        store_i8(q + i, round_i32(ratio));
    }
}

static size_t pack_scales(uint16_t *scales, const dm_pack_job *job, int format) {
    size_t bad = 0;
    size_t groups = dm_scale_groups(job->C, job->group);
    for (size_t s = 0; s < groups; s++) {
        for (size_t r = 0; r < 16; r++) scales[s * 16 + r] = choose_scale(job, r, s, format, &bad);
    }
    for (size_t i = groups * 16; i < dm_scale_bytes(job->C, job->group) / 2; i++) scales[i] = 0;
    return bad;
}

static size_t pack_tile_q8(void *tile, const dm_pack_job *job) {
    size_t bad = pack_scales(tile, job, DM_Q8);
    uint8_t *vectors = (uint8_t *)tile + dm_scale_bytes(job->C, job->group);
    for (size_t g = 0; g < dm_divide_up(job->C, DM_GROUP); g++, vectors += 512) {
        for (size_t r = 0; r < 16; r++) {
            int8_t q[DM_GROUP];
            uint8_t bytes[DM_GROUP];
            quantize_weights(q, job, tile, r, g, -127.0f, 127.0f);
            for (size_t i = 0; i < DM_GROUP; i++) bytes[i] = (uint8_t)(q[i] + 128);
            for (size_t j = 0; j < 8; j++) __builtin_memcpy(vectors + 64 * j + 4 * r, bytes + 4 * j, 4);
        }
    }
    return bad;
}

static size_t pack_tile_q4(void *tile, const dm_pack_job *job) {
    size_t bad = pack_scales(tile, job, DM_Q4);
    uint8_t *vectors = (uint8_t *)tile + dm_scale_bytes(job->C, job->group);
    for (size_t g = 0; g < dm_divide_up(job->C, DM_GROUP); g++, vectors += 256) {
        for (size_t r = 0; r < 16; r++) {
            int8_t q[DM_GROUP];
            uint8_t bytes[16];
            quantize_weights(q, job, tile, r, g, -8.0f, 7.0f);
            for (size_t i = 0; i < 16; i++) bytes[i] = (uint8_t)((q[i] + 8) | (q[16 + i] + 8) << 4);
            for (size_t j = 0; j < 4; j++) __builtin_memcpy(vectors + 64 * j + 4 * r, bytes + 4 * j, 4);
        }
    }
    return bad;
}

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
