/* pool.c: a pool of threads that share the items of one job at a time.
 *
 * `ticket` holds the job's number (high 32 bits) and its next item. A thread takes an item by a compare-and-swap on
 * both, so a thread that wakes late finds nothing to take, and nobody ever waits for it: the caller waits for items.
 * While a job is written its ticket is closed. Waiting threads spin for some microseconds, then sleep; they do not spin
 * if the caller says that others need the cores, or if there are more threads than cores in the affinity mask.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "context.h"
#include "float_state.h"

#define CLOSED UINT32_MAX
#define SPINS 400 /* pauses, about 20 microseconds */

struct dm_pool {
    size_t threads;
    size_t started;
    int spins;
    pthread_t *handles;
    dm_worker *workers;
    _Atomic uint64_t ticket;
    _Atomic(dm_task) task;
    _Atomic(void *) job;
    _Atomic size_t count;
    _Atomic size_t done;
    _Atomic int sleepers;
    _Atomic int caller_sleeps;
    _Atomic int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_cond_t finished;
};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static uint32_t job_number(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

/* Takes items until none is left. */
static void take_items(dm_pool *pool, dm_worker *worker) {
    uint64_t ticket = atomic_load(&pool->ticket);
    for (;;) {
        uint32_t item = (uint32_t)ticket;
        size_t count = atomic_load(&pool->count);
        dm_task task = atomic_load(&pool->task);
        void *job = atomic_load(&pool->job);
        if (item == CLOSED || item >= count) return;
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        task(job, item, worker);
        if (atomic_fetch_add(&pool->done, 1) + 1 == count && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->mutex);
        }
        ticket = atomic_load(&pool->ticket);
    }
}

static int has_news(dm_pool *pool, uint32_t seen) {
    uint64_t ticket = atomic_load(&pool->ticket);
    return (job_number(ticket) != seen && (uint32_t)ticket != CLOSED) || atomic_load(&pool->stop);
}

static void wait_for_job(dm_pool *pool, uint32_t seen) {
    for (int i = 0; i < pool->spins; i++) {
        if (has_news(pool, seen)) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_news(pool, seen)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *argument) {
    dm_worker *worker = argument;
    dm_pool *pool = worker->pool;
    dm_set_float_state(DM_FLOAT_STATE);
    uint32_t seen = 0;
    for (;;) {
        wait_for_job(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        /* A ticket that has closed meanwhile belongs to a job that is yet to come. */
        uint64_t ticket = atomic_load(&pool->ticket);
        if ((uint32_t)ticket != CLOSED) seen = job_number(ticket);
        take_items(pool, worker);
    }
}

static void wait_for_items(dm_pool *pool, size_t count) {
    for (int i = 0; i < pool->spins; i++) {
        if (atomic_load(&pool->done) == count) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_sleeps, 1);
    while (atomic_load(&pool->done) != count) pthread_cond_wait(&pool->finished, &pool->mutex);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->mutex);
}

void dm_pool_run(dm_pool *pool, dm_task task, void *job, size_t count) {
    if (pool->threads == 1 || count <= 1) {
        for (size_t item = 0; item < count; item++) task(job, item, &pool->workers[0]);
        return;
    }
    uint64_t number = (uint64_t)job_number(atomic_load(&pool->ticket)) + 1;
    atomic_store(&pool->ticket, number << 32 | CLOSED);
    atomic_store(&pool->task, task);
    atomic_store(&pool->job, job);
    atomic_store(&pool->count, count);
    atomic_store(&pool->done, 0);
    atomic_store(&pool->ticket, number << 32);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    take_items(pool, &pool->workers[0]);
    wait_for_items(pool, count);
}

static size_t cores_available(void) {
    cpu_set_t mask;
    return sched_getaffinity(0, sizeof mask, &mask) == 0 ? (size_t)CPU_COUNT(&mask) : 1;
}

/* Starts the threads with all signals blocked, for they belong to the caller's threads; but not SIGBUS, which comes
 * from a read of a mapped file and goes to the reader (bus_error.c). */
static int start_threads(dm_pool *pool) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return 0;
    for (size_t i = 1; i < pool->threads; i++) {
        if (pthread_create(&pool->handles[i], NULL, worker_main, &pool->workers[i]) != 0) break;
        pool->started = i;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->started + 1 == pool->threads;
}

dm_pool *dm_pool_create(size_t threads, int spin) {
    dm_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pool->threads = threads;
    pool->spins = spin && threads <= cores_available() ? SPINS : 0;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->finished, NULL);
    atomic_store(&pool->ticket, CLOSED);
    pool->handles = calloc(threads, sizeof *pool->handles);
    pool->workers = calloc(threads, sizeof *pool->workers);
    int usable = pool->handles != NULL && pool->workers != NULL;
    for (size_t i = 0; usable && i < threads; i++) pool->workers[i] = (dm_worker){.index = i, .pool = pool};
    if (usable && start_threads(pool)) return pool;
    dm_pool_destroy(pool);
    return NULL;
}

void dm_pool_destroy(dm_pool *pool) {
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (size_t i = 1; i <= pool->started; i++) pthread_join(pool->handles[i], NULL);
    for (size_t i = 0; pool->workers != NULL && i < pool->threads; i++) {
        for (size_t slot = 0; slot < DM_SCRATCH_COUNT; slot++) free(pool->workers[i].scratch[slot]);
    }
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool->handles);
    free(pool);
}

dm_worker *dm_pool_worker(dm_pool *pool, size_t index) { return &pool->workers[index]; }

void *dm_scratch(dm_worker *worker, enum dm_scratch_slot slot, size_t bytes) {
    if (worker->scratch_bytes[slot] >= bytes && worker->scratch[slot] != NULL) return worker->scratch[slot];
    /* Growing by half keeps the number of reallocations logarithmic. */
    size_t wanted = dm_round_up(bytes + bytes / 2 + 1, 64);
    free(worker->scratch[slot]);
    worker->scratch[slot] = wanted < bytes ? NULL : aligned_alloc(64, wanted);
    worker->scratch_bytes[slot] = wanted;
    if (worker->scratch[slot] == NULL) dm_end_without_memory(wanted < bytes ? bytes : wanted);
    return worker->scratch[slot];
}
