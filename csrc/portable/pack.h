/* pack.h: one tile of 16 rows of a weight matrix, from f32 into a packed format and back. Formats: formats.h. */
#ifndef DM_PACK_H
#define DM_PACK_H

DM_INLINE int is_finite(float x) { return (f32_bits(x) & DM_ABS_MASK) < DM_INFINITY_BITS; }

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

/* The f16 scale of n weights as bits. q8: amax / 127. q4: the value of largest magnitude becomes -8. */
static uint16_t scale_bits(const float *weights, size_t n, int format) {
    float extreme = 0.0f;
    for (size_t i = 0; i < n; i++) {
        if (is_finite(weights[i]) && __builtin_fabsf(weights[i]) > __builtin_fabsf(extreme)) extreme = weights[i];
    }
    return narrow_f16(format == DM_Q4 ? extreme / -8.0f : __builtin_fabsf(extreme) / 127.0f);
}

static float row_scale(const float *weights_C, size_t C, int format) {
    uint16_t bits = scale_bits(weights_C, C, format);
    return (bits & 0x7c00) == 0x7c00 ? f32_from_bits(DM_INFINITY_BITS) : widen_f16_one(bits);
}

/* rint(w / d) in [lowest, highest]; clamping first gives the same and keeps the rounding in range. */
DM_INLINE int32_t quantize_weight(float w, float d, float lowest, float highest) {
    if (d == 0.0f || !is_finite(w)) return 0;
    float ratio = w / d;
    ratio = ratio < lowest ? lowest : ratio;
    ratio = ratio > highest ? highest : ratio;
    return (int32_t)(f32_bits(ratio + 0x1.8p23f) - 0x4b400000);
}

/* Scale s of row r: given, or taken from the weights. Adds to *bad what cannot be represented. */
static uint16_t choose_scale(const dm_pack_job *job, size_t r, size_t s, int format, size_t *bad) {
    if (r >= job->rows_present) return 0;
    const float *row = job->weights_RC + r * job->row_stride;
    size_t first = s * job->group;
    size_t n = job->group == 0 || first + job->group > job->C ? job->C - first : job->group;
    for (size_t i = 0; i < n; i++) *bad += !is_finite(row[first + i]);
    int given = job->group == 0 && job->scale_R != NULL;
    uint16_t bits = 0x7c00;
    if (!given) bits = scale_bits(row + first, n, format);
    else if (is_finite(job->scale_R[r])) bits = narrow_f16(job->scale_R[r]);
    if ((bits & 0x7c00) != 0x7c00) return bits;
    *bad += 1;
    return 0;
}

/* The quantized value of row r, column c, without its offset. */
DM_INLINE int32_t tile_weight(const dm_pack_job *job, const uint16_t *scales, size_t r, size_t c, int format) {
    if (r >= job->rows_present || c >= job->C) return 0;
    float d = widen_f16_one(scales[dm_scale_index(c / DM_GROUP, job->group) * 16 + r]);
    float w = job->weights_RC[r * job->row_stride + c];
    return format == DM_Q4 ? quantize_weight(w, d, -8.0f, 7.0f) : quantize_weight(w, d, -127.0f, 127.0f);
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
    for (size_t c = 0; c < dm_round_up(job->C, DM_GROUP); c++) {
        for (size_t r = 0; r < 16; r++) {
            vectors[c / 4 * 64 + 4 * r + c % 4] = (uint8_t)(tile_weight(job, tile, r, c, DM_Q8) + 128);
        }
    }
    return bad;
}

static size_t pack_tile_q4(void *tile, const dm_pack_job *job) {
    size_t bad = pack_scales(tile, job, DM_Q4);
    uint8_t *vectors = (uint8_t *)tile + dm_scale_bytes(job->C, job->group);
    for (size_t g = 0; g < dm_divide_up(job->C, DM_GROUP); g++) {
        for (size_t c = 0; c < 16; c++) {
            for (size_t r = 0; r < 16; r++) {
                int32_t low = tile_weight(job, tile, r, g * DM_GROUP + c, DM_Q4) + 8;
                int32_t high = tile_weight(job, tile, r, g * DM_GROUP + 16 + c, DM_Q4) + 8;
                vectors[g * 256 + c / 4 * 64 + 4 * r + c % 4] = (uint8_t)(low | high << 4);
            }
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
