/* draw.c: one token out of the best candidates (rules 13 and 14).
 *
 * Filters in order: temperature, top_k, top_p (the smallest prefix that holds top_p of what top_k kept), min_p (at
 * least min_p of the best one's probability), typical_p. A uniform number then picks a share of the mass that is left.
 * Masses are float64 sums of the float32 terms in (logit descending, id ascending) order. Without top_k the mass of all
 * tokens is Z, from the block sums, with candidates as with the full list: both give the same token or the candidates
 * give none.
 */
#include "block_mass.h"
#include "context.h"
#include "float_state.h"

#include <math.h>

#define UNDECIDED (-1)

/* Everything that the filters look at. terms are exp((logit - max) / temperature). */
typedef struct draw {
    const dm_kernels *kernels;
    const dm_sampling *how;
    const float *logits_N;
    dm_block_mass all; /* sum < 0: not known */
    float temperature;
    size_t count;
    int complete;
} draw;

/* Places [first, last) of the list. */
typedef struct places {
    size_t first, last;
} places;

static double term(const draw *state, size_t i) {
    return (double)state->kernels->softmax_term(state->logits_N[i], state->all.max, state->temperature);
}

/* The tokens that top_k, top_p and min_p keep are a prefix of the list: its length (or UNDECIDED) and its mass. */
static int64_t filter(const draw *state, double *mass) {
    const dm_sampling *how = state->how;
    size_t limit = state->count;
    int closed = state->complete;
    int by_mass = how->top_p < 1.0f, by_share = how->min_p > 0.0f;
    double total = (double)state->all.sum;
    if (how->top_k > 0) {
        if ((uint64_t)how->top_k <= state->count) {
            limit = (size_t)how->top_k;
            closed = 1;
        }
        if (!closed) return UNDECIDED;
        total = 0.0;
        for (size_t i = 0; i < limit; i++) total += term(state, i);
    }
    if (total < 0.0 && (by_mass || !by_share)) return UNDECIDED;
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

/* How much a token's surprise, -log p, exceeds that of the best one. */
static double surprise(const draw *state, size_t i) {
    return ((double)state->all.max - (double)state->logits_N[i]) / (double)state->temperature;
}

/* Locally typical tokens: those whose surprise is closest to the expected one, until they hold typical_p of the mass;
 * those as close as the last one stay, too. Surprise grows along the list, so they are neighbours in it; the logarithm
 * of the mass stands on both sides of the difference. Source: Meister et al., "Locally typical sampling", 2023. */
static places typical(const draw *state, size_t kept, double *mass) {
    double total = 0.0, weighted = 0.0;
    for (size_t i = 0; i < kept; i++) {
        double share = term(state, i);
        if (share == 0.0) break;
        total += share;
        weighted += share * surprise(state, i);
    }
    double expected = weighted / total, enough = (double)state->how->typical_p * total, sum = 0.0, farthest = 0.0;
    size_t first = 0;
    while (first < kept && surprise(state, first) < expected) first++;
    places found = {first, first};
    while (found.first > 0 || found.last < kept) {
        double below = found.first > 0 ? expected - surprise(state, found.first - 1) : INFINITY;
        double above = found.last < kept ? surprise(state, found.last) - expected : INFINITY;
        double next = below < above ? below : above;
        if (found.last > found.first && sum >= enough && next > farthest) break;
        farthest = next;
        sum += term(state, below < above ? --found.first : found.last++);
    }
    *mass = 0.0;
    for (size_t i = found.first; i < found.last; i++) *mass += term(state, i);
    return found;
}

static int64_t choose(const draw *state) {
    double mass = 0.0;
    int64_t kept = filter(state, &mass);
    if (kept == UNDECIDED) return UNDECIDED;
    const dm_sampling *how = state->how;
    size_t count = state->count;
    places from = {0, (uint64_t)kept < count ? (size_t)kept : count};
    int closed = kept <= (int64_t)count;
    if (how->typical_p < 1.0f) {
        if (!closed) return UNDECIDED;
        from = typical(state, from.last, &mass);
    }
    double target = dm_uniform(how->seed, how->sample_index, how->position) * mass;
    double sum = 0.0;
    int64_t last_possible = (int64_t)from.first;
    for (size_t i = from.first; i < from.last; i++) {
        double share = term(state, i);
        sum += share;
        if (sum > target) return (int64_t)i;
        if (share > 0.0) last_possible = (int64_t)i;
    }
    /* Rounding may leave the target a hair beyond the last sum. */
    return closed ? last_possible : UNDECIDED;
}

int64_t dm_sample(dm_context *context, float *probability, const dm_sampling *how, const int32_t *ids_N,
                  const float *logits_N, const float *max_B, const float *sum_B, size_t count, size_t B, int complete) {
    uint64_t saved = dm_enter();
    draw state = {.kernels = context->kernels,
                  .how = how,
                  .logits_N = logits_N,
                  .all = {-INFINITY, -1.0f},
                  .temperature = how->temperature == 0.0f ? 1.0f : how->temperature,
                  .count = count,
                  .complete = complete};
    /* Places without a token stand last. */
    while (state.count > 0 && ids_N[state.count - 1] < 0) state.count--;
    if (B > 0)
        state.all = dm_merge_blocks(context->kernels, max_B, sum_B, state.temperature, B);
    else if (state.count > 0)
        state.all.max = logits_N[0] + 0.0f;
    int64_t place = UNDECIDED;
    if (state.count > 0) place = how->temperature == 0.0f ? 0 : choose(&state);
    *probability = 0.0f;
    if (place >= 0 && state.all.sum > 0.0f) *probability = (float)term(&state, (size_t)place) / state.all.sum;
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
