/* quantize.h: the activation quantizer of rule 5, 32 values at a time. */
#ifndef DM_QUANTIZE_H
#define DM_QUANTIZE_H

/* q gets 32 values, zeros behind the n given; returns the scale. A NaN or infinity gives scale 0 and sets *bad. */
DM_INLINE float quantize_group(int8_t *q, int32_t *sum, const float *x, size_t n, int *bad) {
    int32_t bits = absmax_bits(x, n);
    /* Below 2^-64 the group counts as zero. */
    int usable = bits < DM_INFINITY_BITS && bits >= 0x1f800000;
    *bad |= bits >= DM_INFINITY_BITS;
    float amax = usable ? f32_from_bits((uint32_t)bits) : 0.0f;
    float inverse = usable ? 127.0f / amax : 0.0f;
    i32v total = {0};
    for (size_t i = 0; i < DM_GROUP; i += DM_LANES) {
        f32v part = usable && i < n ? load_f32_part(x + i, n - i) : (f32v){0};
        i32v rounded = round_i32(part * inverse);
        store_i8(q + i, rounded);
        total += rounded;
    }
    *sum = sum_i32(total);
    return amax / 127.0f;
}

static int quantize(int8_t *q_C, float *scale_G, int32_t *sum_G, const float *x_C, size_t C) {
    int bad = 0;
    size_t g = 0;
    for (; (g + 1) * DM_GROUP <= C; g++) {
        scale_G[g] = quantize_group(q_C + g * DM_GROUP, &sum_G[g], x_C + g * DM_GROUP, DM_GROUP, &bad);
    }
    if (g * DM_GROUP < C) {
        scale_G[g] = quantize_group(q_C + g * DM_GROUP, &sum_G[g], x_C + g * DM_GROUP, C - g * DM_GROUP, &bad);
    }
    return bad ? DM_FAULT_QUANTIZER : 0;
}

#endif
