/* walk.h: the order in which a matrix is multiplied with blocks of tokens, group by group of 32 columns.
 *
 * Tiles come from `runs` equal runs of adjacent tiles: the same tile of each run, a strip of its groups at a time, once
 * for each block. Memory delivers runs side by side faster than one, above all next to computing: the hardware's own
 * prefetch runs at most 20 lines ahead in each.
 */
#ifndef DM_AMX_WALK_H
#define DM_AMX_WALK_H

/* One block of tokens. */
typedef struct amx_block {
    float *out_TR;
    const int8_t *q_GT;    /* [groups][AMX_BLOCK][DM_GROUP] */
    const float *scale_GT; /* [groups][AMX_BLOCK] */
} amx_block;

typedef float amx_sums[AMX_BLOCK * 16];

typedef struct amx_job {
    const amx_block *block;
    amx_sums *sum_TR; /* of each run and block, while others have their turn */
    const uint8_t *packed;
    int8_t *ring; /* of unpacked groups */
    size_t blocks, tokens, groups, runs, run_tiles, total, strip, ring_bytes, ahead;
    size_t groups_per_scale, scale_step, bytes_per_group, scale_bytes, tile_bytes, rows, out_stride;
} amx_job;

/* A strip of a tile, and the block that it is multiplied with. */
typedef struct amx_walk {
    size_t run, block, tile, g;
} amx_walk;

DM_INLINE const uint8_t *tile_at(const amx_walk *walk, const amx_job *job) {
    return job->packed + (walk->run * job->run_tiles + walk->tile) * job->tile_bytes;
}

DM_INLINE size_t turn_of(const amx_walk *walk, const amx_job *job) { return walk->run * job->blocks + walk->block; }

/* On to the next strip of all; the block is left alone. */
static __attribute__((noinline)) void next_strip(amx_walk *walk, const amx_job *job) {
    if (++walk->run < job->runs) return;
    walk->run = 0;
    walk->g += job->strip;
    if (walk->g < job->groups) return;
    walk->g = 0;
    walk->tile++;
}

/* The same for a stage that takes each strip once for each block. */
DM_INLINE void next_turn(amx_walk *walk, const amx_job *job) {
    if (++walk->block < job->blocks) return;
    walk->block = 0;
    next_strip(walk, job);
}

/* The longest strip up to `most` groups that fits a tile a whole number of times. */
DM_INLINE size_t strip_of(size_t groups, size_t most) {
    size_t strip = groups < most ? groups : most;
    while (groups % strip != 0) strip--;
    return strip;
}

#endif
