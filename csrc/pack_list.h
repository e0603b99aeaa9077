/* pack_list.h: packing many matrices at once. A part of dist_moe.h, under the same rules. */
#ifndef DM_PACK_LIST_H
#define DM_PACK_LIST_H

typedef struct dm_context dm_context;

/* The scale of a group of weights: from the one of largest magnitude, or of least squared error. */
#define DM_SCALES_ABSMAX 0
#define DM_SCALES_MSE 1

/* A matrix to be packed with `rows` x `columns`, of which rows_present x columns_present are given and the others are
 * 0: f32 or, if is_bf16, the upper halves of f32; row_stride is in elements. scale_R: as dm_pack. importance_C: how
 * much the squared error of each column counts in DM_SCALES_MSE, all the same if NULL. */
typedef struct dm_pack_matrix {
    void *packed;
    const void *weights;
    const float *scale_R;
    const float *importance_C;
    size_t rows;
    size_t columns;
    size_t rows_present;
    size_t columns_present;
    size_t row_stride;
    size_t group;
    size_t is_bf16;
} dm_pack_matrix;

/* Pack `count` matrices at once; bad_N gets for each what dm_pack returns. `scales` says how the scales are chosen that
 * are not given. */
void dm_pack_matrices(dm_context *context, uint64_t *bad_N, const dm_pack_matrix *matrices, size_t count, int format,
                      int scales);

#endif
