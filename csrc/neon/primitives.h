/* neon/primitives.h: what the vector extension cannot say. Each is the exact operation of portable/primitives.h. */
#ifndef DM_NEON_PRIMITIVES_H
#define DM_NEON_PRIMITIVES_H

/* a * b + c, rounded once. */
DM_INLINE f32v fma_lanes(f32v a, f32v b, f32v c) {
    return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

/* float16 to float32. */
DM_INLINE f32v widen_f16(const uint16_t *half) { return (f32v)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half))); }

#endif
