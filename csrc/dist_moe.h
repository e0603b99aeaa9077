/* dist_moe.h: everything that Python may call, and the text that cffi parses.
 *
 * Conventions: the context comes first, then outputs, then const inputs, then sizes. Suffixes name the axes:
 * T tokens, D model dim, H/h query heads, G/g KV heads, P head dim, E experts, K experts per token, F expert
 * hidden units, V vocabulary, R matrix rows, C matrix columns; lower case is this rank's share.
 * Python checks shapes; C trusts them. Every number follows the numerics contract (ARCHITECTURE.md).
 *
 * Lines that begin with '#' reach the compiler only, except #define of integers and #include of a part of this text.
 */
#ifndef DIST_MOE_H
#define DIST_MOE_H
#include <stddef.h>
#include <stdint.h>

#include "mapped.h"
#include "pack_list.h"
#include "pick.h"
#include "token_rows.h"

#define DM_NUMERICS_VERSION 1
#define DM_TILE_ROWS 16
#define DM_GROUP 32
#define DM_BLOCK_POSITIONS 64
#define DM_VOCABULARY_BLOCK 128
#define DM_MAX_UNITS 8191

/* Formats of packed weight matrices. */
enum dm_format { DM_F32, DM_BF16, DM_Q8, DM_Q4, DM_FORMAT_COUNT };

/* Formats of the key/value cache. */
enum dm_kv_format { DM_KV_F32, DM_KV_F16, DM_KV_Q8, DM_KV_FORMAT_COUNT };

/* What went wrong with a token. A fault is layer << 8 | kind, DM_NO_FAULT is none; the lowest one is kept. */
#define DM_NO_FAULT 0x7fffffff
enum dm_fault_kind {
    DM_FAULT_QUANTIZER = 1,    /* a NaN or infinity in an activation that is to be quantized */
    DM_FAULT_KEY_VALUE = 2,    /* a NaN or infinity in K or V, before or after narrowing */
    DM_FAULT_CONTRIBUTION = 3, /* |x| >= 2^18 or NaN in a unit's contribution to a sum */
    DM_FAULT_SUM = 4,          /* |sum| >= 2^51 in fixed point */
    DM_FAULT_ROUTER = 5,       /* a NaN or infinity in a router logit */
    DM_FAULT_LOGIT = 6         /* a NaN or infinity in a vocabulary logit */
};

/* One packed matrix: tiles of 16 rows; its rows become columns out_column... of an output row. group: weights per
 * scale, 0: one scale per row. */
typedef struct dm_matrix {
    const void *packed;
    size_t rows, out_column;
    int format;
    size_t group;
} dm_matrix;

/* The parts of an operand that weights read. */
enum dm_operand_part { DM_PART_FLOATS = 1, DM_PART_INT8 = 2 };

/* What a matrix is multiplied with: T vectors of `columns` values, row-major without gaps. f32 and bf16 weights read
 * x; q8 and q4 weights read q (int8, rows padded with zeros to a multiple of 32), and per 32 values scale and sum. */
typedef struct dm_operand {
    float *x;
    int8_t *q;
    float *scale;
    int32_t *sum;
    size_t columns;
} dm_operand;

/* How the matrices of an expert's chunks are packed: gate and up alike, down in its own way. Where experts differ,
 * read_cost takes the place of that in dm_workers. */
typedef struct dm_chunk_format {
    int format, down_format;
    size_t group, down_group, read_cost;
} dm_chunk_format;

/* One expert chunk (gate rows, up rows, down columns in one run of bytes) and the tokens routed to its expert:
 * entries [first, first + count) of the step's token and weight lists. */
typedef struct dm_chunk {
    const void *packed;
    const dm_chunk_format *format;
    size_t first, count;
} dm_chunk;

/* Where the K and V of a step's tokens stand. blocks[table_T[t] + b] is position block b of token t's sequence;
 * this layer's part begins layer_offset bytes into it: per KV head dm_kv_block_bytes(), K before V. */
typedef struct dm_kv_view {
    uint8_t *const *blocks;
    const int64_t *table_T, *position_T;
    size_t layer_offset;
    int format;
} dm_kv_view;

/* What the layers of one rank's share have in common. */
typedef struct dm_sizes {
    size_t D, h, g, P, K;
    dm_workers workers;
    int norm_topk_prob;
    float eps, score_scale;
    const int32_t *kv_of_h;
} dm_sizes;

/* The buffers of a step that both halves of a layer work in; C = h * P, R = (h + 2 g) * P, N = T * K. */
typedef struct dm_buffers {
    float *x_TD;
    int64_t *sums_TD;
    int32_t *fault_T;
    const dm_operand *normed;   /* D columns */
    const dm_operand *attended; /* C columns */
    float *qkv_TR;
    float *cos_TP, *sin_TP;
    float *router_TE;
    int32_t *ids_TK;
    float *weights_TK;
    int32_t *offset_E1;
    int32_t *token_N;
    float *weight_N;
    dm_chunk *chunks;
    dm_picks *picks;
    int64_t *work_L2; /* written for each layer: this rank's chunks, and their products with a token */
} dm_buffers;

/* One layer's attention: h + 2 g matrices of P rows, and each head's columns of o_proj. */
typedef struct dm_attention_layer {
    const float *norm_D, *q_norm_P, *k_norm_P;
    const dm_matrix *qkv;
    const float *qkv_bias_R; /* NULL: none */
    const dm_matrix *o_units;
    size_t cache_offset;              /* bytes before the layer's part of a cache block */
    int normed_parts, attended_parts; /* of the operands, that weights read */
    int32_t layer;
} dm_attention_layer;

/* One layer's MLP. Chunk c of expert e is number e * chunks_per_expert + c. */
typedef struct dm_experts_layer {
    const float *norm_D;
    const dm_matrix *router;        /* NULL: a dense MLP, one expert that every token picks with weight 1 */
    const void *const *chunks;      /* by number; NULL where this host has no copy */
    const dm_chunk_format *formats; /* of each expert, or of all: expert e's is formats[e * format_step] */
    size_t format_step;             /* 1 or 0 */
    const uint8_t *own_C; /* by number: 1 for this rank's chunks; NULL: a node's chunks are dealt out in each step */
    const dm_holders *holders; /* not read for one node */
    size_t experts, chunks_per_expert, width;
    int normed_parts; /* of the operand, that chunks read; a router reads floats */
    int32_t layer;
} dm_experts_layer;

/* How to draw one token. top_k = 0: no limit; temperature = 0: the best token. */
typedef struct dm_sampling {
    float temperature, top_p, min_p, typical_p;
    int64_t top_k;
    uint64_t seed, sample_index, position;
} dm_sampling;

typedef struct dm_context dm_context;

/* ---- context: an ISA level, a thread pool and its scratch memory ---- */

/* Names of the ISA levels in this build, best last, NULL at the end. */
const char *const *dm_isa_levels(void);
/* 1 if CPU and operating system can run the level. */
int dm_isa_available(const char *isa);
/* isa = NULL takes the best available level. spin = 0 where threads share cores with others: waiting ones then sleep at
 * once. NULL if the level is not available or memory or threads are lacking. */
dm_context *dm_context_create(const char *isa, size_t threads, int spin);
/* Binds thread i to core cores[i]; thread 0 is the caller's, which gets its cores back when the context ends. Returns
 * 0, or an error number; then nothing is bound. */
int dm_context_bind(dm_context *context, const int32_t *cores);
void dm_context_destroy(dm_context *context);
const char *dm_context_isa(const dm_context *context);
size_t dm_context_threads(const dm_context *context);
/* Known answers of all primitives, hashed together with the contract's version (rule 16). */
uint64_t dm_self_test(dm_context *context);

/* ---- packed weights ---- */

/* Bytes of a packed matrix, a multiple of 64. group = 0: one scale per row; f32 and bf16 ignore it. */
size_t dm_packed_bytes(int format, size_t rows, size_t columns, size_t group);
/* The f16 scale of every whole row, as a float: what dm_pack needs for slices of rows when group = 0. importance_C and
 * scales are those of dm_pack_matrices. */
void dm_row_scales(dm_context *context, float *scale_R, const float *weights_RC, const float *importance_C, size_t R,
                   size_t C, size_t row_stride, int format, int scales);
/* Pack a matrix. scale_R may be NULL (scales are then taken from the rows given); it is read only when group = 0.
 * Returns the number of NaN or infinite weights and of scales beyond f16. */
size_t dm_pack(dm_context *context, void *packed, const float *weights_RC, const float *scale_R, size_t R, size_t C,
               size_t row_stride, int format, size_t group);
/* The exact inverse for inspection and tests: the values that the kernels compute with. */
void dm_unpack(dm_context *context, float *weights_RC, const void *packed, size_t R, size_t C, int format,
               size_t group);

/* ---- vectors ---- */

/* Rows of an embedding table; bf16_table = 0 means f32. */
void dm_embed(dm_context *context, float *x_TD, const void *table_VD, const int32_t *ids_T, size_t T, size_t D,
              int bf16_table);
/* y = (x * (1 / sqrt(mean(x^2) + eps))) * gain (rule 4). Source: Qwen3MoeRMSNorm. */
void dm_rmsnorm(dm_context *context, float *out_TD, const float *x_TD, const float *gain_D, float eps, size_t T,
                size_t D);
/* Rule 5: fills operand->q, scale and sum from operand->x. */
void dm_quantize(dm_context *context, const dm_operand *operand, int32_t *fault_T, size_t T, int32_t layer);
/* x += f32(sum * 2^-32) (+ bias, if not NULL, added to the sum first). */
void dm_add_exact(dm_context *context, float *x_TD, int32_t *fault_T, const int64_t *sums_TD, const float *bias_D,
                  size_t T, size_t D, int32_t layer);

/* ---- matrices ---- */

/* out[t][m.out_column + r] = m row r . x_t for every matrix m; rows of out_TR lie out_stride floats apart. */
void dm_matmul(dm_context *context, float *out_TR, const dm_matrix *matrices, const dm_operand *x, size_t matrix_count,
               size_t T, size_t out_stride);
/* out[t][column + r] += bias[r] for r < R. */
void dm_add_bias(dm_context *context, float *out_TR, const float *bias_R, size_t T, size_t R, size_t out_stride);
/* o_proj: unit u multiplies columns [u * P, (u + 1) * P) of x; contributions are summed in fixed point (rule 7).
 * sums_TD is overwritten, with zeros if there is no unit. */
void dm_unit_sums(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_matrix *units, const dm_operand *x,
                  size_t unit_count, size_t T, size_t D, size_t P, int32_t layer);

/* ---- attention ---- */

/* cos and sin of position * inv_freq, times attention_factor; computed in f64, rounded to f32. */
void dm_rope_angles(dm_context *context, float *cos_TP, float *sin_TP, const int64_t *position_T,
                    const float *inv_freq_P, float attention_factor, size_t T, size_t half_P);
/* Per-head RMSNorm, then rotation of pairs (i, i + P/2), in place. Heads of one token are adjacent; tokens lie
 * row_stride floats apart. Source: Qwen3MoeAttention, apply_rotary_pos_emb. */
void dm_norm_rope(dm_context *context, float *heads_ThP, const float *gain_P, const float *cos_TP, const float *sin_TP,
                  float eps, size_t T, size_t h, size_t P, size_t row_stride);
/* Bytes of 64 positions of one KV head of one layer: K and V. A multiple of 64. */
size_t dm_kv_block_bytes(int format, size_t P);
/* Narrow K and V of the step's tokens into the cache (rule 9). Tokens lie row_stride floats apart. */
void dm_kv_store(dm_context *context, const dm_kv_view *cache, int32_t *fault_T, const float *k_TgP, const float *v_TgP,
                 size_t T, size_t g, size_t P, size_t row_stride, int32_t layer);
/* Causal attention over fixed blocks of 64 positions (rule 10). kv_of_h: the local KV head of each local query head;
 * score_scale = f32(P^-1/2). q rows lie row_stride floats apart; out_ThP has no gaps. */
void dm_attention(dm_context *context, float *out_ThP, int32_t *fault_T, const float *q_ThP, const dm_kv_view *cache,
                  const int32_t *kv_of_h, float score_scale, size_t T, size_t h, size_t g, size_t P, size_t row_stride,
                  int32_t layer);

/* ---- experts ---- */

/* Rule 11: the K best experts of each token and their weights, in (logit descending, id ascending) order. */
void dm_route(dm_context *context, int32_t *ids_TK, float *weights_TK, int32_t *fault_T, const float *logits_TE,
              size_t T, size_t E, size_t K, int norm_topk_prob, int32_t layer);
/* Counting sort of a step's choices: expert e's tokens, ascending, are entries [offset_E[e], offset_E[e + 1]). */
void dm_group_by_expert(dm_context *context, int32_t *offset_E1, int32_t *token_N, float *weight_N,
                        const int32_t *ids_TK, const float *weights_TK, size_t T, size_t E, size_t K);
/* Bytes of one expert chunk of `width` hidden units. */
size_t dm_chunk_bytes(const dm_chunk_format *format, size_t D, size_t width);
/* sums_TD = fixed-point sum over chunks of weight * down(silu(gate x) * up x) (rules 6, 7); overwritten. */
void dm_experts(dm_context *context, int64_t *sums_TD, int32_t *fault_T, const dm_chunk *chunks, const int32_t *token_N,
                const float *weight_N, const dm_operand *x, size_t chunk_count, size_t T, size_t D, size_t width,
                int32_t layer);

/* ---- halves of a layer: from the residual to this rank's sums, which are then summed over ranks ---- */

/* buffers->sums_TD = o_proj(attend(rope(norm(q)), rope(norm(k)), v)) of norm(x), over this rank's heads. The view's
 * layer_offset is not read. */
void dm_attention_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                       const dm_attention_layer *weights, const dm_kv_view *cache, size_t T);
/* buffers->sums_TD = sum of weight * down(silu(gate(x)) * up(x)) of norm(x), over this rank's chunks of the experts
 * that router(x) picks. */
void dm_experts_half(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t T);

/* The pieces of both halves, for ranks of which each keeps the residual of some tokens only. The first two compute
 * tokens [first, first + count): the parts of normed = norm(x) that weights read, and ids_TK and weights_TK of normed
 * (nothing for a dense MLP). The others take all T: the step's choices by expert, and which node computes what of them;
 * sums_TD of normed, as the halves. */
void dm_norm_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const float *norm_D,
                    int parts, size_t first, size_t count, int32_t layer);
void dm_route_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, size_t first, size_t count);
void dm_group_tokens(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                     const dm_experts_layer *weights, int keep_tokens, size_t T);
void dm_attend(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes, const dm_attention_layer *weights,
               const dm_kv_view *cache, size_t T);
void dm_compute_experts(dm_context *context, const dm_buffers *buffers, const dm_sizes *sizes,
                        const dm_experts_layer *weights, size_t T);

/* ---- logits and sampling (rules 13, 14) ---- */

/* Per block of 128 rows: the largest logit and the sum of exp((logit - largest) / temperature). Columns from `valid`
 * on are masked. A masked block gives -infinity and 0. temperature_T = 0 is read as 1. */
void dm_vocabulary_blocks(dm_context *context, float *max_TB, float *sum_TB, int32_t *fault_T, const float *logits_TV,
                          const float *temperature_T, size_t T, size_t V, size_t valid, int32_t layer);
/* The `count` best columns below `valid` by (logit descending, id ascending). Block b's columns have the ids from
 * block_B[b] * 128 on, which ascend; max_TB is that of dm_vocabulary_blocks with the same V and valid. Missing ones get
 * id -1 and logit -infinity. */
void dm_top_logits(dm_context *context, int32_t *ids_TN, float *logits_TN, const float *logits_TV, const float *max_TB,
                   const int32_t *block_B, size_t T, size_t V, size_t valid, size_t count);
/* Put the best `count` of each list of N candidates to its front, in order; what follows them is not valid. */
void dm_merge_candidates(dm_context *context, int32_t *ids_TN, float *logits_TN, size_t T, size_t N, size_t count);
/* Draw from the `count` best candidates. B block sums give Z (B = 0: not known); complete = 1 if no other token exists.
 * Returns a place in the list, or -1 if the candidates cannot decide. *probability gets its share of Z, or 0. */
int64_t dm_sample(dm_context *context, float *probability, const dm_sampling *how, const int32_t *ids_N,
                  const float *logits_N, const float *max_B, const float *sum_B, size_t count, size_t B, int complete);
/* Change N logits, in this order: add bias_N; where seen_N is not 0, divide a positive one by `repetition`, multiply
 * another by it; where count_N is not 0, take away presence + frequency * count_N; take away dry_N. */
void dm_penalize(float *logits_N, const float *bias_N, const int32_t *seen_N, const int32_t *count_N,
                 const float *dry_N, float repetition, float presence, float frequency, size_t N);
/* log p of N logits; B block sums at temperature 1 give the mass of all. */
void dm_log_probabilities(dm_context *context, double *out_N, const float *logits_N, const float *max_B,
                          const float *sum_B, size_t N, size_t B);
/* base^exponent for a finite base > 0: below 2^-1022 it is 0, above 2^1023 infinity. */
double dm_power(double base, double exponent);
/* Uniform in [0, 1) with 53 bits: Philox4x32-10 keyed by seed, counter (sample_index, position). */
double dm_uniform(uint64_t seed, uint64_t sample_index, uint64_t position);

/* ---- the ranks of one host: exact sums through shared memory ---- */

/* Bytes of each rank's two slots: longer messages travel in pieces. */
#define DM_NODE_SLOT_BYTES 262144

typedef struct dm_node dm_node;

/* The first rank makes shared memory with all its pages, `name` telling it from others. spins: pauses before a waiting
 * rank sleeps, 0 where ranks share cores. The others open it as /proc/<first's process>/fd/<its dm_node_file>; when all
 * have, the first closes the file. NULL with errno set on failure; ENOENT if another file is at that path. */
dm_node *dm_node_create(const char *name, size_t ranks, size_t spins);
int dm_node_file(const dm_node *node);
dm_node *dm_node_open(const char *path, const char *name, size_t rank, size_t ranks);
void dm_node_close_file(dm_node *node);
void dm_node_close(dm_node *node);
/* Collectives: every rank calls the same one with the same count. The two reductions work in place. */
void dm_node_sum(dm_node *node, int64_t *values, size_t count);
void dm_node_min(dm_node *node, int32_t *values, size_t count);
/* The first rank's bytes reach all ranks. */
void dm_node_broadcast(dm_node *node, void *data, size_t bytes);
/* out (first rank only) gets the ranks' bytes one after another. */
void dm_node_gather(dm_node *node, void *out, const void *own, size_t bytes);

#include "sums_wire.h"
/* ---- integrity ---- */

/* XXH64 of the floats' bytes, with every NaN as 0x7fc00000. */
uint64_t dm_hash_floats(const float *values, size_t count, uint64_t seed);

/* ---- measuring the machine (dist-moe bench); all threads work, and the clock runs from start to end ---- */

/* Seconds to read `bytes` bytes, in pieces of up to 8 MiB of which each is `streams` runs of whole 256-byte steps side
 * by side; every read is preceded by a prefetch `ahead` bytes before it (0: none). *seen gets the xor of all 32-bit
 * words. */
double dm_read_seconds(dm_context *context, int32_t *seen, const void *data, size_t bytes, size_t streams,
                       size_t ahead);
/* Operations per second, two per multiply-add: bare int8 dot products, and bare f32 fused multiply-adds. */
double dm_int8_peak(dm_context *context, size_t rounds);
double dm_f32_peak(dm_context *context, size_t rounds);
/* The same of the level's own matmul of T vectors, on a matrix [R, C] per thread that stays in its cache. */
double dm_matmul_peak(dm_context *context, size_t R, size_t C, size_t T, int format, size_t group, size_t rounds);

#endif
