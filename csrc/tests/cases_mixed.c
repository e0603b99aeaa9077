/* cases_mixed.c: matrices, units and chunks of several formats and groups in one call. The case's format and group are
 * those of the first; the others follow in turn. */
#include "cases.h"

#include <string.h>

enum { LISTED = 5, UNITS = 4, CHUNKS = 6, WIDTH = 64 };

static int format_of(const test_run *run, size_t i) { return (int)(((size_t)run->one->format + i) % DM_FORMAT_COUNT); }

static size_t group_of(const test_run *run, size_t i) { return (run->one->group + 32 * i) % 160; }

static dm_matrix matrix_of(test_run *run, size_t i, size_t rows, size_t columns, size_t out_column) {
    dm_matrix matrix = {NULL, rows, out_column, format_of(run, i), group_of(run, i)};
    matrix.packed = packed(run, weights(run, rows, columns), &matrix, columns, 0);
    return matrix;
}

static void multiply(test_run *run, const dm_operand *x) {
    const size_t rows[LISTED] = {run->one->rows, 17, 160, 1, 48}, T = run->one->T;
    dm_matrix matrices[LISTED];
    size_t stride = 0;
    for (size_t i = 0; i < LISTED; i++) {
        matrices[i] = matrix_of(run, i, rows[i], x->columns, stride);
        stride += rows[i];
    }
    float *out = buffer(run, T * stride * sizeof(float));
    dm_matmul(run->context, out, matrices, x, LISTED, T, stride);
    output_f32(run, "out", out, T * stride);
}

static void add_units(test_run *run) {
    const size_t T = run->one->T, D = run->one->rows, P = dm_round_up(run->one->columns, DM_GROUP);
    const dm_operand x = operand(run, T, UNITS * P);
    dm_matrix units[UNITS];
    for (size_t i = 0; i < UNITS; i++) units[i] = matrix_of(run, i, D, P, 0);
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_unit_sums(run->context, sums, run->fault_T, units, &x, UNITS, T, D, P, 2);
    output_i64(run, "sums of units", sums, T * D);
}

/* Gate, up and down in a buffer of exactly their size. */
static void *chunk_of(test_run *run, const dm_chunk_format *how, size_t D) {
    const dm_matrix rows = {NULL, WIDTH, 0, how->format, how->group},
                    down = {NULL, D, 0, how->down_format, how->down_group};
    const size_t rows_bytes = dm_packed_bytes(how->format, WIDTH, D, how->group);
    uint8_t *bytes = buffer(run, dm_chunk_bytes(how, D, WIDTH));
    const size_t kept = run->buffer_count;
    memcpy(bytes, packed(run, weights(run, WIDTH, D), &rows, D, 0), rows_bytes);
    memcpy(bytes + rows_bytes, packed(run, weights(run, WIDTH, D), &rows, D, 0), rows_bytes);
    memcpy(bytes + 2 * rows_bytes, packed(run, weights(run, D, WIDTH), &down, WIDTH, 0),
           dm_packed_bytes(how->down_format, D, WIDTH, how->down_group));
    free_buffers_from(run, kept);
    return bytes;
}

/* Every token, then every second one, in turn. */
static void add_chunks(test_run *run, const dm_operand *x) {
    const size_t T = run->one->T, D = x->columns, half = (T + 1) / 2;
    int32_t *token = buffer(run, (T + half) * sizeof(int32_t));
    for (size_t t = 0; t < T; t++) token[t] = (int32_t)t;
    for (size_t t = 0; t < half; t++) token[T + t] = (int32_t)(2 * t);
    const float *weight = numbers(run, T + half, 1, NUMBERS_USUAL);
    dm_chunk_format formats[CHUNKS];
    dm_chunk chunks[CHUNKS];
    for (size_t c = 0; c < CHUNKS; c++) {
        formats[c] = (dm_chunk_format){format_of(run, c), format_of(run, c / 4 + 3 * c + 1), group_of(run, c),
                                       group_of(run, c + 2), 1};
        chunks[c] = (dm_chunk){chunk_of(run, &formats[c], D), &formats[c], c % 2 ? T : 0, c % 2 ? half : T};
    }
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_experts(run->context, sums, run->fault_T, chunks, token, weight, x, CHUNKS, T, D, WIDTH, 4);
    output_i64(run, "sums of chunks", sums, T * D);
}

void run_mixed(test_run *run) {
    const dm_operand x = operand(run, run->one->T, run->one->columns);
    multiply(run, &x);
    add_units(run);
    add_chunks(run, &x);
}
