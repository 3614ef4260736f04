/* Octavo's CPU kernels: FP8 weights and caches stay one byte a value in memory and are widened in registers.

   One source for every instruction set, compiled once with each and chosen when the library is loaded. Called through ctypes:
   pointers, counts and the structs of types.h. Nothing here knows of Python or of torch. */
#define _GNU_SOURCE
#include "pool.h"
#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static float widened[2][256]; /* [is E5M2][code], as the half-precision number that has the code's bits */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, SUFFIX)
#define STRING_(x) #x
#define STRING(x) STRING_(x)

typedef struct {
    const char *name;
    task_fn prepare, multiply, attend, rms_norm, silu_mul, rotate, write_kv;
} Functions;

#define SUFFIX portable
#define VL 4
#define ISA 0
#define TILE_ROWS 3
#include "all.h"

#if defined(__x86_64__)
#define SUFFIX avx2
#define VL 8
#define ISA 2
#define TILE_ROWS 6
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "all.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SUFFIX avx512
#define VL 16
#define ISA 3
#define TILE_ROWS 12
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "all.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const Functions *chosen;

/* The best instruction set that this CPU has, or the one of the given name: its name, or NULL if this CPU lacks it. */
const char *octavo_use(const char *name) {
    const Functions *have[3];
    int count = 0;
    for (int code = 0; code < 256; code++) {
        for (int e5m2 = 0; e5m2 < 2; e5m2++) {
            int mantissa = e5m2 ? 2 : 3, exponent = (code & 0x7F) >> mantissa, fraction = code & ((1 << mantissa) - 1);
            float value = ldexpf((float)(exponent ? fraction + (1 << mantissa) : fraction), (exponent ? exponent : 1) - 15 - mantissa);
            if (e5m2 && exponent == 31) value = fraction ? NAN : INFINITY;
            widened[e5m2][code] = code & 0x80 ? -value : value;
        }
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        have[count++] = &functions_avx512;
    if (avx2) have[count++] = &functions_avx2;
#endif
    have[count++] = &functions_portable;
    for (int i = 0; i < count; i++) {
        if (name && strcmp(name, have[i]->name)) continue;
        chosen = have[i];
        return chosen->name;
    }
    return NULL;
}

/* Memory of one call, kept for the next; guarded by pool.call. */
static void *scratch(size_t bytes) {
    static void *memory;
    static size_t have;
    if (bytes > have) {
        free(memory);
        have = (bytes + 4095) / 4096 * 4096;
        memory = aligned_alloc(64, have);
        if (!memory) have = 0;
    }
    return memory;
}

/* Whether any of the codes is no finite number. */
int32_t octavo_not_finite(const uint8_t *codes, int64_t count, int32_t kind) {
    int found = 0;
    for (int64_t at = 0; at < count && !found; at += 4096) {
        int64_t end = least(at + 4096, count);
        if (kind == E4M3) for (int64_t i = at; i < end; i++) found |= (codes[i] & 0x7F) == 0x7F;
        else if (kind == E4M3FNUZ) for (int64_t i = at; i < end; i++) found |= codes[i] == 0x80;
        else for (int64_t i = at; i < end; i++) found |= (codes[i] & 0x7C) == 0x7C;
    }
    return found;
}

/* y [m, n] = x [m, k] times the transposed weight, both of `kind`; x's rows are x_stride values apart. 0, or -1 without memory. */
int32_t octavo_linear(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t threads) {
    int64_t k_padded = (w->k + CHUNK - 1) / CHUNK * CHUNK, most = least(m, CHUNK_TOKENS);
    int status = 0;
    pthread_mutex_lock(&pool.call);
    for (int64_t done = 0; done < m && !status; done += most) {
        int64_t count = least(most, m - done), panels = (count + LANES - 1) / LANES;
        int is_panel = count > ROWS_MODE;
        size_t values = (size_t)(is_panel ? panels * w->k * LANES : count * k_padded), scales = (size_t)(count + 15) / 16 * 16;
        float *memory = scratch((values + scales) * 4);
        if (!memory) {
            status = -1;
            break;
        }
        LinearJob job = {w, (const char *)x + done * x_stride * size_of(kind), (char *)y + done * w->n * size_of(kind), memory + scales,
                         memory, count, x_stride, k_padded, 0, 1, kind, is_panel};
        parallel(chosen->prepare, &job, is_panel ? panels : 1, threads);
        if (is_panel) {
            job.row_tasks = (w->n + TASK_ROWS - 1) / TASK_ROWS;
            while (job.row_tasks * job.token_tasks < 2 * threads && job.token_tasks * 2 <= panels) job.token_tasks *= 2;
        } else {
            job.row_tasks = least((w->n + 15) / 16, 8 * threads);
        }
        parallel(chosen->multiply, &job, job.row_tasks * job.token_tasks, threads);
    }
    pthread_mutex_unlock(&pool.call);
    return status;
}

/* Attention as Attention says, over `cache`. 0, or -1 without memory. */
int32_t octavo_attention(const Attention *a, const Cache *cache, int32_t threads) {
    int64_t group = a->heads / cache->kv_heads, blocks = 0;
    pthread_mutex_lock(&pool.call);
    int64_t *first = scratch((size_t)(a->requests + 1) * sizeof *first);
    for (int64_t r = 0; first && r <= a->requests; r++) {
        first[r] = blocks;
        if (r < a->requests) blocks += ((a->starts[r + 1] - a->starts[r]) * group + LANES - 1) / LANES;
    }
    AttentionJob job = {a, cache, first};
    if (first) parallel(chosen->attend, &job, blocks * cache->kv_heads, threads);
    pthread_mutex_unlock(&pool.call);
    return first ? 0 : -1;
}

#define ROW_VALUES 16384 /* of a task: less is not worth a second thread */

static void each_row(task_fn run, Rows *rows, int32_t threads) {
    rows->per_task = rows->width ? (ROW_VALUES + rows->width - 1) / rows->width : rows->rows;
    pthread_mutex_lock(&pool.call);
    if (rows->rows) parallel(run, rows, (rows->rows + rows->per_task - 1) / rows->per_task, threads);
    pthread_mutex_unlock(&pool.call);
}

void octavo_rms_norm(Rows *rows, int32_t threads) { each_row(chosen->rms_norm, rows, threads); }
void octavo_silu_mul(Rows *rows, int32_t threads) { each_row(chosen->silu_mul, rows, threads); }
void octavo_rotate(Rows *rows, int32_t threads) { each_row(chosen->rotate, rows, threads); }

void octavo_write_kv(Write *w, int32_t threads) {
    w->per_task = 1 + ROW_VALUES / (w->cache->kv_heads * w->cache->dim);
    pthread_mutex_lock(&pool.call);
    if (w->tokens) parallel(chosen->write_kv, w, (w->tokens + w->per_task - 1) / w->per_task, threads);
    pthread_mutex_unlock(&pool.call);
}
