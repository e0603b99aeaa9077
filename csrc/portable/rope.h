/* rope.h: rotary position embedding. Angles in float64 with our own sine and cosine (rule 3). */
#ifndef DM_ROPE_H
#define DM_ROPE_H

/* sin(r) and cos(r) for |r| <= pi/4 (a little beyond). Coefficients: fdlibm's __kernel_sin and __kernel_cos. */
DM_INLINE double sine_kernel(double r) {
    double z = r * r;
    double p = 1.58969099521155010221e-10;
    p = p * z + -2.50507602534068634195e-08;
    p = p * z + 2.75573137070700676789e-06;
    p = p * z + -1.98412698298579493134e-04;
    p = p * z + 8.33333333332248946124e-03;
    p = p * z + -1.66666666666666324348e-01;
    return r + r * z * p;
}

DM_INLINE double cosine_kernel(double r) {
    double z = r * r;
    double p = -1.13596475577881948265e-11;
    p = p * z + 2.08757232129817482790e-09;
    p = p * z + -2.75573143513906633035e-07;
    p = p * z + 2.48015872894767294178e-05;
    p = p * z + -1.38888888888741095749e-03;
    p = p * z + 4.16666666666666019037e-02;
    return 1.0 - 0.5 * z + z * z * p;
}

/* The angle is exact in float64 (24-bit inv_freq, positions below 2^29). pi/2 in parts of 33, 33 and 53 bits: n times
 * each of the first two is exact for |n| < 2^20, far beyond the longest context. Source: fdlibm e_rem_pio2.c. */
static void rope_angles(float *cos_P, float *sin_P, int64_t position, const float *inv_freq_P, float attention_factor,
                        size_t half_P) {
    for (size_t i = 0; i < half_P; i++) {
        double angle = (double)position * (double)inv_freq_P[i];
        double shifted = angle * 0x1.45f306dc9c883p-1 + 0x1.8p52;
        double n = shifted - 0x1.8p52;
        double r = ((angle - n * 0x1.921fb544p0) - n * 0x1.0b4611a6p-34) - n * 0x1.3198a2e037073p-69;
        uint64_t bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        double sine = sine_kernel(r), cosine = cosine_kernel(r);
        double sin_part = bits & 1 ? cosine : sine;
        double cos_part = bits & 1 ? sine : cosine;
        sin_P[i] = (float)((bits & 2 ? -sin_part : sin_part) * (double)attention_factor);
        cos_P[i] = (float)(((bits + 1) & 2 ? -cos_part : cos_part) * (double)attention_factor);
    }
}

static void norm_rope(float *head_P, const float *gain_P, const float *cos_P, const float *sin_P, float eps, size_t P) {
    const float factor = rms_factor(head_P, eps, P);
    const size_t half = P / 2;
    for (size_t i = 0; i < half; i += DM_LANES) {
        const size_t n = half - i;
        f32v x = load_f32_part(head_P + i, n) * factor, y = load_f32_part(head_P + half + i, n) * factor;
        x *= load_f32_part(gain_P + i, n);
        y *= load_f32_part(gain_P + half + i, n);
        const f32v cos = load_f32_part(cos_P + i, n), sin = load_f32_part(sin_P + i, n);
        store_f32_part(head_P + i, x * cos - y * sin, n);
        store_f32_part(head_P + half + i, y * cos + x * sin, n);
    }
    if (P % 2 != 0) head_P[P - 1] = (head_P[P - 1] * factor) * gain_P[P - 1];
}

#endif
