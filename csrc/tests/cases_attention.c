/* cases_attention.c: rotation, the cache, and attention of many tokens, of one, and of several sequences. */
#include "cases.h"

#include <string.h>

enum { HEADS = 3, KV_HEADS = 2, BLOCKS = 4, SEQUENCES = 9 };

static const int32_t KV_OF_H[HEADS] = {0, 1, 1};

/* Every seventh token from the last one back, each a sequence of its own with a table of its own over the same blocks;
 * then the last one alone, as in decode. */
static void attend_sequences(test_run *run, const dm_kv_view *one, const float *qkv, size_t T, size_t P, size_t row) {
    uint8_t *blocks[SEQUENCES * BLOCKS];
    int64_t table[SEQUENCES], position[SEQUENCES];
    float *q = buffer(run, SEQUENCES * row * sizeof(float)), *out = buffer(run, SEQUENCES * HEADS * P * sizeof(float));
    size_t count = 0;
    for (size_t t = T; t > 0 && count < SEQUENCES; t = t > 7 ? t - 7 : 0, count++) {
        for (size_t b = 0; b < BLOCKS; b++) blocks[count * BLOCKS + b] = one->blocks[b];
        table[count] = (int64_t)(count * BLOCKS) + one->table_T[0];
        position[count] = (int64_t)t - 1;
        memcpy(q + count * row, qkv + (t - 1) * row, row * sizeof(float));
    }
    dm_kv_view view = {blocks, table, position, one->layer_offset, one->format};
    dm_attention(run->context, out, run->fault_T, q, &view, KV_OF_H, 0.125f, count, HEADS, KV_HEADS, P, row, 6);
    output_f32(run, "out of sequences", out, count * HEADS * P);
    dm_attention(run->context, out, run->fault_T, q, &view, KV_OF_H, 0.125f, 1, HEADS, KV_HEADS, P, row, 6);
    output_f32(run, "out of one token", out, HEADS * P);
}

/* One sequence of T + rows tokens. */
void run_attention(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T + one->rows, P = one->columns / 2 * 2, half_P = P / 2;
    if (P == 0) return;
    size_t row = (HEADS + 2 * KV_HEADS) * P, layer_bytes = KV_HEADS * dm_kv_block_bytes(one->format, P);
    uint8_t *blocks[BLOCKS];
    for (size_t b = 0; b < BLOCKS; b++) blocks[b] = buffer(run, 2 * layer_bytes);
    int64_t *table = buffer(run, T * sizeof(int64_t)), *position = buffer(run, T * sizeof(int64_t));
    for (size_t t = 0; t < T; t++) {
        table[t] = 1;
        position[t] = (int64_t)t;
    }
    float *inv_freq = numbers(run, 1, half_P, NUMBERS_USUAL), *gain = numbers(run, 1, P, NUMBERS_USUAL);
    float *qkv = numbers(run, T, row, one->numbers);
    float *cos_TP = buffer(run, T * half_P * sizeof(float)), *sin_TP = buffer(run, T * half_P * sizeof(float));
    float *out = buffer(run, T * HEADS * P * sizeof(float));
    dm_kv_view view = {blocks, table, position, layer_bytes, one->format};
    dm_rope_angles(run->context, cos_TP, sin_TP, position, inv_freq, 1.25f, T, half_P);
    output_f32(run, "cos", cos_TP, T * half_P);
    output_f32(run, "sin", sin_TP, T * half_P);
    int norm = one->numbers != NUMBERS_HUGE;
    if (norm) dm_norm_rope(run->context, qkv, gain, cos_TP, sin_TP, 1e-6f, T, HEADS + KV_HEADS, P, row);
    output_f32(run, "rotated", qkv, T * row);
    const float *k = qkv + HEADS * P;
    dm_kv_store(run->context, &view, run->fault_T, k, k + KV_HEADS * P, T, KV_HEADS, P, row, 6);
    for (size_t b = 0; b < BLOCKS; b++) output_bytes(run, "KV block", blocks[b], 2 * layer_bytes);
    dm_attention(run->context, out, run->fault_T, qkv, &view, KV_OF_H, 0.125f, T, HEADS, KV_HEADS, P, row, 6);
    output_f32(run, "out", out, T * HEADS * P);
    attend_sequences(run, &view, qkv, T, P, row);
}
