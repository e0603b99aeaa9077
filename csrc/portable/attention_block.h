/* attention_block.h: one block of positions for a tile of queries: scores, then weights (rule 10). */
#ifndef DM_ATTENTION_BLOCK_H
#define DM_ATTENTION_BLOCK_H

/* So many rows read K and V as they are; for more, a block is widened to floats once. */
#define FEW_ROWS 8

/* One block at work: its parts, what is fetched while each of them is read, and arrays per row. */
typedef struct block_work {
    const dm_attention_tile *tile;
    const uint8_t *keys, *values;
    next_part after_keys, after_values;
    size_t rows, o_stride, shortest;
    float *score, *m, *l, *alpha, *beta, *panel;
    int merges;
} block_work;

/* Positions of the block that count for a row. */
DM_INLINE size_t row_count(const block_work *work, size_t row) {
    const size_t count = work->shortest + row / work->tile->heads;
    return count < DM_BLOCK_POSITIONS ? count : DM_BLOCK_POSITIONS;
}

/* Rows [row, last) in groups of `rows`, for all chunks of positions that count. */
DM_INLINE void score_pass(const block_work *work, size_t row, size_t last, size_t rows, column_loader load,
                          size_t bytes) {
    const size_t width = DM_PRODUCT_WIDTH(rows), chunk = width * DM_LANES, P = work->tile->P;
    const size_t reach = row_count(work, work->rows - 1), slab = dm_round_up(work->rows, 16) * 16;
    for (size_t c = 0; c < reach; c += chunk) {
        next_part next = work->after_keys;
        next.at = c * P * bytes;
        next.step = chunk * bytes;
        for (size_t r = row; r < last; r += rows) {
            const float *q = (const float *)work->tile->queries + r * 16;
            f32v sum[DM_PRODUCT_SUMS];
            for (size_t i = 0; i < rows * width; i++) sum[i] = (f32v){0};
            for (size_t p = 0; p < P; p += 16, q += slab) {
                add_products(sum, q, 16, work->keys, p, p + 16 < P ? p + 16 : P, c, DM_LANES, P, &next, rows, width,
                             load);
            }
            for (size_t i = 0; i < rows * width; i++) {
                store_f32(work->score + (r + i / width) * DM_BLOCK_POSITIONS + c + i % width * DM_LANES, sum[i]);
            }
        }
    }
}

/* Queries and weights are padded with rows of zeros, so a remainder takes the next power of two. */
DM_INLINE void all_scores(const block_work *work, column_loader load, size_t bytes) {
    const size_t rest = work->rows % DM_PRODUCT_ROWS;
    const size_t whole = work->rows - rest + (rest > DM_PRODUCT_ROWS / 2 ? DM_PRODUCT_ROWS : 0);
    score_pass(work, 0, whole, DM_PRODUCT_ROWS, load, bytes);
    if (whole >= work->rows) return;
    if (rest > 2)
        score_pass(work, whole, whole + 1, 4, load, bytes);
    else if (rest == 2)
        score_pass(work, whole, whole + 1, 2, load, bytes);
    else
        score_pass(work, whole, whole + 1, 1, load, bytes);
}

static void scores_q8(block_work *work) {
    const size_t P = work->tile->P, tile_bytes = dm_key_bytes(DM_KV_Q8, P) / 4, R = dm_round_up(work->rows, 16);
    const size_t reach = row_count(work, work->rows - 1);
    for (size_t c = 0; c < reach; c += 16) {
        const uint8_t *tile = work->keys + c / 16 * tile_bytes;
        next_part next = work->after_keys;
        next.at = c / 16 * tile_bytes;
        size_t r = 0;
        for (; r + DM_PRODUCT_ROWS / 2 < work->rows; r += DM_PRODUCT_ROWS) {
            dot_keys(work->score + r * DM_BLOCK_POSITIONS + c, work->tile->queries, r, R, tile, P, &next,
                     DM_PRODUCT_ROWS);
        }
        for (; r < work->rows; r++) {
            dot_keys(work->score + r * DM_BLOCK_POSITIONS + c, work->tile->queries, r, R, tile, P, &next, 1);
        }
    }
}

/* Of a register of positions from `first` on, those that count; `other` in the place of the rest. */
DM_INLINE f32v masked(f32v x, size_t first, size_t count, float other) {
    const int32_t present = (int32_t)(first < count ? count - first : 0);
    return select_f32(lane_numbers() < present, x, all_f32(other));
}

/* One row: p = exp(s - m) in place of the scores, its maximum m and 16-lane sum l. */
DM_INLINE void weigh_row(const block_work *work, size_t row, size_t count) {
    enum { REGISTERS = DM_BLOCK_POSITIONS / DM_LANES };
    float *score = work->score + row * DM_BLOCK_POSITIONS;
    f32v weight[REGISTERS], best = all_f32(-__builtin_inff());
    for (size_t i = 0; i < REGISTERS; i++) {
        weight[i] = load_f32(score + i * DM_LANES) * work->tile->score_scale;
        if (count < DM_BLOCK_POSITIONS) weight[i] = masked(weight[i], i * DM_LANES, count, -__builtin_inff());
        best = max_f32(best, weight[i]);
    }
    const float m = highest_f32(best);
    f32x16 sum = zero_f32x16();
    for (size_t i = 0; i < REGISTERS; i++) {
        weight[i] = exp_f32(weight[i] - m);
        if (count < DM_BLOCK_POSITIONS) weight[i] = masked(weight[i], i * DM_LANES, count, 0.0f);
        store_f32(score + i * DM_LANES, weight[i]);
        sum.part[i % DM_PARTS] += weight[i];
    }
    work->m[row] = m;
    work->l[row] = sum_tree(sum);
}

static void all_weights(const block_work *work) {
    for (size_t row = 0; row < work->rows; row++) {
        const size_t count = row_count(work, row);
        if (count == DM_BLOCK_POSITIONS)
            weigh_row(work, row, DM_BLOCK_POSITIONS);
        else
            weigh_row(work, row, count);
    }
}

/* The state's m and l take in the block's; alpha and beta of every row are kept for o. */
static void merge_sums(const block_work *work, float *m_R, float *l_R) {
    for (size_t r = 0; r < work->rows; r += DM_LANES) {
        const f32v m = load_f32(m_R + r), block_m = load_f32(work->m + r);
        const f32v max = max_f32(m, block_m);
        const f32v alpha = exp_f32(m - max), beta = exp_f32(block_m - max);
        store_f32(work->alpha + r, alpha);
        store_f32(work->beta + r, beta);
        store_f32(l_R + r, fma_lanes(load_f32(work->l + r), beta, load_f32(l_R + r) * alpha));
        store_f32(m_R + r, max);
    }
}

#endif
