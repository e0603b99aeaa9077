/* matmul_int.h: q4 and q8 weights by byte dot products: per 32 columns one exact int32 dot product per row, one
 * conversion and one fma (rule 6).
 *
 * The level says how bytes are multiplied: group_weights, load_weights, dot_tokens. Work goes by strips of DM_STRIP
 * registers of rows, which share every load of activations: two tiles of 16 lanes, or the halves of one tile.
 *
 * The operand of up to DM_TOKEN_BLOCK tokens is first copied in the order of use:
 *
 *   per 32 columns: int32 start [n], float scale [n], int8 q [n][32]
 *
 * start = -offset * sum of the activations: the dot product's first value, which takes the weights' offset (8 or 128)
 * away. A strip's weights are loaded once for all n tokens.
 */
#ifndef DM_X86_MATMUL_INT_H
#define DM_X86_MATMUL_INT_H

#define OPERAND_BYTES (DM_GROUP + 8) /* of one token, per 32 columns */
#define STRIP_TILES (DM_STRIP / DM_PARTS)

/* Each tile's vectors are asked for so far ahead, on into the next tiles (256 to 2048 tried with benchmarks/matmul.py).
 */
#define PREFETCH_BYTES 768

typedef struct int_job {
    const uint8_t *operand;
    size_t groups, groups_per_scale, scale_bytes, tile_bytes;
} int_job;

/* The vectors that are asked for next, and how many groups are left in their tile. */
typedef struct prefetcher {
    const uint8_t *vectors;
    size_t left;
} prefetcher;

/* Tokens [first, first + n) in the order of use. */
DM_INLINE void pack_operand(uint8_t *to, const dm_rows *x, size_t first, size_t n, size_t groups, int32_t offset) {
    for (size_t i = 0; i < n; i++) {
        const int8_t *q = x->q + (first + i) * x->q_stride;
        const float *scale = x->scale + (first + i) * x->group_stride;
        const int32_t *sum = x->sum + (first + i) * x->group_stride;
        uint8_t *group = to;
        for (size_t g = 0; g < groups; g++, group += n * OPERAND_BYTES) {
            int32_t start = -offset * sum[g];
            __builtin_memcpy(group + 4 * i, &start, 4);
            __builtin_memcpy(group + 4 * (n + i), &scale[g], 4);
            __builtin_memcpy(group + 8 * n + DM_GROUP * i, q + g * DM_GROUP, DM_GROUP);
        }
    }
}

DM_INLINE void prefetch(const uint8_t *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

/* One group of each of the strip's tiles. */
DM_INLINE void prefetch_group(prefetcher *ahead, const int_job *job, size_t tiles, size_t group_bytes) {
    for (size_t i = 0; i < tiles; i++) prefetch(ahead->vectors + i * job->tile_bytes, group_bytes);
    ahead->vectors += group_bytes;
    if (--ahead->left == 0) {
        ahead->vectors += tiles * job->tile_bytes - job->groups * group_bytes;
        ahead->left = job->groups;
    }
}

/* Where register r of a strip has its rows, in bytes of vectors or of scales. */
DM_INLINE size_t strip_offset(size_t r, size_t tile_bytes, size_t register_bytes) {
    return r / DM_PARTS * tile_bytes + r % DM_PARTS * register_bytes;
}

/* sum[i][r] += scale[r] * scale_x[i] * (32 columns of register r times token t + i), for n of the operand's tokens. */
DM_INLINE void group_tokens(f32v *sum, const group_weights *weights, const f32v *scale, const uint8_t *operand,
                            size_t t, size_t tokens, size_t n, size_t registers, int format) {
    const int32_t *start = (const int32_t *)operand + t;
    const float *scale_x = (const float *)operand + tokens + t;
    i32v dot[8 * DM_STRIP];
    dot_tokens(dot, weights, (const int8_t *)operand + 8 * tokens + DM_GROUP * t, start, n, registers, format);
    for (size_t i = 0; i < n; i++) {
        for (size_t r = 0; r < registers; r++) {
            f32v *to = sum + (t + i) * registers + r;
            f32v product = __builtin_convertvector(dot[i * registers + r], f32v);
            *to = fma_lanes(scale[r] * all_f32(scale_x[i]), product, *to);
        }
    }
}

/* One strip of `registers` against all tokens, `step` at a time. */
DM_INLINE void int_strip(f32v *sum, const uint8_t *tile, prefetcher *ahead, const int_job *job, size_t tokens,
                         size_t step, size_t registers, int format) {
    const size_t group_bytes = format == DM_Q4 ? 256 : 512, tiles = registers / DM_PARTS;
    const uint8_t *vectors = tile + job->scale_bytes, *scales = tile, *operand = job->operand;
    prefetcher next = *ahead;
    size_t left = job->groups_per_scale;
    for (size_t i = 0; i < tokens * registers; i++) sum[i] = (f32v){0};
    for (size_t g = 0; g < job->groups; g++) {
        group_weights weights[DM_STRIP];
        f32v scale[DM_STRIP];
        prefetch_group(&next, job, tiles, group_bytes);
        for (size_t i = 0; i < tiles; i++) prefetch(scales + (tiles + i) * job->tile_bytes, 1);
        for (size_t r = 0; r < registers; r++) {
            load_weights(&weights[r], vectors + strip_offset(r, job->tile_bytes, 4 * DM_LANES), format);
            scale[r] = widen_f16((const uint16_t *)(scales + strip_offset(r, job->tile_bytes, 2 * DM_LANES)));
        }
        size_t t = 0;
        for (; t + step <= tokens; t += step)
            group_tokens(sum, weights, scale, operand, t, tokens, step, registers, format);
        if (step > 4 && (tokens & 4)) {
            group_tokens(sum, weights, scale, operand, t, tokens, 4, registers, format);
            t += 4;
        }
        if (step > 2 && step != 3 && (tokens & 2)) {
            group_tokens(sum, weights, scale, operand, t, tokens, 2, registers, format);
            t += 2;
        }
        if (step > 1 && step != 3 && (tokens & 1))
            group_tokens(sum, weights, scale, operand, t, tokens, 1, registers, format);
        vectors += group_bytes;
        operand += tokens * OPERAND_BYTES;
        if (--left == 0) {
            scales += 16 * sizeof(uint16_t);
            left = job->groups_per_scale;
        }
    }
    *ahead = next;
}

DM_INLINE void store_strip(float *out_TR, const f32v *sum, size_t tokens, size_t rows, size_t out_stride,
                           size_t registers) {
    for (size_t t = 0; t < tokens; t++) {
        for (size_t r = 0; r < registers && r * DM_LANES < rows; r++) {
            size_t row = r * DM_LANES;
            store_f32_part(out_TR + t * out_stride + row, sum[t * registers + r], rows - row);
        }
    }
}

/* Asks for the scales of the first tiles and the first PREFETCH_BYTES of their vectors. */
DM_INLINE prefetcher start_prefetch(const uint8_t *packed, const int_job *job, size_t tiles, size_t group_bytes) {
    prefetcher ahead = {packed + job->scale_bytes, job->groups};
    for (size_t i = 0; i < tiles; i++) prefetch(packed + i * job->tile_bytes, job->scale_bytes);
    for (size_t i = 0; i < PREFETCH_BYTES; i += group_bytes) prefetch_group(&ahead, job, tiles, group_bytes);
    return ahead;
}

/* All rows, a strip at a time. */
DM_INLINE void int_rows(float *out_TR, const uint8_t *packed, const int_job *job, size_t tokens, size_t step,
                        size_t rows, size_t out_stride, int format) {
    f32v sum[DM_TOKEN_BLOCK * DM_STRIP];
    prefetcher ahead = start_prefetch(packed, job, STRIP_TILES, format == DM_Q4 ? 256 : 512);
    size_t row = 0;
    for (; row + 16 * (STRIP_TILES - 1) < rows; row += 16 * STRIP_TILES) {
        int_strip(sum, packed + row / 16 * job->tile_bytes, &ahead, job, tokens, step, DM_STRIP, format);
        store_strip(out_TR + row, sum, tokens, rows - row, out_stride, DM_STRIP);
    }
    if (row < rows) {
        int_strip(sum, packed + row / 16 * job->tile_bytes, &ahead, job, tokens, step, DM_PARTS, format);
        store_strip(out_TR + row, sum, tokens, rows - row, out_stride, DM_PARTS);
    }
}

DM_INLINE void matmul_int(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                          size_t out_stride, size_t group, int format, uint8_t *scratch) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP);
    int_job job = {.operand = scratch,
                   .groups = groups,
                   .groups_per_scale = group == 0 ? groups : group / DM_GROUP,
                   .scale_bytes = dm_scale_bytes(x->columns, group),
                   .tile_bytes = dm_tile_bytes(format, x->columns, group)};
    for (size_t first = 0; first < T; first += DM_TOKEN_BLOCK) {
        const size_t tokens = T - first < DM_TOKEN_BLOCK ? T - first : DM_TOKEN_BLOCK;
        float *out = out_TR + first * out_stride;
        pack_operand(scratch, x, first, tokens, groups, format == DM_Q4 ? 8 : 128);
        const size_t step = format == DM_Q4 ? DOT_TOKENS_Q4 : DOT_TOKENS_Q8;
        switch (tokens) {
            case 1: int_rows(out, packed, &job, 1, 1, rows, out_stride, format); break;
            case 2: int_rows(out, packed, &job, 2, 2, rows, out_stride, format); break;
            case 3: int_rows(out, packed, &job, 3, 3, rows, out_stride, format); break;
            default: int_rows(out, packed, &job, tokens, step, rows, out_stride, format);
        }
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_int(out_TR, packed, x, T, rows, out_stride, group, DM_Q8, scratch);
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    matmul_int(out_TR, packed, x, T, rows, out_stride, group, DM_Q4, scratch);
}

#endif
