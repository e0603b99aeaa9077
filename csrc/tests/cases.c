/* cases.c: one function per group of entry points: fills inputs from a fixed generator, calls, hashes the outputs.
 * Every buffer is allocated with the promised size and filled with 0xaa first. */
#include "cases.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BUFFERS = 64 };

struct test_run {
    dm_context *context;
    const test_case *one;
    uint64_t hash, random;
    void *buffers[MAX_BUFFERS];
    size_t buffer_count;
    int32_t *fault_T;
};

static void *buffer(test_run *run, size_t bytes) {
    size_t rounded = (bytes + 63) / 64 * 64;
    /* The promised alignment needs a rounded size; what is not a whole matrix gets its exact size. */
    void *memory = rounded == bytes ? aligned_alloc(64, bytes) : malloc(bytes);
    if (memory == NULL || run->buffer_count == MAX_BUFFERS) abort();
    memset(memory, 0xaa, bytes);
    run->buffers[run->buffer_count++] = memory;
    return memory;
}

static void hash_bytes(test_run *run, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) run->hash = (run->hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
}

static void hash_floats(test_run *run, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float value = x[i] == x[i] ? x[i] : __builtin_nanf("");
        hash_bytes(run, &value, sizeof value);
    }
}

static uint32_t next_random(test_run *run) {
    run->random = run->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(run->random >> 32);
}

static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* USUAL: about [-2, 2) over 12 binades, with zeros of both signs. TINY: down to denormals. HUGE: sums overflow. */
static float number(test_run *run, int numbers) {
    uint32_t bits = next_random(run);
    uint32_t spread = next_random(run) % 12;
    if (bits % 61 == 0) return bits & 64 ? 0.0f : -0.0f;
    uint32_t exponent = 127 - spread;
    if (numbers == NUMBERS_TINY) exponent = next_random(run) % 24;
    if (numbers == NUMBERS_HUGE) exponent = 127 + next_random(run) % 127;
    return from_bits((bits & 0x807fffff) | exponent << 23);
}

/* Weights stay usual where a scale must fit float16; POISONED puts NaN and infinity into the last row. */
static float *numbers(test_run *run, size_t rows, size_t columns, int kind) {
    float *x = buffer(run, rows * columns * sizeof(float));
    for (size_t i = 0; i < rows * columns; i++) x[i] = number(run, kind);
    if (kind != NUMBERS_POISONED || rows * columns == 0) return x;
    x[rows * columns - 1] = from_bits(0x7f800000);
    x[(rows - 1) * columns] = from_bits(0xffc12345);
    return x;
}

static dm_operand operand(test_run *run, size_t T, size_t columns) {
    size_t groups = (columns + 31) / 32;
    dm_operand x = {numbers(run, T, columns, run->one->numbers), buffer(run, T * groups * 32),
                    buffer(run, T * groups * sizeof(float)), buffer(run, T * groups * sizeof(int32_t)), columns};
    dm_quantize(run->context, &x, run->fault_T, T, 3);
    hash_bytes(run, x.q, T * groups * 32);
    hash_floats(run, x.scale, T * groups);
    hash_bytes(run, x.sum, T * groups * sizeof(int32_t));
    return x;
}

static void *packed(test_run *run, void *to, size_t rows, size_t columns, size_t group, int row_scales) {
    const test_case *one = run->one;
    size_t bytes = dm_packed_bytes(one->format, rows, columns, group);
    int kind = one->numbers == NUMBERS_POISONED ? NUMBERS_USUAL : one->numbers;
    float *weights = numbers(run, rows, columns, kind);
    float *scale_R = buffer(run, rows * sizeof(float));
    float *back = buffer(run, rows * columns * sizeof(float));
    if (to == NULL) to = buffer(run, bytes);
    dm_row_scales(run->context, scale_R, weights, rows, columns, columns, one->format);
    size_t bad =
        dm_pack(run->context, to, weights, row_scales ? scale_R : NULL, rows, columns, columns, one->format, group);
    dm_unpack(run->context, back, to, rows, columns, one->format, group);
    hash_bytes(run, &bad, sizeof bad);
    hash_floats(run, scale_R, rows);
    hash_bytes(run, to, bytes);
    hash_floats(run, back, rows * columns);
    return to;
}

static void run_vectors(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, D = one->columns;
    float *x = numbers(run, T, D, one->numbers), *gain = numbers(run, 1, D, NUMBERS_USUAL);
    float *out = buffer(run, T * D * sizeof(float));
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
    dm_embed(run->context, out, table, ids, T, D, 1);
    hash_floats(run, out, T * D);
    dm_rmsnorm(run->context, out, x, gain, 1e-6f, T, D);
    hash_floats(run, out, T * D);
    dm_add_exact(run->context, x, run->fault_T, sums, one->group ? gain : NULL, T, D, 5);
    hash_floats(run, x, T * D);
    dm_add_bias(run->context, out, gain, T, D / 2, D);
    hash_floats(run, out, T * D);
}

static void run_matrices(test_run *run) {
    const test_case *one = run->one;
    size_t stride = one->rows + 19;
    dm_operand x = operand(run, one->T, one->columns);
    dm_matrix matrices[2] = {{packed(run, NULL, one->rows, one->columns, one->group, 1), one->rows, 0},
                             {packed(run, NULL, 17, one->columns, one->group, 0), 17, one->rows + 2}};
    float *out = buffer(run, one->T * stride * sizeof(float));
    dm_matmul(run->context, out, matrices, &x, 2, one->T, stride, one->format, one->group);
    hash_floats(run, out, one->T * stride);
}

/* head_dim is a multiple of 32 for quantized weights. */
static void run_units(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, D = one->rows, P = one->format >= DM_Q8 ? (one->columns + 31) / 32 * 32 : one->columns;
    dm_operand x = operand(run, T, 2 * P);
    dm_matrix units[2];
    for (size_t i = 0; i < 2; i++) units[i] = (dm_matrix){packed(run, NULL, D, P, one->group, 1), D, 0};
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_unit_sums(run->context, sums, run->fault_T, units, &x, 2, T, D, P, one->format, one->group, 2);
    hash_bytes(run, sums, T * D * sizeof(int64_t));
    dm_unit_sums(run->context, sums, run->fault_T, units, &x, 0, T, D, P, one->format, one->group, 2);
    hash_bytes(run, sums, T * D * sizeof(int64_t));
}

static void run_experts(test_run *run) {
    enum { E = 5, K = 2, WIDTH = 64, CHUNKS = 2 };
    const test_case *one = run->one;
    size_t T = one->T, D = one->columns;
    size_t rows_bytes = dm_packed_bytes(one->format, WIDTH, D, one->group);
    size_t chunk_bytes = dm_chunk_bytes(one->format, D, WIDTH, one->group);
    dm_operand x = operand(run, T, D);
    float *logits = numbers(run, T, E, one->numbers), *weights = buffer(run, T * K * sizeof(float));
    int32_t *ids = buffer(run, T * K * sizeof(int32_t)), *offset = buffer(run, (E + 1) * sizeof(int32_t));
    int32_t *token = buffer(run, T * K * sizeof(int32_t));
    float *weight = buffer(run, T * K * sizeof(float));
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_route(run->context, ids, weights, run->fault_T, logits, T, E, K, one->group != 0, 4);
    hash_bytes(run, ids, T * K * sizeof(int32_t));
    hash_floats(run, weights, T * K);
    dm_group_by_expert(run->context, offset, token, weight, ids, weights, T, E, K);
    hash_bytes(run, offset, (E + 1) * sizeof(int32_t));
    hash_bytes(run, token, T * K * sizeof(int32_t));
    dm_chunk chunks[E * CHUNKS];
    for (size_t c = 0; c < E * CHUNKS; c++) {
        uint8_t *bytes = buffer(run, chunk_bytes);
        packed(run, bytes, WIDTH, D, one->group, 0);
        packed(run, bytes + rows_bytes, WIDTH, D, one->group, 0);
        packed(run, bytes + 2 * rows_bytes, D, WIDTH, one->group, 0);
        size_t e = c / CHUNKS;
        chunks[c] = (dm_chunk){bytes, (size_t)offset[e], (size_t)(offset[e + 1] - offset[e])};
        /* Weights' buffers are not needed any more: keep the chunk alone. */
        while (run->buffers[run->buffer_count - 1] != bytes) free(run->buffers[--run->buffer_count]);
    }
    dm_experts(run->context, sums, run->fault_T, chunks, token, weight, &x, E * CHUNKS, T, D, WIDTH, one->format,
               one->group, 4);
    hash_bytes(run, sums, T * D * sizeof(int64_t));
    dm_experts(run->context, sums, run->fault_T, chunks, token, weight, &x, 0, T, D, WIDTH, one->format, one->group, 4);
    hash_bytes(run, sums, T * D * sizeof(int64_t));
}

/* T tokens at the end of one sequence of `rows` more positions. */
static void run_attention(test_run *run) {
    enum { HEADS = 3, KV_HEADS = 2 };
    const test_case *one = run->one;
    size_t T = one->T + one->rows, P = one->columns / 2 * 2, half_P = P / 2;
    if (P == 0) return;
    size_t row = (HEADS + 2 * KV_HEADS) * P, layer_bytes = KV_HEADS * dm_kv_block_bytes(one->format, P);
    uint8_t *blocks[5];
    for (size_t b = 0; b < 5; b++) blocks[b] = buffer(run, 2 * layer_bytes);
    int64_t *table = buffer(run, T * sizeof(int64_t)), *position = buffer(run, T * sizeof(int64_t));
    for (size_t t = 0; t < T; t++) {
        table[t] = 1;
        position[t] = (int64_t)t;
    }
    float *inv_freq = numbers(run, 1, half_P, NUMBERS_USUAL), *gain = numbers(run, 1, P, NUMBERS_USUAL);
    float *qkv = numbers(run, T, row, one->numbers);
    float *cos_TP = buffer(run, T * half_P * sizeof(float)), *sin_TP = buffer(run, T * half_P * sizeof(float));
    float *out = buffer(run, T * HEADS * P * sizeof(float));
    const int32_t kv_of_h[HEADS] = {0, 1, 1};
    dm_kv_view view = {blocks, table, position, layer_bytes, one->format};
    dm_rope_angles(run->context, cos_TP, sin_TP, position, inv_freq, 1.25f, T, half_P);
    hash_floats(run, cos_TP, T * half_P);
    hash_floats(run, sin_TP, T * half_P);
    int norm = one->numbers != NUMBERS_HUGE;
    if (norm) dm_norm_rope(run->context, qkv, gain, cos_TP, sin_TP, 1e-6f, T, HEADS + KV_HEADS, P, row);
    hash_floats(run, qkv, T * row);
    const float *k = qkv + HEADS * P;
    dm_kv_store(run->context, &view, run->fault_T, k, k + KV_HEADS * P, T, KV_HEADS, P, row, 6);
    for (size_t b = 0; b < 5; b++) hash_bytes(run, blocks[b], 2 * layer_bytes);
    dm_attention(run->context, out, run->fault_T, qkv, &view, kv_of_h, 0.125f, T, HEADS, KV_HEADS, P, row, 6);
    hash_floats(run, out, T * HEADS * P);
}

static void run_sampling(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, V = one->rows * one->columns, N = V / 2 + 3, B = (V + 127) / 128;
    float *logits = numbers(run, T, V, one->numbers), *temperature = buffer(run, T * sizeof(float));
    float *max = buffer(run, T * B * sizeof(float)), *sum = buffer(run, T * B * sizeof(float));
    float *best = buffer(run, T * N * sizeof(float)), probability = 0.0f;
    int32_t *ids = buffer(run, T * N * sizeof(int32_t));
    size_t valid = V - V / 3;
    for (size_t t = 0; t < T; t++) temperature[t] = (float)(t % 3) * 0.5f;
    dm_vocabulary_blocks(run->context, max, sum, run->fault_T, logits, temperature, T, V, valid, 9);
    hash_floats(run, max, T * B);
    hash_floats(run, sum, T * B);
    dm_top_logits(run->context, ids, best, logits, T, V, valid, 7, N);
    hash_bytes(run, ids, T * N * sizeof(int32_t));
    hash_floats(run, best, T * N);
    for (size_t t = 0; t < T; t++) {
        for (size_t i = 0; i < 8; i++) {
            dm_sampling how = {.temperature = temperature[t],
                               .top_p = i & 1 ? 0.8f : 1.0f,
                               .min_p = i & 2 ? 0.05f : 0.0f,
                               .top_k = i & 4 ? 5 : 0,
                               .seed = t,
                               .sample_index = i};
            int64_t place = dm_sample(run->context, &probability, &how, ids + t * N, best + t * N, max + t * B,
                                      sum + t * B, N, B, N >= valid);
            hash_bytes(run, &place, sizeof place);
            hash_floats(run, &probability, 1);
        }
    }
    dm_merge_candidates(run->context, ids, best, T * N);
    hash_bytes(run, ids, T * N * sizeof(int32_t));
    hash_floats(run, best, T * N);
}

const case_kind CASE_KINDS[] = {{"vectors", run_vectors, 1},
                                {"matrices", run_matrices, DM_FORMAT_COUNT},
                                {"units", run_units, DM_FORMAT_COUNT},
                                {"experts", run_experts, DM_FORMAT_COUNT},
                                {"attention", run_attention, DM_KV_FORMAT_COUNT},
                                {"sampling", run_sampling, 1},
                                {NULL, NULL, 0}};

uint64_t run_case(dm_context *context, const test_case *one) {
    test_run run = {.context = context, .one = one, .hash = 0xcbf29ce484222325u, .random = 42};
    size_t most_tokens = one->T + one->rows;
    run.fault_T = buffer(&run, most_tokens * sizeof(int32_t));
    for (size_t t = 0; t < most_tokens; t++) run.fault_T[t] = DM_NO_FAULT;
    one->run(&run);
    hash_bytes(&run, run.fault_T, most_tokens * sizeof(int32_t));
    for (size_t i = 0; i < run.buffer_count; i++) free(run.buffers[i]);
    return run.hash;
}
