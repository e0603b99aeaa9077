/* attention.h: a tile of queries over the position blocks of their KV head (rule 10).
 *
 * Rows are the tile's query heads, token by token. Scores have positions as lanes, values have dims as lanes; K and V
 * are read once for all rows. A block's triple (m, l, o) starts from nothing; triples are merged in ascending order.
 * Positions behind a token's own do not count, but a register block of the written tiles is loaded whole.
 */
#ifndef DM_ATTENTION_H
#define DM_ATTENTION_H
#include "row_products.h"
#ifndef DM_KEY_DOTS_H
#include "key_dots.h"
#endif
#include "attention_block.h"

/* Dims [p, p + width registers) of rows [row, row + rows): o = sum over j < count, merged if the state has begun. */
DM_INLINE void value_group(const block_work *work, float *o_RP, size_t row, size_t count, size_t p, size_t n,
                           size_t bytes, size_t rows, size_t width, column_loader load) {
    f32v sum[DM_PRODUCT_SUMS];
    next_part next = work->after_values;
    next.at = p * DM_BLOCK_POSITIONS * bytes;
    next.step = width * DM_LANES * bytes;
    for (size_t i = 0; i < rows * width; i++) sum[i] = (f32v){0};
    add_products(sum, work->score + row * DM_BLOCK_POSITIONS, DM_BLOCK_POSITIONS, work->values, 0, count, p, n,
                 work->tile->P, &next, rows, width, load);
    for (size_t r = 0; r < rows; r++) {
        float *o = o_RP + (row + r) * work->o_stride + p;
        for (size_t i = 0; i < width; i++) {
            f32v value = sum[r * width + i];
            if (work->merges) {
                const f32v before = load_f32(o + i * DM_LANES) * work->alpha[row + r];
                value = fma_lanes(value, all_f32(work->beta[row + r]), before);
            }
            store_f32(o + i * DM_LANES, value);
        }
    }
}

DM_INLINE void value_pass(const block_work *work, float *o_RP, size_t row, size_t last, size_t count, size_t rows,
                          column_loader load, size_t bytes) {
    const size_t width = DM_PRODUCT_WIDTH(rows), chunk = width * DM_LANES, P = work->tile->P;
    size_t p = 0;
    for (; p + chunk <= P; p += chunk) {
        for (size_t r = row; r < last; r += rows)
            value_group(work, o_RP, r, count, p, DM_LANES, bytes, rows, width, load);
    }
    for (; p < P; p += DM_LANES) {
        const size_t n = P - p;
        for (size_t r = row; r < last; r += rows) {
            if (n >= DM_LANES)
                value_group(work, o_RP, r, count, p, DM_LANES, bytes, rows, 1, load);
            else
                value_group(work, o_RP, r, count, p, n, bytes, rows, 1, load);
        }
    }
}

/* Rows [row, last) with the same count. `padded`: rows behind the last may be overwritten. */
DM_INLINE void value_rows(const block_work *work, float *o_RP, size_t row, size_t last, size_t count, int padded,
                          column_loader load, size_t bytes) {
    size_t rest = (last - row) % DM_PRODUCT_ROWS, whole = last - rest;
    if (padded && rest > DM_PRODUCT_ROWS / 2) {
        whole += DM_PRODUCT_ROWS;
        rest = 0;
    }
    value_pass(work, o_RP, row, whole, count, DM_PRODUCT_ROWS, load, bytes);
    if (rest >= 4) {
        value_pass(work, o_RP, whole, whole + 1, count, 4, load, bytes);
        whole += 4;
        rest -= 4;
    }
    if (rest >= 2) {
        value_pass(work, o_RP, whole, whole + 1, count, 2, load, bytes);
        whole += 2;
        rest -= 2;
    }
    if (rest > 0) value_pass(work, o_RP, whole, whole + 1, count, 1, load, bytes);
}

DM_INLINE void all_values(const block_work *work, float *o_RP, column_loader load, size_t bytes) {
    const size_t heads = work->tile->heads, shortest = row_count(work, 0);
    if (shortest == row_count(work, work->rows - 1)) {
        value_rows(work, o_RP, 0, work->rows, shortest, 1, load, bytes);
        return;
    }
    for (size_t row = 0; row < work->rows; row += heads) {
        value_rows(work, o_RP, row, row + heads, row_count(work, row), 0, load, bytes);
    }
}

/* n floats of a panel that serves all rows. */
static void widen_panel(float *panel, const uint8_t *from, const next_part *next, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        if (i % 32 == 0) fetch_bytes(next, i * sizeof(uint16_t), 64);
        for (size_t part = 0; part < 16; part += DM_LANES) {
            store_f32(panel + i + part, widen_f16((const uint16_t *)from + i + part));
        }
    }
}

static void widen_values_q8(float *panel, const uint8_t *values, const next_part *next, size_t P) {
    const size_t row_bytes = dm_round_up(P, DM_GROUP);
    for (size_t j = 0; j < DM_BLOCK_POSITIONS; j++) {
        fetch_bytes(next, j * row_bytes, row_bytes);
        for (size_t p = 0; p < P; p += DM_LANES) {
            store_f32_part(panel + j * P + p, value_q8(values, j, p, 0, DM_LANES, P), P - p);
        }
    }
}

static void scores_f32(block_work *work) {
    if (work->rows <= FEW_ROWS)
        all_scores(work, key_f32, sizeof(float));
    else
        all_scores(work, key_f32, 0);
}

static void scores_f16(block_work *work) {
    if (work->rows <= FEW_ROWS) {
        all_scores(work, key_f16, sizeof(uint16_t));
        return;
    }
    const size_t n = DM_BLOCK_POSITIONS * work->tile->P;
    widen_panel(work->panel, work->keys, &work->after_keys, n);
    work->keys = (const uint8_t *)work->panel;
    scores_f32(work);
}

static void values_f32(block_work *work, float *o_RP) {
    if (work->rows <= FEW_ROWS)
        all_values(work, o_RP, value_f32, sizeof(float));
    else
        all_values(work, o_RP, value_f32, 0);
}

static void values_f16(block_work *work, float *o_RP) {
    if (work->rows <= FEW_ROWS) {
        all_values(work, o_RP, value_f16, sizeof(uint16_t));
        return;
    }
    widen_panel(work->panel, work->values, &work->after_values, DM_BLOCK_POSITIONS * work->tile->P);
    work->values = (const uint8_t *)work->panel;
    values_f32(work, o_RP);
}
static void values_q8(block_work *work, float *o_RP) {
    const size_t q_bytes = DM_BLOCK_POSITIONS * dm_round_up(work->tile->P, DM_GROUP);
    fetch_bytes(&work->after_values, q_bytes, q_bytes / DM_GROUP * sizeof(float));
    if (work->rows <= FEW_ROWS) {
        all_values(work, o_RP, value_q8, sizeof(int8_t));
        return;
    }
    widen_values_q8(work->panel, work->values, &work->after_values, work->tile->P);
    work->values = (const uint8_t *)work->panel;
    values_f32(work, o_RP);
}

/* Blocks [first, last): each one's triple into `triples`, or, if that is NULL, merged into the state. */
DM_INLINE void attend(float *state, float *triples, const dm_attention_tile *tile, size_t first, size_t last,
                      void *scratch, int format, void (*scores)(block_work *), void (*values)(block_work *, float *)) {
    const size_t rows = tile->tokens * tile->heads, R = dm_round_up(rows, 16),
                 key_bytes = dm_key_bytes(format, tile->P);
    float *arrays = scratch;
    block_work work = {.tile = tile,
                       .rows = rows,
                       .o_stride = dm_round_up(tile->P, 16),
                       .m = arrays,
                       .l = arrays + R,
                       .alpha = arrays + 2 * R,
                       .beta = arrays + 3 * R,
                       .score = arrays + 4 * R,
                       .panel = arrays + (4 + DM_BLOCK_POSITIONS) * R};
    for (size_t i = rows; i < R; i++) work.m[i] = work.l[i] = 0.0f;
    for (size_t i = rows * DM_BLOCK_POSITIONS; i < R * DM_BLOCK_POSITIONS; i++) work.score[i] = 0.0f;
    for (size_t b = first; b < last; b++) {
        work.keys = tile->blocks[b] + tile->offset;
        work.values = work.keys + key_bytes;
        work.after_keys = next_part_at(work.values, key_bytes);
        work.after_values = next_part_at(tile->blocks[b + 1 < last ? b + 1 : b] + tile->offset, key_bytes);
        work.shortest = tile->first_position + 1 - b * DM_BLOCK_POSITIONS;
        work.merges = triples == NULL && b > 0;
        float *to = triples == NULL ? state : triples + (b - first) * dm_triple_floats(rows, tile->P);
        scores(&work);
        all_weights(&work);
        if (work.merges) {
            merge_sums(&work, to, to + R);
        } else {
            __builtin_memcpy(to, work.m, R * sizeof(float));
            __builtin_memcpy(to + R, work.l, R * sizeof(float));
        }
        values(&work, to + 2 * R);
    }
}

static void attention_f32(float *state, float *triples, const dm_attention_tile *tile, size_t first, size_t last,
                          void *scratch) {
    attend(state, triples, tile, first, last, scratch, DM_KV_F32, scores_f32, values_f32);
}

static void attention_f16(float *state, float *triples, const dm_attention_tile *tile, size_t first, size_t last,
                          void *scratch) {
    attend(state, triples, tile, first, last, scratch, DM_KV_F16, scores_f16, values_f16);
}

static void attention_q8(float *state, float *triples, const dm_attention_tile *tile, size_t first, size_t last,
                         void *scratch) {
    attend(state, triples, tile, first, last, scratch, DM_KV_Q8, scores_q8, values_q8);
}

/* Queries of f32 and f16 caches: slabs of 16 dims [R][16]. */
static int query_f32(void *queries, const float *q_P, size_t row, size_t R, size_t P) {
    for (size_t p = 0; p < P; p += DM_LANES) {
        float *to = (float *)queries + p / 16 * 16 * R + row * 16 + p % 16;
        store_f32(to, load_f32_part(q_P + p, P - p));
    }
    return 0;
}

/* One row of `count` triples into the state. */
static void attention_merge(float *state, const float *triples, size_t count, size_t row, size_t rows, size_t P) {
    const size_t R = dm_round_up(rows, 16), o_stride = dm_round_up(P, 16), stride = dm_triple_floats(rows, P);
    float m = state[row], l = state[R + row], *o_P = state + 2 * R + row * o_stride;
    for (size_t b = 0; b < count; b++, triples += stride) {
        const float block_m = triples[row], *block_o_P = triples + 2 * R + row * o_stride;
        const float max = block_m > m ? block_m : m;
        const f32v alpha = exp_f32(all_f32(m - max)), beta = exp_f32(all_f32(block_m - max));
        l = fma_lanes(all_f32(triples[R + row]), beta, l * alpha)[0];
        for (size_t p = 0; p < P; p += DM_LANES) {
            store_f32(o_P + p, fma_lanes(load_f32(block_o_P + p), beta, load_f32(o_P + p) * alpha));
        }
        m = max;
    }
    state[row] = m;
    state[R + row] = l;
}

static void attention_finish(float *out_P, const float *state, size_t row, size_t rows, size_t P) {
    const size_t R = dm_round_up(rows, 16);
    const float *o_P = state + 2 * R + row * dm_round_up(P, 16);
    const f32v l = all_f32(state[R + row]);
    for (size_t p = 0; p < P; p += DM_LANES) store_f32_part(out_P + p, load_f32(o_P + p) / l, P - p);
}

#endif
