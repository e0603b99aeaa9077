/* table.h: the table of the level that is being compiled. The last include of every level.c. */
#include "portable/machine.h"

#define DM_JOIN_(a, b) a##b
#define DM_JOIN(a, b) DM_JOIN_(a, b)
#define DM_TEXT_(a) #a
#define DM_TEXT(a) DM_TEXT_(a)

const dm_kernels DM_JOIN(dm_kernels_, DM_LEVEL) = {
    .name = DM_TEXT(DM_LEVEL),
    .open_tile = open_tile,
    .pack_tile = {pack_tile_f32, pack_tile_bf16, pack_tile_q8, pack_tile_q4},
    .row_scales = row_scales,
    .unpack_tile = {unpack_tile_f32, unpack_tile_bf16, unpack_tile_q8, unpack_tile_q4},
    .embed = embed,
    .rmsnorm = rmsnorm,
    .quantize = quantize,
    .add_exact = add_exact,
    .add_fixed = add_fixed,
    .silu = silu,
    .matmul = {matmul_f32, matmul_bf16, matmul_q8, matmul_q4},
    .rope_angles = rope_angles,
    .norm_rope = norm_rope,
    .kv_store = {kv_store_f32, kv_store_f16, kv_store_q8},
    .attention_query = {query_f32, query_f32, query_q8},
    .attention = {attention_f32, attention_f16, attention_q8},
    .attention_merge = attention_merge,
    .attention_finish = attention_finish,
    .route = route,
    .vocabulary = vocabulary,
    .softmax_term = softmax_term,
    .fma_one = fma_one,
    .read_bytes = read_bytes,
    .f32_peak = f32_peak,
    .int8_peak = int8_peak,
};
