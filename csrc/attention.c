/* attention.c: a step's attention, cut into units that any thread may take (rule 10).
 *
 * A chain is a tile of queries (tokens of one sequence, the heads of one KV head) with all of its position blocks. As a
 * rule a thread takes a whole chain. Where threads could not share whole chains evenly, the long ones are cut into runs
 * of blocks: the first run is merged into the chain's state at once, the others leave one triple per block; then all
 * are merged in ascending order. So that triples stay in the cache, this goes on in waves.
 */
#include "context.h"
#include "float_state.h"

#define TILE_ROWS 64       /* queries that share a block of K and V; their state and scores stay in the L2 cache */
#define UNITS_PER_THREAD 8 /* so that threads end together */
#define TRIPLE_BYTES (512 << 10) /* per thread and wave */
#define MERGE_PARTS 4            /* items that share the rows of a chain in a merge */
#define BLOCK_COST 8             /* reading a block costs as much as so many rows */

typedef struct chain {
    size_t token, tokens, head, heads;
    size_t blocks, done;
    float *state; /* NULL: one unit takes all blocks */
} chain;

typedef struct unit {
    chain *chain;
    size_t first, last;
    float *triples;
} unit;

typedef struct merge {
    chain *chain;
    const float *triples;
    size_t count;
} merge;

typedef struct attention_job {
    dm_context *context;
    float *out_ThP;
    int32_t *fault_T;
    const float *q_ThP;
    const dm_kv_view *cache;
    const int32_t *kv_of_h;
    size_t T, h, P, row_stride;
    float scale;
    int32_t layer;
    chain *chains;
    unit *units;
    merge *merges;
    float *triples;
    size_t chain_count, unit_capacity, unit_count, merge_count, triple_floats;
    size_t share, target; /* costs: of a thread, of a unit */
} attention_job;

static size_t rows_of(const chain *chain) { return chain->tokens * chain->heads; }

/* ---- units on a thread ---- */

/* A chain's queries as its cache's format needs them; each unit makes its own. */
static const void *pack_queries(const attention_job *job, const chain *chain, dm_worker *worker) {
    const size_t rows = rows_of(chain), R = dm_round_up(rows, 16);
    void *queries = dm_scratch(worker, DM_SCRATCH_OPERAND, dm_query_bytes(rows, job->P));
    if (R != rows) __builtin_memset(queries, 0, dm_query_bytes(rows, job->P));
    for (size_t row = 0; row < rows; row++) {
        const size_t t = chain->token + row / chain->heads;
        const float *q_P = job->q_ThP + t * job->row_stride + (chain->head + row % chain->heads) * job->P;
        int kind = job->context->kernels->attention_query[job->cache->format](queries, q_P, row, R, job->P);
        dm_report_fault(job->fault_T, t, kind, job->layer);
    }
    return queries;
}

static void finish_row(const attention_job *job, const chain *chain, const float *state, size_t row) {
    const size_t t = chain->token + row / chain->heads, head = chain->head + row % chain->heads;
    job->context->kernels->attention_finish(job->out_ThP + (t * job->h + head) * job->P, state, row, rows_of(chain),
                                            job->P);
}

static void run_unit(void *argument, size_t item, dm_worker *worker) {
    const attention_job *job = argument;
    const unit *unit = &job->units[item];
    const chain *chain = unit->chain;
    const dm_kv_view *cache = job->cache;
    const size_t rows = rows_of(chain);
    const dm_attention_tile tile = {
        .blocks = cache->blocks + cache->table_T[chain->token],
        .offset = cache->layer_offset + (size_t)job->kv_of_h[chain->head] * dm_kv_block_bytes(cache->format, job->P),
        .first_position = (size_t)cache->position_T[chain->token],
        .tokens = chain->tokens,
        .heads = chain->heads,
        .P = job->P,
        .score_scale = job->scale,
        .queries = pack_queries(job, chain, worker),
    };
    float *state = chain->state;
    if (state == NULL) state = dm_scratch(worker, DM_SCRATCH_OUT, dm_triple_floats(rows, job->P) * sizeof(float));
    void *scratch = dm_scratch(worker, DM_SCRATCH_HIDDEN, dm_attention_scratch(rows, job->P));
    job->context->kernels->attention[cache->format](state, unit->triples, &tile, unit->first, unit->last, scratch);
    if (chain->state != NULL) return;
    for (size_t row = 0; row < rows; row++) finish_row(job, chain, state, row);
}

static void run_merge(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    const attention_job *job = argument;
    const merge *merge = &job->merges[item / MERGE_PARTS];
    const chain *chain = merge->chain;
    const size_t rows = rows_of(chain), last = dm_item_first(item % MERGE_PARTS + 1, MERGE_PARTS, rows);
    for (size_t row = dm_item_first(item % MERGE_PARTS, MERGE_PARTS, rows); row < last; row++) {
        job->context->kernels->attention_merge(chain->state, merge->triples, merge->count, row, rows, job->P);
        if (chain->done == chain->blocks) finish_row(job, chain, chain->state, row);
    }
}

/* ---- the plan ---- */

static int same_sequence(const dm_kv_view *cache, size_t t) {
    return cache->table_T[t] == cache->table_T[t - 1] && cache->position_T[t] == cache->position_T[t - 1] + 1;
}

/* Tokens of a tile for so many heads: a power of two, so that no tile crosses a block's border. */
static size_t tile_tokens(size_t heads) {
    size_t tokens = DM_BLOCK_POSITIONS;
    while (tokens > 1 && tokens * heads > TILE_ROWS) tokens /= 2;
    return tokens;
}

/* Chains of the heads [head, head + heads), which share a KV head; returns their number. */
static size_t cut_tokens(const attention_job *job, chain *chains, size_t head, size_t heads) {
    const dm_kv_view *cache = job->cache;
    const size_t most = tile_tokens(heads);
    size_t count = 0;
    for (size_t t = 0; t < job->T; count++) {
        const size_t token = t++;
        while (t < job->T && same_sequence(cache, t) && (size_t)cache->position_T[t] % most != 0) t++;
        const size_t blocks = (size_t)cache->position_T[token] / DM_BLOCK_POSITIONS + 1;
        if (chains != NULL) chains[count] = (chain){token, t - token, head, heads, blocks, 0, NULL};
    }
    return count;
}

/* All chains; NULL counts them. Neighbouring heads with the same KV head share it. */
static size_t cut_chains(const attention_job *job, chain *chains) {
    size_t count = 0;
    for (size_t head = 0; head < job->h;) {
        size_t heads = 1;
        while (head + heads < job->h && heads < TILE_ROWS && job->kv_of_h[head + heads] == job->kv_of_h[head]) heads++;
        count += cut_tokens(job, chains == NULL ? NULL : chains + count, head, heads);
        head += heads;
    }
    return count;
}

static size_t block_cost(const chain *chain) { return rows_of(chain) + BLOCK_COST; }
static size_t cost_of(const chain *chain) { return chain->blocks * block_cost(chain); }

/* Moves the long chains to the end of the list, the longest last; returns where they begin. */
static size_t sort_chains(const attention_job *job) {
    chain *chains = job->chains;
    size_t first = job->chain_count;
    for (size_t i = job->chain_count; i-- > 0;) {
        if (cost_of(&chains[i]) <= job->target) continue;
        const chain moved = chains[i];
        chains[i] = chains[--first];
        size_t at = first;
        for (; at + 1 < job->chain_count && cost_of(&chains[at + 1]) < cost_of(&moved); at++)
            chains[at] = chains[at + 1];
        chains[at] = moved;
    }
    return first;
}

/* Whether threads that take whole chains, the longest first, would end about together. */
static int shares_evenly(const attention_job *job, size_t first, size_t threads) {
    size_t *load = dm_scratch(dm_pool_worker(job->context->pool, 0), DM_SCRATCH_SUMS, threads * sizeof(size_t));
    for (size_t i = 0; i < threads; i++) load[i] = 0;
    for (size_t i = job->chain_count; i-- > first;) {
        size_t least = 0;
        for (size_t j = 1; j < threads; j++) least = load[j] < load[least] ? j : least;
        load[least] += cost_of(&job->chains[i]);
        if (load[least] > job->share + job->target) return 0;
    }
    return 1;
}

/* Sorts the chains and gives a state to those that are to be cut. */
static void plan_states(attention_job *job, size_t threads) {
    size_t total = 0, floats = 0;
    for (size_t i = 0; i < job->chain_count; i++) total += cost_of(&job->chains[i]);
    job->share = total / threads + 1;
    job->target = job->share / UNITS_PER_THREAD + 1;
    if (threads == 1) return;
    const size_t first = sort_chains(job);
    if (shares_evenly(job, first, threads)) return;
    for (size_t i = first; i < job->chain_count; i++) floats += dm_triple_floats(rows_of(&job->chains[i]), job->P);
    float *state = dm_scratch(dm_pool_worker(job->context->pool, 0), DM_SCRATCH_SUMS, floats * sizeof(float));
    for (size_t i = first; i < job->chain_count; i++) {
        job->chains[i].state = state;
        state += dm_triple_floats(rows_of(&job->chains[i]), job->P);
    }
}

/* Blocks of the chain's next unit: the first one needs no triples, so it is as long as balance allows. */
static size_t run_length(const attention_job *job, const chain *chain) {
    if (chain->state == NULL) return chain->blocks;
    const size_t cost = cost_of(chain) < job->share ? cost_of(chain) : job->share;
    const size_t wanted = chain->done == 0 && cost / 2 > job->target ? cost / 2 : job->target;
    return dm_divide_up(wanted, block_cost(chain));
}

/* Adds the chain's next runs to the wave; returns 0 if the wave is full. */
static int plan_chain(attention_job *job, chain *chain, size_t *floats_used) {
    const size_t size = dm_triple_floats(rows_of(chain), job->P);
    merge *merge = NULL;
    while (chain->done < chain->blocks) {
        const size_t run = run_length(job, chain), left = chain->blocks - chain->done;
        size_t count = left < run ? left : run;
        const size_t room = (job->triple_floats - *floats_used) / size;
        if (job->unit_count == job->unit_capacity || (merge != NULL && room == 0)) return 0;
        float *triples = NULL;
        if (merge == NULL && chain->state != NULL) {
            merge = &job->merges[job->merge_count++];
            merge->chain = chain;
            merge->triples = job->triples + *floats_used;
            merge->count = 0;
        } else if (merge != NULL) {
            count = count < room ? count : room;
            triples = job->triples + *floats_used;
            merge->count += count;
            *floats_used += count * size;
        }
        job->units[job->unit_count++] = (unit){chain, chain->done, chain->done + count, triples};
        chain->done += count;
    }
    return 1;
}

static void run_items(const attention_job *job, dm_task task, size_t count, size_t threads) {
    dm_worker *worker = dm_pool_worker(job->context->pool, 0);
    if (threads > 1) {
        dm_pool_run(job->context->pool, task, (void *)job, count);
        return;
    }
    for (size_t i = 0; i < count; i++) task((void *)job, i, worker);
}

/* The last chains come first: they are the longest, in a prompt too. */
static void run_waves(attention_job *job, size_t threads) {
    for (size_t left = job->chain_count; left > 0;) {
        size_t floats_used = 0;
        job->unit_count = job->merge_count = 0;
        while (left > 0 && plan_chain(job, &job->chains[left - 1], &floats_used)) left--;
        run_items(job, run_unit, job->unit_count, threads);
        run_items(job, run_merge, job->merge_count * MERGE_PARTS, threads);
    }
}

static void make_plan(attention_job *job, size_t threads) {
    dm_worker *worker = dm_pool_worker(job->context->pool, 0);
    job->chain_count = cut_chains(job, NULL);
    job->unit_capacity = job->chain_count + 2 * threads * UNITS_PER_THREAD;
    const size_t chain_bytes = job->chain_count * sizeof(chain), unit_bytes = job->unit_capacity * sizeof(unit);
    uint8_t *lists = dm_scratch(worker, DM_SCRATCH_HEAP, chain_bytes + unit_bytes + job->chain_count * sizeof(merge));
    job->chains = (chain *)lists;
    job->units = (unit *)(lists + chain_bytes);
    job->merges = (merge *)(lists + chain_bytes + unit_bytes);
    cut_chains(job, job->chains);
    plan_states(job, threads);
    const size_t most = dm_triple_floats(TILE_ROWS, job->P), usual = threads * TRIPLE_BYTES / sizeof(float);
    job->triple_floats = threads == 1 ? 0 : most > usual ? most : usual;
    job->triples = dm_scratch(worker, DM_SCRATCH_MATMUL, job->triple_floats * sizeof(float));
}

void dm_attention(dm_context *context, float *out_ThP, int32_t *fault_T, const float *q_ThP, const dm_kv_view *cache,
                  const int32_t *kv_of_h, float score_scale, size_t T, size_t h, size_t g, size_t P, size_t row_stride,
                  int32_t layer) {
    (void)g;
    if (T == 0 || h == 0) return;
    uint64_t saved = dm_enter();
    attention_job job = {.context = context,
                         .out_ThP = out_ThP,
                         .fault_T = fault_T,
                         .q_ThP = q_ThP,
                         .cache = cache,
                         .kv_of_h = kv_of_h,
                         .T = T,
                         .h = h,
                         .P = P,
                         .row_stride = row_stride,
                         .scale = score_scale,
                         .layer = layer};
    size_t positions = 0;
    for (size_t t = 0; t < T; t++) positions += (size_t)cache->position_T[t] + 1;
    const size_t threads = positions * h * P * 2 < DM_SMALL_WORK ? 1 : context->threads;
    make_plan(&job, threads);
    run_waves(&job, threads);
    dm_set_float_state(saved);
}
