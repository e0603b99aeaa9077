/* draw.c: one token out of the best candidates (rules 13 and 14).
 *
 * Filters in order: temperature, top_k, top_p (the smallest prefix that holds top_p of what top_k kept), min_p (at
 * least min_p of the best one's probability). A uniform number then picks a share of the mass that is left. Masses are
 * float64 sums of the float32 terms in (logit descending, id ascending) order. Without top_k the mass of all tokens is
 * Z, from the block sums, with candidates as with the full list: both give the same token or the candidates give none.
 */
#include "context.h"
#include "float_state.h"

#include <math.h>

#define UNDECIDED (-1)

/* Everything that the filters look at. terms are exp((logit - max) / temperature). */
typedef struct draw {
    const dm_kernels *kernels;
    const dm_sampling *how;
    const float *logits_N;
    float max, temperature, z;
    size_t count;
    int complete;
} draw;

/* Z and the largest logit from the blocks' (max, sum), merged by rule 10's formula; masked blocks are passed over. */
static void merge_blocks(draw *state, const float *max_B, const float *sum_B, size_t B) {
    const dm_kernels *kernels = state->kernels;
    int first = 1;
    for (size_t b = 0; b < B; b++) {
        if (max_B[b] == -INFINITY) continue;
        if (first) {
            state->max = max_B[b];
            state->z = sum_B[b];
            first = 0;
            continue;
        }
        float max = max_B[b] > state->max ? max_B[b] : state->max;
        float alpha = kernels->softmax_term(state->max, max, state->temperature);
        float beta = kernels->softmax_term(max_B[b], max, state->temperature);
        state->z = kernels->fma_one(sum_B[b], beta, state->z * alpha);
        state->max = max;
    }
}

static double term(const draw *state, size_t i) {
    return (double)state->kernels->softmax_term(state->logits_N[i], state->max, state->temperature);
}

/* The tokens that the filters keep are a prefix of the list: its length (or UNDECIDED) and its mass. */
static int64_t filter(const draw *state, double *mass) {
    const dm_sampling *how = state->how;
    size_t limit = state->count;
    int closed = state->complete;
    double total = (double)state->z;
    if (how->top_k > 0) {
        if ((uint64_t)how->top_k <= state->count) {
            limit = (size_t)how->top_k;
            closed = 1;
        }
        if (!closed) return UNDECIDED;
        total = 0.0;
        for (size_t i = 0; i < limit; i++) total += term(state, i);
    }
    int by_mass = how->top_p < 1.0f, by_share = how->min_p > 0.0f;
    if (!by_mass && !by_share) {
        *mass = total;
        return closed ? (int64_t)limit : INT64_MAX;
    }
    double enough = (double)how->top_p * total, least = (double)how->min_p * term(state, 0), sum = 0.0;
    for (size_t i = 0; i < limit; i++) {
        double share = term(state, i);
        *mass = sum;
        if (i > 0 && ((by_mass && sum >= enough) || (by_share && share < least))) return (int64_t)i;
        sum += share;
    }
    *mass = sum;
    if (!closed && !(by_mass && sum >= enough)) return UNDECIDED;
    return (int64_t)limit;
}

static int64_t choose(const draw *state) {
    double mass = 0.0;
    int64_t kept = filter(state, &mass);
    if (kept == UNDECIDED) return UNDECIDED;
    const dm_sampling *how = state->how;
    double target = dm_uniform(how->seed, how->sample_index, how->position) * mass;
    double sum = 0.0;
    int64_t last_possible = 0;
    for (size_t i = 0; i < state->count && i < (size_t)kept; i++) {
        double share = term(state, i);
        sum += share;
        if (sum > target) return (int64_t)i;
        if (share > 0.0) last_possible = (int64_t)i;
    }
    /* Rounding may leave the target a hair beyond the last sum. */
    return kept <= (int64_t)state->count ? last_possible : UNDECIDED;
}

int64_t dm_sample(dm_context *context, float *probability, const dm_sampling *how, const int32_t *ids_N,
                  const float *logits_N, const float *max_B, const float *sum_B, size_t count, size_t B, int complete) {
    uint64_t saved = dm_enter();
    draw state = {.kernels = context->kernels,
                  .how = how,
                  .logits_N = logits_N,
                  .temperature = how->temperature == 0.0f ? 1.0f : how->temperature,
                  .max = -INFINITY,
                  .count = count,
                  .complete = complete};
    /* Places without a token stand last. */
    while (state.count > 0 && ids_N[state.count - 1] < 0) state.count--;
    merge_blocks(&state, max_B, sum_B, B);
    int64_t place = UNDECIDED;
    if (state.count > 0) place = how->temperature == 0.0f ? 0 : choose(&state);
    *probability = place < 0 ? 0.0f : (float)term(&state, (size_t)place) / state.z;
    dm_set_float_state(saved);
    return place;
}

/* Philox4x32-10. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. */
double dm_uniform(uint64_t seed, uint64_t sample_index, uint64_t position) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t x[4] = {(uint32_t)sample_index, (uint32_t)(sample_index >> 32), (uint32_t)position,
                     (uint32_t)(position >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)x[0] * 0xd2511f53u, b = (uint64_t)x[2] * 0xcd9e8d57u;
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ x[1] ^ key0, (uint32_t)b, (uint32_t)(a >> 32) ^ x[3] ^ key1,
                            (uint32_t)a};
        __builtin_memcpy(x, next, sizeof x);
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return (double)(((uint64_t)x[1] << 32 | x[0]) >> 11) * 0x1p-53;
}
