/* cases_matrices.c: packing, and everything that multiplies with packed matrices. */
#include "cases.h"

dm_operand operand(test_run *run, size_t T, size_t columns) {
    size_t groups = dm_divide_up(columns, DM_GROUP);
    dm_operand x = {numbers(run, T, columns, run->one->numbers), buffer(run, T * groups * 32),
                    buffer(run, T * groups * sizeof(float)), buffer(run, T * groups * sizeof(int32_t)), columns};
    dm_quantize(run->context, &x, run->fault_T, T, 3);
    output_bytes(run, "q", x.q, T * groups * 32);
    output_f32(run, "scale", x.scale, T * groups);
    output_i32(run, "sum", x.sum, T * groups);
    return x;
}

float *weights(test_run *run, size_t rows, size_t columns) {
    int kind = run->one->numbers;
    return numbers(run, rows, columns, kind == NUMBERS_POISONED ? NUMBERS_USUAL : kind);
}

void *packed(test_run *run, const float *weights, const dm_matrix *matrix, size_t columns, int row_scales) {
    const int format = matrix->format;
    const size_t group = matrix->group, rows = matrix->rows;
    size_t bytes = dm_packed_bytes(format, rows, columns, group);
    void *to = buffer(run, bytes);
    size_t kept = run->buffer_count;
    float *scale_R = buffer(run, rows * sizeof(float));
    float *back = buffer(run, rows * columns * sizeof(float));
    dm_row_scales(run->context, scale_R, weights, NULL, rows, columns, columns, format, DM_SCALES_ABSMAX);
    int64_t bad =
        (int64_t)dm_pack(run->context, to, weights, row_scales ? scale_R : NULL, rows, columns, columns, format, group);
    dm_unpack(run->context, back, to, rows, columns, format, group);
    output_i64(run, "bad weights", &bad, 1);
    output_f32(run, "row scales", scale_R, rows);
    output_bytes(run, "packed", to, bytes);
    output_f32(run, "unpacked", back, rows * columns);
    free_buffers_from(run, kept);
    return to;
}

/* A matrix of random weights in the case's format. */
static dm_matrix matrix_of(test_run *run, size_t rows, size_t columns, size_t out_column, int row_scales) {
    dm_matrix matrix = {NULL, rows, out_column, run->one->format, run->one->group};
    matrix.packed = packed(run, weights(run, rows, columns), &matrix, columns, row_scales);
    return matrix;
}

void run_matrices(test_run *run) {
    const test_case *one = run->one;
    size_t stride = one->rows + 19;
    dm_operand x = operand(run, one->T, one->columns);
    dm_matrix matrices[2];
    matrices[0] = matrix_of(run, one->rows, one->columns, 0, 1);
    matrices[1] = matrix_of(run, 17, one->columns, one->rows + 2, 0);
    float *out = buffer(run, one->T * stride * sizeof(float));
    dm_matmul(run->context, out, matrices, &x, 2, one->T, stride);
    output_f32(run, "out", out, one->T * stride);
}

/* The same rows against every number of tokens up to T. */
void run_tokens(test_run *run) {
    const test_case *one = run->one;
    dm_operand x = operand(run, one->T, one->columns);
    dm_matrix matrix = matrix_of(run, one->rows, one->columns, 0, 0);
    for (size_t T = 1; T <= one->T; T++) {
        size_t kept = run->buffer_count;
        float *out = buffer(run, T * one->rows * sizeof(float));
        dm_matmul(run->context, out, &matrix, &x, 1, T, one->rows);
        output_f32(run, "out", out, T * one->rows);
        free_buffers_from(run, kept);
    }
}

/* head_dim is a multiple of 32 for quantized weights. */
void run_units(test_run *run) {
    const test_case *one = run->one;
    size_t T = one->T, D = one->rows, P = one->format >= DM_Q8 ? dm_round_up(one->columns, DM_GROUP) : one->columns;
    dm_operand x = operand(run, T, 2 * P);
    dm_matrix units[2];
    for (size_t i = 0; i < 2; i++) units[i] = matrix_of(run, D, P, 0, 1);
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_unit_sums(run->context, sums, run->fault_T, units, &x, 2, T, D, P, 2);
    output_i64(run, "sums", sums, T * D);
    dm_unit_sums(run->context, sums, run->fault_T, units, &x, 0, T, D, P, 2);
    output_i64(run, "sums of no unit", sums, T * D);
}

static void pack_part(test_run *run, void *to, const float *weights, size_t rows, size_t columns) {
    const test_case *one = run->one;
    int64_t bad = (int64_t)dm_pack(run->context, to, weights, NULL, rows, columns, columns, one->format, one->group);
    output_i64(run, "bad weights", &bad, 1);
}

void run_experts(test_run *run) {
    enum { E = 5, K = 2, WIDTH = 64, CHUNKS = 2 };
    const test_case *one = run->one;
    size_t T = one->T, D = one->columns;
    size_t rows_bytes = dm_packed_bytes(one->format, WIDTH, D, one->group);
    const dm_chunk_format alike = {one->format, one->format, one->group, one->group, 1};
    size_t chunk_bytes = dm_chunk_bytes(&alike, D, WIDTH);
    dm_operand x = operand(run, T, D);
    float *logits = numbers(run, T, E, one->numbers), *weights_TK = buffer(run, T * K * sizeof(float));
    int32_t *ids = buffer(run, T * K * sizeof(int32_t)), *offset = buffer(run, (E + 1) * sizeof(int32_t));
    int32_t *token = buffer(run, T * K * sizeof(int32_t));
    float *weight = buffer(run, T * K * sizeof(float));
    int64_t *sums = buffer(run, T * D * sizeof(int64_t));
    dm_route(run->context, ids, weights_TK, run->fault_T, logits, T, E, K, one->group != 0, 4);
    output_i32(run, "expert ids", ids, T * K);
    output_f32(run, "routing weights", weights_TK, T * K);
    dm_group_by_expert(run->context, offset, token, weight, ids, weights_TK, T, E, K);
    output_i32(run, "offsets", offset, E + 1);
    output_i32(run, "tokens", token, T * K);
    /* Every matrix begins at another row of one pool of weights. */
    const float *pool = weights(run, WIDTH + 3 * E * CHUNKS, D);
    dm_chunk chunks[E * CHUNKS];
    for (size_t c = 0; c < E * CHUNKS; c++) {
        uint8_t *bytes = buffer(run, chunk_bytes);
        pack_part(run, bytes, pool + 3 * c * D, WIDTH, D);
        pack_part(run, bytes + rows_bytes, pool + (3 * c + 1) * D, WIDTH, D);
        pack_part(run, bytes + 2 * rows_bytes, pool + (3 * c + 2) * D, D, WIDTH);
        size_t e = c / CHUNKS;
        chunks[c] = (dm_chunk){bytes, &alike, (size_t)offset[e], (size_t)(offset[e + 1] - offset[e])};
    }
    dm_experts(run->context, sums, run->fault_T, chunks, token, weight, &x, E * CHUNKS, T, D, WIDTH, 4);
    output_i64(run, "sums", sums, T * D);
    dm_experts(run->context, sums, run->fault_T, chunks, token, weight, &x, 0, T, D, WIDTH, 4);
    output_i64(run, "sums of no chunk", sums, T * D);
}
