/* driver.c: calls every entry point at every ISA level of this machine, with 1 thread and in turn 2 or 3, on awkward
 * sizes and awkward numbers, in heap buffers of exactly the promised size, and compares all bits with portable C on one
 * thread.
 *
 *   driver                      records each case with portable C, then replays it at every level
 *   driver write FILE           records every case into a file: inputs and expected bits
 *   driver replay FILE [LEVELS] replays another machine's file; LEVELS (portable,neon,...) must be what runs here
 *
 * `make test-sanitize` runs the first under ASan and UBSan, `make test-neon` the others on two machines. With -O3 and
 * no sanitizer it is a quick check of a new level.
 */
#include <stdlib.h>
#include <string.h>

#include "../float_state.h"
#include "cases.h"

typedef struct driver {
    const char *path, *one_level;
    FILE *file;
    int writes, replays;
    size_t cases, failures;
    trace trace;
} driver;

/* Flush to zero, round towards zero: what other libraries may have set before they call. */
#if defined(__x86_64__)
#define HOSTILE_FLOAT_STATE 0xffc0
#else
#define HOSTILE_FLOAT_STATE 0x3c00000
#endif

static void run_case(dm_context *context, const test_case *one, trace *trace) {
    test_run run = {.context = context, .one = one, .trace = trace, .random = 42};
    size_t most_tokens = one->T + one->rows;
    run.fault_T = buffer(&run, most_tokens * sizeof(int32_t));
    for (size_t t = 0; t < most_tokens; t++) run.fault_T[t] = DM_NO_FAULT;
    one->run(&run);
    output_i32(&run, "faults", run.fault_T, most_tokens);
    trace_end(trace);
    free_buffers_from(&run, 0);
}

static void record(const test_case *one, trace *trace) {
    dm_context *portable = dm_context_create("portable", 1, 1);
    trace_record(trace);
    run_case(portable, one, trace);
    dm_context_destroy(portable);
}

static void replay(driver *driver, const char *name, const test_case *one, const char *isa, size_t threads) {
    trace *trace = &driver->trace;
    trace_replay(trace);
    uint64_t saved = dm_float_state();
    dm_set_float_state(HOSTILE_FLOAT_STATE);
    dm_context *context = dm_context_create(isa, threads, threads != 2);
    run_case(context, one, trace);
    uint64_t left = dm_float_state();
    dm_set_float_state(saved);
    dm_context_destroy(context);
    if ((left & HOSTILE_FLOAT_STATE) != HOSTILE_FLOAT_STATE && !trace->wrong) {
        trace->wrong = 1;
        snprintf(trace->difference, sizeof trace->difference, "the caller's float state is not put back");
    }
    if (!trace->wrong) return;
    printf("  DIFFERENT: %s on %s with %zu threads: %s\n", name, isa, threads, trace->difference);
    driver->failures++;
}

static void check_case(driver *driver, const test_case *one) {
    char name[112];
    snprintf(name, sizeof name, "%-10s T %2zu rows %3zu columns %3zu group %3zu format %d numbers %d", one->name,
             one->T, one->rows, one->columns, one->group, one->format, one->numbers);
    driver->cases++;
    if (driver->replays)
        trace_read(driver->file, driver->path, name, &driver->trace);
    else
        record(one, &driver->trace);
    if (driver->writes) {
        trace_write(driver->file, driver->path, name, &driver->trace);
        return;
    }
    printf("%s: %016llx\n", name, (unsigned long long)driver->trace.hash);
    size_t level = 0;
    for (const char *const *isa = dm_isa_levels(); *isa != NULL; isa++, level++) {
        if (!dm_isa_available(*isa)) continue;
        if (driver->one_level != NULL && strcmp(driver->one_level, *isa) != 0) continue;
        size_t turn = (driver->cases + level) % 3;
        if (driver->replays) {
            replay(driver, name, one, *isa, 1 + turn);
            continue;
        }
        replay(driver, name, one, *isa, 1);
        replay(driver, name, one, *isa, 2 + turn % 2);
    }
}

typedef struct case_kind {
    const char *name;
    void (*run)(test_run *run);
    size_t formats;
    int numbers;
} case_kind;

static void check_all(driver *driver) {
    static const size_t SIZES[][2] = {{1, 1}, {1, 31}, {31, 33}, {16, 32}, {33, 64}, {65, 100}, {70, 128}, {130, 288}};
    static const size_t TOKENS[] = {1, 3, 4, 17};
    static const size_t GROUPS[] = {0, 32, 64, 96, 128};
    static const case_kind KINDS[] = {
        {"vectors", run_vectors, 1, NUMBERS_COUNT},
        {"primitives", run_primitives, 1, NUMBERS_COUNT},
        {"node", run_node, 1, 2},
        {"sums", run_sums, 1, 2},
        {"picks", run_picks, 1, 2},
        {"machine", run_machine, DM_FORMAT_COUNT, 1},
        {"matrices", run_matrices, DM_FORMAT_COUNT, NUMBERS_COUNT},
        {"units", run_units, DM_FORMAT_COUNT, NUMBERS_COUNT},
        {"experts", run_experts, DM_FORMAT_COUNT, NUMBERS_COUNT},
        {"mixed", run_mixed, DM_FORMAT_COUNT, NUMBERS_COUNT},
        {"attention", run_attention, DM_KV_FORMAT_COUNT, NUMBERS_COUNT},
        {"sampling", run_sampling, 1, NUMBERS_COUNT},
    };
    for (size_t k = 0; k < sizeof KINDS / sizeof KINDS[0]; k++) {
        const case_kind *kind = &KINDS[k];
        for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
            for (size_t format = 0; format < kind->formats; format++) {
                size_t j = i + format;
                for (int numbers = 0; numbers < kind->numbers; numbers++) {
                    test_case one = {kind->name,  kind->run,   TOKENS[(j + (size_t)numbers) % 4],
                                     SIZES[i][0], SIZES[i][1], GROUPS[j % 5],
                                     (int)format, numbers};
                    check_case(driver, &one);
                }
            }
        }
    }
    for (int format = 0; format < DM_FORMAT_COUNT; format++) {
        for (size_t i = 0; i < sizeof GROUPS / sizeof GROUPS[0]; i++) {
            int numbers = i % 2 ? NUMBERS_EXTREME : NUMBERS_USUAL;
            test_case one = {"tokens", run_tokens, 20, 37, 200, GROUPS[i], format, numbers};
            check_case(driver, &one);
        }
    }
}

/* Prints the levels that run here, one after another with commas; fails if they are not the expected ones, or if one
 * that cannot run can be had. */
static void check_ladder(driver *driver, const char *expected) {
    char levels[256] = "";
    const char *best = NULL;
    for (const char *const *isa = dm_isa_levels(); *isa != NULL; isa++) {
        dm_context *context = dm_context_create(*isa, 1, 0);
        int created = context != NULL && strcmp(dm_context_isa(context), *isa) == 0;
        dm_context_destroy(context);
        if (created != dm_isa_available(*isa)) {
            printf("  DIFFERENT: level %s is %savailable but was %screated\n", *isa, created ? "not " : "",
                   created ? "" : "not ");
            driver->failures++;
        }
        if (!dm_isa_available(*isa)) continue;
        best = *isa;
        snprintf(levels + strlen(levels), sizeof levels - strlen(levels), "%s%s", levels[0] ? "," : "", *isa);
    }
    dm_context *context = dm_context_create(NULL, 1, 0);
    printf("levels: %s; chosen: %s\n", levels, dm_context_isa(context));
    if ((expected != NULL && strcmp(levels, expected) != 0) || strcmp(dm_context_isa(context), best) != 0) {
        printf("  DIFFERENT: expected levels %s and the last one chosen\n", expected == NULL ? levels : expected);
        driver->failures++;
    }
    dm_context_destroy(context);
}

/* The same hash on every level: ranks recognise each other by it. */
static void check_self_test(driver *driver) {
    uint64_t expected = 0;
    for (const char *const *isa = dm_isa_levels(); *isa != NULL; isa++) {
        if (!dm_isa_available(*isa)) continue;
        dm_context *context = dm_context_create(*isa, 2, 0);
        uint64_t hash = dm_self_test(context);
        dm_context_destroy(context);
        if (expected == 0) expected = hash;
        if (hash == expected) continue;
        printf("  DIFFERENT: self-test on %s: %016llx\n", *isa, (unsigned long long)hash);
        driver->failures++;
    }
    printf("self-test: %016llx\n", (unsigned long long)expected);
}

int main(int argc, char **argv) {
    driver driver = {.writes = argc == 3 && strcmp(argv[1], "write") == 0,
                     .replays = argc >= 3 && argc <= 5 && strcmp(argv[1], "replay") == 0};
    if (argc > 1 && !driver.writes && !driver.replays) {
        fprintf(stderr, "usage: driver [write FILE | replay FILE [LEVELS [ONE]]]\n");
        return 2;
    }
    if (argc > 1) {
        driver.path = argv[2];
        driver.one_level = argc == 5 ? argv[4] : NULL;
        driver.file = fopen(driver.path, driver.writes ? "wb" : "rb");
        if (driver.file == NULL) {
            perror(driver.path);
            return 2;
        }
    }
    if (!driver.writes) check_ladder(&driver, argc >= 4 ? argv[3] : NULL);
    check_all(&driver);
    if (!driver.writes) check_self_test(&driver);
    trace_free(&driver.trace);
    if (driver.file != NULL && fclose(driver.file) != 0) {
        perror(driver.path);
        return 2;
    }
    printf("%zu cases: %s\n", driver.cases, driver.failures ? "FAILED" : driver.writes ? "written" : "all equal");
    return driver.failures != 0;
}
