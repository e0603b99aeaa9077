/* token_rows.c: which hosts want which tokens, and tokens' operands and sums as bytes on their way there and back. */
#include <string.h>

#include "context.h"

void dm_list_tokens(int32_t *row_NT, int32_t *count_N, const dm_buffers *buffers, size_t nodes, size_t T) {
    memset(row_NT, 0, nodes * T * sizeof(int32_t));
    for (size_t i = 0; i < buffers->picks->part_count; i++) {
        const dm_part *part = &buffers->picks->parts[i];
        int32_t *marks_T = row_NT + (size_t)part->node * T;
        const int32_t *tokens = buffers->token_N + part->first;
        for (int32_t n = 0; n < part->count; n++) marks_T[tokens[n]] = 1;
    }
    for (size_t n = 0; n < nodes; n++) { /* marks become a list in their own place: it is never longer */
        int32_t *row_T = row_NT + n * T;
        int32_t count = 0;
        for (size_t t = 0; t < T; t++) {
            if (row_T[t]) row_T[count++] = (int32_t)t;
        }
        count_N[n] = count;
    }
}

size_t dm_operand_row_bytes(const dm_operand *operand, int parts) {
    const size_t float_bytes = operand->columns * sizeof(float);
    const size_t int8_bytes = dm_divide_up(operand->columns, DM_GROUP) * (sizeof(float) + DM_GROUP);
    return (parts & DM_PART_FLOATS ? float_bytes : 0) + (parts & DM_PART_INT8 ? int8_bytes : 0);
}

void dm_pack_operand_rows(uint8_t *out, const dm_operand *operand, const int32_t *row_N, size_t N, int parts) {
    const size_t float_bytes = operand->columns * sizeof(float);
    const size_t groups = dm_divide_up(operand->columns, DM_GROUP), scale_bytes = groups * sizeof(float);
    for (size_t i = 0; i < N; i++) {
        const dm_operand row = dm_operand_from(operand, (size_t)row_N[i]);
        if (parts & DM_PART_FLOATS) {
            memcpy(out, row.x, float_bytes);
            out += float_bytes;
        }
        if (!(parts & DM_PART_INT8)) continue;
        memcpy(out, row.scale, scale_bytes);
        memcpy(out + scale_bytes, row.q, groups * DM_GROUP);
        out += scale_bytes + groups * DM_GROUP;
    }
}

static void sum_groups(int32_t *sum, const int8_t *q, size_t groups) {
    for (size_t g = 0; g < groups; g++, q += DM_GROUP) {
        int32_t total = 0;
        for (size_t i = 0; i < DM_GROUP; i++) total += q[i];
        sum[g] = total;
    }
}

void dm_unpack_operand_rows(const dm_operand *operand, const uint8_t *packed, const int32_t *row_N, size_t N,
                            int parts) {
    const size_t float_bytes = operand->columns * sizeof(float);
    const size_t groups = dm_divide_up(operand->columns, DM_GROUP), scale_bytes = groups * sizeof(float);
    for (size_t i = 0; i < N; i++) {
        const dm_operand row = dm_operand_from(operand, (size_t)row_N[i]);
        if (parts & DM_PART_FLOATS) {
            memcpy(row.x, packed, float_bytes);
            packed += float_bytes;
        }
        if (!(parts & DM_PART_INT8)) continue;
        memcpy(row.scale, packed, scale_bytes);
        memcpy(row.q, packed + scale_bytes, groups * DM_GROUP);
        packed += scale_bytes + groups * DM_GROUP;
        sum_groups(row.sum, row.q, groups);
    }
}

size_t dm_sum_rows_bound(size_t N, size_t D) { return N * dm_packed_bound(D); }

size_t dm_pack_sum_rows(uint8_t *out, const int64_t *sums_TD, const int32_t *row_N, size_t N, size_t D) {
    size_t bytes = 0;
    for (size_t i = 0; i < N; i++) bytes += dm_pack_sums(out + bytes, sums_TD + (size_t)row_N[i] * D, D);
    return bytes;
}

int dm_add_sum_rows(int64_t *sums_TD, const uint8_t *packed, size_t packed_bytes, const int32_t *row_N, size_t N,
                    size_t D) {
    size_t at = 0;
    for (size_t i = 0; i < N; i++) {
        size_t read = dm_unpack_sums(sums_TD + (size_t)row_N[i] * D, packed + at, packed_bytes - at, D, 1);
        if (read == 0) return 0;
        at += read;
    }
    return at == packed_bytes;
}
