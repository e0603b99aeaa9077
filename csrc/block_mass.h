/* block_mass.h: the mass of the whole vocabulary from the sums of its blocks (rule 13). */
#ifndef DM_BLOCK_MASS_H
#define DM_BLOCK_MASS_H
#include "kernels.h"

/* The largest logit, and the sum of exp((logit - max) / temperature). */
typedef struct dm_block_mass {
    float max, sum;
} dm_block_mass;

/* Blocks are merged in ascending order by rule 10's formula; masked ones are passed over. */
dm_block_mass dm_merge_blocks(const dm_kernels *kernels, const float *max_B, const float *sum_B, float temperature,
                              size_t B);

#endif
