/* cases.h: what driver.c runs. */
#ifndef DM_TEST_CASES_H
#define DM_TEST_CASES_H
#include "../dist_moe.h"

/* Where the inputs of a case lie. */
enum numbers { NUMBERS_USUAL, NUMBERS_TINY, NUMBERS_HUGE, NUMBERS_POISONED, NUMBERS_COUNT };

typedef struct test_run test_run;

typedef struct test_case {
    const char *name;
    void (*run)(test_run *run);
    size_t T, rows, columns, group;
    int format;
    int numbers;
} test_case;

typedef struct case_kind {
    const char *name;
    void (*run)(test_run *run);
    size_t formats;
} case_kind;

/* Ends with a name of NULL. */
extern const case_kind CASE_KINDS[];

/* The hash of all outputs. A NaN counts as one value whatever its payload: only its place is promised. */
uint64_t run_case(dm_context *context, const test_case *one);

#endif
