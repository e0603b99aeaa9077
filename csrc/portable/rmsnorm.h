/* rmsnorm.h: RMSNorm of one vector (rule 4). */
#ifndef DM_RMSNORM_H
#define DM_RMSNORM_H

/* 1 / sqrt(mean of squares + eps). */
DM_INLINE float rms_factor(const float *x_D, float eps, size_t D) {
    f32x16 squares = zero_f32x16();
    for (size_t d = 0; d < D; d += 16) {
        for (size_t part = 0; part < DM_PARTS; part++) {
            size_t i = d + part * DM_LANES;
            f32v x = i < D ? load_f32_part(x_D + i, D - i) : (f32v){0};
            squares.part[part] = fma_lanes(x, x, squares.part[part]);
        }
    }
    float mean = sum_tree(squares) / (float)D;
    return 1.0f / __builtin_sqrtf(mean + eps);
}

static void rmsnorm(float *out_D, const float *x_D, const float *gain_D, float eps, size_t D) {
    const float factor = rms_factor(x_D, eps, D);
    for (size_t d = 0; d < D; d += DM_LANES) {
        f32v x = load_f32_part(x_D + d, D - d) * factor;
        store_f32_part(out_D + d, x * load_f32_part(gain_D + d, D - d), D - d);
    }
}

#endif
