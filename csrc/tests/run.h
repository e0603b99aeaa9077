/* run.h: what a case is made of: buffers of exactly the promised size, inputs, and outputs with their expected bits. */
#ifndef DM_TEST_RUN_H
#define DM_TEST_RUN_H
#include "../context.h"
#include "trace.h"

/* Where the inputs of a case lie. USUAL: about [-2, 2) over 12 binades, with zeros of both signs. TINY: down to
 * denormals. HUGE: sums overflow. POISONED: USUAL with NaN and infinity in the last row. EXTREME: runs of 1 and -1, so
 * that quantized values stand at their bounds. */
enum numbers { NUMBERS_USUAL, NUMBERS_TINY, NUMBERS_HUGE, NUMBERS_POISONED, NUMBERS_EXTREME, NUMBERS_COUNT };

typedef struct test_run test_run;

typedef struct test_case {
    const char *name;
    void (*run)(test_run *run);
    size_t T, rows, columns, group;
    int format;
    int numbers;
} test_case;

enum { MAX_BUFFERS = 64 };

struct test_run {
    dm_context *context;
    const test_case *one;
    trace *trace;
    uint64_t random;
    void *buffers[MAX_BUFFERS];
    size_t buffer_count;
    int32_t *fault_T;
};

/* `bytes` bytes of 0xaa, freed when the case ends. */
void *buffer(test_run *run, size_t bytes);
void free_buffers_from(test_run *run, size_t kept);

uint32_t next_random(test_run *run);
float float_of_bits(uint32_t bits);
/* An input of floats. */
float *numbers(test_run *run, size_t rows, size_t columns, int kind);
/* What the case has filled in at random is an input: recorded, or replaced by what was recorded. */
void input(test_run *run, void *data, size_t bytes);

void output_bytes(test_run *run, const char *what, const void *data, size_t n);
void output_i32(test_run *run, const char *what, const int32_t *data, size_t n);
void output_i64(test_run *run, const char *what, const int64_t *data, size_t n);
void output_f32(test_run *run, const char *what, const float *data, size_t n);
void output_f64(test_run *run, const char *what, const double *data, size_t n);

#endif
