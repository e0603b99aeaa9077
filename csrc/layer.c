/* layer.c: each half of a layer as one call, from the residual to this rank's sums.
 *
 *   attention   norm, q k v, norm and rotation per head, cache, attention, o_proj
 *   experts     norm, router, the step's choices by expert, this rank's chunks of them
 *
 * A dense MLP is one expert that every token picks with weight 1.
 */
#include "context.h"

static void norm_operand(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const float *norm_D,
                         size_t T, int32_t layer) {
    dm_rmsnorm(context, buffers->normed->x, buffers->x_TD, norm_D, sizes->eps, T, sizes->D);
    if (dm_is_quantized(sizes->format)) dm_quantize(context, buffers->normed, buffers->fault_T, T, layer);
}

void dm_attention_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                       const dm_attention_layer *weights, const dm_kv_view *cache, size_t T) {
    const size_t h = sizes->h, g = sizes->g, P = sizes->P, row = (h + 2 * g) * P;
    const int32_t layer = weights->layer;
    float *q_ThP = buffers->qkv_TR, *k_TgP = q_ThP + h * P, *v_TgP = k_TgP + g * P;
    dm_kv_view here = *cache;
    here.layer_offset = weights->cache_offset;
    norm_operand(context, buffers, sizes, weights->norm_D, T, layer);
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

static void route_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                         const dm_experts_layer *weights, size_t T) {
    const size_t E = weights->experts, K = sizes->K;
    dm_matmul(context, buffers->router_TE, weights->router, buffers->normed, 1, T, E, sizes->router_format, 0);
    dm_route(context, buffers->ids_TK, buffers->weights_TK, buffers->fault_T, buffers->router_TE, T, E, K,
             sizes->norm_topk_prob, weights->layer);
    dm_group_by_expert(context, buffers->offset_E1, buffers->token_N, buffers->weight_N, buffers->ids_TK,
                       buffers->weights_TK, T, E, K);
}

void dm_experts_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t T) {
    norm_operand(context, buffers, sizes, weights->norm_D, T, weights->layer);
    if (weights->router != NULL)
        route_tokens(context, buffers, sizes, weights, T);
    else
        take_all_tokens(buffers, T);
    size_t count = dm_pick_chunks(buffers->chunks, buffers->picks, weights, buffers->offset_E1, &sizes->workers);
    dm_experts(context, buffers->sums_TD, buffers->fault_T, buffers->chunks, buffers->token_N, buffers->weight_N,
               buffers->normed, count, T, sizes->D, weights->width, sizes->format, sizes->group, weights->layer);
}
