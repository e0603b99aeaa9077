/* route.h: the K best experts of one token and their weights (rule 11). */
#ifndef DM_ROUTE_H
#define DM_ROUTE_H

/* The sum of exp((x - max) / temperature) in 16 lanes; scratch-free, tail lanes add nothing. */
DM_INLINE float softmax_sum(const float *x, float max, float temperature, size_t n) {
    f32x16 sum = zero_f32x16();
    for (size_t first = 0; first < n; first += 16) {
        for (size_t part = 0; part < DM_PARTS; part++) {
            size_t i = first + part * DM_LANES;
            if (i >= n) break;
            f32v term = exp_f32((load_f32_part(x + i, n - i) - max) / temperature);
            i32v present = lane_numbers() < (int32_t)(n - i < DM_LANES ? n - i : DM_LANES);
            sum.part[part] += select_f32(present, term, (f32v){0});
        }
    }
    return sum_tree(sum);
}

static float softmax_term(float x, float max, float temperature) { return exp_one((x - max) / temperature); }

/* Dividing by 1 changes no bit, so routing shares the sampler's exp. A token with a fault gets weights 0. */
static int route(int32_t *ids_K, float *weights_K, const float *logits_E, size_t E, size_t K, int norm_topk_prob,
                 float *scratch_E) {
    int bad = absmax_bits(logits_E, E) >= DM_INFINITY_BITS;
    float max = -__builtin_inff();
    for (size_t e = 0; e < E; e++) {
        scratch_E[e] = logits_E[e] == logits_E[e] ? logits_E[e] : -__builtin_inff();
        max = scratch_E[e] > max ? scratch_E[e] : max;
    }
    float total = softmax_sum(scratch_E, max, 1.0f, E);
    float chosen_total = 0.0f;
    for (size_t k = 0; k < K; k++) {
        size_t best = E;
        for (size_t e = 0; e < E; e++) {
            int taken = 0;
            for (size_t i = 0; i < k; i++) taken |= ids_K[i] == (int32_t)e;
            if (!taken && (best == E || scratch_E[e] > scratch_E[best])) best = e;
        }
        ids_K[k] = (int32_t)best;
        weights_K[k] = softmax_term(scratch_E[best], max, 1.0f) / total;
        chosen_total += weights_K[k];
    }
    for (size_t k = 0; k < K; k++) {
        if (bad)
            weights_K[k] = 0.0f;
        else if (norm_topk_prob)
            weights_K[k] /= chosen_total;
    }
    return bad ? DM_FAULT_ROUTER : 0;
}

#endif
