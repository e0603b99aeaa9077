/* cases_machine.c: the loops of bench: they read what they should, no more than that, and every level can run them. */
#include "cases.h"

void run_machine(test_run *run) {
    const test_case *one = run->one;
    size_t bytes = one->rows * one->columns * 37 / 4 * 4;
    uint32_t *data = buffer(run, bytes);
    for (size_t i = 0; i < bytes / 4; i++) data[i] = next_random(run);
    input(run, data, bytes);
    int32_t seen[4] = {0, 0, 0, 0};
    int positive = 1;
    for (size_t i = 0; i < 4; i++) {
        positive &= dm_read_seconds(run->context, &seen[i], data, bytes, one->T << i, 512 * i) >= 0;
    }
    output_i32(run, "words read", seen, 4);
    positive &= dm_int8_peak(run->context, 3) > 0 && dm_f32_peak(run->context, 3) > 0;
    positive &= dm_matmul_peak(run->context, one->rows, one->columns, one->T, one->format, one->group, 2) > 0;
    output_i32(run, "figures are positive", &positive, 1);
}
