/* matmul_int.h: q4 and q8 weights by byte dot products: per 32 columns one exact int32 dot product per row, one
 * conversion and one fma (rule 6).
 *
 * The level says how bytes are multiplied: group_weights, load_weights, dot_tokens. Work goes by strips of registers of
 * rows, which share every load of activations: DM_STRIP of them for several tokens, DM_STRIP_ONE for a single one.
 *
 * A strip's tiles lie far apart, each in a run of tiles of its own. One token takes no longer than its weights take to
 * arrive, and memory delivers a few long runs side by side faster than one (`dist-moe bench` tries that, too).
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

/* So far ahead of its vectors each run of tiles is asked for (256 to 4096 tried: benchmarks/matmul.py). */
#define PREFETCH_BYTES 1024

typedef struct int_job {
    const uint8_t *operand;
    size_t groups, groups_per_scale, scale_bytes, tile_bytes;
    size_t apart; /* bytes between the tiles of a strip */
} int_job;

/* What is asked for next, and up to where. */
typedef struct prefetcher {
    const uint8_t *at, *due;
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

/* So many bytes more of each of the strip's tiles. */
DM_INLINE void prefetch_more(prefetcher *ahead, const int_job *job, size_t tiles, size_t bytes) {
    ahead->due += bytes;
    for (; ahead->at < ahead->due; ahead->at += 64) {
        for (size_t i = 0; i < tiles; i++) __builtin_prefetch(ahead->at + i * job->apart, 0, 3);
    }
}

DM_INLINE prefetcher start_prefetch(const uint8_t *packed, const int_job *job, size_t tiles) {
    prefetcher ahead = {packed, packed};
    prefetch_more(&ahead, job, tiles, job->scale_bytes + PREFETCH_BYTES);
    return ahead;
}

/* Where register r of a strip has its rows, in bytes of vectors or of scales. */
DM_INLINE size_t strip_offset(size_t r, size_t apart, size_t register_bytes) {
    return r / DM_PARTS * apart + r % DM_PARTS * register_bytes;
}

/* sum[i][r] += scale[r] * scale_x[i] * (32 columns of register r times token t + i), for n of the operand's tokens. */
DM_INLINE void group_tokens(f32v *sum, const group_weights *weights, const f32v *scale, const uint8_t *operand,
                            size_t t, size_t tokens, size_t n, size_t registers, int format) {
    const int32_t *start = (const int32_t *)operand + t;
    const float *scale_x = (const float *)operand + tokens + t;
    i32v dot[DOT_REGISTERS];
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
    const size_t scale_step = job->scale_bytes / job->groups;
    const uint8_t *vectors = tile + job->scale_bytes, *scales = tile, *operand = job->operand;
    prefetcher next = *ahead;
    size_t left = job->groups_per_scale;
    for (size_t i = 0; i < tokens * registers; i++) sum[i] = (f32v){0};
    for (size_t g = 0; g < job->groups; g++) {
        group_weights weights[DM_STRIP_ONE];
        f32v scale[DM_STRIP_ONE];
        prefetch_more(&next, job, tiles, group_bytes + scale_step);
        for (size_t r = 0; r < registers; r++) {
            load_weights(&weights[r], vectors + strip_offset(r, job->apart, 4 * DM_LANES), format);
            scale[r] = widen_f16((const uint16_t *)(scales + strip_offset(r, job->apart, 2 * DM_LANES)));
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

/* Tile i of the strip has rows [row + i * rows_apart, ...). */
DM_INLINE void store_strip(float *out_TR, const f32v *sum, size_t tokens, size_t row, size_t rows_apart, size_t rows,
                           size_t out_stride, size_t registers) {
    for (size_t t = 0; t < tokens; t++) {
        for (size_t r = 0; r < registers; r++) {
            size_t at = row + r / DM_PARTS * rows_apart + r % DM_PARTS * DM_LANES;
            if (at < rows) store_f32_part(out_TR + t * out_stride + at, sum[t * registers + r], rows - at);
        }
    }
}

/* All rows, a strip at a time: its tiles come from so many runs of adjacent tiles, which memory delivers faster than
 * one run. */
DM_INLINE void int_rows(float *out_TR, const uint8_t *packed, int_job *job, size_t tokens, size_t step, size_t rows,
                        size_t out_stride, size_t registers, int format) {
    f32v sum[DM_TOKEN_BLOCK * DM_STRIP];
    const size_t tiles = dm_divide_up(rows, 16), runs = registers / DM_PARTS, run = tiles / runs;
    job->apart = run * job->tile_bytes;
    prefetcher ahead = start_prefetch(packed, job, runs);
    for (size_t i = 0; i < run; i++) {
        int_strip(sum, packed + i * job->tile_bytes, &ahead, job, tokens, step, registers, format);
        store_strip(out_TR, sum, tokens, 16 * i, 16 * run, rows, out_stride, registers);
    }
    if (run * runs < tiles) ahead = start_prefetch(packed + run * runs * job->tile_bytes, job, 1);
    for (size_t i = run * runs; i < tiles; i++) {
        int_strip(sum, packed + i * job->tile_bytes, &ahead, job, tokens, step, DM_PARTS, format);
        store_strip(out_TR, sum, tokens, 16 * i, 0, rows, out_stride, DM_PARTS);
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
            case 1: int_rows(out, packed, &job, 1, 1, rows, out_stride, DM_STRIP_ONE, format); break;
            case 2: int_rows(out, packed, &job, 2, 2, rows, out_stride, DM_STRIP, format); break;
            case 3: int_rows(out, packed, &job, 3, 3, rows, out_stride, DM_STRIP, format); break;
            default: int_rows(out, packed, &job, tokens, step, rows, out_stride, DM_STRIP, format);
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
