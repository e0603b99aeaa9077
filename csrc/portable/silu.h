/* silu.h: silu(gate) * up, silu(a) = a / (1 + exp(-a)) (rule 4). */
#ifndef DM_SILU_H
#define DM_SILU_H

static void silu(float *out_F, const float *gate_F, const float *up_F, size_t F) {
    for (size_t f = 0; f < F; f += DM_LANES) {
        f32v gate = load_f32_part(gate_F + f, F - f);
        f32v up = load_f32_part(up_F + f, F - f);
        store_f32_part(out_F + f, gate / (exp_f32(-gate) + 1.0f) * up, F - f);
    }
}

#endif
