/* vocabulary.h: one block of 128 logits for the sampler's Z (rule 13). */
#ifndef DM_VOCABULARY_H
#define DM_VOCABULARY_H

static int vocabulary(float *max, float *sum, const float *logits_V, float temperature, size_t n) {
    float best = -__builtin_inff();
    for (size_t i = 0; i < n; i++) best = logits_V[i] > best ? logits_V[i] : best;
    *max = best;
    *sum = n == 0 ? 0.0f : softmax_sum(logits_V, best, temperature, n);
    return absmax_bits(logits_V, n) >= DM_INFINITY_BITS ? DM_FAULT_LOGIT : 0;
}

/* What merging block sums needs besides softmax_term. */
static float fma_one(float a, float b, float c) { return fma_lanes(all_f32(a), all_f32(b), all_f32(c))[0]; }

#endif
