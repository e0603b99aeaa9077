/* cases_vectors.c: operations on vectors, and sampling. */
#include "cases.h"

#include "../float_state.h"

void run_vectors(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, D = one->columns;
    float *x = numbers(run, T, D, one->numbers), *gain = numbers(run, 1, D, NUMBERS_USUAL);
    float *out = buffer(run, T * D * sizeof(float)), *table_f32 = numbers(run, one->rows, D, one->numbers);
    uint16_t *table = buffer(run, one->rows * D * sizeof(uint16_t));
    int32_t *ids = buffer(run, T * sizeof(int32_t));
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    for (size_t i = 0; i < T; i++) ids[i] = (int32_t)(next_random(run) % one->rows);
    for (size_t i = 0; i < one->rows * D; i++) table[i] = (uint16_t)next_random(run);
    for (size_t i = 0; i < T * D; i++) {
        uint64_t high = next_random(run);
        uint64_t bits = high << 32 | next_random(run);
        sums[i] = (int64_t)bits >> (next_random(run) % 52);
    }
    input(run, ids, T * sizeof(int32_t));
    input(run, table, one->rows * D * sizeof(uint16_t));
    input(run, sums, T * D * sizeof(int64_t));
    dm_embed(run->context, out, table, ids, T, D, 1);
    output_f32(run, "bf16 embeddings", out, T * D);
    dm_embed(run->context, out, table_f32, ids, T, D, 0);
    output_f32(run, "f32 embeddings", out, T * D);
    dm_rmsnorm(run->context, out, x, gain, 1e-6f, T, D);
    output_f32(run, "norms", out, T * D);
    dm_add_exact(run->context, x, run->fault_T, sums, one->group ? gain : NULL, T, D, 5);
    output_f32(run, "x", x, T * D);
    dm_add_bias(run->context, out, gain, T, D / 2, D);
    output_f32(run, "biased", out, T * D);
    int64_t hash = (int64_t)dm_hash_floats(x, T * D, 7);
    output_i64(run, "hash", &hash, 1);
}

/* Entries of the table that entry points reach with few operands only. */
void run_primitives(test_run *run) {
    const dm_kernels *kernels = run->context->kernels;
    size_t n = run->one->rows * run->one->columns;
    float *a = numbers(run, 1, n, run->one->numbers), *b = numbers(run, 1, n, NUMBERS_HUGE);
    float *c = numbers(run, 1, n, run->one->numbers), *out = buffer(run, n * sizeof(float));
    int64_t *sums = buffer(run, n * sizeof(int64_t));
    for (size_t i = 0; i < n; i++) {
        a[i] = i % 3 ? a[i] : float_of_bits(next_random(run));
        c[i] = i % 4 ? c[i] : -(a[i] * b[i]);
        sums[i] = (int64_t)next_random(run);
    }
    input(run, a, n * sizeof(float));
    input(run, c, n * sizeof(float));
    input(run, sums, n * sizeof(int64_t));
    uint64_t saved = dm_enter();
    for (size_t i = 0; i < n; i++) out[i] = kernels->fma_one(a[i], b[i], c[i]);
    output_f32(run, "fma_one", out, n);
    for (size_t i = 0; i < n; i++) out[i] = kernels->softmax_term(a[i], c[i], 0.75f);
    output_f32(run, "softmax_term", out, n);
    kernels->silu(out, a, c, n);
    output_f32(run, "silu", out, n);
    int32_t kind = kernels->add_fixed(sums, c, 0.625f, n);
    output_i32(run, "add_fixed's kind", &kind, 1);
    output_i64(run, "add_fixed", sums, n);
    dm_set_float_state(saved);
}

static void draw(test_run *run, const dm_sampling *how, const int32_t *ids, const float *best, const float *max,
                 const float *sum, size_t N, size_t B, int complete) {
    float probability = 0.0f;
    int64_t place = dm_sample(run->context, &probability, how, ids, best, max, sum, N, B, complete);
    output_i64(run, "place", &place, 1);
    output_f32(run, "probability", &probability, 1);
}

static void run_probabilities(test_run *run, const int32_t *ids, const float *best, const float *max, const float *sum,
                              size_t N, size_t B) {
    double *out = buffer(run, N * sizeof(double)), power = dm_power(1.0 + (double)N, 0.7);
    float *bias = numbers(run, 1, N, NUMBERS_USUAL), *dry = numbers(run, 1, N, NUMBERS_USUAL);
    float *changed = buffer(run, N * sizeof(float));
    int32_t *count = buffer(run, N * sizeof(int32_t));
    dm_log_probabilities(run->context, out, best, max, sum, N, B);
    output_f64(run, "log probabilities", out, N);
    output_f64(run, "power", &power, 1);
    for (size_t i = 0; i < N; i++) {
        changed[i] = best[i];
        count[i] = (int32_t)(next_random(run) % 3);
    }
    input(run, count, N * sizeof(int32_t));
    dm_penalize(changed, bias, ids, count, dry, 1.2f, 0.5f, 0.25f, N);
    output_f32(run, "penalized", changed, N);
}

void run_sampling(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, V = one->rows * one->columns, N = V / 2 + 3, B = dm_divide_up(V, DM_VOCABULARY_BLOCK);
    float *logits = numbers(run, T, V, one->numbers), *temperature = buffer(run, T * sizeof(float));
    float *max = buffer(run, T * B * sizeof(float)), *sum = buffer(run, T * B * sizeof(float));
    float *best = buffer(run, T * N * sizeof(float));
    int32_t *ids = buffer(run, T * N * sizeof(int32_t)), *block = buffer(run, B * sizeof(int32_t));
    size_t valid = V - V / 3;
    for (size_t t = 0; t < T; t++) temperature[t] = (float)(t % 3) * 0.5f;
    dm_vocabulary_blocks(run->context, max, sum, run->fault_T, logits, temperature, T, V, valid, 9);
    output_f32(run, "max", max, T * B);
    output_f32(run, "sum", sum, T * B);
    for (size_t b = 0; b < B; b++) block[b] = (int32_t)(2 * b + 7);
    dm_top_logits(run->context, ids, best, logits, max, block, T, V, valid, N);
    output_i32(run, "ids", ids, T * N);
    output_f32(run, "best logits", best, T * N);
    for (size_t t = 0; t < T; t++) {
        for (size_t i = 0; i < 8; i++) {
            dm_sampling how = {.temperature = temperature[t],
                               .top_p = i & 1 ? 0.8f : 1.0f,
                               .min_p = i & 2 ? 0.05f : 0.0f,
                               .typical_p = (i + t) & 1 ? 0.7f : 1.0f,
                               .top_k = i & 4 ? 5 : 0,
                               .seed = t,
                               .sample_index = i};
            draw(run, &how, ids + t * N, best + t * N, max + t * B, sum + t * B, N, B, N >= valid);
            draw(run, &how, ids + t * N, best + t * N, max + t * B, sum + t * B, N, 0, N >= valid);
        }
    }
    run_probabilities(run, ids, best, max, sum, N, B);
    dm_merge_candidates(run->context, ids, best, 1, T * N, T * N);
    output_i32(run, "merged ids", ids, T * N);
    output_f32(run, "merged logits", best, T * N);
}
