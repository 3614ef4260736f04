/* Octavo's CPU kernels. FP8 stays one byte per value in memory, and packed INT4 half a byte; both are widened in registers.

   There is one source for all instruction sets, compiled once for each; the library dispatches when it is loaded. Kernels
   are called through ctypes with pointers, counts and the structs of types.h. Nothing here depends on Python or torch. */
#define _GNU_SOURCE
#include "types.h"
#include "filter.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "tile.h"
#include "pool.h"

static float widened[2][256]; /* [is E5M2][code]: the half-precision number with the code's bits */

static int uses_tiles; /* whether products and attention of the set in use may be computed by matrix tiles */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, SUFFIX)
#define STRING_(x) #x
#define STRING(x) STRING_(x)

typedef struct {
    const char *name;
    task_fn prepare, multiply, look_up, attend, rms_norm, silu_mul, argmax, sample, rotate, rope, round_columns, descend, scale_errors,
        round_keys, gram_codes, gram_products, combine, write_latent, write_index_keys, heads, latent_attend, latent_join, select_prepare, select_score;
    int (*pairs_pay)(void); /* whether panels are faster in pairs (dot product); NULL without such a product */
    int has_tiles;          /* whether `multiply` can use matrix tiles */
} Functions;

#if defined(__clang__)
#define PRAGMA(x) _Pragma(#x)
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define PRAGMA(x) _Pragma(#x)
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define SUFFIX portable
#define VL 4
#define ISA 0
#define SHIFT 0
#define TILE_ROWS 3
#define DOT 0
#define TILES 0
#include "all.h"

#ifdef TEST_TILES /* the data flow of dot products and of matrix tiles, for testing without a CPU that has the instructions */
#define SUFFIX loops
#define VL 4
#define ISA 0
#define SHIFT 0
#define TILE_ROWS 3
#define DOT 1
#define TILES 1
#include "all.h"
#endif

#if defined(__x86_64__)
#define SUFFIX avx2
#define VL 8
#define ISA 2
#define SHIFT 0
#define TILE_ROWS 6
#define DOT 0
#define TILES 0
BEGIN_TARGET("avx2,fma,f16c")
#include "all.h"
END_TARGET

#define SUFFIX avx2_shift /* for a CPU that multiplies subnormal numbers at full speed */
#define VL 8
#define ISA 2
#define SHIFT 1
#define TILE_ROWS 6
#define DOT 0
#define TILES 0
BEGIN_TARGET("avx2,fma,f16c")
#include "all.h"
END_TARGET

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define SUFFIX avx512
#define VL 16
#define ISA 3
#define SHIFT 0
#define TILE_ROWS 12
#define DOT 0
#define TILES 0
BEGIN_TARGET(AVX512)
#include "all.h"
END_TARGET

#define SUFFIX avx512_bf16
#define VL 16
#define ISA 4
#define SHIFT 0
#define TILE_ROWS 12
#define DOT 1
#if HAS_TILES && !defined(TEST_TILES)
#define TILES 1
BEGIN_TARGET("amx-tile,amx-bf16,avx512bf16,avx512vnni," AVX512)
#else
#define TILES 0
BEGIN_TARGET("avx512bf16,avx512vnni," AVX512)
#endif
#include "all.h"
END_TARGET
#endif

static const Functions *chosen;
static int panels_of_pairs;
static void choose_ways(int forced);

/* Select the best instruction set of this CPU, or the named one. Returns its name, or NULL if this CPU lacks it.

   A named set uses all of its code paths, whether they are faster or not. */
const char *octavo_use(const char *name) {
    static Functions tiled; /* the dot product's set, with products by matrix tiles */
    const Functions *have[8];
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
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const int bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"); /* no CPU has one alone */
    if (bf16) tiled = functions_avx512_bf16;
#if !defined(TEST_TILES)
    if (bf16 && HAS_TILES && tiles_permitted()) have[count++] = &tiled;
#endif
    if (bf16) have[count++] = &functions_avx512_bf16;
    if (avx512) have[count++] = &functions_avx512;
    if (avx2 && (name || __builtin_cpu_is("amd"))) have[count++] = &functions_avx2_shift;
    if (avx2) have[count++] = &functions_avx2;
#endif
#if defined(TEST_TILES)
    static Functions paired;
    tiled = paired = functions_loops, paired.name = "avx512_bf16";
    have[count++] = &tiled, have[count++] = &paired; /* the CPU's own, if it has one, comes before */
#endif
    tiled.name = "amx", tiled.has_tiles = 1;
    have[count++] = &functions_portable;
    for (int i = 0; i < count; i++) {
        if (name && strcmp(name, have[i]->name)) continue;
        chosen = have[i];
        panels_of_pairs = chosen->pairs_pay && (name || chosen->pairs_pay());
        uses_tiles = chosen->has_tiles;
        if (uses_tiles) choose_ways(name != NULL);
        return chosen->name;
    }
    return NULL;
}

/* The name of the selected instruction set. */
const char *octavo_used(void) { return chosen->name; }

/* Scratch memory of one call, reused by the next; guarded by pool.call. */
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

/* Whether any code is NaN or infinite: eight codes at a time; such codes set the highest bit of their byte. */
int32_t octavo_not_finite(const uint8_t *codes, int64_t count, int32_t kind) {
    const uint64_t each = 0x0101010101010101;
    uint64_t found = 0;
    for (int64_t at = 0; at < count; at += 8) {
        uint64_t x = 0;
        if (at + 8 <= count) memcpy(&x, codes + at, 8);
        else memcpy(&x, codes + at, (size_t)(count - at)); /* the zeros after them are finite */
        if (kind == E4M3) found |= (x & 0x7F * each) + each;
        else if (kind == E5M2) found |= (x & 0x7C * each) + 4 * each;
        else x ^= 0x80 * each, found |= ~(((x & 0x7F * each) + 0x7F * each) | x); /* the only such code is now zero */
    }
    return (found & 0x80 * each) != 0;
}

static void each_of(task_fn run, void *job, int64_t tasks, int32_t threads) {
    pthread_mutex_lock(&pool.call);
    parallel(run, job, tasks, threads);
    pthread_mutex_unlock(&pool.call);
}

#define TASK_VALUES 4096 /* fewer values are not worth a second thread */

#include "products.h"
#include "experts.h"

/* Causal attention of q [tokens, heads, dim] over `cache`; see Attention. Returns 0, or -1 without memory. */
int32_t octavo_attention(const void *q, void *out, const Cache *cache, const int32_t *tables, const int32_t *starts,
                         const int32_t *lengths, int64_t table_stride, int64_t requests, int64_t heads, int64_t q_token,
                         int64_t q_head, int64_t window, float k_factor, float v_factor, int32_t kind, int32_t threads) {
    Attention a = {q, out, q_token, q_head, tables, starts, lengths, table_stride, requests, heads, window, k_factor, v_factor, kind};
    const int tiles = uses_tiles && kind == BF16 && cache->kind != F32;
    const int64_t group = heads / cache->kv_heads;
    int64_t blocks = 0;
    pthread_mutex_lock(&pool.call);
    int64_t *first = scratch((size_t)(requests + 1) * sizeof *first);
    for (int64_t r = 0; first && r <= requests; r++) {
        first[r] = blocks;
        if (r == requests) break;
        const int64_t rows = (starts[r + 1] - starts[r]) * group, each = rows_of_task(rows, tiles);
        blocks += (rows + each - 1) / each;
    }
    AttentionJob job = {&a, cache, first, tiles};
    if (first) parallel_on(chosen->attend, &job, blocks * cache->kv_heads, threads, tiles);
    pthread_mutex_unlock(&pool.call);
    return first ? 0 : -1;
}

static void each_row(task_fn run, Rows *r, int32_t threads) {
    r->per_task = 1 + TASK_VALUES / (r->width + 1);
    each_of(run, r, (r->rows + r->per_task - 1) / r->per_task, threads);
}

/* y = norm(x + residual) * weight, sum = x + residual, all [rows, width]; residual may be NULL, then sum is not written. */
void octavo_rms_norm(const void *x, const void *residual, const void *weight, void *y, void *sum, int64_t rows, int64_t width,
                     int64_t inner, int64_t outer, int64_t inside, float eps, int32_t kind, int32_t threads) {
    Rows r = {.x = x, .residual = residual, .weight = weight, .y = y, .sum = sum, .rows = rows, .width = width, .inner = inner,
              .outer = outer, .inside = inside, .eps = eps, .kind = kind};
    each_row(chosen->rms_norm, &r, threads);
}

/* y [rows, width] = silu(gate) * up of x [rows, 2 width], rows `stride` values apart. */
void octavo_silu_mul(const void *x, void *y, int64_t rows, int64_t width, int64_t stride, int32_t kind, int32_t threads) {
    Rows r = {.x = x, .y = y, .rows = rows, .width = width, .inner = 1, .outer = stride, .kind = kind};
    each_row(chosen->silu_mul, &r, threads);
}

/* Argmax: y [rows] = the index of the first largest value of x [rows, width]. */
void octavo_argmax(const void *x, int64_t *y, int64_t rows, int64_t width, int64_t stride, int32_t kind, int32_t threads) {
    Rows r = {.x = x, .y = y, .rows = rows, .width = width, .inner = 1, .outer = stride, .kind = kind};
    each_row(chosen->argmax, &r, threads);
}

/* Sampling: out [rows] = a token of each row; see Sample. */
void octavo_sample(float *logits, int64_t *out, const float *temperature, const double *u, const int32_t *top_k, const float *top_p,
                 const float *min_p, int64_t rows, int64_t width, int32_t threads) {
    Sample d = {logits, out, temperature, u, top_k, top_p, min_p, width};
    each_of(chosen->sample, &d, rows, threads);
}

/* Rotary embedding: y [tokens, heads, dim] = x with its first `rotated` dimensions rotated. */
void octavo_rotate(const void *x, void *y, const float *cos_sin, const int64_t *rotary_rows, int64_t tokens, int64_t heads, int64_t dim,
                   int64_t token, int64_t head, int64_t rotated, int32_t kind, int32_t threads) {
    Rows r = {.x = x, .y = y, .cos_sin = cos_sin, .rotary_rows = rotary_rows, .rows = tokens * heads, .width = dim, .inner = heads,
              .outer = token, .inside = head, .rotated = rotated, .kind = kind};
    each_row(chosen->rotate, &r, threads);
}

/* Norm and rotate queries into `out`, and keys, which are written to the cache with the values; see Rope. */
void octavo_rope_write_kv(const void *q, const void *k, const void *v, const void *q_norm, const void *k_norm, void *out,
                          const float *cos_sin, const int64_t *rotary_rows, const int64_t *slots, const Cache *cache, int64_t tokens,
                          int64_t heads, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token,
                          int64_t v_head, int64_t rotated, float eps, int32_t kind, int32_t threads) {
    Rope r = {q, k, v, q_norm, k_norm, out, cos_sin, rotary_rows, slots, cache, tokens, heads, q_token, q_head, k_token, k_head,
              v_token, v_head, rotated, 1 + TASK_VALUES / ((heads + 2 * cache->kv_heads) * cache->dim), eps, kind};
    each_of(chosen->rope, &r, (tokens + r.per_task - 1) / r.per_task, threads);
}

/* Round columns to FP8 one after the other; contract in octavo/ops/__init__.py. At most ROUNDED_COLUMNS of them. */
void octavo_round_columns(float *values, float *offset, float *moved, const float *influence, const float *scale, int64_t columns,
                          int64_t rows, int64_t influence_stride, int64_t scale_stride, int32_t threads) {
    RoundedColumns c = {values, offset, moved, influence, scale, columns, rows, influence_stride, scale_stride};
    each_of(chosen->round_columns, &c, (rows + LANES - 1) / LANES, threads);
}

/* Coordinate descent over FP8 codes, `sweeps` times over; contract in octavo/ops/rounding.py. A stride of scales may be 0. */
void octavo_descend(float *values, float *offset, const float *influence, const float *scale, int64_t rows, int64_t width,
                    int64_t scale_row, int64_t scale_column, int64_t sweeps, int32_t threads) {
    Descent d = {values, offset, influence, scale, rows, width, scale_row, scale_column, sweeps};
    each_of(chosen->descend, &d, (rows + DESCENT_ROWS - 1) / DESCENT_ROWS, threads);
}

/* The squared errors of rounding to FP8 with scales [rows, groups] times each of `steps` factors, at most MOST_STEPS; contract in
   octavo/ops/rounding.py. A group has `group` columns, the last one as many as are left. */
void octavo_scale_errors(const float *values, const float *scale, const float *step, const float *weight, float *errors, int64_t rows,
                         int64_t width, int64_t groups, int64_t group, int64_t steps, int32_t threads) {
    ScaleErrors e = {values, scale, step, weight, errors, rows, width, groups, group, steps, 1 + TASK_VALUES / (width + 1)};
    each_of(chosen->scale_errors, &e, (rows + e.per_task - 1) / e.per_task, threads);
}

/* Round keys to FP8 values one dimension after the other; contract in octavo/ops/cache_writes.py. dim is at most MAX_DIM. */
void octavo_round_keys(const void *k, void *out, const float *influence, const int32_t *order, const float *scale, int64_t tokens,
                       int64_t heads, int64_t dim, int64_t token, int64_t head, int64_t scale_head, int32_t kind, int32_t to_kind,
                       int32_t threads) {
    RoundedKeys r = {k, out, influence, scale, order, tokens, heads, dim, token, head, scale_head, kind, to_kind};
    each_of(chosen->round_keys, &r, (tokens + LANES - 1) / LANES * heads, threads);
}

/* Add x^T x to the upper half of total [width, width], for x [tokens, width] whose rows are `stride` values apart. Returns 0, or
   -1 without memory. */
int32_t octavo_add_gram(const void *x, float *total, int64_t tokens, int64_t width, int64_t stride, int32_t kind, int32_t threads) {
    const int64_t most = 8 * GRAM_TOKENS, panels = (width + LANES - 1) / LANES, chunks = (least(tokens, most) + GRAM_TOKENS - 1) / GRAM_TOKENS;
    const size_t codes = (size_t)(chunks * panels * LANES * GRAM_TOKENS / 2), columns = (size_t)(chunks * panels * LANES);
    pthread_mutex_lock(&pool.call);
    int32_t *memory = scratch((codes + 2 * columns) * sizeof *memory);
    for (int64_t at = 0; memory && at < tokens; at += most) {
        Gram g = {(const char *)x + at * stride * size_of(kind), total, (float *)memory + codes, memory, memory + codes + columns,
                  least(most, tokens - at), width, stride, panels, kind};
        const int64_t parts = (g.tokens + GRAM_TOKENS - 1) / GRAM_TOKENS * ((panels * LANES + GROUP - 1) / GROUP);
        parallel(chosen->gram_codes, &g, parts, threads);
        parallel(chosen->gram_products, &g, (width + GRAM_STRIP - 1) / GRAM_STRIP, threads);
    }
    pthread_mutex_unlock(&pool.call);
    return memory ? 0 : -1;
}

#include "mla.h"
#include "replay.h"
