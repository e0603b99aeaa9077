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

/* A logit as an integer of the same order: NaN as -infinity, -0 as +0. */
DM_INLINE int32_t rank_of(float logit) {
    int32_t bits = (int32_t)f32_bits(logit == logit ? logit + 0.0f : -__builtin_inff());
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

#define TAKEN INT32_MIN /* below the rank of -infinity */

/* The first place of the highest rank. */
DM_INLINE size_t best_place(const int32_t *rank_E, size_t E) {
    i32v best = {0};
    best += TAKEN;
    size_t e = 0;
    for (; e + DM_LANES <= E; e += DM_LANES) {
        i32v ranks;
        __builtin_memcpy(&ranks, rank_E + e, sizeof ranks);
        best = max_i32(best, ranks);
    }
    int32_t highest = highest_i32(best);
    for (; e < E; e++) highest = rank_E[e] > highest ? rank_E[e] : highest;
    e = 0;
    while (rank_E[e] != highest) e++;
    return e;
}

/* Dividing by 1 changes no bit, so routing shares the sampler's exp. A token with a fault gets weights 0. */
static int route(int32_t *ids_K, float *weights_K, const float *logits_E, size_t E, size_t K, int norm_topk_prob,
                 int32_t *scratch_E) {
    int bad = absmax_bits(logits_E, E) >= DM_INFINITY_BITS;
    for (size_t e = 0; e < E; e++) scratch_E[e] = rank_of(logits_E[e]);
    for (size_t k = 0; k < K; k++) {
        size_t best = best_place(scratch_E, E);
        ids_K[k] = (int32_t)best;
        weights_K[k] = 0.0f;
        scratch_E[best] = TAKEN;
    }
    if (bad) return DM_FAULT_ROUTER;
    float max = logits_E[ids_K[0]], total = softmax_sum(logits_E, max, 1.0f, E), chosen_total = 0.0f;
    for (size_t k = 0; k < K; k++) {
        weights_K[k] = softmax_term(logits_E[ids_K[k]], max, 1.0f) / total;
        chosen_total += weights_K[k];
    }
    for (size_t k = 0; norm_topk_prob && k < K; k++) weights_K[k] /= chosen_total;
    return 0;
}

#undef TAKEN
#endif
