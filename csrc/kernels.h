/* kernels.h: one ISA level is one table of these functions.
 *
 * How a level is made: <level>/level.c opens its target region and includes one file per operation; every file is
 * static functions over lanes.h, so the same source becomes portable C, AVX2, AVX-512 and NEON. To replace an
 * operation by hand-written code, put a file of the same name and with the same functions into the level's folder and
 * include that one instead. It must give the same bits (csrc/tests/driver.c and tests/kernels compare them).
 *
 * These functions run on one thread and allocate nothing. Splitting the work is the business of the files beside this
 * one (matrices.c, experts.c, ...), which know no ISA. Functions that return int give an enum dm_fault_kind or 0.
 */
#ifndef DM_KERNELS_H
#define DM_KERNELS_H
#include "dist_moe.h"

/* Tokens that one pass of a matmul works on, and the bytes of scratch it needs for them. */
#define DM_TOKEN_BLOCK 64
#define DM_MATMUL_SCRATCH(columns) (DM_TOKEN_BLOCK * (((columns) + 31) / 32 * 32) * sizeof(int16_t))
/* Tiles of f32 or bf16 weights that a kernel reads side by side for one token, and at most for several. */
#define DM_FLOAT_TILES_ONE 4
#define DM_FLOAT_TILES 2

/* T vectors of `columns` values, or a range of columns of wider ones. Strides are in elements. */
typedef struct dm_rows {
    const float *x;
    const int8_t *q;
    const float *scale;
    const int32_t *sum;
    size_t columns;
    size_t x_stride;
    size_t q_stride;
    size_t group_stride;
} dm_rows;

/* One tile of 16 rows of a matrix that is being packed, column after column, and zeros up to a multiple of 32 columns;
 * rows_present of them exist. */
typedef struct dm_pack_job {
    float *columns_C16;
    const float *scale_R;
    const float *importance_C;
    size_t rows_present;
    size_t C;
    size_t group;
    int scales;
} dm_pack_job;

/* Query heads that share a KV head, of consecutive tokens of one sequence whose positions lie in one block. Its rows
 * are ordered by token: t * heads + i. attention_query fills `queries`, dm_query_bytes() long; rows that it was not
 * called for are zeros. offset: from a block's begin to the KV head's part. */
typedef struct dm_attention_tile {
    uint8_t *const *blocks;
    size_t offset;
    size_t first_position;
    size_t tokens;
    size_t heads;
    size_t P;
    float score_scale;
    const void *queries;
} dm_attention_tile;

typedef struct dm_kernels {
    const char *name;

    void (*open_tile)(float *columns_C16, const dm_pack_matrix *matrix, size_t first_row);
    /* Returns the number of bad weights and scales; weights that are not finite may become 0 in the job. */
    size_t (*pack_tile[DM_FORMAT_COUNT])(void *tile, const dm_pack_job *job);
    void (*row_scales)(float *scale_16, const dm_pack_job *job, int format);
    void (*unpack_tile[DM_FORMAT_COUNT])(float *weights_RC, const void *tile, size_t rows, size_t C, size_t group);

    void (*embed)(float *x_D, const void *row_D, size_t D, int bf16_table);
    void (*rmsnorm)(float *out_D, const float *x_D, const float *gain_D, float eps, size_t D);
    int (*quantize)(int8_t *q_C, float *scale_G, int32_t *sum_G, const float *x_C, size_t C);
    int (*add_exact)(float *x_D, const int64_t *sum_D, const float *bias_D, size_t D);
    /* sum += rint(weight * x * 2^32). */
    int (*add_fixed)(int64_t *sum_D, const float *x_D, float weight, size_t D);
    /* out = silu(gate) * up. */
    void (*silu)(float *out_F, const float *gate_F, const float *up_F, size_t F);

    /* `packed` points to the first of ceil(rows / 16) tiles. */
    void (*matmul[DM_FORMAT_COUNT])(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows,
                                    size_t out_stride, size_t group, void *scratch);

    void (*rope_angles)(float *cos_P, float *sin_P, int64_t position, const float *inv_freq_P, float attention_factor,
                        size_t half_P);
    void (*norm_rope)(float *head_P, const float *gain_P, const float *cos_P, const float *sin_P, float eps, size_t P);
    int (*kv_store[DM_KV_FORMAT_COUNT])(uint8_t *block, const float *k_P, const float *v_P, size_t place, size_t P);
    /* Row `row` of a tile in the form that the cache's format needs; R = rows, rounded up to 16. */
    int (*attention_query[DM_KV_FORMAT_COUNT])(void *queries, const float *q_P, size_t row, size_t R, size_t P);
    /* Blocks [first, last) merged into the tile's state, which need not be set before block 0; or, if triples is not
     * NULL, each block's triple. States and triples are dm_triple_floats(), scratch dm_attention_scratch(). */
    void (*attention[DM_KV_FORMAT_COUNT])(float *state, float *triples, const dm_attention_tile *tile, size_t first,
                                          size_t last, void *scratch);
    /* One row of `count` triples into the same row of a state; the end: out = o / l. */
    void (*attention_merge)(float *state, const float *triples, size_t count, size_t row, size_t rows, size_t P);
    void (*attention_finish)(float *out_P, const float *state, size_t row, size_t rows, size_t P);

    int (*route)(int32_t *ids_K, float *weights_K, const float *logits_E, size_t E, size_t K, int norm_topk_prob,
                 int32_t *scratch_E);
    /* One vocabulary block of n <= 128 logits. */
    int (*vocabulary)(float *max, float *sum, const float *logits_V, float temperature, size_t n);
    /* exp((x - max) / temperature). */
    float (*softmax_term)(float x, float max, float temperature);
    /* a * b + c, rounded once. */
    float (*fma_one)(float a, float b, float c);

    /* Measuring (machine.h): the xor of all words in whole 256-byte steps of each of `streams` equal runs; arithmetic
     * on 256 numbers, which returns how many operations it did. */
    int32_t (*read_bytes)(const uint8_t *data, size_t bytes, size_t streams, size_t ahead);
    size_t (*f32_peak)(float *data, size_t rounds);
    size_t (*int8_peak)(int32_t *data, size_t rounds);
} dm_kernels;

extern const dm_kernels dm_kernels_portable;
extern const dm_kernels dm_kernels_avx2;
extern const dm_kernels dm_kernels_avxvnni;
extern const dm_kernels dm_kernels_avx512;
extern const dm_kernels dm_kernels_avx512vnni;
extern const dm_kernels dm_kernels_amx;
extern const dm_kernels dm_kernels_neon;
extern const dm_kernels dm_kernels_neondot;
extern const dm_kernels dm_kernels_neoni8mm;

#endif
