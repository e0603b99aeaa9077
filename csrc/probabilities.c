/* probabilities.c: the mass of all tokens, logarithms of probabilities, and powers, the same bits everywhere (rule 3).
 *
 * log and exp are float64 made of +, * and / alone: an argument is split exactly into a power of two and a remainder
 * near 1 (or 0), whose series is summed in one order. Both are within 2 ulps.
 */
#include "block_mass.h"
#include "context.h"
#include "float_state.h"

#include <math.h>

/* ln 2 in two parts; the first has 32 bits, so that its product with an exponent is exact. Source: fdlibm e_log.c. */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10

dm_block_mass dm_merge_blocks(const dm_kernels *kernels, const float *max_B, const float *sum_B, float temperature,
                              size_t B) {
    dm_block_mass all = {-INFINITY, 0.0f};
    int first = 1;
    for (size_t b = 0; b < B; b++) {
        if (max_B[b] == -INFINITY) continue;
        if (first) {
            all = (dm_block_mass){max_B[b], sum_B[b]};
            first = 0;
            continue;
        }
        /* One of the two factors is exp(0) = 1. */
        float alpha = 1.0f, beta = 1.0f, max = all.max;
        if (max_B[b] > max) {
            max = max_B[b];
            alpha = kernels->softmax_term(all.max, max, temperature);
        } else {
            beta = kernels->softmax_term(max_B[b], max, temperature);
        }
        all.sum = kernels->fma_one(sum_B[b], beta, all.sum * alpha);
        all.max = max;
    }
    return all;
}

/* log x of a finite x > 0 by 2 atanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)). */
static double logarithm(double x) {
    int exponent;
    double m = frexp(x, &exponent);
    if (m < 0.70710678118654752440) {
        m *= 2.0;
        exponent--;
    }
    double s = (m - 1.0) / (m + 1.0), square = s * s, series = 0.0;
    /* |s| < 0.172: the term behind the last one is below 2^-60 of the sum. */
    for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * square;
    return exponent * LN2_HIGH + (2.0 * s + (2.0 * s * series + exponent * LN2_LOW));
}

/* exp x by 2^n exp(r), |r| <= ln2 / 2. */
static double exponential(double x) {
    if (x < -708.0) return 0.0;
    if (x > 709.0) return INFINITY;
    double n = rint(x * 1.44269504088896340736), r = x - n * LN2_HIGH - n * LN2_LOW, series = 1.0;
    /* The 15th term is below 2^-60. */
    for (int k = 14; k >= 1; k--) series = 1.0 + series * r / k;
    return ldexp(series, (int)n);
}

double dm_power(double base, double exponent) {
    uint64_t saved = dm_enter();
    double power = exponential(exponent * logarithm(base));
    dm_set_float_state(saved);
    return power;
}

void dm_log_probabilities(dm_context *context, double *out_N, const float *logits_N, const float *max_B,
                          const float *sum_B, size_t N, size_t B) {
    uint64_t saved = dm_enter();
    dm_block_mass all = dm_merge_blocks(context->kernels, max_B, sum_B, 1.0f, B);
    double log_mass = logarithm((double)all.sum);
    for (size_t i = 0; i < N; i++) out_N[i] = ((double)logits_N[i] - (double)all.max) - log_mass;
    dm_set_float_state(saved);
}
