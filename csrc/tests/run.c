/* run.c: buffers, random inputs, and their way into the trace. */
#include "run.h"

#include <stdlib.h>
#include <string.h>

void *buffer(test_run *run, size_t bytes) {
    size_t rounded = (bytes + 63) / 64 * 64;
    /* The promised alignment needs a rounded size; what is not a whole matrix gets its exact size. */
    void *memory = rounded == bytes ? aligned_alloc(64, bytes) : malloc(bytes);
    if (memory == NULL || run->buffer_count == MAX_BUFFERS) abort();
    memset(memory, 0xaa, bytes);
    run->buffers[run->buffer_count++] = memory;
    return memory;
}

void free_buffers_from(test_run *run, size_t kept) {
    while (run->buffer_count > kept) free(run->buffers[--run->buffer_count]);
}

/* Source of the constants: Knuth, MMIX. */
uint32_t next_random(test_run *run) {
    run->random = run->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(run->random >> 32);
}

float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float number(test_run *run, int kind) {
    uint32_t bits = next_random(run);
    uint32_t spread = next_random(run) % 12;
    if (bits % 61 == 0) return float_of_bits(bits & 64 ? 0 : 0x80000000);
    uint32_t exponent = 127 - spread;
    if (kind == NUMBERS_TINY) exponent = next_random(run) % 24;
    if (kind == NUMBERS_HUGE) exponent = 127 + next_random(run) % 127;
    return float_of_bits((bits & 0x807fffff) | exponent << 23);
}

/* The sign changes about once in 32 values. */
static void fill_extreme(test_run *run, float *x, size_t n) {
    uint32_t sign = 0;
    for (size_t i = 0; i < n; i++) {
        if (next_random(run) % 32 == 0) sign ^= 0x80000000;
        x[i] = float_of_bits(0x3f800000 | sign);
    }
}

float *numbers(test_run *run, size_t rows, size_t columns, int kind) {
    size_t n = rows * columns;
    float *x = buffer(run, n * sizeof(float));
    if (kind == NUMBERS_EXTREME)
        fill_extreme(run, x, n);
    else
        for (size_t i = 0; i < n; i++) x[i] = number(run, kind);
    if (kind == NUMBERS_POISONED && n > 0) {
        x[n - 1] = float_of_bits(0x7f800000);
        x[(rows - 1) * columns] = float_of_bits(0xffc12345);
    }
    input(run, x, n * sizeof(float));
    return x;
}

void input(test_run *run, void *data, size_t bytes) { trace_input(run->trace, data, bytes); }

void output_bytes(test_run *run, const char *what, const void *data, size_t n) {
    trace_output(run->trace, what, data, n, 1);
}

void output_i32(test_run *run, const char *what, const int32_t *data, size_t n) {
    trace_output(run->trace, what, data, n, 4);
}

void output_i64(test_run *run, const char *what, const int64_t *data, size_t n) {
    trace_output(run->trace, what, data, n, 8);
}

/* A NaN counts as one value whatever its payload: only its place is promised. */
void output_f32(test_run *run, const char *what, const float *data, size_t n) {
    uint32_t *bits = buffer(run, n * sizeof *bits);
    memcpy(bits, data, n * sizeof *bits);
    for (size_t i = 0; i < n; i++) bits[i] = (bits[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits[i];
    trace_output(run->trace, what, bits, n, 4);
    free_buffers_from(run, run->buffer_count - 1);
}

void output_f64(test_run *run, const char *what, const double *data, size_t n) {
    uint64_t *bits = buffer(run, n * sizeof *bits);
    memcpy(bits, data, n * sizeof *bits);
    for (size_t i = 0; i < n; i++) bits[i] = (bits[i] & INT64_MAX) > 0x7ff0000000000000 ? 0x7ff8000000000000 : bits[i];
    trace_output(run->trace, what, bits, n, 8);
    free_buffers_from(run, run->buffer_count - 1);
}
