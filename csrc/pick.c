/* pick.c: who computes what of a step's experts: first the node, then the rank inside the node.
 *
 * Every rank knows the whole step's routing and does the same integer arithmetic, so all decide alike without a word.
 * Sums over units are exact (rule 7): whoever computes a unit, the bits are the same.
 *
 * A run is a stretch of one expert's chunks that the same nodes hold. Its work comes in units: chunks, since chunks on
 * several nodes are still read once; or, where tokens must stay together or there are too few chunks, the whole run,
 * and from FEW_TOKENS on blocks of tokens: only then is reading the weights on two nodes a small part of the work.
 */
#include <string.h>

#include "dist_moe.h"

/* Times the cost of reading a chunk: more tokens than that may be split (a second reading costs a fifth or less). */
#define FEW_TOKENS 4
#define SPLIT_BLOCK 16
/* Units of work looked at while the busiest node is relieved: some 20 us. */
#define MOST_LOOKS 16384

/* The state of one assignment; arrays of N nodes, R runs and H holder entries. */
typedef struct balance {
    const dm_holders *holders;
    const int64_t *speed_N;
    size_t nodes, looks;
    int64_t *load_N, *gained_N, *from_N, *via_N, *queue_N;
    int64_t *units_H;                    /* of a run on each of its holders */
    int64_t *cost_R, *fixed_R, *units_R; /* of a unit; of having any on a node; how many */
    int64_t *picked_R, *free_R;          /* runs that got tokens, ascending; those with several holders, by cost */
    size_t picked, free;
} balance;

size_t dm_pick_scratch_words(size_t nodes, size_t runs, size_t holder_entries) {
    return 5 * nodes + 5 * runs + holder_entries;
}

static balance set_up(int64_t *scratch, const dm_holders *holders, const dm_workers *who) {
    const size_t N = who->nodes, R = holders->run_count, H = holders->entry_count;
    balance b = {.holders = holders, .speed_N = who->speed_N, .nodes = N};
    int64_t **const of_nodes[] = {&b.load_N, &b.gained_N, &b.from_N, &b.via_N, &b.queue_N};
    int64_t **const of_runs[] = {&b.cost_R, &b.fixed_R, &b.units_R, &b.picked_R, &b.free_R};
    for (size_t i = 0; i < 5; i++, scratch += N) *of_nodes[i] = scratch;
    for (size_t i = 0; i < 5; i++, scratch += R) *of_runs[i] = scratch;
    b.units_H = scratch;
    memset(b.load_N, 0, N * sizeof *b.load_N);
    memset(b.units_H, 0, H * sizeof *b.units_H);
    return b;
}

/* What reading a chunk of an expert costs. */
static int64_t read_cost(const dm_experts_layer *weights, const dm_workers *who, int32_t expert) {
    return (int64_t)(weights->format_step == 0 ? who->read_cost : weights->formats[expert].read_cost);
}

/* How the run's work is cut up; tokens > 0. */
static void cut_run(balance *b, size_t r, int64_t tokens, int64_t read, int keep_tokens) {
    const dm_chunk_run *run = &b->holders->runs[r];
    const int64_t chunks = run->chunk_count;
    if (!keep_tokens && (chunks >= run->holder_count || tokens <= FEW_TOKENS * read)) {
        b->units_R[r] = chunks;
        b->cost_R[r] = tokens + read;
        b->fixed_R[r] = 0;
    } else if (tokens <= FEW_TOKENS * read) {
        b->units_R[r] = 1;
        b->cost_R[r] = chunks * (tokens + read);
        b->fixed_R[r] = 0;
    } else {
        b->units_R[r] = (tokens + SPLIT_BLOCK - 1) / SPLIT_BLOCK;
        b->cost_R[r] = chunks * SPLIT_BLOCK;
        b->fixed_R[r] = chunks * read;
    }
}

static int64_t gain(const balance *b, size_t r, size_t entry) {
    return b->cost_R[r] + (b->units_H[entry] == 0 ? b->fixed_R[r] : 0);
}

static int64_t loss(const balance *b, size_t r, size_t entry) {
    return b->cost_R[r] + (b->units_H[entry] == 1 ? b->fixed_R[r] : 0);
}

/* Whether load_a on node a takes less time than load_b on node b. */
static int is_sooner(const balance *b, int64_t load_a, size_t a, int64_t load_b, size_t other) {
    return load_a * b->speed_N[other] < load_b * b->speed_N[a];
}

static void give(balance *b, size_t r, size_t entry) {
    b->load_N[b->holders->node_H[entry]] += gain(b, r, entry);
    b->units_H[entry]++;
}

/* Each unit to the holder that would be done with it first, the lowest of several. */
static void spread(balance *b, size_t r) {
    const dm_chunk_run *run = &b->holders->runs[r];
    const size_t first = (size_t)run->first_holder, last = first + (size_t)run->holder_count;
    for (int64_t unit = 0; unit < b->units_R[r]; unit++) {
        size_t best = first;
        int64_t best_load = b->load_N[b->holders->node_H[first]] + gain(b, r, first);
        for (size_t entry = first + 1; entry < last; entry++) {
            size_t node = (size_t)b->holders->node_H[entry];
            int64_t load = b->load_N[node] + gain(b, r, entry);
            if (!is_sooner(b, load, node, best_load, (size_t)b->holders->node_H[best])) continue;
            best = entry;
            best_load = load;
        }
        give(b, r, best);
    }
}

/* Cuts the work of all runs that got tokens; those that one node alone holds are placed. */
static void collect(balance *b, const dm_experts_layer *weights, const int32_t *offset_E1, const dm_workers *who,
                    int keep_tokens) {
    for (size_t r = 0; r < b->holders->run_count; r++) {
        const dm_chunk_run *run = &b->holders->runs[r];
        int64_t tokens = offset_E1[run->expert + 1] - offset_E1[run->expert];
        if (tokens == 0 || run->holder_count == 0) continue;
        b->picked_R[b->picked++] = (int64_t)r;
        cut_run(b, r, tokens, read_cost(weights, who, run->expert), keep_tokens);
        if (run->holder_count > 1) {
            b->free_R[b->free++] = (int64_t)r;
            continue;
        }
        b->load_N[b->holders->node_H[run->first_holder]] += b->units_R[r] * b->cost_R[r] + b->fixed_R[r];
        b->units_H[run->first_holder] = b->units_R[r];
    }
}

static int64_t run_cost(const balance *b, int64_t r) { return b->units_R[r] * b->cost_R[r] + b->fixed_R[r]; }

static int comes_before(const balance *b, int64_t r, int64_t s) {
    int64_t left = run_cost(b, r), right = run_cost(b, s);
    return left > right || (left == right && r < s);
}

/* The free runs by descending cost, then ascending number. A shell sort: no two runs are equal in that order. */
static void sort_free(balance *b) {
    size_t gap = 1;
    while (gap < b->free / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3) {
        for (size_t i = gap; i < b->free; i++) {
            int64_t run = b->free_R[i];
            size_t at = i;
            for (; at >= gap && comes_before(b, run, b->free_R[at - gap]); at -= gap)
                b->free_R[at] = b->free_R[at - gap];
            b->free_R[at] = run;
        }
    }
}

static size_t entry_of(const balance *b, size_t r, size_t node) {
    const dm_chunk_run *run = &b->holders->runs[r];
    size_t entry = (size_t)run->first_holder, end = entry + (size_t)run->holder_count;
    while (entry < end && (size_t)b->holders->node_H[entry] != node) entry++;
    return entry;
}

static size_t busiest(const balance *b) {
    size_t top = 0;
    for (size_t node = 1; node < b->nodes; node++) {
        if (is_sooner(b, b->load_N[top], top, b->load_N[node], node)) top = node;
    }
    return top;
}

/* One unit moves along each step of the path that ends at `node`. */
static void move_along(balance *b, size_t node) {
    while ((size_t)b->from_N[node] != node) {
        size_t r = (size_t)b->via_N[node], from = (size_t)b->from_N[node], entry = entry_of(b, r, from);
        b->load_N[from] -= loss(b, r, entry);
        b->units_H[entry]--;
        give(b, r, entry_of(b, r, node));
        node = from;
    }
}

/* Continues the paths that end at node a by one step over run r. Returns 1 if that relieved the busiest node. */
static int extend(balance *b, size_t a, size_t r, size_t top, size_t *queued) {
    const dm_chunk_run *run = &b->holders->runs[r];
    const size_t first = (size_t)run->first_holder, end = first + (size_t)run->holder_count;
    const size_t here = entry_of(b, r, a);
    b->looks += (size_t)run->holder_count;
    if (here == end || b->units_H[here] == 0) return 0;
    int64_t left = b->load_N[a] + b->gained_N[a] - loss(b, r, here);
    if (a != top && left > b->load_N[a] && !is_sooner(b, left, a, b->load_N[top], top)) return 0;
    for (size_t entry = first; entry < end; entry++) {
        size_t node = (size_t)b->holders->node_H[entry];
        if (b->from_N[node] >= 0) continue;
        b->from_N[node] = (int64_t)a;
        b->via_N[node] = (int64_t)r;
        b->gained_N[node] = gain(b, r, entry);
        b->queue_N[(*queued)++] = (int64_t)node;
        if (is_sooner(b, b->load_N[node] + b->gained_N[node], node, b->load_N[top], top)) {
            move_along(b, node);
            return 1;
        }
    }
    return 0;
}

/* Whether the busiest node, less the smallest unit that could move, would have less than its fair share. */
static int is_even(const balance *b, size_t top) {
    int64_t least = b->cost_R[b->free_R[0]], work = 0, speed = 0;
    for (size_t i = 1; i < b->free; i++) least = b->cost_R[b->free_R[i]] < least ? b->cost_R[b->free_R[i]] : least;
    for (size_t node = 0; node < b->nodes; node++) {
        work += b->load_N[node];
        speed += b->speed_N[node];
    }
    return (b->load_N[top] - least) * speed < work * b->speed_N[top];
}

/* Looks, nearest first, for a chain of nodes along which one unit each may move on from the busiest node to one that
 * stays less busy with it. Where all units cost the same, none is left only when the busiest node is as good as it can
 * be (Harvey et al., Semi-matchings for bipartite graphs, 2006). */
static int relieve(balance *b) {
    size_t top = busiest(b), queued = 0;
    if (is_even(b, top)) return 0;
    for (size_t node = 0; node < b->nodes; node++) b->from_N[node] = -1;
    b->from_N[top] = (int64_t)top;
    b->gained_N[top] = 0;
    b->queue_N[queued++] = (int64_t)top;
    for (size_t at = 0; at < queued; at++) {
        for (size_t i = b->free; i-- > 0 && b->looks < MOST_LOOKS;) {
            if (extend(b, (size_t)b->queue_N[at], (size_t)b->free_R[i], top, &queued)) return 1;
        }
    }
    return 0;
}

/* The parts of a run, one per holder that got units of it. */
static size_t add_parts(dm_part *parts, size_t count, const balance *b, size_t r, const int32_t *offset_E1) {
    const dm_chunk_run *run = &b->holders->runs[r];
    const int32_t first = offset_E1[run->expert], tokens = offset_E1[run->expert + 1] - first;
    const int32_t chunks_per_unit = (int32_t)(run->chunk_count / b->units_R[r]);
    int32_t done = 0;
    for (int32_t h = run->first_holder; h < run->first_holder + run->holder_count; h++) {
        const int32_t units = (int32_t)b->units_H[h];
        if (units == 0) continue;
        dm_part part = {run->expert, b->holders->node_H[h], run->first_chunk, run->chunk_count, first, tokens};
        if (b->fixed_R[r] > 0) {
            int32_t from = done * SPLIT_BLOCK, to = (done + units) * SPLIT_BLOCK;
            part.first = first + from;
            part.count = (to < tokens ? to : tokens) - from;
        } else {
            part.first_chunk = run->first_chunk + done * chunks_per_unit;
            part.chunk_count = units * chunks_per_unit;
        }
        parts[count++] = part;
        done += units;
    }
    return count;
}

static size_t one_node(dm_part *parts, const dm_experts_layer *weights, const int32_t *offset_E1) {
    size_t count = 0;
    for (size_t e = 0; e < weights->experts; e++) {
        int32_t first = offset_E1[e], tokens = offset_E1[e + 1] - first;
        if (tokens == 0) continue;
        parts[count++] = (dm_part){(int32_t)e, 0, 0, (int32_t)weights->chunks_per_expert, first, tokens};
    }
    return count;
}

void dm_assign_nodes(dm_picks *picks, const dm_experts_layer *weights, const int32_t *offset_E1, const dm_workers *who,
                     int keep_tokens) {
    if (who->nodes == 1) {
        picks->part_count = one_node(picks->parts, weights, offset_E1);
        return;
    }
    balance b = set_up(picks->scratch, weights->holders, who);
    collect(&b, weights, offset_E1, who, keep_tokens);
    sort_free(&b);
    for (size_t i = 0; i < b.free; i++) spread(&b, (size_t)b.free_R[i]);
    while (b.free > 0 && b.looks < MOST_LOOKS && relieve(&b)) {
    }
    picks->part_count = 0;
    for (size_t i = 0; i < b.picked; i++) {
        picks->part_count = add_parts(picks->parts, picks->part_count, &b, (size_t)b.picked_R[i], offset_E1);
    }
}

void dm_node_work(int64_t *work_SN, dm_picks *picks, const dm_experts_layer *weights, const int32_t *offset_SE1,
                  const dm_workers *who, size_t S, int keep_tokens) {
    memset(work_SN, 0, S * who->nodes * sizeof *work_SN);
    for (size_t s = 0; s < S; s++) {
        dm_assign_nodes(picks, weights, offset_SE1 + s * (weights->experts + 1), who, keep_tokens);
        for (size_t i = 0; i < picks->part_count; i++) {
            const dm_part *part = &picks->parts[i];
            const int64_t cost = part->count + read_cost(weights, who, part->expert);
            work_SN[s * who->nodes + (size_t)part->node] += part->chunk_count * cost;
        }
    }
}

static size_t add_chunk(dm_chunk *chunks, size_t count, const dm_experts_layer *weights, const dm_part *part,
                        size_t chunk) {
    size_t number = (size_t)part->expert * weights->chunks_per_expert + (size_t)part->first_chunk + chunk;
    if (weights->own_C != NULL && !weights->own_C[number]) return count;
    const dm_chunk_format *format = &weights->formats[(size_t)part->expert * weights->format_step];
    chunks[count] = (dm_chunk){weights->chunks[number], format, (size_t)part->first, (size_t)part->count};
    return count + 1;
}

/* Reading a chunk costs as much as multiplying it with read_cost tokens. A chunk belongs to the run in which the middle
 * of its work lies. */
static size_t deal_parts(dm_chunk *chunks, const dm_picks *picks, const dm_experts_layer *weights,
                         const dm_workers *who) {
    size_t total = 0, before = 0, count = 0;
    for (size_t i = 0; i < picks->part_count; i++) {
        const dm_part *part = &picks->parts[i];
        const int64_t cost = part->count + read_cost(weights, who, part->expert);
        if ((size_t)part->node == who->node) total += (size_t)(part->chunk_count * cost);
    }
    for (size_t i = 0; i < picks->part_count; i++) {
        const dm_part *part = &picks->parts[i];
        const size_t cost = (size_t)(part->count + read_cost(weights, who, part->expert));
        if ((size_t)part->node != who->node) continue;
        for (size_t c = 0; c < (size_t)part->chunk_count; c++) {
            size_t middle = 2 * before + cost;
            before += cost;
            if (middle * who->ranks / (2 * total) == who->rank) count = add_chunk(chunks, count, weights, part, c);
        }
    }
    return count;
}

size_t dm_rank_chunks(dm_chunk *chunks, const dm_picks *picks, const dm_experts_layer *weights, const dm_workers *who) {
    if (weights->own_C == NULL) return deal_parts(chunks, picks, weights, who);
    size_t count = 0;
    for (size_t i = 0; i < picks->part_count; i++) {
        const dm_part *part = &picks->parts[i];
        if ((size_t)part->node != who->node) continue;
        for (size_t c = 0; c < (size_t)part->chunk_count; c++) count = add_chunk(chunks, count, weights, part, c);
    }
    return count;
}

size_t dm_pick_chunks(dm_chunk *chunks, dm_picks *picks, const dm_experts_layer *weights, const int32_t *offset_E1,
                      const dm_workers *who) {
    dm_assign_nodes(picks, weights, offset_E1, who, 0);
    return dm_rank_chunks(chunks, picks, weights, who);
}
