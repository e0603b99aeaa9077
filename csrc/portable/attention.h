/* attention.h: one query head of one token over its KV head's blocks (rule 10).
 *
 * Scores have positions as lanes, values have dims as lanes. A block's triple (m, l, o) starts from nothing; triples
 * are merged in ascending order. Positions behind the token's own are not read, except that a register of 16 positions
 * is loaded whole; those lanes are masked.
 */
#ifndef DM_ATTENTION_H
#define DM_ATTENTION_H

/* The query in the form that the keys' format needs. */
typedef struct attention_query {
    const float *q_P;
    const uint32_t *pairs;
    const float *scale_G;
} attention_query;

/* score[i] = q . k_i for 16 positions of one K tile. */
typedef void (*score_tile)(float *score, const attention_query *query, const uint8_t *keys, size_t tile, size_t P);
/* Values of DM_LANES dims (n of them exist) of position j. */
typedef f32v (*value_loader)(const uint8_t *values, size_t j, size_t p, size_t n, size_t P);

DM_INLINE void score_f32(float *score, const attention_query *query, const uint8_t *keys, size_t tile, size_t P) {
    const float *key = (const float *)keys + tile * 16 * P;
    f32x16 sum = zero_f32x16();
    for (size_t p = 0; p < P; p++) {
        f32v q = all_f32(query->q_P[p]);
        for (size_t part = 0; part < DM_PARTS; part++) {
            sum.part[part] = fma_lanes(q, load_f32(key + p * 16 + part * DM_LANES), sum.part[part]);
        }
    }
    for (size_t part = 0; part < DM_PARTS; part++) store_f32(score + part * DM_LANES, sum.part[part]);
}

DM_INLINE void score_f16(float *score, const attention_query *query, const uint8_t *keys, size_t tile, size_t P) {
    const uint16_t *key = (const uint16_t *)keys + tile * 16 * P;
    f32x16 sum = zero_f32x16();
    for (size_t p = 0; p < P; p++) {
        f32v q = all_f32(query->q_P[p]);
        for (size_t part = 0; part < DM_PARTS; part++) {
            sum.part[part] = fma_lanes(q, widen_f16(key + p * 16 + part * DM_LANES), sum.part[part]);
        }
    }
    for (size_t part = 0; part < DM_PARTS; part++) store_f32(score + part * DM_LANES, sum.part[part]);
}

DM_INLINE void score_q8(float *score, const attention_query *query, const uint8_t *keys, size_t tile, size_t P) {
    size_t groups = dm_divide_up(P, DM_GROUP);
    const uint8_t *key = keys + tile * groups * DM_KEY_GROUP_BYTES;
    for (size_t part = 0; part < 16; part += DM_LANES) {
        f32v sum = {0};
        for (size_t g = 0; g < groups; g++) {
            const uint8_t *vectors = key + g * DM_KEY_GROUP_BYTES;
            i32v dot;
            dot_bytes(&dot, vectors + 4 * part, query->pairs + 16 * g, 0, 1, 0);
            f32v factor = load_f32((const float *)(vectors + 512) + part) * all_f32(query->scale_G[g]);
            sum = fma_lanes(factor, __builtin_convertvector(dot, f32v), sum);
        }
        store_f32(score + part, sum);
    }
}

DM_INLINE f32v value_f32(const uint8_t *values, size_t j, size_t p, size_t n, size_t P) {
    return load_f32_part((const float *)values + j * P + p, n);
}

DM_INLINE f32v value_f16(const uint8_t *values, size_t j, size_t p, size_t n, size_t P) {
    const uint16_t *value = (const uint16_t *)values + j * P + p;
    if (n >= DM_LANES) return widen_f16(value);
    uint16_t part[DM_LANES] = {0};
    for (size_t i = 0; i < n; i++) part[i] = value[i];
    return widen_f16(part);
}

/* Rows of int8 are padded to 32, so a whole register can be read. */
DM_INLINE f32v value_q8(const uint8_t *values, size_t j, size_t p, size_t n, size_t P) {
    (void)n;
    size_t groups = dm_divide_up(P, DM_GROUP);
    const float *scale = (const float *)(values + DM_BLOCK_POSITIONS * groups * DM_GROUP);
    i32v q = load_i8((const int8_t *)values + j * groups * DM_GROUP + p);
    return all_f32(scale[j * groups + p / DM_GROUP]) * __builtin_convertvector(q, f32v);
}

/* Scores of `count` written positions, scaled; the others are -infinity. Returns the largest. */
DM_INLINE float block_scores(float score[DM_BLOCK_POSITIONS], const attention_query *query, const uint8_t *keys,
                             size_t count, float score_scale, size_t P, score_tile compute) {
    f32v best = all_f32(-__builtin_inff());
    for (size_t first = 0; first < DM_BLOCK_POSITIONS; first += 16) {
        if (first < count) compute(score + first, query, keys, first / 16, P);
        for (size_t i = first; i < first + 16; i += DM_LANES) {
            int32_t present = (int32_t)(i < count ? count - i : 0);
            f32v scaled = load_f32(score + i) * score_scale;
            scaled = select_f32(lane_numbers() < present, scaled, all_f32(-__builtin_inff()));
            store_f32(score + i, scaled);
            best = max_f32(best, scaled);
        }
    }
    return highest_f32(best);
}

/* p = exp(s - m) in place of the scores, masked ones +0; returns their 16-lane sum. */
DM_INLINE float block_weights(float score[DM_BLOCK_POSITIONS], float max, size_t count) {
    f32x16 sum = zero_f32x16();
    for (size_t first = 0; first < DM_BLOCK_POSITIONS; first += 16) {
        for (size_t part = 0; part < DM_PARTS; part++) {
            size_t i = first + part * DM_LANES;
            int32_t present = (int32_t)(i < count ? count - i : 0);
            f32v weight = select_f32(lane_numbers() < present, exp_f32(load_f32(score + i) - max), (f32v){0});
            store_f32(score + i, weight);
            sum.part[part] += weight;
        }
    }
    return sum_tree(sum);
}

/* o[p] = fma(weight_j, v_j[p], o[p]), j ascending. `chains` registers at a time hide the latency of fma. */
DM_INLINE void weigh_values(float *o_P, const float *weight, const uint8_t *values, size_t count, size_t p,
                            size_t chains, size_t P, value_loader load) {
    f32v sum[4] = {{0}, {0}, {0}, {0}};
    for (size_t j = 0; j < count; j++) {
        f32v factor = all_f32(weight[j]);
        for (size_t i = 0; i < chains; i++) {
            size_t first = p + i * DM_LANES;
            sum[i] = fma_lanes(factor, load(values, j, first, P - first, P), sum[i]);
        }
    }
    for (size_t i = 0; i < chains; i++) store_f32_part(o_P + p + i * DM_LANES, sum[i], P - p - i * DM_LANES);
}

DM_INLINE void block_values(float *o_P, const float *weight, const uint8_t *values, size_t count, size_t P,
                            value_loader load) {
    size_t p = 0;
    for (; p + 4 * DM_LANES <= P; p += 4 * DM_LANES) weigh_values(o_P, weight, values, count, p, 4, P, load);
    for (; p < P; p += DM_LANES) weigh_values(o_P, weight, values, count, p, 1, P, load);
}

/* (m, l, o) takes in the block's triple. */
DM_INLINE void merge_block(float *o_P, float *m, float *l, const float *block_o_P, float block_m, float block_l,
                           size_t P) {
    float max = block_m > *m ? block_m : *m;
    float alpha = exp_one(*m - max);
    float beta = exp_one(block_m - max);
    *l = fma_lanes(all_f32(block_l), all_f32(beta), all_f32(*l * alpha))[0];
    for (size_t p = 0; p < P; p += DM_LANES) {
        f32v o = load_f32_part(o_P + p, P - p) * alpha;
        store_f32_part(o_P + p, fma_lanes(load_f32_part(block_o_P + p, P - p), all_f32(beta), o), P - p);
    }
    *m = max;
}

DM_INLINE void attend(float *out_P, const attention_query *query, const dm_attention_job *job, int format,
                      float *scratch, score_tile compute, value_loader load) {
    size_t P = job->P;
    float *score = scratch;
    float *block_o_P = scratch + DM_BLOCK_POSITIONS;
    float m = 0.0f, l = 0.0f;
    size_t written = (size_t)job->position + 1;
    for (size_t b = 0; b * DM_BLOCK_POSITIONS < written; b++) {
        size_t count = written - b * DM_BLOCK_POSITIONS;
        count = count < DM_BLOCK_POSITIONS ? count : DM_BLOCK_POSITIONS;
        const uint8_t *keys = job->blocks[b] + job->offset;
        const uint8_t *values = keys + dm_key_bytes(format, P);
        float block_m = block_scores(score, query, keys, count, job->score_scale, P, compute);
        float block_l = block_weights(score, block_m, count);
        block_values(b == 0 ? out_P : block_o_P, score, values, count, P, load);
        if (b == 0) {
            m = block_m;
            l = block_l;
        } else {
            merge_block(out_P, &m, &l, block_o_P, block_m, block_l, P);
        }
    }
    for (size_t p = 0; p < P; p++) out_P[p] /= l;
}

static int attention_f32(float *out_P, const float *q_P, const dm_attention_job *job, void *scratch) {
    attention_query query = {.q_P = q_P};
    attend(out_P, &query, job, DM_KV_F32, scratch, score_f32, value_f32);
    return 0;
}

static int attention_f16(float *out_P, const float *q_P, const dm_attention_job *job, void *scratch) {
    attention_query query = {.q_P = q_P};
    attend(out_P, &query, job, DM_KV_F16, scratch, score_f16, value_f16);
    return 0;
}

static int attention_q8(float *out_P, const float *q_P, const dm_attention_job *job, void *scratch) {
    size_t groups = dm_divide_up(job->P, DM_GROUP);
    float *scale_G = (float *)scratch + DM_BLOCK_POSITIONS + groups * DM_GROUP;
    int32_t *sum_G = (int32_t *)(scale_G + groups);
    uint32_t *pairs = (uint32_t *)(sum_G + groups);
    int8_t *q = (int8_t *)(pairs + 16 * groups);
    int fault = quantize(q, scale_G, sum_G, q_P, job->P);
    widen_pairs(pairs, q, 8 * groups);
    attention_query query = {.pairs = pairs, .scale_G = scale_G};
    attend(out_P, &query, job, DM_KV_Q8, scratch, score_q8, value_q8);
    return fault;
}

#endif
