/* walk.h: the order in which a matrix is multiplied with blocks of tokens, group by group of 32 columns. */
#ifndef DM_AMX_WALK_H
#define DM_AMX_WALK_H

/* One block of tokens. */
typedef struct amx_block {
    float *out_TR;
    const int8_t *q_GT;    /* [groups][AMX_BLOCK][DM_GROUP] */
    const float *scale_GT; /* [groups][AMX_BLOCK] */
    float *sum_TR;         /* while other blocks have their turn */
} amx_block;

typedef struct amx_job {
    const amx_block *block;
    const uint8_t *packed, *end;
    int8_t *ring; /* of unpacked groups */
    size_t blocks, last_block, tokens, groups, total, steps, strip, ring_bytes, ahead;
    size_t groups_per_scale, scale_step, bytes_per_group, scale_bytes, tile_bytes, rows, out_stride;
} amx_job;

/* Where one of the stages is: it walks through the groups of a strip, once for each block, then on to the next strip.
 * A run of groups ends with its row of tiles or with the strip. */
typedef struct amx_walk {
    size_t run, left;                  /* groups of the run, of the strip */
    size_t b, tile, g;                 /* block, tile of rows and group in it where the run began */
    size_t start_tile, start_g, count; /* the strip's */
} amx_walk;

DM_INLINE void begin_run(amx_walk *walk, const amx_job *job) {
    const size_t in_row = job->groups - walk->g;
    walk->run = walk->left < in_row ? walk->left : in_row;
    walk->left -= walk->run;
}

static __attribute__((noinline)) void begin_strip(amx_walk *walk, const amx_job *job) {
    const size_t rest = job->total - (walk->tile * job->groups + walk->g);
    walk->b = 0;
    walk->start_tile = walk->tile;
    walk->start_g = walk->g;
    walk->count = walk->left = rest < job->strip ? rest : job->strip;
    begin_run(walk, job);
}

/* After a run of `length` groups. */
static __attribute__((noinline)) void next_run(amx_walk *walk, const amx_job *job, size_t length) {
    walk->g += length;
    if (walk->g == job->groups) {
        walk->g = 0;
        walk->tile++;
    }
    if (walk->left > 0) {
        begin_run(walk, job);
    } else if (walk->b + 1 < job->blocks) {
        walk->b++;
        walk->tile = walk->start_tile;
        walk->g = walk->start_g;
        walk->left = walk->count;
        begin_run(walk, job);
    } else {
        begin_strip(walk, job);
    }
}

#endif
