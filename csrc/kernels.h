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

/* One tile of 16 rows of a matrix that is being packed; rows_present of them exist. */
typedef struct dm_pack_job {
    const float *weights_RC;
    const float *scale_R;
    size_t rows_present;
    size_t C;
    size_t row_stride;
    size_t group;
} dm_pack_job;

/* One query head of one token: its sequence's blocks, where its KV head stands in them, and its position. */
typedef struct dm_attention_job {
    uint8_t *const *blocks;
    size_t offset;
    int64_t position;
    float score_scale;
    size_t P;
} dm_attention_job;

#define DM_ATTENTION_SCRATCH(P) ((5 * (((P) + 31) / 32 * 32) + 64) * sizeof(float))

typedef struct dm_kernels {
    const char *name;

    /* Returns the number of bad weights and scales. */
    size_t (*pack_tile[DM_FORMAT_COUNT])(void *tile, const dm_pack_job *job);
    float (*row_scale)(const float *weights_C, size_t C, int format);
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
    int (*attention[DM_KV_FORMAT_COUNT])(float *out_P, const float *q_P, const dm_attention_job *job, void *scratch);

    int (*route)(int32_t *ids_K, float *weights_K, const float *logits_E, size_t E, size_t K, int norm_topk_prob,
                 float *scratch_E);
    /* One vocabulary block of n <= 128 logits. */
    int (*vocabulary)(float *max, float *sum, const float *logits_V, float temperature, size_t n);
    /* exp((x - max) / temperature). */
    float (*softmax_term)(float x, float max, float temperature);
    /* a * b + c, rounded once. */
    float (*fma_one)(float a, float b, float c);
} dm_kernels;

extern const dm_kernels dm_kernels_portable;
extern const dm_kernels dm_kernels_avx2;
extern const dm_kernels dm_kernels_avxvnni;
extern const dm_kernels dm_kernels_avx512;
extern const dm_kernels dm_kernels_avx512vnni;
extern const dm_kernels dm_kernels_neon;

#endif
