/* matmul_int.h: q4 and q8 weights by AMX tiles: per 32 columns one tdpbssd gives the exact int32 dot products of 16
 * rows and up to 16 tokens; AVX-512 scales and adds them, one conversion and one fma each.
 *
 * Bounds for 16 rows, 16 tokens and 32 columns, measured: 64-byte fused products and conversions have one port only
 * next to tile instructions, a tile's store takes 16 slots of the other one and 15 cycles of decoding.
 *
 *   tdpbssd          16 cycles
 *   port 0           16 fma, 16 products, 6 conversions, 4 of unpacking: 42 cycles
 *   port 5           16 of the tile's store, 20 additions, 4 of unpacking: 40 cycles
 *
 * So every further micro-operation counts: stages walk by pointers, and what is rare is not inlined. The right tile is
 * 8 vectors of weights, whose offset is taken away while they are unpacked. Few tokens go to vpdpbusd.
 */
#ifndef DM_AMX_MATMUL_INT_H
#define DM_AMX_MATMUL_INT_H

#define matmul_q8 vnni_matmul_q8
#define matmul_q4 vnni_matmul_q4
#include "../x86/matmul_int.h"
#undef matmul_q8
#undef matmul_q4

/* Below this many tokens vpdpbusd is faster. */
#define AMX_TOKENS 7

/* Tokens of one tile, and of one pass over the weights. */
#define AMX_BLOCK 16
#define AMX_PASS 64

/* One block of tokens: short strips of four runs, so that memory is read at four places while one computes. Several
 * blocks take turns with longer strips, which the ring keeps unpacked; arithmetic takes longer than reading then. */
#define RUNS 4
#define SHORT_STRIP 4
#define LONG_STRIP 16
#define RING (2 * LONG_STRIP)
#define AHEAD 4

/* How far ahead of the unpacking a run is asked for. */
#define PREFETCH_AHEAD 1024

#include "tiles.h"
#include "operand.h"
#include "walk.h"

/* The stage that unpacks; ahead of it the matrix is asked for, scales and all. */
typedef struct amx_unpacker {
    const uint8_t *vectors, *wanted;
    int8_t *weights;
    size_t left_in_strip, left;
    amx_walk walk;
} amx_unpacker;

/* The next place of a ring. Its size is a bit that is not set in the addresses of its first round. */
DM_INLINE int8_t *next_in_ring(const int8_t *at, size_t ring_bytes) {
    return (int8_t *)(((uintptr_t)at + GROUP_TILE_BYTES) & ~(uintptr_t)ring_bytes);
}

DM_INLINE void begin_unpack(amx_unpacker *at, const amx_job *job, int format) {
    const uint8_t *tile = tile_at(&at->walk, job) + job->scale_bytes;
    at->vectors = tile + at->walk.g * (format == DM_Q4 ? 256 : 512);
    at->wanted = tile + at->walk.g * job->bytes_per_group + PREFETCH_AHEAD;
    at->left_in_strip = job->strip;
}

DM_INLINE void unpack_group(amx_unpacker *at, const amx_job *job, int format) {
    const size_t group_bytes = format == DM_Q4 ? 256 : 512;
    for (size_t i = 0; i < group_bytes + 64; i += 64) __builtin_prefetch(at->wanted + i, 0, 3);
    at->wanted += job->bytes_per_group;
    if (format == DM_Q4) unpack_group_q4(at->weights, at->vectors);
    if (format == DM_Q8) unpack_group_q8(at->weights, at->vectors);
    at->vectors += group_bytes;
    at->weights = next_in_ring(at->weights, job->ring_bytes);
    at->left--;
    if (--at->left_in_strip > 0) return;
    next_strip(&at->walk, job);
    begin_unpack(at, job, format);
}

/* 1.5 * 2^23: an integer below 2^22 added to these bits is that number added to this float. */
#define MAGIC_BITS 0x4b400000
#define MAGIC 0x1.8p23f

/* sum[t] += scale * scale_x[t] * dots[t]. Next to tile instructions only one port has fused multiply-adds and
 * conversions, and the other one has additions: five eighths of the conversions are made of these. */
DM_INLINE void add_dots(f32v *sum, const int32_t *dots_TR, const float *scale_T, f32v scale, size_t width) {
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) {
        i32v raw = (i32v)_mm512_load_si512(dots_TR + 16 * i);
        f32v dot = i % 8 < 3 ? __builtin_convertvector(raw, f32v) : (f32v)((u32v)raw + MAGIC_BITS) - MAGIC;
        sum[i] = fma_lanes(scale * all_f32(scale_T[i]), dot, sum[i]);
    }
}

/* Stores a finished tile of rows and starts the next one. */
DM_INLINE void finish_rows(f32v *sum, float *out_TR, const amx_job *job, size_t row, size_t width) {
    const size_t rows = job->rows - row;
    const __mmask16 present = rows < 16 ? (__mmask16)((1u << rows) - 1) : 0xffff;
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) {
        if (i < job->tokens) _mm512_mask_storeu_ps(out_TR + i * job->out_stride + row, present, (__m512)sum[i]);
        sum[i] = (f32v){0};
    }
}

/* The stage that multiplies tiles. */
typedef struct amx_multiplier {
    const int8_t *q, *weights, *strip_weights;
    size_t left_in_strip;
    amx_walk walk;
} amx_multiplier;

DM_INLINE void begin_multiply(amx_multiplier *at, const amx_job *job) {
    if (at->walk.block == 0) at->strip_weights = at->weights;
    at->weights = at->strip_weights;
    at->q = job->block[at->walk.block].q_GT + at->walk.g * (AMX_BLOCK * DM_GROUP);
    at->left_in_strip = job->strip;
}

DM_INLINE void multiply_group(amx_multiplier *at, const amx_job *job, int32_t *before_TR, size_t odd) {
    multiply(before_TR, at->q, at->weights, odd);
    at->q += AMX_BLOCK * DM_GROUP;
    at->weights = next_in_ring(at->weights, job->ring_bytes);
    if (--at->left_in_strip > 0) return;
    next_turn(&at->walk, job);
    begin_multiply(at, job);
}

/* The stage that adds dot products. */
typedef struct amx_adder {
    const float *scale_T;
    const uint16_t *scale_R;
    size_t left_of_scale, left_in_strip;
    amx_walk walk;
} amx_adder;

/* The part of a strip's rest that has one scale, if that is not one group only. */
DM_INLINE void begin_scale(amx_adder *at, const amx_job *job) {
    const size_t g = at->walk.g + job->strip - at->left_in_strip;
    const size_t of_scale = job->groups_per_scale - g % job->groups_per_scale;
    at->left_of_scale = job->groups_per_scale == 1 || at->left_in_strip < of_scale ? at->left_in_strip : of_scale;
    at->left_in_strip -= at->left_of_scale;
    at->scale_R = (const uint16_t *)tile_at(&at->walk, job) + g / job->groups_per_scale * 16;
}

DM_INLINE void begin_add(amx_adder *at, const amx_job *job) {
    at->scale_T = job->block[at->walk.block].scale_GT + at->walk.g * AMX_BLOCK;
    at->left_in_strip = job->strip;
    begin_scale(at, job);
}

/* Takes on the next scale; at a strip's end stores finished rows, and the next run or block has its turn. */
DM_INLINE void end_add(f32v *sum, amx_adder *at, const amx_job *job, size_t width) {
    if (at->left_in_strip > 0) {
        begin_scale(at, job);
        return;
    }
    const amx_walk done = at->walk;
    const size_t row = (done.run * job->run_tiles + done.tile) * 16;
    if (done.g + job->strip == job->groups) finish_rows(sum, job->block[done.block].out_TR, job, row, width);
    next_turn(&at->walk, job);
    begin_add(at, job);
    if (job->strip == job->groups || job->runs * job->blocks == 1) return;
    float *to_TR = job->sum_TR[turn_of(&done, job)];
    const float *from_TR = job->sum_TR[turn_of(&at->walk, job)];
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) {
        store_f32(to_TR + 16 * i, sum[i]);
        sum[i] = load_f32(from_TR + 16 * i);
    }
}

DM_INLINE void add_group(f32v *sum, amx_adder *at, const amx_job *job, const int32_t *dots_TR, size_t width) {
    add_dots(sum, plain_address(dots_TR), at->scale_T, widen_f16(at->scale_R), width);
    at->scale_T += AMX_BLOCK;
    at->scale_R += job->scale_step;
    if (--at->left_of_scale == 0) end_add(sum, at, job, width);
}

/* What happens side by side: a group is unpacked `ahead` groups before it is multiplied, its dot products are stored
 * one step and added two steps after that. */
typedef struct amx_stages {
    amx_unpacker unpacker;
    amx_multiplier multiplier;
    amx_adder adder;
} amx_stages;

typedef int32_t amx_dots[AMX_BLOCK * 16];

DM_INLINE void full_step(f32v *sum, amx_dots *dots, amx_stages *stages, const amx_job *job, size_t odd, size_t width,
                         int format) {
    if (stages->unpacker.left > 0 && stages->multiplier.walk.block == job->blocks - 1) {
        unpack_group(&stages->unpacker, job, format);
    }
    compiler_barrier();
    multiply_group(&stages->multiplier, job, dots[1 - odd], odd);
    compiler_barrier();
    add_group(sum, &stages->adder, job, dots[odd], width);
}

/* The whole matrix against all blocks. */
DM_INLINE void amx_rows(const amx_job *job, size_t width, int format) {
    amx_dots dots[2] __attribute__((aligned(64)));
    amx_stages stages = {.unpacker = {.weights = job->ring, .left = job->total}, .multiplier = {.weights = job->ring}};
    f32v sum[AMX_BLOCK];
    begin_unpack(&stages.unpacker, job, format);
    begin_multiply(&stages.multiplier, job);
    begin_add(&stages.adder, job);
#pragma GCC unroll 16
    for (size_t i = 0; i < width; i++) sum[i] = (f32v){0};
    for (size_t i = 0; i < job->ahead && stages.unpacker.left > 0; i++) unpack_group(&stages.unpacker, job, format);
    compiler_barrier();
    multiply_group(&stages.multiplier, job, NULL, 0);
    const size_t steps = job->total * job->blocks;
    size_t left = steps - 1;
    if (left > 0) {
        multiply_group(&stages.multiplier, job, dots[0], 1);
        left--;
        for (; left >= 2; left -= 2) {
            full_step(sum, dots, &stages, job, 0, width, format);
            full_step(sum, dots, &stages, job, 1, width, format);
        }
        if (left > 0) full_step(sum, dots, &stages, job, 0, width, format);
    }
    const size_t odd = steps % 2;
    store_last(dots[1 - odd], odd);
    compiler_barrier();
    if (steps > 1) add_group(sum, &stages.adder, job, dots[odd], width);
    add_group(sum, &stages.adder, job, dots[1 - odd], width);
}

/* The vector part has a few sizes; what it computes beyond the tokens is not used. */
DM_INLINE void run_any(const amx_job *job, int format) {
    switch (job->tokens) {
        case 7:
        case 8: amx_rows(job, 8, format); break;
        case 9: amx_rows(job, 9, format); break;
        case 10: amx_rows(job, 10, format); break;
        case 11: amx_rows(job, 11, format); break;
        case 12: amx_rows(job, 12, format); break;
        case 13:
        case 14: amx_rows(job, 14, format); break;
        default: amx_rows(job, 16, format);
    }
}

static void run_q4(const amx_job *job) { run_any(job, DM_Q4); }
static void run_q8(const amx_job *job) { run_any(job, DM_Q8); }

/* All runs of so many tiles each, from out_TR's first row on. */
static void run_tiles(const amx_block *block, amx_job *job, const uint8_t *packed, size_t run_count, size_t tiles,
                      int format) {
    job->block = block;
    job->packed = packed;
    job->runs = run_count;
    job->run_tiles = tiles;
    job->total = run_count * tiles * job->groups;
    __builtin_memset(job->sum_TR, 0, run_count * job->blocks * sizeof *job->sum_TR);
    if (format == DM_Q4) {
        run_q4(job);
    } else {
        run_q8(job);
    }
}

/* At most AMX_PASS tokens in blocks of one size; the last may begin inside the one before it. */
static void amx_pass(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                     size_t group, int format, void *scratch) {
    const size_t groups = dm_divide_up(x->columns, DM_GROUP), tiles = dm_divide_up(rows, 16);
    const size_t blocks = dm_divide_up(T, AMX_BLOCK), tokens = dm_divide_up(T, blocks);
    const size_t runs = blocks == 1 && tiles >= RUNS ? RUNS : 1, run = tiles / runs;
    const size_t strip = strip_of(groups, blocks > 1 ? LONG_STRIP : runs > 1 ? SHORT_STRIP : groups);
    const size_t tile_bytes = dm_tile_bytes(format, x->columns, group);
    amx_sums sum_TR[RUNS > AMX_PASS / AMX_BLOCK ? RUNS : AMX_PASS / AMX_BLOCK] __attribute__((aligned(64)));
    int8_t space[3 * RING * GROUP_TILE_BYTES];
    amx_block block[AMX_PASS / AMX_BLOCK], rest[AMX_PASS / AMX_BLOCK];
    amx_job job = {.sum_TR = sum_TR,
                   .ring = (int8_t *)dm_round_up((uintptr_t)space, 2 * RING * GROUP_TILE_BYTES),
                   .blocks = blocks,
                   .tokens = tokens,
                   .groups = groups,
                   .strip = strip,
                   .ring_bytes = (blocks == 1 ? 2 * AHEAD : RING) * GROUP_TILE_BYTES,
                   .ahead = blocks == 1 ? AHEAD : strip + 2,
                   .groups_per_scale = group == 0 ? groups : group / DM_GROUP,
                   .scale_step = group == DM_GROUP ? 16 : 0,
                   .bytes_per_group = tile_bytes / groups,
                   .scale_bytes = dm_scale_bytes(x->columns, group),
                   .tile_bytes = tile_bytes,
                   .rows = rows,
                   .out_stride = out_stride};
    for (size_t b = 0; b < blocks; b++) {
        const size_t first = (b + 1) * tokens <= T ? b * tokens : T - tokens;
        float *scale_GT = (float *)scratch + b * groups * AMX_BLOCK;
        int8_t *q_GT = (int8_t *)scratch + (blocks * sizeof(float) + b * DM_GROUP) * groups * AMX_BLOCK;
        gather_scales(scale_GT, x, first, tokens, groups);
        copy_operand(q_GT, x, first, tokens, groups);
        block[b] = rest[b] = (amx_block){out_TR + first * out_stride, q_GT, scale_GT};
        rest[b].out_TR += runs * run * 16;
    }
    configure_for(tokens);
    run_tiles(block, &job, packed, runs, run, format);
    if (runs * run < tiles) {
        job.rows -= runs * run * 16;
        run_tiles(rest, &job, packed + runs * run * tile_bytes, 1, tiles - runs * run, format);
    }
    _tile_release();
}

DM_INLINE void matmul_amx(float *out_TR, const uint8_t *packed, const dm_rows *x, size_t T, size_t rows,
                          size_t out_stride, size_t group, int format, void *scratch) {
    const size_t passes = dm_divide_up(T, AMX_PASS);
    for (size_t pass = 0; pass < passes; pass++) {
        const size_t first = T * pass / passes, last = T * (pass + 1) / passes;
        const dm_rows part = {.q = x->q + first * x->q_stride,
                              .scale = x->scale + first * x->group_stride,
                              .columns = x->columns,
                              .q_stride = x->q_stride,
                              .group_stride = x->group_stride};
        amx_pass(out_TR + first * out_stride, packed, &part, last - first, rows, out_stride, group, format, scratch);
    }
}

static void matmul_q8(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    if (T < AMX_TOKENS) {
        vnni_matmul_q8(out_TR, packed, x, T, rows, out_stride, group, scratch);
    } else {
        matmul_amx(out_TR, packed, x, T, rows, out_stride, group, DM_Q8, scratch);
    }
}

static void matmul_q4(float *out_TR, const void *packed, const dm_rows *x, size_t T, size_t rows, size_t out_stride,
                      size_t group, void *scratch) {
    if (T < AMX_TOKENS) {
        vnni_matmul_q4(out_TR, packed, x, T, rows, out_stride, group, scratch);
    } else {
        matmul_amx(out_TR, packed, x, T, rows, out_stride, group, DM_Q4, scratch);
    }
}

#endif
