/* cases_hosts.c: what ranks of several hosts need alike: sums as bytes, and who computes which chunks. */
#include "cases.h"

#include <string.h>

/* Sums of every width, in runs, with the bounds of the fault check among them. */
static int64_t *random_sums(test_run *run, size_t count) {
    int64_t *sums = buffer(run, count * sizeof *sums);
    int shift = 0;
    for (size_t i = 0; i < count; i++) {
        if (i % 40 == 0) shift = (int)(next_random(run) % 64);
        sums[i] = (int64_t)((uint64_t)next_random(run) << 32 | next_random(run)) >> shift;
        if (next_random(run) % 50 == 0)
            sums[i] = (next_random(run) & 1 ? 1 : -1) * (((int64_t)1 << 51) - (int64_t)(i % 3));
    }
    input(run, sums, count * sizeof *sums);
    return sums;
}

/* Encoded and decoded in buffers of exactly the promised size. */
void run_sums(test_run *run) {
    const size_t count = run->one->rows * run->one->columns;
    const int64_t *sums = random_sums(run, count), *others = random_sums(run, count);
    for (int wire = 0; wire < DM_WIRE_COUNT; wire++) {
        uint8_t *bytes = buffer(run, dm_wire_bound(count, wire));
        const size_t used = dm_encode_sums(bytes, sums, count, wire);
        uint8_t *sent = buffer(run, used);
        memcpy(sent, bytes, used);
        output_bytes(run, "bytes", sent, used);
        int64_t *set = buffer(run, count * sizeof *set), *added = buffer(run, count * sizeof *added);
        memcpy(added, others, count * sizeof *added);
        const size_t read = dm_decode_sums(set, sent, used, count, wire, 0);
        dm_decode_sums(added, sent, used, count, wire, 1);
        const int32_t whole[] = {read == used, dm_decode_sums(set, sent, used - 1, count, wire, 0) == 0};
        dm_decode_sums(set, sent, used, count, wire, 0);
        output_i32(run, "whole", whole, 2);
        output_i64(run, "decoded", set, count);
        output_i64(run, "added", added, count);
    }
}

enum { NODES = 4, STEPS = 3 };

static void output_picks(test_run *run, const dm_experts_layer *layer, dm_picks *picks, dm_workers *who,
                         const int32_t *offset_E1, size_t chunks) {
    dm_chunk *own = buffer(run, chunks * sizeof *own);
    for (who->node = 0; who->node < NODES; who->node++) {
        for (who->rank = 0; who->rank < who->ranks; who->rank++) {
            const size_t count = dm_pick_chunks(own, picks, layer, offset_E1, who);
            for (size_t i = 0; i < count; i++) {
                const int32_t found[] = {(int32_t)((const uint8_t *)own[i].packed - (const uint8_t *)layer->chunks),
                                         (int32_t)own[i].first, (int32_t)own[i].count};
                output_i32(run, "chunk", found, 3);
            }
        }
    }
    for (int keep_tokens = 0; keep_tokens < 2; keep_tokens++) {
        dm_assign_nodes(picks, layer, offset_E1, who, keep_tokens);
        output_bytes(run, "parts", picks->parts, picks->part_count * sizeof *picks->parts);
    }
}

/* Random holders of `rows` experts, each cut in two runs of chunks. */
void run_picks(test_run *run) {
    const size_t E = run->one->rows, C = 3, R = 2 * E;
    dm_chunk_run *runs = buffer(run, R * sizeof *runs);
    int32_t *node_H = buffer(run, R * NODES * sizeof *node_H), *offset_SE1 = buffer(run, STEPS * (E + 1) * 4);
    const void **chunks = buffer(run, E * C * sizeof *chunks);
    int32_t held = 0;
    for (size_t r = 0; r < R; r++) {
        const uint32_t nodes = next_random(run) % ((1 << NODES) - 1) + 1;
        runs[r] = (dm_chunk_run){(int32_t)(r / 2), r % 2 ? 1 : 0, r % 2 ? 2 : 1, held, 0};
        for (int32_t node = 0; node < NODES; node++) {
            if (nodes >> node & 1) node_H[held++] = node;
        }
        runs[r].holder_count = held - runs[r].first_holder;
    }
    for (size_t s = 0; s < STEPS; s++) {
        int32_t *offset_E1 = offset_SE1 + s * (E + 1);
        offset_E1[0] = 0;
        for (size_t e = 0; e < E; e++) {
            offset_E1[e + 1] = offset_E1[e] + (int32_t)(next_random(run) % 3 ? 0 : next_random(run) % (s * 40 + 2));
        }
    }
    for (size_t c = 0; c < E * C; c++) chunks[c] = (const uint8_t *)chunks + c;
    const dm_holders holders = {runs, node_H, R, (size_t)held};
    const int64_t speed_N[NODES] = {3, 3, 2, 1};
    dm_workers who = {.nodes = NODES, .ranks = 2, .read_cost = 8, .speed_N = speed_N};
    dm_chunk_format *formats = buffer(run, E * sizeof *formats);
    for (size_t e = 0; e < E; e++) formats[e] = (dm_chunk_format){DM_Q4, DM_Q8, 32, 32, 1 + next_random(run) % 16};
    const dm_experts_layer layer = {.chunks = chunks,
                                    .formats = formats,
                                    .format_step = run->one->numbers == NUMBERS_USUAL,
                                    .holders = &holders,
                                    .experts = E,
                                    .chunks_per_expert = C};
    dm_picks picks = {.parts = buffer(run, (size_t)held * sizeof *picks.parts),
                      .scratch = buffer(run, dm_pick_scratch_words(NODES, R, (size_t)held) * sizeof(int64_t))};
    for (size_t s = 0; s < STEPS; s++) {
        output_picks(run, &layer, &picks, &who, offset_SE1 + s * (E + 1), E * C);
    }
    int64_t work_SN[STEPS * NODES];
    who.node = 0;
    dm_node_work(work_SN, &picks, &layer, offset_SE1, &who, STEPS, 1);
    output_i64(run, "work", work_SN, STEPS * NODES);
}
