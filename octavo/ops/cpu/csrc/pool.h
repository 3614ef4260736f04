/* A thread pool that runs the tasks of one call.

   A job is a number of tasks, claimed one by one, so a preempted thread delays one task and not its whole share. An idle
   worker spins for some microseconds for the next job, yielding its core to other threads, and then sleeps. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define MAX_THREADS 256
#define SPIN_NS 100000 /* time that a worker spins before it sleeps; Python takes less between the calls of a step */

typedef void (*task_fn)(void *job, int64_t task);

static struct {
    pthread_mutex_t call;  /* serializes calls: scratch memory and the job belong to the caller */
    pthread_mutex_t sleep;
    pthread_cond_t wake;
    int workers;
    task_fn run;
    void *job;
    int uses_tiles; /* the job's tasks */
    int64_t tasks;
    atomic_int wanted;         /* workers that this job takes */
    atomic_int inside;         /* workers that may access the job */
    atomic_int sleeping;
    _Atomic uint64_t published; /* number of the newest job */
    atomic_bool open;
    struct { _Atomic int64_t next; int64_t end; char padding[48]; } range[MAX_THREADS]; /* a range of tasks, on a cache line */
    int ranges;
} pool = {.call = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Run the tasks of this thread's range, then those left in other ranges. */
static void work(int self) {
    if (pool.uses_tiles) begin_tiles();
    for (int i = 0; i < pool.ranges; i++) {
        int at = (self + i) % pool.ranges;
        for (int64_t task; (task = atomic_fetch_add(&pool.range[at].next, 1)) < pool.range[at].end;) pool.run(pool.job, task);
    }
    if (pool.uses_tiles) end_tiles();
}

#define DEFAULT_MXCSR 0x1F80 /* no traps; subnormal numbers are kept, since FP8 codes may be subnormal */

/* Set this thread's floating-point mode; returns the previous one. */
static inline unsigned float_mode(unsigned mode) {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode);
    return before;
#else
    return mode;
#endif
}

static void *worker(void *arg) {
    int index = (int)(intptr_t)arg;
    float_mode(DEFAULT_MXCSR);
    uint64_t seen = 0;
    for (;;) {
        for (int64_t until = now() + SPIN_NS; atomic_load(&pool.published) == seen && now() < until; sched_yield())
            for (int i = 0; i < 64 && atomic_load(&pool.published) == seen; i++) relax();
        if (atomic_load(&pool.published) == seen) {
            pthread_mutex_lock(&pool.sleep);
            atomic_fetch_add(&pool.sleeping, 1);
            while (atomic_load(&pool.published) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
            atomic_fetch_sub(&pool.sleeping, 1);
            pthread_mutex_unlock(&pool.sleep);
        }
        seen = atomic_load(&pool.published);
        /* A worker enters before it checks whether the job is open; the caller closes the job before it checks whether
           workers are inside. */
        atomic_fetch_add(&pool.inside, 1);
        if (atomic_load(&pool.open) && index < atomic_load(&pool.wanted)) work(index + 1);
        atomic_fetch_sub(&pool.inside, 1);
    }
    return NULL;
}

static void forget_workers(void) { /* a forked child has none of its parent's threads */
    pthread_mutex_init(&pool.call, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.open, 0);
}

static void share_out(task_fn run, void *job, int64_t tasks, int threads, int uses_tiles) {
    if (threads > tasks) threads = (int)tasks;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    while (pool.workers < threads - 1) {
        static int registered;
        pthread_t id;
        sigset_t all, before; /* signals are for the threads that wait for them */
        if (!registered) registered = 1, pthread_atfork(NULL, NULL, forget_workers);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int failed = pthread_create(&id, NULL, worker, (void *)(intptr_t)pool.workers);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (failed) break; /* fewer threads are slower, not wrong */
        pthread_detach(id);
        pool.workers++;
    }
    if (threads <= 1 || !pool.workers) {
        if (uses_tiles) begin_tiles();
        for (int64_t task = 0; task < tasks; task++) run(job, task);
        if (uses_tiles) end_tiles();
        return;
    }
    pool.run = run, pool.job = job, pool.tasks = tasks, pool.uses_tiles = uses_tiles;
    pool.ranges = threads;
    for (int i = 0; i < threads; i++) {
        atomic_store(&pool.range[i].next, tasks * i / threads);
        pool.range[i].end = tasks * (i + 1) / threads;
    }
    atomic_store(&pool.wanted, threads - 1);
    atomic_store(&pool.open, 1);
    atomic_fetch_add(&pool.published, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    work(0);
    atomic_store(&pool.open, 0);
    for (int i = 0; atomic_load(&pool.inside); i++) {
        relax();
        if (i > 1000) sched_yield();
    }
}

/* Run tasks 0 to tasks-1 on up to `threads` threads, including the caller; uses_tiles: with matrix tiles configured. The caller
   holds pool.call. */
static void parallel_on(task_fn run, void *job, int64_t tasks, int threads, int uses_tiles) {
    unsigned before = float_mode(DEFAULT_MXCSR);
    share_out(run, job, tasks, threads, uses_tiles);
    float_mode(before);
}

static void parallel(task_fn run, void *job, int64_t tasks, int threads) { parallel_on(run, job, tasks, threads, 0); }
