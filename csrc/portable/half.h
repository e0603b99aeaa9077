/* half.h: float32 to float16 and bfloat16, rounded to nearest even, by integer arithmetic on the bits. */
#ifndef DM_HALF_H
#define DM_HALF_H

/* Overflow gives infinity (0x7c00); the caller has refused NaN and infinity. */
DM_INLINE uint16_t narrow_f16(float x) {
    uint32_t bits = f32_bits(x);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & DM_ABS_MASK;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        /* Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the hardware. */
        return (uint16_t)(sign | (f32_bits(f32_from_bits(magnitude) + 0.5f) - 0x3f000000));
    }
    uint32_t odd = (magnitude >> 13) & 1;
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

/* DM_LANES at a time, for magnitudes that do not overflow. */
DM_INLINE u16_lanes narrow_f16_lanes(f32v x) {
    const u32v bits = (u32v)x, magnitude = bits & DM_ABS_MASK;
    const u32v tiny = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000;
    const u32v normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const u32v is_tiny = (u32v)((i32v)magnitude < 0x38800000);
    return __builtin_convertvector(((bits >> 16) & 0x8000) | (tiny & is_tiny) | (normal & ~is_tiny), u16_lanes);
}

/* One finite float16. */
DM_INLINE float widen_f16_one(uint16_t half) {
    uint16_t lanes[DM_LANES] = {half};
    return widen_f16(lanes)[0];
}

DM_INLINE uint16_t narrow_bf16(float x) {
    uint32_t bits = f32_bits(x);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DM_INLINE float widen_bf16_one(uint16_t bits) { return f32_from_bits((uint32_t)bits << 16); }

/* DM_LANES bfloat16. */
DM_INLINE f32v widen_bf16(const uint16_t *from) {
    u16_lanes narrow;
    __builtin_memcpy(&narrow, from, sizeof narrow);
    return (f32v)(__builtin_convertvector(narrow, u32v) << 16);
}

#endif
