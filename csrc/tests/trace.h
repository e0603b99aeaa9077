/* trace.h: the inputs and output bits of one case in the order in which the case meets them. It is recorded once, by
 * portable C; every other level is given the same inputs and must give the same outputs. */
#ifndef DM_TEST_TRACE_H
#define DM_TEST_TRACE_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct trace {
    uint8_t *bytes;
    size_t count, capacity;
    size_t at;     /* where a replay stands */
    int recording; /* else replaying */
    uint64_t hash; /* of the outputs */
    int wrong;     /* the replay differs; `difference` says where first */
    char difference[160];
} trace;

void trace_record(trace *trace);
void trace_replay(trace *trace);
/* Recording: keeps the data. Replaying: data gets what was recorded. */
void trace_input(trace *trace, void *data, size_t bytes);
/* Recording: keeps the data. Replaying: compares n elements with what was recorded. */
void trace_output(trace *trace, const char *what, const void *data, size_t n, size_t element_bytes);
/* A replay must have met all that was recorded. */
void trace_end(trace *trace);
void trace_free(trace *trace);

/* A file of cases: each is its name and its trace. Both end the process with a sentence if the file is at fault. */
void trace_write(FILE *file, const char *path, const char *name, const trace *trace);
void trace_read(FILE *file, const char *path, const char *name, trace *trace);

#endif
