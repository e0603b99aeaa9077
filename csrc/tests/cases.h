/* cases.h: what driver.c runs. */
#ifndef DM_TEST_CASES_H
#define DM_TEST_CASES_H
#include "run.h"

void run_vectors(test_run *run);
void run_primitives(test_run *run);
void run_attention(test_run *run);
void run_sampling(test_run *run);
void run_matrices(test_run *run);
void run_tokens(test_run *run);
void run_units(test_run *run);
void run_experts(test_run *run);
void run_mixed(test_run *run);
void run_node(test_run *run);
void run_machine(test_run *run);
void run_sums(test_run *run);
void run_picks(test_run *run);

/* T random vectors, quantized. */
dm_operand operand(test_run *run, size_t T, size_t columns);
/* Random weights; they stay usual where a scale must fit float16. */
float *weights(test_run *run, size_t rows, size_t columns);
/* They, packed as the matrix says, whose `packed` is not read; both ways are compared. */
void *packed(test_run *run, const float *weights, const dm_matrix *matrix, size_t columns, int row_scales);

#endif
