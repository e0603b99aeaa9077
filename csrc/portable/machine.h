/* machine.h: what the machine can do at this level, for dist-moe bench: a loop that only reads, and bare arithmetic
 * on registers and the L1 cache. Included by table.h; a level with better int8 instructions brings its int8_peak.h. */
#ifndef DM_MACHINE_H
#define DM_MACHINE_H

#define DM_READ_STEP 256

/* `bytes` bytes as `streams` runs side by side, each with prefetches `ahead` bytes before its reads (0: none). */
DM_INLINE void read_runs(i32v total[DM_READ_STEP / 64 * DM_PARTS], const uint8_t *data, size_t bytes, size_t streams,
                         size_t ahead) {
    const size_t run = bytes / streams;
    for (size_t at = 0; at + DM_READ_STEP <= run; at += DM_READ_STEP) {
        for (size_t s = 0; s < streams; s++) {
            const uint8_t *from = data + s * run + at;
            for (size_t line = 0; ahead != 0 && line < DM_READ_STEP; line += 64) {
                __builtin_prefetch(from + ahead + line, 0, 3);
            }
            for (size_t i = 0; i < DM_READ_STEP / 64 * DM_PARTS; i++) {
                i32v x;
                __builtin_memcpy(&x, from + i * sizeof x, sizeof x);
                total[i] ^= x;
            }
        }
    }
}

static int32_t read_bytes(const uint8_t *data, size_t bytes, size_t streams, size_t ahead) {
    i32v total[DM_READ_STEP / 64 * DM_PARTS] = {{0}};
    if (streams == 1 && ahead == 0)
        read_runs(total, data, bytes, 1, 0);
    else if (streams == 1)
        read_runs(total, data, bytes, 1, ahead);
    else
        read_runs(total, data, bytes, streams, ahead);
    int32_t seen = 0;
    for (size_t i = 0; i < DM_READ_STEP / 64 * DM_PARTS; i++) {
        for (size_t lane = 0; lane < DM_LANES; lane++) seen ^= total[i][lane];
    }
    return seen;
}

/* Fused multiply-adds in registers: twelve chains hide their latency. Returns operations, two per multiply-add. */
static size_t f32_peak(float *out, size_t rounds) {
    f32v factor = all_f32(out[0]), sum[12];
    for (size_t i = 0; i < 12; i++) sum[i] = all_f32(out[i + 1]);
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < 12; i++) sum[i] = fma_lanes(sum[i], factor, factor);
    }
    for (size_t i = 0; i < 12; i++) out[i + 1] = sum[i][0];
    return rounds * 12 * DM_LANES * 2;
}

#ifndef DM_HAS_INT8_PEAK
/* Dot products of 4-bit weights in int16 lanes, as int_pairs.h adds them, from L1. */
static size_t int8_peak(int32_t *data, size_t rounds) {
    const u16v *x = (const u16v *)data;
    u16v weight = (u16v)all_u32(0x00030005);
    u32v sum[4] = {{0}, {0}, {0}, {0}};
    for (size_t round = 0; round < rounds; round++) {
        for (size_t chain = 0; chain < 4; chain++) {
            u16v total = {0};
            for (size_t j = 0; j < 16; j++) total += weight * x[j];
            sum[chain] += (u32v)sum_pairs((i16v)total);
            __asm__ volatile("" : : : "memory"); /* the loads stay in the loop */
        }
    }
    for (size_t chain = 0; chain < 4; chain++) data[chain] ^= (int32_t)sum[chain][0];
    return rounds * 4 * 16 * (2 * DM_LANES) * 2;
}
#endif

#endif
