/* vocabulary.h: one block of 128 logits for the sampler's Z (rule 13). */
#ifndef DM_VOCABULARY_H
#define DM_VOCABULARY_H

/* The largest of n floats, NaN left out, +0 where it is -0; -infinity if there is none. */
DM_INLINE float largest(const float *x, size_t n) {
    f32v best = all_f32(-__builtin_inff());
    const size_t whole = n - n % DM_LANES;
    for (size_t i = 0; i < whole; i += DM_LANES) best = max_f32(best, load_f32(x + i));
    float highest = highest_f32(best);
    for (size_t i = whole; i < n; i++) highest = x[i] > highest ? x[i] : highest;
    return highest + 0.0f;
}

DM_INLINE int vocabulary_part(float *max, float *sum, const float *logits_V, float temperature, size_t n) {
    float best = largest(logits_V, n);
    *max = best;
    /* Dividing by 1 changes no bit. */
    *sum = temperature == 1.0f ? softmax_sum(logits_V, best, 1.0f, n) : softmax_sum(logits_V, best, temperature, n);
    return absmax_bits(logits_V, n) >= DM_INFINITY_BITS ? DM_FAULT_LOGIT : 0;
}

/* A whole block's size is known to the compiler. */
static int vocabulary(float *max, float *sum, const float *logits_V, float temperature, size_t n) {
    if (n == DM_VOCABULARY_BLOCK) return vocabulary_part(max, sum, logits_V, temperature, DM_VOCABULARY_BLOCK);
    return vocabulary_part(max, sum, logits_V, temperature, n);
}

/* What merging block sums needs besides softmax_term. */
static float fma_one(float a, float b, float c) { return fma_lanes(all_f32(a), all_f32(b), all_f32(c))[0]; }

#endif
