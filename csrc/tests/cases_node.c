/* cases_node.c: the collectives of one host, every rank a thread. */
#include "cases.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { RANKS = 3 };

typedef struct rank_job {
    dm_node *node;
    size_t count;
    int64_t *values;
    int32_t *least;
    uint8_t *gathered, *message;
} rank_job;

static void *run_rank(void *argument) {
    rank_job *job = argument;
    dm_node_sum(job->node, job->values, job->count);
    dm_node_min(job->node, job->least, job->count);
    dm_node_gather(job->node, job->gathered, job->least, job->count * sizeof(int32_t));
    dm_node_broadcast(job->node, job->message, job->count);
    return NULL;
}

/* The owner is first. Ranks that share cores (0 spins) meet in another way than those that do not. */
static void open_nodes(rank_job jobs[RANKS], size_t spins) {
    char path[64];
    jobs[0].node = dm_node_create("driver", RANKS, spins);
    for (size_t rank = 1; rank < RANKS && jobs[0].node != NULL; rank++) {
        snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)getpid(), dm_node_file(jobs[0].node));
        jobs[rank].node = dm_node_open(path, "driver", rank, RANKS);
    }
    for (size_t rank = 0; rank < RANKS; rank++) {
        if (jobs[rank].node != NULL) continue;
        perror("shared memory");
        exit(2);
    }
    dm_node_close_file(jobs[0].node);
}

void run_node(test_run *run) {
    size_t count = run->one->rows * run->one->columns;
    rank_job jobs[RANKS];
    pthread_t threads[RANKS];
    for (size_t rank = 0; rank < RANKS; rank++) {
        rank_job *job = &jobs[rank];
        *job = (rank_job){.count = count};
        job->values = buffer(run, count * sizeof(int64_t));
        job->least = buffer(run, count * sizeof(int32_t));
        job->gathered = rank == 0 ? buffer(run, RANKS * count * sizeof(int32_t)) : NULL;
        job->message = buffer(run, count);
        for (size_t i = 0; i < count; i++) {
            job->values[i] = (int64_t)next_random(run) << 20;
            job->least[i] = (int32_t)next_random(run);
            job->message[i] = rank == 0 ? (uint8_t)next_random(run) : 0;
        }
        input(run, job->values, count * sizeof(int64_t));
        input(run, job->least, count * sizeof(int32_t));
        input(run, job->message, count);
    }
    open_nodes(jobs, run->one->numbers % 2 ? 100 : 0);
    for (size_t rank = 0; rank < RANKS; rank++) {
        if (pthread_create(&threads[rank], NULL, run_rank, &jobs[rank]) != 0) abort();
    }
    for (size_t rank = 0; rank < RANKS; rank++) {
        pthread_join(threads[rank], NULL);
        dm_node_close(jobs[rank].node);
    }
    for (size_t rank = 0; rank < RANKS; rank++) {
        output_i64(run, "sums", jobs[rank].values, count);
        output_i32(run, "least", jobs[rank].least, count);
        output_bytes(run, "message", jobs[rank].message, count);
    }
    output_bytes(run, "gathered", jobs[0].gathered, RANKS * count * sizeof(int32_t));
}
