/* self_test.c: fixed inputs through every primitive and format; the hash of the results tells whether two machines
 * compute the same bits (rule 16). About a millisecond. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "float_state.h"

enum { T = 3, D = 80, R = 33, WIDTH = 32, H = 2, P = 32, E = 20, K = 4, V = 300, POSITIONS = 70 };

typedef struct test_state {
    dm_context *context;
    uint64_t hash;
    uint64_t random;
    float x_TD[T * D], y_TD[T * V], gain_D[D];
    int8_t q[T * 96];
    float scale[T * 3];
    int32_t sum[T * 3];
    int64_t sums_TD[T * D];
    int32_t fault_T[T], ids[V];
    float values[R * D + 2 * WIDTH * D + V];
    _Alignas(64) uint8_t packed[3 * 16 * 1024];
    _Alignas(64) uint8_t blocks[2][64 * 1024];
} test_state;

/* FNV-1a. */
static void hash_bytes(test_state *state, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) state->hash = (state->hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
}

/* Multiples of 2^-20 in [-2, 2): exact in every float format. Source of the constants: Knuth, MMIX. */
static void fill(test_state *state, float *to, size_t n) {
    for (size_t i = 0; i < n; i++) {
        state->random = state->random * 6364136223846793005u + 1442695040888963407u;
        to[i] = (float)((int32_t)(state->random >> 42) - (1 << 21)) * 0x1p-20f;
    }
}

static void test_vectors(test_state *state) {
    dm_context *context = state->context;
    fill(state, state->x_TD, T * D);
    fill(state, state->gain_D, D);
    dm_rmsnorm(context, state->x_TD, state->x_TD, state->gain_D, 1e-6f, T, D);
    hash_bytes(state, state->x_TD, sizeof state->x_TD);
    dm_operand operand = {state->x_TD, state->q, state->scale, state->sum, D};
    dm_quantize(context, &operand, state->fault_T, T, 0);
    hash_bytes(state, state->q, sizeof state->q);
    hash_bytes(state, state->scale, sizeof state->scale);
}

static void test_matrices(test_state *state, int format) {
    dm_context *context = state->context;
    dm_operand operand = {state->x_TD, state->q, state->scale, state->sum, D};
    fill(state, state->values, R * D);
    dm_pack(context, state->packed, state->values, NULL, R, D, D, format, 64);
    hash_bytes(state, state->packed, dm_packed_bytes(format, R, D, 64));
    dm_unpack(context, state->values, state->packed, R, D, format, 64);
    hash_bytes(state, state->values, R * D * sizeof(float));
    dm_matrix matrix = {state->packed, R, 0, format, 64};
    dm_matmul(context, state->y_TD, &matrix, &operand, 1, T, R);
    hash_bytes(state, state->y_TD, T * R * sizeof(float));
    dm_unit_sums(context, state->sums_TD, state->fault_T, &matrix, &operand, 1, T, R, D, 0);
    dm_add_exact(context, state->y_TD, state->fault_T, state->sums_TD, state->gain_D, T, R, 0);
    hash_bytes(state, state->y_TD, T * R * sizeof(float));
}

static void test_experts(test_state *state, int format) {
    dm_context *context = state->context;
    dm_operand operand = {state->x_TD, state->q, state->scale, state->sum, D};
    size_t rows_bytes = dm_packed_bytes(format, WIDTH, D, 32);
    fill(state, state->values, 3 * WIDTH * D);
    dm_pack(context, state->packed, state->values, NULL, WIDTH, D, D, format, 32);
    dm_pack(context, state->packed + rows_bytes, state->values + WIDTH * D, NULL, WIDTH, D, D, format, 32);
    dm_pack(context, state->packed + 2 * rows_bytes, state->values + 2 * WIDTH * D, NULL, D, WIDTH, WIDTH, format, 32);
    const dm_chunk_format alike = {format, format, 32, 32, 1};
    dm_chunk chunk = {state->packed, &alike, 0, T};
    const int32_t token_N[T] = {0, 1, 2};
    const float weight_N[T] = {0.25f, 0.5f, 0.75f};
    dm_experts(context, state->sums_TD, state->fault_T, &chunk, token_N, weight_N, &operand, 1, T, D, WIDTH, 0);
    hash_bytes(state, state->sums_TD, sizeof state->sums_TD);
}

static void test_attention(test_state *state, int format) {
    dm_context *context = state->context;
    float cos_P[P / 2], sin_P[P / 2], inv_freq[P / 2], row[3 * P], out[H * P];
    uint8_t *blocks[2] = {state->blocks[0], state->blocks[1]};
    const int32_t kv_of_h[H] = {0, 0};
    const int64_t table = 0;
    int64_t position = 0;
    dm_kv_view view = {blocks, &table, &position, 0, format};
    for (size_t i = 0; i < P / 2; i++) inv_freq[i] = 1.0f / (float)(1 + i * i);
    for (; position < POSITIONS; position++) {
        fill(state, row, 3 * P);
        dm_rope_angles(context, cos_P, sin_P, &position, inv_freq, 1.0f, 1, P / 2);
        dm_norm_rope(context, row, state->gain_D, cos_P, sin_P, 1e-6f, 1, 2, P, 3 * P);
        dm_kv_store(context, &view, state->fault_T, row, row + 2 * P, 1, 1, P, 3 * P, 0);
    }
    position = POSITIONS - 1;
    dm_attention(context, out, state->fault_T, row, &view, kv_of_h, 0.25f, 1, H, 1, P, 3 * P, 0);
    hash_bytes(state, out, sizeof out);
}

static void test_choices(test_state *state) {
    dm_context *context = state->context;
    float weights[T * K], max_B[T * 3], sum_B[T * 3], probability = 0.0f;
    const float temperature_T[T] = {0.0f, 0.7f, 1.5f};
    const int32_t block_B[3] = {0, 1, 2};
    fill(state, state->y_TD, T * V);
    dm_route(context, state->ids, weights, state->fault_T, state->y_TD, T, E, K, 1, 0);
    hash_bytes(state, state->ids, T * K * sizeof(int32_t));
    hash_bytes(state, weights, sizeof weights);
    dm_vocabulary_blocks(context, max_B, sum_B, state->fault_T, state->y_TD, temperature_T, T, V, V - 7, 0);
    hash_bytes(state, max_B, sizeof max_B);
    hash_bytes(state, sum_B, sizeof sum_B);
    dm_top_logits(context, state->ids, state->values, state->y_TD, max_B, block_B, 1, V, V - 7, V);
    dm_sampling how = {.temperature = 0.7f, .top_p = 0.9f, .min_p = 0.1f, .typical_p = 0.8f, .seed = 1};
    int64_t place = dm_sample(context, &probability, &how, state->ids, state->values, max_B + 3, sum_B + 3, V, 3, 1);
    hash_bytes(state, &place, sizeof place);
    hash_bytes(state, &probability, sizeof probability);
    double surprises[T + 1] = {[T] = dm_power(7.0, 0.6)};
    dm_log_probabilities(context, surprises, state->values, max_B, sum_B, T, 3);
    hash_bytes(state, surprises, sizeof surprises);
    dm_penalize(state->values, state->y_TD, state->ids, state->ids, state->y_TD + V, 1.3f, 0.4f, 0.2f, V);
    hash_bytes(state, state->values, V * sizeof(float));
}

uint64_t dm_self_test(dm_context *context) {
    uint64_t saved = dm_enter();
    test_state *state = aligned_alloc(64, dm_round_up(sizeof *state, 64));
    if (state == NULL) {
        fprintf(stderr, "dist-moe: out of memory: the self-test's %zu bytes could not be allocated\n", sizeof *state);
        abort();
    }
    memset(state, 0, sizeof *state);
    state->context = context;
    state->hash = 0xcbf29ce484222325u;
    const uint32_t version = DM_NUMERICS_VERSION;
    hash_bytes(state, &version, sizeof version);
    for (size_t t = 0; t < T; t++) state->fault_T[t] = DM_NO_FAULT;
    test_vectors(state);
    for (int format = 0; format < DM_FORMAT_COUNT; format++) {
        test_matrices(state, format);
        test_experts(state, format);
    }
    for (int format = 0; format < DM_KV_FORMAT_COUNT; format++) test_attention(state, format);
    test_choices(state);
    hash_bytes(state, state->fault_T, sizeof state->fault_T);
    uint64_t hash = state->hash;
    free(state);
    dm_set_float_state(saved);
    return hash;
}
