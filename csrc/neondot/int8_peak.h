/* int8_peak.h: sdot on registers, 16 products each; sixteen chains hide the latency of four pipes. */
#define DM_HAS_INT8_PEAK

static size_t int8_peak(int32_t *data, size_t rounds) {
    const int8x16_t a = vld1q_s8((const int8_t *)data), b = vld1q_s8((const int8_t *)data + 16);
    int32x4_t sum[16];
    for (size_t i = 0; i < 16; i++) sum[i] = vdupq_n_s32(data[i]);
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < 16; i++) sum[i] = vdotq_s32(sum[i], a, b);
    }
    for (size_t i = 0; i < 16; i++) data[i] ^= vaddvq_s32(sum[i]);
    return rounds * 16 * 16 * 2;
}
