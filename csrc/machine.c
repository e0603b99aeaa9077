/* machine.c: the speeds that a measurement is compared with: reading memory, bare arithmetic, our own kernel in cache.
 */
#define _POSIX_C_SOURCE 199309L
#include <string.h>
#include <time.h>

#include "context.h"
#include "float_state.h"

#define PIECE_BYTES ((size_t)8 << 20)
#define NUMBERS 256 /* what the arithmetic loops work on, per thread */

typedef struct machine_job {
    const dm_kernels *kernels;
    const uint8_t *data;
    size_t bytes, streams, ahead, rounds;
    size_t R, C, T, group;
    int format;
    size_t operations; /* of all items together */
    int32_t seen;      /* the xor of what was read */
} machine_job;

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double run(dm_context *context, dm_task task, machine_job *job, size_t items) {
    uint64_t saved = dm_enter();
    job->kernels = context->kernels;
    double started = seconds_now();
    dm_pool_run(context->pool, task, job, items);
    double elapsed = seconds_now() - started;
    dm_set_float_state(saved);
    return elapsed;
}

static void count_operations(machine_job *job, size_t operations) {
    __atomic_fetch_add(&job->operations, operations, __ATOMIC_RELAXED);
}

static void read_item(void *argument, size_t item, dm_worker *worker) {
    (void)worker;
    machine_job *job = argument;
    size_t first = item * PIECE_BYTES;
    size_t bytes = job->bytes - first < PIECE_BYTES ? job->bytes - first : PIECE_BYTES;
    int32_t seen = job->kernels->read_bytes(job->data + first, bytes, job->streams, job->ahead);
    __atomic_fetch_xor(&job->seen, seen, __ATOMIC_RELAXED);
}

double dm_read_seconds(dm_context *context, int32_t *seen, const void *data, size_t bytes, size_t streams,
                       size_t ahead) {
    machine_job job = {.data = data, .bytes = bytes, .streams = streams, .ahead = ahead};
    double elapsed = run(context, read_item, &job, dm_divide_up(bytes, PIECE_BYTES));
    *seen = job.seen;
    return elapsed;
}

static void int8_item(void *argument, size_t item, dm_worker *worker) {
    (void)item;
    machine_job *job = argument;
    int32_t *data = dm_scratch(worker, DM_SCRATCH_OUT, NUMBERS * sizeof *data);
    for (size_t i = 0; i < NUMBERS; i++) data[i] = 0x01020304;
    count_operations(job, job->kernels->int8_peak(data, job->rounds));
}

static void f32_item(void *argument, size_t item, dm_worker *worker) {
    (void)item;
    machine_job *job = argument;
    float *data = dm_scratch(worker, DM_SCRATCH_OUT, NUMBERS * sizeof *data);
    for (size_t i = 0; i < NUMBERS; i++) data[i] = 0.5f;
    count_operations(job, job->kernels->f32_peak(data, job->rounds));
}

double dm_int8_peak(dm_context *context, size_t rounds) {
    machine_job job = {.rounds = rounds};
    double elapsed = run(context, int8_item, &job, context->threads);
    return (double)job.operations / elapsed;
}

double dm_f32_peak(dm_context *context, size_t rounds) {
    machine_job job = {.rounds = rounds};
    double elapsed = run(context, f32_item, &job, context->threads);
    return (double)job.operations / elapsed;
}

/* All bytes 1: small numbers in every format, and nothing that a kernel treats differently. */
static void matmul_item(void *argument, size_t item, dm_worker *worker) {
    (void)item;
    machine_job *job = argument;
    size_t groups = dm_divide_up(job->C, DM_GROUP), values = job->T * groups * DM_GROUP;
    size_t packed_bytes = dm_packed_bytes(job->format, job->R, job->C, job->group);
    void *packed = dm_scratch(worker, DM_SCRATCH_HIDDEN, packed_bytes);
    float *x = dm_scratch(worker, DM_SCRATCH_OPERAND, values * (sizeof(float) + 1) + job->T * groups * 8);
    float *scale = x + values;
    int32_t *sum = (int32_t *)(scale + job->T * groups);
    int8_t *q = (int8_t *)(sum + job->T * groups);
    memset(packed, 1, packed_bytes);
    memset(q, 1, values);
    for (size_t i = 0; i < values; i++) x[i] = 1.0f;
    for (size_t i = 0; i < job->T * groups; i++) scale[i] = 1.0f, sum[i] = DM_GROUP;
    dm_operand operand = {.x = x, .q = q, .scale = scale, .sum = sum, .columns = job->C};
    dm_rows rows = dm_operand_rows(&operand, 0, job->C);
    float *out = dm_scratch(worker, DM_SCRATCH_OUT, job->T * job->R * sizeof *out);
    void *scratch = dm_scratch(worker, DM_SCRATCH_MATMUL, DM_MATMUL_SCRATCH(job->C));
    for (size_t round = 0; round < job->rounds; round++) {
        job->kernels->matmul[job->format](out, packed, &rows, job->T, job->R, job->R, job->group, scratch);
    }
    count_operations(job, job->rounds * 2 * job->R * job->C * job->T);
}

double dm_matmul_peak(dm_context *context, size_t R, size_t C, size_t T, int format, size_t group, size_t rounds) {
    machine_job job = {.R = R, .C = C, .T = T, .format = format, .group = group, .rounds = rounds};
    double elapsed = run(context, matmul_item, &job, context->threads);
    return (double)job.operations / elapsed;
}
