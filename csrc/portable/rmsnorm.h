/* rmsnorm.h: RMSNorm of one vector (rule 4). */
#ifndef DM_RMSNORM_H
#define DM_RMSNORM_H

static void rmsnorm(float *out_D, const float *x_D, const float *gain_D, float eps, size_t D) {
    f32x16 squares = zero_f32x16();
    for (size_t d = 0; d < D; d += 16) {
        for (size_t part = 0; part < DM_PARTS; part++) {
            size_t i = d + part * DM_LANES;
            f32v x = i < D ? load_f32_part(x_D + i, D - i) : (f32v){0};
            squares.part[part] = fma_lanes(x, x, squares.part[part]);
        }
    }
    float mean = sum_tree(squares) / (float)D;
    float factor = 1.0f / __builtin_sqrtf(mean + eps);
    for (size_t d = 0; d < D; d++) out_D[d] = (x_D[d] * factor) * gain_D[d];
}

#endif
