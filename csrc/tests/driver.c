/* driver.c: calls every entry point at every ISA level of this machine and with 1, 2 and 3 threads, on awkward sizes
 * and awkward numbers, in heap buffers of exactly the promised size, and compares all bits with portable C on one
 * thread. It prints one hash per case: the output of two machines must be the same text. Built from the repository's
 * root:
 *
 *   gcc -std=c11 -O1 -g -Wall -Wextra -Werror -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all \
 *       -pthread -ffp-contract=off -Icsrc $(find csrc -name '*.c') -lm -o /tmp/dm_driver && /tmp/dm_driver
 *
 * Sanitizers off and -O3 instead make it a quick check of a new ISA level.
 */
#include <stdio.h>

#include "cases.h"

/* Levels compiled in but not runnable here are skipped. */
static int check_case(const test_case *one) {
    dm_context *portable = dm_context_create("portable", 1, 1);
    uint64_t expected = run_case(portable, one);
    dm_context_destroy(portable);
    printf("%-10s T %2zu rows %3zu columns %3zu group %3zu format %d numbers %d: %016llx\n", one->name, one->T,
           one->rows, one->columns, one->group, one->format, one->numbers, (unsigned long long)expected);
    int failures = 0;
    for (const char *const *isa = dm_isa_levels(); *isa != NULL; isa++) {
        if (!dm_isa_available(*isa)) continue;
        for (size_t threads = 1; threads <= 3; threads++) {
            dm_context *context = dm_context_create(*isa, threads, threads != 2);
            uint64_t actual = run_case(context, one);
            dm_context_destroy(context);
            if (actual == expected) continue;
            printf("  DIFFERENT on %s with %zu threads: %016llx\n", *isa, threads, (unsigned long long)actual);
            failures++;
        }
    }
    return failures;
}

int main(void) {
    static const size_t SIZES[][2] = {{1, 1}, {1, 31}, {31, 33}, {16, 32}, {33, 64}, {65, 100}, {130, 288}};
    static const size_t TOKENS[] = {1, 3, 4, 17};
    static const size_t GROUPS[] = {0, 32, 64, 128};
    int failures = 0;
    for (const case_kind *kind = CASE_KINDS; kind->name != NULL; kind++) {
        for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
            for (size_t format = 0; format < kind->formats; format++) {
                size_t j = (i + format) % 4;
                for (int numbers = 0; numbers < NUMBERS_COUNT; numbers++) {
                    test_case one = {kind->name,  kind->run,   TOKENS[(j + (size_t)numbers) % 4],
                                     SIZES[i][0], SIZES[i][1], GROUPS[j],
                                     (int)format, numbers};
                    failures += check_case(&one);
                }
            }
        }
    }
    dm_context *context = dm_context_create(NULL, 1, 0);
    printf("self-test: %016llx\n%s\n", (unsigned long long)dm_self_test(context), failures ? "FAILED" : "all equal");
    dm_context_destroy(context);
    return failures != 0;
}
