/* trace.c: a growing run of bytes, its comparison, and its way into a file. */
#include "trace.h"

#include <stdlib.h>
#include <string.h>

static void append(trace *trace, const void *data, size_t bytes) {
    if (trace->count + bytes > trace->capacity) {
        trace->capacity = 2 * (trace->count + bytes);
        trace->bytes = realloc(trace->bytes, trace->capacity);
        if (trace->bytes == NULL) abort();
    }
    if (bytes > 0) memcpy(trace->bytes + trace->count, data, bytes);
    trace->count += bytes;
}

/* The next `bytes` recorded bytes, or NULL if the replay asks for other things than were recorded. */
static const uint8_t *next(trace *trace, const char *what, size_t bytes) {
    uint64_t recorded = UINT64_MAX;
    if (trace->at + sizeof recorded <= trace->count) memcpy(&recorded, trace->bytes + trace->at, sizeof recorded);
    if (recorded == bytes && trace->count - trace->at - sizeof recorded >= bytes) {
        const uint8_t *data = trace->bytes + trace->at + sizeof recorded;
        trace->at += sizeof recorded + bytes;
        return data;
    }
    if (!trace->wrong) {
        snprintf(trace->difference, sizeof trace->difference, "%s has %zu bytes where %lld were recorded", what, bytes,
                 (long long)recorded);
    }
    trace->wrong = 1;
    return NULL;
}

void trace_record(trace *trace) {
    trace->recording = 1;
    trace->count = 0;
    trace->hash = 0xcbf29ce484222325u;
}

void trace_replay(trace *trace) {
    trace->recording = 0;
    trace->at = 0;
    trace->wrong = 0;
}

void trace_input(trace *trace, void *data, size_t bytes) {
    if (trace->recording) {
        uint64_t recorded = bytes;
        append(trace, &recorded, sizeof recorded);
        append(trace, data, bytes);
        return;
    }
    const uint8_t *expected = next(trace, "an input", bytes);
    if (expected != NULL && bytes > 0) memcpy(data, expected, bytes);
}

static unsigned long long element(const uint8_t *data, size_t i, size_t element_bytes) {
    uint64_t value = 0;
    memcpy(&value, data + i * element_bytes, element_bytes);
    return value;
}

static void compare(trace *trace, const char *what, const uint8_t *expected, const uint8_t *actual, size_t n,
                    size_t element_bytes) {
    size_t first = n, different = 0;
    for (size_t i = n; i-- > 0;) {
        if (memcmp(expected + i * element_bytes, actual + i * element_bytes, element_bytes) == 0) continue;
        first = i;
        different++;
    }
    if (different == 0 || trace->wrong) return;
    trace->wrong = 1;
    snprintf(trace->difference, sizeof trace->difference, "%s[%zu] is 0x%llx instead of 0x%llx (%zu of %zu differ)",
             what, first, element(actual, first, element_bytes), element(expected, first, element_bytes), different, n);
}

/* FNV-1a. */
void trace_output(trace *trace, const char *what, const void *data, size_t n, size_t element_bytes) {
    size_t bytes = n * element_bytes;
    if (trace->recording) {
        for (size_t i = 0; i < bytes; i++) trace->hash = (trace->hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
        uint64_t recorded = bytes;
        append(trace, &recorded, sizeof recorded);
        append(trace, data, bytes);
        return;
    }
    const uint8_t *expected = next(trace, what, bytes);
    if (expected != NULL) compare(trace, what, expected, data, n, element_bytes);
}

void trace_end(trace *trace) {
    if (trace->recording || trace->wrong || trace->at == trace->count) return;
    trace->wrong = 1;
    snprintf(trace->difference, sizeof trace->difference, "%zu recorded bytes are left over", trace->count - trace->at);
}

void trace_free(trace *trace) { free(trace->bytes); }

static void give_up(const char *path, const char *what, const char *name) {
    fprintf(stderr, "%s: %s at case '%s'; write it anew with this driver's `write`\n", path, what, name);
    exit(2);
}

typedef struct file_entry {
    char name[112];
    uint64_t bytes, hash;
} file_entry;

void trace_write(FILE *file, const char *path, const char *name, const trace *trace) {
    file_entry entry = {.bytes = trace->count, .hash = trace->hash};
    snprintf(entry.name, sizeof entry.name, "%s", name);
    if (fwrite(&entry, sizeof entry, 1, file) != 1 || fwrite(trace->bytes, 1, trace->count, file) != trace->count)
        give_up(path, "cannot write", name);
}

void trace_read(FILE *file, const char *path, const char *name, trace *trace) {
    file_entry entry;
    if (fread(&entry, sizeof entry, 1, file) != 1) give_up(path, "the file ends", name);
    if (strncmp(entry.name, name, sizeof entry.name) != 0) give_up(path, "the file has another case", name);
    if (entry.bytes > trace->capacity) {
        trace->capacity = entry.bytes;
        trace->bytes = realloc(trace->bytes, trace->capacity);
        if (trace->bytes == NULL) abort();
    }
    if (fread(trace->bytes, 1, entry.bytes, file) != entry.bytes) give_up(path, "the file ends", name);
    trace->count = entry.bytes;
    trace->hash = entry.hash;
}
