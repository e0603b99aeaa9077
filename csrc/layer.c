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
                    int parts, size_t first, size_t count, int32_t layer) {
    const dm_operand normed = dm_operand_from(buffers->normed, first);
    dm_rmsnorm(context, normed.x, buffers->x_TD + first * sizes->D, norm_D, sizes->eps, count, sizes->D);
    if (parts & DM_PART_INT8) dm_quantize(context, &normed, buffers->fault_T + first, count, layer);
}

void dm_attend(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const dm_attention_layer *weights,
               const dm_kv_view *cache, size_t T) {
    const size_t h = sizes->h, g = sizes->g, P = sizes->P, row = (h + 2 * g) * P;
    const int32_t layer = weights->layer;
    float *q_ThP = buffers->qkv_TR, *k_TgP = q_ThP + h * P, *v_TgP = k_TgP + g * P;
    dm_kv_view here = *cache;
    here.layer_offset = weights->cache_offset;
    dm_matmul(context, q_ThP, weights->qkv, buffers->normed, h + 2 * g, T, row);
    if (weights->qkv_bias_R != NULL) dm_add_bias(context, q_ThP, weights->qkv_bias_R, T, row, row);
    dm_norm_rope(context, q_ThP, weights->q_norm_P, buffers->cos_TP, buffers->sin_TP, sizes->eps, T, h, P, row);
    dm_norm_rope(context, k_TgP, weights->k_norm_P, buffers->cos_TP, buffers->sin_TP, sizes->eps, T, g, P, row);
    dm_kv_store(context, &here, buffers->fault_T, k_TgP, v_TgP, T, g, P, row, layer);
    dm_attention(context, buffers->attended->x, buffers->fault_T, q_ThP, &here, sizes->kv_of_h, sizes->score_scale, T,
                 h, g, P, row, layer);
    if (weights->attended_parts & DM_PART_INT8) dm_quantize(context, buffers->attended, buffers->fault_T, T, layer);
    dm_unit_sums(context, buffers->sums_TD, buffers->fault_T, weights->o_units, buffers->attended, h, T, sizes->D, P,
                 layer);
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
    dm_matmul(context, router_TE, weights->router, &normed, 1, count, E);
    dm_route(context, buffers->ids_TK + first * K, buffers->weights_TK + first * K, buffers->fault_T + first, router_TE,
             count, E, K, sizes->norm_topk_prob, weights->layer);
}

void dm_group_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, int keep_tokens, size_t T) {
    if (weights->router == NULL)
        take_all_tokens(buffers, T);
    else
        dm_group_by_expert(context, buffers->offset_E1, buffers->token_N, buffers->weight_N, buffers->ids_TK,
                           buffers->weights_TK, T, weights->experts, sizes->K);
    dm_assign_nodes(buffers->picks, weights, buffers->offset_E1, &sizes->workers, keep_tokens);
}

static void note_work(const dm_buffers *buffers, int32_t layer, size_t count) {
    size_t products = 0;
    for (size_t i = 0; i < count; i++) products += buffers->chunks[i].count;
    buffers->work_L2[2 * layer] = (int64_t)count;
    buffers->work_L2[2 * layer + 1] = (int64_t)products;
}

void dm_compute_experts(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                        const dm_experts_layer *weights, size_t T) {
    size_t count = dm_rank_chunks(buffers->chunks, buffers->picks, weights, &sizes->workers);
    dm_experts(context, buffers->sums_TD, buffers->fault_T, buffers->chunks, buffers->token_N, buffers->weight_N,
               buffers->normed, count, T, sizes->D, weights->width, weights->layer);
    note_work(buffers, weights->layer, count);
}

void dm_attention_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                       const dm_attention_layer *weights, const dm_kv_view *cache, size_t T) {
    dm_norm_tokens(context, buffers, sizes, weights->norm_D, weights->normed_parts, 0, T, weights->layer);
    dm_attend(context, buffers, sizes, weights, cache, T);
}

void dm_experts_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t T) {
    dm_norm_tokens(context, buffers, sizes, weights->norm_D, weights->normed_parts, 0, T, weights->layer);
    dm_route_tokens(context, buffers, sizes, weights, 0, T);
    dm_group_tokens(context, buffers, sizes, weights, 0, T);
    dm_compute_experts(context, buffers, sizes, weights, T);
}
