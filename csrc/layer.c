/* layer.c: each half of a layer from the residual to this rank's sums, and the pieces that a half is made of.
 *
 *   attention   norm | q k v, norm and rotation per head, cache, attention, o_proj
 *   experts     norm, router | the step's choices by expert, this rank's chunks of them
 *
 * At | a half can be cut: before it each token needs its residual alone, after it the operands of all tokens.
 * A dense MLP is one expert that every token picks with weight 1.
 */
#include "context.h"

void dm_norm_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const float *norm_D,
                    size_t first, size_t count, int32_t layer) {
    const dm_operand normed = dm_operand_from(buffers->normed, first);
    dm_rmsnorm(context, normed.x, buffers->x_TD + first * sizes->D, norm_D, sizes->eps, count, sizes->D);
    if (dm_is_quantized(sizes->format)) dm_quantize(context, &normed, buffers->fault_T + first, count, layer);
}

void dm_attend(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const dm_attention_layer *weights,
               const dm_kv_view *cache, size_t T) {
    const size_t h = sizes->h, g = sizes->g, P = sizes->P, row = (h + 2 * g) * P;
    const int32_t layer = weights->layer;
    float *q_ThP = buffers->qkv_TR, *k_TgP = q_ThP + h * P, *v_TgP = k_TgP + g * P;
    dm_kv_view here = *cache;
    here.layer_offset = weights->cache_offset;
    dm_matmul(context, q_ThP, weights->qkv, buffers->normed, h + 2 * g, T, row, sizes->format, sizes->group);
    if (weights->qkv_bias_R != NULL) dm_add_bias(context, q_ThP, weights->qkv_bias_R, T, row, row);
    dm_norm_rope(context, q_ThP, weights->q_norm_P, buffers->cos_TP, buffers->sin_TP, sizes->eps, T, h, P, row);
    dm_norm_rope(context, k_TgP, weights->k_norm_P, buffers->cos_TP, buffers->sin_TP, sizes->eps, T, g, P, row);
    dm_kv_store(context, &here, buffers->fault_T, k_TgP, v_TgP, T, g, P, row, layer);
    dm_attention(context, buffers->attended->x, buffers->fault_T, q_ThP, &here, sizes->kv_of_h, sizes->score_scale, T,
                 h, g, P, row, layer);
    if (dm_is_quantized(sizes->format)) dm_quantize(context, buffers->attended, buffers->fault_T, T, layer);
    dm_unit_sums(context, buffers->sums_TD, buffers->fault_T, weights->o_units, buffers->attended, h, T, sizes->D, P,
                 sizes->format, sizes->output_group, layer);
}

static void take_all_tokens(const dm_buffers *buffers, size_t T) {
    buffers->offset_E1[0] = 0;
    buffers->offset_E1[1] = (int32_t)T;
    for (size_t t = 0; t < T; t++) {
        buffers->token_N[t] = (int32_t)t;
        buffers->weight_N[t] = 1.0f;
    }
}

void dm_route_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t first, size_t count) {
    if (weights->router == NULL) return;
    const size_t E = weights->experts, K = sizes->K;
    const dm_operand normed = dm_operand_from(buffers->normed, first);
    float *router_TE = buffers->router_TE + first * E;
    dm_matmul(context, router_TE, weights->router, &normed, 1, count, E, sizes->router_format, 0);
    dm_route(context, buffers->ids_TK + first * K, buffers->weights_TK + first * K, buffers->fault_T + first, router_TE,
             count, E, K, sizes->norm_topk_prob, weights->layer);
}

void dm_group_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t T) {
    if (weights->router == NULL)
        take_all_tokens(buffers, T);
    else
        dm_group_by_expert(context, buffers->offset_E1, buffers->token_N, buffers->weight_N, buffers->ids_TK,
                           buffers->weights_TK, T, weights->experts, sizes->K);
}

static size_t add_chunk(dm_chunk *chunks, size_t count, const dm_experts_layer *weights, const int32_t *offset_E1,
                        size_t index) {
    size_t expert = index / weights->chunks_per_expert;
    size_t first = (size_t)offset_E1[expert], last = (size_t)offset_E1[expert + 1];
    if (first == last) return count;
    chunks[count] = (dm_chunk){.packed = weights->chunks[index], .first = first, .count = last - first};
    return count + 1;
}

/* Reading a chunk costs as much as multiplying it with read_cost tokens. A chunk belongs to the run in which the middle
 * of its work lies. */
static size_t deal_chunks(dm_chunk *chunks, const dm_experts_layer *weights, const int32_t *offset_E1, size_t rank,
                          size_t ranks, size_t read_cost) {
    size_t total = 0, before = 0, count = 0;
    for (size_t e = 0; e < weights->experts; e++) {
        size_t tokens = (size_t)(offset_E1[e + 1] - offset_E1[e]);
        if (tokens > 0) total += (tokens + read_cost) * weights->chunks_per_expert;
    }
    for (size_t e = 0; e < weights->experts; e++) {
        size_t tokens = (size_t)(offset_E1[e + 1] - offset_E1[e]);
        if (tokens == 0) continue;
        for (size_t c = 0; c < weights->chunks_per_expert; c++) {
            size_t middle = 2 * before + tokens + read_cost;
            before += tokens + read_cost;
            if (middle * ranks / (2 * total) != rank) continue;
            count = add_chunk(chunks, count, weights, offset_E1, e * weights->chunks_per_expert + c);
        }
    }
    return count;
}

size_t dm_pick_chunks(dm_chunk *chunks, const dm_experts_layer *weights, const int32_t *offset_E1, size_t rank,
                      size_t ranks, size_t read_cost) {
    if (weights->owned == NULL) return deal_chunks(chunks, weights, offset_E1, rank, ranks, read_cost);
    size_t count = 0;
    for (size_t i = 0; i < weights->owned_count; i++) {
        count = add_chunk(chunks, count, weights, offset_E1, (size_t)weights->owned[i]);
    }
    return count;
}

static void note_work(const dm_buffers *buffers, int32_t layer, size_t count) {
    size_t products = 0;
    for (size_t i = 0; i < count; i++) products += buffers->chunks[i].count;
    buffers->work_L2[2 * layer] = (int64_t)count;
    buffers->work_L2[2 * layer + 1] = (int64_t)products;
}

void dm_compute_experts(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                        const dm_experts_layer *weights, size_t T) {
    size_t count =
        dm_pick_chunks(buffers->chunks, weights, buffers->offset_E1, sizes->rank, sizes->ranks, sizes->chunk_read_cost);
    dm_experts(context, buffers->sums_TD, buffers->fault_T, buffers->chunks, buffers->token_N, buffers->weight_N,
               buffers->normed, count, T, sizes->D, weights->width, sizes->format, sizes->group, weights->layer);
    note_work(buffers, weights->layer, count);
}

void dm_attention_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                       const dm_attention_layer *weights, const dm_kv_view *cache, size_t T) {
    dm_norm_tokens(context, buffers, sizes, weights->norm_D, 0, T, weights->layer);
    dm_attend(context, buffers, sizes, weights, cache, T);
}

void dm_experts_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t T) {
    dm_norm_tokens(context, buffers, sizes, weights->norm_D, 0, T, weights->layer);
    dm_route_tokens(context, buffers, sizes, weights, 0, T);
    dm_group_tokens(context, buffers, sizes, weights, T);
    dm_compute_experts(context, buffers, sizes, weights, T);
}
