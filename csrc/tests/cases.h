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
void run_node(test_run *run);
void run_machine(test_run *run);
void run_sums(test_run *run);
void run_picks(test_run *run);

#endif
