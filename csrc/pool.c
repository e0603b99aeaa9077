/* pool.c: a pool of threads that share the units of one job at a time.
 *
 * `ticket` holds the job's number (high 32 bits) and its next unit. A thread takes units by a compare-and-swap on both,
 * so a thread that wakes late finds nothing to take, and nobody ever waits for it: the caller waits for units. While a
 * job is written its ticket is closed. Waiting threads spin for some microseconds, then sleep on a futex; they do not
 * spin if the caller says that others need the cores, or if there are more threads than cores in the affinity mask.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "context.h"
#include "float_state.h"

#define CLOSED UINT32_MAX
#define LINE 64
/* Longer than the caller's pauses between two halves of a layer; about as long as what two wake-ups cost. */
#define SPIN_NS 60000

struct dm_pool {
    size_t threads;
    size_t started;
    size_t spins; /* pauses */
    pthread_t *handles;
    dm_worker *workers;
    int bound;
    pthread_t caller; /* while bound */
    cpu_set_t before;
    _Alignas(LINE) _Atomic uint64_t ticket;
    _Atomic(dm_range_task) task;
    _Atomic(void *) job;
    _Atomic uint32_t units;
    _Atomic uint32_t least;
    _Alignas(LINE) _Atomic uint32_t done; /* a futex of the caller */
    _Atomic uint32_t caller_sleeps;
    _Alignas(LINE) _Atomic uint32_t news; /* a futex of the others: grows with each job, and at the end */
    _Atomic uint32_t sleepers;
    _Atomic int stop;
};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0); }

static uint32_t job_number(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

/* Large shares first, so that few are taken; small ones at the end, so that threads finish together. */
static uint32_t share_of(const dm_pool *pool, uint32_t left, uint32_t least) {
    uint32_t share = left / (2 * (uint32_t)pool->threads);
    share = share > least ? share : least;
    return share < left ? share : left;
}

/* Takes units until none is left. */
static void take_units(dm_pool *pool, dm_worker *worker) {
    uint64_t ticket = atomic_load(&pool->ticket);
    for (;;) {
        uint32_t first = (uint32_t)ticket;
        uint32_t units = atomic_load(&pool->units);
        uint32_t least = atomic_load(&pool->least);
        dm_range_task task = atomic_load(&pool->task);
        void *job = atomic_load(&pool->job);
        if (first == CLOSED || first >= units) return;
        uint32_t count = least == 0 ? 1 : share_of(pool, units - first, least);
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + count)) continue;
        task(job, first, first + count, worker);
        if (atomic_fetch_add(&pool->done, count) + count == units && atomic_load(&pool->caller_sleeps)) {
            wake(&pool->done);
        }
        ticket = atomic_load(&pool->ticket);
    }
}

static void wait_for_news(dm_pool *pool, uint32_t seen) {
    for (size_t i = 0; i < pool->spins; i++) {
        if (atomic_load_explicit(&pool->news, memory_order_acquire) != seen) return;
        pause_briefly();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->news) == seen) sleep_while(&pool->news, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void *worker_main(void *argument) {
    dm_worker *worker = argument;
    dm_pool *pool = worker->pool;
    dm_set_float_state(DM_FLOAT_STATE);
    uint32_t seen = 0;
    for (;;) {
        wait_for_news(pool, seen);
        seen = atomic_load(&pool->news);
        if (atomic_load(&pool->stop)) return NULL;
        take_units(pool, worker);
    }
}

static void wait_for_units(dm_pool *pool, uint32_t units) {
    for (size_t i = 0; i < pool->spins; i++) {
        if (atomic_load_explicit(&pool->done, memory_order_acquire) == units) return;
        pause_briefly();
    }
    atomic_store(&pool->caller_sleeps, 1);
    for (uint32_t done = atomic_load(&pool->done); done != units; done = atomic_load(&pool->done)) {
        sleep_while(&pool->done, done);
    }
    atomic_store(&pool->caller_sleeps, 0);
}

static void tell_news(dm_pool *pool) {
    atomic_fetch_add(&pool->news, 1);
    if (atomic_load(&pool->sleepers) > 0) wake(&pool->news);
}

static void run(dm_pool *pool, dm_range_task task, void *job, size_t units, size_t least) {
    uint64_t number = (uint64_t)job_number(atomic_load(&pool->ticket)) + 1;
    atomic_store(&pool->ticket, number << 32 | CLOSED);
    atomic_store_explicit(&pool->task, task, memory_order_relaxed);
    atomic_store_explicit(&pool->job, job, memory_order_relaxed);
    atomic_store_explicit(&pool->units, (uint32_t)units, memory_order_relaxed);
    atomic_store_explicit(&pool->least, (uint32_t)least, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store(&pool->ticket, number << 32);
    tell_news(pool);
    take_units(pool, &pool->workers[0]);
    wait_for_units(pool, (uint32_t)units);
}

void dm_pool_share(dm_pool *pool, dm_range_task task, void *job, size_t units, size_t least) {
    if (units == 0) return;
    if (pool->threads == 1 || units <= least)
        task(job, 0, units, &pool->workers[0]);
    else
        run(pool, task, job, units, least > 0 ? least : 1);
}

typedef struct item_job {
    dm_task task;
    void *job;
} item_job;

static void one_item(void *argument, size_t first, size_t last, dm_worker *worker) {
    const item_job *items = argument;
    for (size_t item = first; item < last; item++) items->task(items->job, item, worker);
}

void dm_pool_run(dm_pool *pool, dm_task task, void *job, size_t count) {
    item_job items = {task, job};
    if (pool->threads == 1 || count <= 1)
        one_item(&items, 0, count, &pool->workers[0]);
    else
        run(pool, one_item, &items, count, 0);
}

static size_t cores_available(void) {
    cpu_set_t mask;
    return sched_getaffinity(0, sizeof mask, &mask) == 0 ? (size_t)CPU_COUNT(&mask) : 1;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Pauses that take SPIN_NS: one takes 10 to 150 cycles, by CPU. */
static size_t pauses_to_spin(void) {
    const int64_t probes = 2000, begin_ns = now_ns();
    for (int64_t i = 0; i < probes; i++) pause_briefly();
    int64_t elapsed_ns = now_ns() - begin_ns;
    return (size_t)(SPIN_NS * probes / (elapsed_ns > 0 ? elapsed_ns : 1)) + 1;
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
    dm_pool *pool = aligned_alloc(LINE, dm_round_up(sizeof *pool, LINE));
    if (pool == NULL) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->spins = spin && threads > 1 && threads <= cores_available() ? pauses_to_spin() : 0;
    atomic_store(&pool->ticket, CLOSED);
    pool->handles = calloc(threads, sizeof *pool->handles);
    pool->workers = calloc(threads, sizeof *pool->workers);
    int usable = pool->handles != NULL && pool->workers != NULL;
    for (size_t i = 0; usable && i < threads; i++) pool->workers[i] = (dm_worker){.index = i, .pool = pool};
    if (usable && start_threads(pool)) return pool;
    dm_pool_destroy(pool);
    return NULL;
}

static int bind_thread(pthread_t thread, int32_t core) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET((size_t)core, &mask);
    return pthread_setaffinity_np(thread, sizeof mask, &mask);
}

static void unbind(dm_pool *pool) {
    for (size_t i = 0; pool->bound && i < pool->threads; i++) {
        pthread_setaffinity_np(i == 0 ? pool->caller : pool->handles[i], sizeof pool->before, &pool->before);
    }
    pool->bound = 0;
}

int dm_pool_bind(dm_pool *pool, const int32_t *cores) {
    int error = pool->bound ? 0 : pthread_getaffinity_np(pthread_self(), sizeof pool->before, &pool->before);
    if (error != 0) return error;
    pool->bound = 1;
    pool->caller = pthread_self();
    for (size_t i = 0; error == 0 && i < pool->threads; i++) {
        error = bind_thread(i == 0 ? pool->caller : pool->handles[i], cores[i]);
    }
    if (error != 0) unbind(pool);
    return error;
}

void dm_pool_destroy(dm_pool *pool) {
    if (pool == NULL) return;
    unbind(pool);
    atomic_store(&pool->stop, 1);
    tell_news(pool);
    for (size_t i = 1; i <= pool->started; i++) pthread_join(pool->handles[i], NULL);
    for (size_t i = 0; pool->workers != NULL && i < pool->threads; i++) {
        for (size_t slot = 0; slot < DM_SCRATCH_COUNT; slot++) free(pool->workers[i].scratch[slot]);
    }
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
