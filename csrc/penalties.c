/* penalties.c: what a request's past and wishes do to logits before a token is drawn (rule 3). */
#include "dist_moe.h"
#include "float_state.h"

/* One rounding per operation and no sum over tokens: a logit's bits do not depend on which others are changed. */
void dm_penalize(float *logits_N, const float *bias_N, const int32_t *seen_N, const int32_t *count_N,
                 const float *dry_N, float repetition, float presence, float frequency, size_t N) {
    uint64_t saved = dm_enter();
    for (size_t i = 0; i < N; i++) {
        float logit = logits_N[i] + bias_N[i];
        if (seen_N[i] != 0) logit = logit > 0.0f ? logit / repetition : logit * repetition;
        if (count_N[i] != 0) logit -= presence + frequency * (float)count_N[i];
        logits_N[i] = logit - dry_N[i];
    }
    dm_set_float_state(saved);
}
