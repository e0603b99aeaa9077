/* pick.h: a part of dist_moe.h: who computes which chunks of a step's experts. */
#ifndef DM_PICK_H
#define DM_PICK_H
#include <stddef.h>
#include <stdint.h>

struct dm_chunk;
struct dm_experts_layer;

/* Who shares the work on experts: nodes, and the ranks of this rank's node. */
typedef struct dm_workers {
    size_t node, nodes;
    size_t rank, ranks;     /* inside the node */
    size_t read_cost;       /* reading a chunk's weights costs as much as multiplying them with this many tokens; > 0;
                               where the formats of experts differ, theirs is read */
    const int64_t *speed_N; /* work that a node does in the same time, in [1, 2^20]; not read for one node */
} dm_workers;

/* A stretch of one expert's chunks that the same nodes hold: holder_count entries of node_H from first_holder on. */
typedef struct dm_chunk_run {
    int32_t expert, first_chunk, chunk_count, first_holder, holder_count;
} dm_chunk_run;

/* Which nodes hold the chunks of a layer: runs by ascending expert and chunk, the nodes of each ascending. */
typedef struct dm_holders {
    const dm_chunk_run *runs;
    const int32_t *node_H;
    size_t run_count, entry_count;
} dm_holders;

/* A part of a step's work on one expert: a node multiplies chunks [first_chunk, + chunk_count) of it with entries
 * [first, + count) of the step's token and weight lists. */
typedef struct dm_part {
    int32_t expert, node, first_chunk, chunk_count, first, count;
} dm_part;

/* Which node computes what of a step's experts: parts by ascending expert. There is room for one part per entry of
 * holders (one node: per expert), and for dm_pick_scratch_words() words of scratch. */
typedef struct dm_picks {
    dm_part *parts;
    int64_t *scratch;
    size_t part_count;
} dm_picks;

/* Words of scratch that an assignment over so many nodes needs, for the layer with most runs and entries. */
size_t dm_pick_scratch_words(size_t nodes, size_t runs, size_t holder_entries);
/* Which node computes what of the experts that got tokens (offset_E1 as above), decided alike by all ranks: greedily
 * by descending work, then the busiest node is relieved. keep_tokens: a token's work on an expert stays on one node, as
 * an exchange of tokens wants it; else an expert's chunks go to all nodes that hold them. */
void dm_assign_nodes(dm_picks *picks, const struct dm_experts_layer *weights, const int32_t *offset_E1,
                     const dm_workers *who, int keep_tokens);
/* This rank's chunks of its node's parts, in their order: its own ones or, where chunks are dealt out, its run of all
 * of them, cut into runs of equal work for the ranks of the node. Returns how many. */
size_t dm_rank_chunks(struct dm_chunk *chunks, const dm_picks *picks, const struct dm_experts_layer *weights,
                      const dm_workers *who);
/* Both: this rank's chunks of a step in which every rank has every token. */
size_t dm_pick_chunks(struct dm_chunk *chunks, dm_picks *picks, const struct dm_experts_layer *weights,
                      const int32_t *offset_E1, const dm_workers *who);
/* The work of each node in S steps, in products of a chunk with a token, reading included. */
void dm_node_work(int64_t *work_SN, dm_picks *picks, const struct dm_experts_layer *weights, const int32_t *offset_SE1,
                  const dm_workers *who, size_t S, int keep_tokens);

#endif
