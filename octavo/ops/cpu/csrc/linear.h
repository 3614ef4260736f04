/* y = x W^T for one instruction set: included after vector.h.

   Weights stay as stored, row by row. For up to ROWS_MODE tokens a weight is widened in registers and multiplied along k,
   bound by reading it. For more tokens, some rows at a time are widened to FP32 in the cache, and tiles of them times a
   panel of LANES tokens are accumulated in registers. */
#define ROWS_MODE 4
#define TASK_ROWS 24 /* a multiple of TILE_ROWS */
#define TASK_K 512   /* TASK_ROWS * TASK_K floats fit into the L2 cache */
#define TASK_OF_PAIRS 32 /* a multiple of the rows of every tile of pairs */
#define TASK_OF_TILES 64   /* rows of a task by matrix tiles: tiles.h; */
#define BLOCK_OF_TILES 256 /* with many tokens */
#define CHUNK_TOKENS 512
#define CHUNK 64   /* values of a row per step, */
#define ROW_CHUNK 128 /* or per step of a product along k in pairs */
#define NIBBLES (8 * VL) /* packed INT4 values in a vector: nibbles.h */
#define AHEAD 4096 /* bytes to prefetch ahead: the hardware prefetcher stops at page boundaries */

/* Address of a panel's values of position k: [k][LANES] FP32, or [k / 2][LANES][2] BF16, which is as exact for codes. */
INLINE float *NAME(panel_at)(const LinearJob *job, int64_t panel, int64_t k) {
    return job->panel + (panel * job->k_padded + k) * LANES / (job->pairs ? 2 : 1);
}

/* Whether pairs hold every other value, to match the order in which codes are widened: pairs.h. */
#define APART(kind) (DOT && (kind) >= E4M3)

/* Address of a token's values. */
INLINE const char *NAME(token_at)(const LinearJob *job, int64_t token) {
    const int64_t row = job->order ? job->order[token] / job->each : token;
    return (const char *)job->x + row * job->x_stride * size_of(job->kind);
}

/* The scale of `count` values. */
static float NAME(scale_of)(const char *x, int kind, int64_t count, Format format) {
    const float scale = NAME(amax_of)(x, kind, count) / format.limit;
    return scale < SCALE_FLOOR ? SCALE_FLOOR : scale;
}

/* A token's scale if it has a single one, else 1. */
static float NAME(token_scale)(const LinearJob *job, const char *x) {
    const Linear *w = job->w;
    return w->activation == PER_TOKEN ? NAME(scale_of)(x, job->kind, w->k, FORMATS[w->kind]) : 1;
}

/* `count` values of a token, at most one group, in FP32, quantized as the weight's scheme says; zeros up to whole vectors. A
   group's own scale is applied unless the job is grouped. Returns the scale. */
INLINE float NAME(quantize_group)(float *values, const LinearJob *job, const char *x, int64_t count, float scale) {
    const int activation = job->w->activation;
    const Format format = FORMATS[job->w->kind];
    int64_t whole = (count + LANES - 1) / LANES * LANES;
    NAME(widen_row)(values, x, job->kind, count);
    if (activation == NOT_QUANTIZED) return scale;
    if (activation == PER_GROUP) scale = NAME(scale_of)(x, job->kind, count, format);
    const float undo = activation == PER_GROUP && !job->grouped ? scale : 1;
    for (int64_t i = 0; i < whole; i += VL) NAME(store)(values + i, NAME(round_to)(NAME(load)(values + i), scale, format) * undo);
    return scale;
}

#include "panel.h"

/* The scale of a row of the weight, or of the row's block that begins at k. */
INLINE float NAME(scale_at)(const Linear *w, int64_t row, int64_t k) {
    if (!w->scale) return 1;
    return w->scale_columns ? w->scale[row / w->scale_rows * w->scale_columns + k / GROUP] : w->scale[row];
}

INLINE void NAME(finish)(const LinearJob *job, int64_t token, int64_t row, float sum) {
    const Linear *w = job->w;
    if (w->activation == PER_TOKEN && !job->grouped) sum *= job->scale[token];
    if (!w->scale_columns && w->scale) sum *= w->scale[row];
    put(job->y, job->y_kind, token * w->n + row, sum);
}

/* Sums [rows][LANES] of tokens from `first` on, times their scales and the rows'. */
INLINE void NAME(scale_sums)(const LinearJob *job, int64_t first, int64_t from, int64_t rows, const float *sum, float *values) {
    const Linear *w = job->w;
    const int by_row = !w->scale_columns && w->scale;
    vf of_token[PARTS];
    const int by_token = w->activation == PER_TOKEN && !job->grouped;
    for (int p = 0; p < PARTS; p++) of_token[p] = by_token ? NAME(load)(job->scale + first + p * VL) : NAME(splat)(1);
    for (int64_t row = 0; row < rows; row++)
        for (int p = 0; p < PARTS; p++)
            NAME(store)(values + row * LANES + p * VL, NAME(load)(sum + row * LANES + p * VL) * of_token[p] * (by_row ? w->scale[from + row] : 1));
}

/* finish() for sums [rows][LANES] of a panel of tokens. */
static void NAME(finish_panel)(const LinearJob *job, int64_t panel, int64_t from, int64_t to, const float *sum) {
    const Linear *w = job->w;
    const int64_t first = panel * LANES, lanes = least(LANES, job->m - first);
    float values[2 * LANES * LANES] __attribute__((aligned(64))), columns[LANES * LANES] __attribute__((aligned(64)));
    float odd[LANES * LANES] __attribute__((aligned(64)));
    for (; job->y_kind == BF16 && to - from >= 2 * LANES; from += 2 * LANES, sum += 2 * LANES * LANES) { /* two rows a word */
        NAME(scale_sums)(job, first, from, 2 * LANES, sum, values);
        NAME(transpose)(values, 2 * LANES, columns);
        NAME(transpose)(values + LANES, 2 * LANES, odd);
        for (int64_t i = 0; i < lanes; i++) {
            uint16_t *y = (uint16_t *)job->y + (first + i) * w->n + from;
            for (int p = 0; p < LANES; p += VL) {
                const vu low = (vu)NAME(round_bf16)(NAME(load)(columns + i * LANES + p)), high = (vu)NAME(round_bf16)(NAME(load)(odd + i * LANES + p));
                const vu both = low >> 16 | (high & 0xFFFF0000);
                memcpy(y + 2 * p, &both, sizeof both);
            }
        }
    }
    for (; from < to; from += LANES, sum += LANES * LANES) {
        const int64_t rows = least(LANES, to - from);
        NAME(scale_sums)(job, first, from, rows, sum, values);
        NAME(transpose)(values, LANES, columns);
        for (int64_t i = 0; i < lanes; i++) NAME(narrow_row)(job->y, job->y_kind, (first + i) * w->n + from, columns + i * LANES, rows);
    }
}

/* Rows `from` to `to` times m tokens; each result is a vector sum along k. grouped: one scale per 128 values of a row. */
INLINE void NAME(dot)(const LinearJob *job, int64_t from, int64_t to, int m, int kind, int grouped) {
    enum { SUMS = CHUNK / LANES * PARTS }; /* few tokens have several accumulators each, to hide the latency of additions */
    const Linear *w = job->w;
    const float *x = job->panel;
    const int64_t size = size_of(kind), whole = w->k / CHUNK * CHUNK, padded = job->k_padded;
    const int sums = m == 1 ? SUMS : m == 2 ? SUMS / 2 : PARTS;
    const float undo = kind >= E4M3 ? UNDO : 1;
    for (int64_t row = from; row < to; row++) {
        const char *at = (const char *)w->weight + row * w->stride * size;
        char tail[CHUNK * 4];
        vf sum[SUMS], v[2 * PARTS];
#pragma GCC unroll 32
        for (int i = 0; i < m * sums; i++) sum[i] = (vf){0};
        for (int64_t k = 0, end = whole;; end = padded) {
            for (; k < end; k += CHUNK) {
                float scale = grouped ? NAME(scale_at)(w, row, k) : 1;
#pragma GCC unroll 4
                for (int line = 0; line < size; line++) __builtin_prefetch(at + k * size + line * 64 + AHEAD);
#pragma GCC unroll 2
                for (int part = 0; part < CHUNK; part += 32) {
                    NAME(widen32)(at + (k + part) * size, kind, v);
#pragma GCC unroll 8
                    for (int p = 0; p < 2 * PARTS; p++) {
                        if (grouped) v[p] = v[p] * undo * scale;
#pragma GCC unroll 4
                        for (int i = 0; i < m; i++)
                            sum[i * sums + (part / VL + p) % sums] += v[p] * NAME(load)(x + i * padded + k + part + p * VL);
                    }
                }
            }
            if (k == padded) break;
            memset(tail, 0, sizeof tail); /* memory after the last row may not be ours to read */
            memcpy(tail, at + whole * size, (size_t)((w->k - whole) * size));
            at = tail - whole * size;
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf *of = sum + i * sums;
#pragma GCC unroll 8
            for (int j = 0; j < sums / 2; j++) of[j] += of[j + sums / 2];
#pragma GCC unroll 8
            for (int j = 0; j < sums / 4; j++) of[j] += of[j + sums / 4];
#pragma GCC unroll 8
            for (int j = 0; j < sums / 8; j++) of[j] += of[j + sums / 8];
#pragma GCC unroll 8
            for (int j = 0; j < sums / 16; j++) of[j] += of[j + sums / 16];
            NAME(finish)(job, i, row, NAME(sum)(of[0]) * (grouped ? 1 : undo));
        }
    }
}

/* sums [rows][LANES] of rows from `from` on += those of the GROUP that begins at k, times its scales of a panel's tokens and of
   the weight; all rows are in one block if blocks have more than one. */
INLINE void NAME(add_group)(const LinearJob *job, int64_t panel, int64_t from, int64_t rows, int64_t k, const float *group, float *sums) {
    const Linear *w = job->w;
    const float *x_scale = x_scale_at(job, panel, k);
    vf scale[PARTS];
    for (int64_t i = 0; i < rows; i++) {
        for (int p = 0; p < PARTS && (!i || w->scale_rows == 1); p++)
            scale[p] = NAME(load)(x_scale + p * VL) * NAME(scale_at)(w, least(from + i, w->n - 1), k);
        for (int p = 0; p < PARTS; p++) {
            const int64_t at = i * LANES + p * VL;
            NAME(store)(sums + at, NAME(load)(sums + at) + NAME(load)(group + at) * scale[p]);
        }
    }
}

#if DOT
#include "pairs.h"
#if TILES
#include "tiles.h"
#endif

/* dot() in pairs. */
INLINE void NAME(dot_of_pairs)(const LinearJob *job, int64_t from, int64_t to, int m, int kind, int grouped) {
    enum { SUMS = ROW_CHUNK / VL / 2 }; /* accumulators per token and row: several, to hide the dot product's latency */
    _Static_assert(ROW_CHUNK == GROUP, "a step's sums have one scale");
    const Linear *w = job->w;
    const int64_t size = size_of(kind), whole = w->k / ROW_CHUNK * ROW_CHUNK, padded = job->k_padded;
    for (int64_t row = from; row < to; row++) {
        const char *at = (const char *)w->weight + row * w->stride * size;
        const uint16_t *x = (const uint16_t *)job->panel;
        char tail[ROW_CHUNK * 2];
        vf sum[ROWS_MODE * SUMS], total[ROWS_MODE];
#pragma GCC unroll 64
        for (int i = 0; i < m * SUMS; i++) sum[i] = (vf){0};
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) total[i] = (vf){0};
        for (int64_t k = 0; k < padded; k += ROW_CHUNK, at += ROW_CHUNK * size, x += ROW_CHUNK) {
            if (k == whole) { /* memory after the last row may not be ours to read */
                memset(tail, 0, sizeof tail);
                memcpy(tail, at, (size_t)((w->k - whole) * size));
                at = tail;
            }
#pragma GCC unroll 4
            for (int line = 0; line < size * ROW_CHUNK; line += 64) __builtin_prefetch(at + line + AHEAD);
#pragma GCC unroll 16
            for (int part = 0; part < SUMS; part += 2) {
                vp v[2], other;
                NAME(widen_unit)(at + part * VL * 2 * size, kind, v);
#pragma GCC unroll 8
                for (int i = 0; i < 2 * m; i++) {
                    memcpy(&other, x + i / 2 * padded + (part + i % 2) * VL * 2, sizeof other);
                    sum[i / 2 * SUMS + part + i % 2] = NAME(dot_pairs)(sum[i / 2 * SUMS + part + i % 2], other, v[i % 2]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; grouped && i < m; i++) {
                vf *of = sum + i * SUMS;
                const float scale = NAME(scale_at)(w, row, k) * *x_scale_at(job, i, k);
#pragma GCC unroll 32
                for (int j = 1; j < SUMS; j++) of[0] += of[j];
                total[i] += of[0] * scale;
#pragma GCC unroll 32
                for (int j = 0; j < SUMS; j++) of[j] = (vf){0};
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
            vf *of = sum + i * SUMS;
#pragma GCC unroll 32
            for (int j = 1; !grouped && j < SUMS; j++) of[0] += of[j];
            NAME(finish)(job, i, row, NAME(sum)(grouped ? total[i] : of[0]));
        }
    }
}
#endif

#include "nibbles.h"
#if TILES
#include "nibble_tiles.h"
#endif

#if DOT
/* Two panels are read again for each tile of rows and stay in L2 meanwhile, as the rows do for the next panels. */
static void NAME(panels_of_pairs)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel) {
    static void (*const one[])(const LinearJob *, int64_t, int64_t) = {
        [BF16] = NAME(one_panel_BF16), [INT4] = NAME(one_panel_INT4), [E4M3] = NAME(one_panel_E4M3),
        [E4M3FNUZ] = NAME(one_panel_E4M3), [E5M2] = NAME(one_panel_E5M2)};
    static void (*const two[])(const LinearJob *, int64_t, int64_t) = {
        [BF16] = NAME(two_panels_BF16), [INT4] = NAME(two_panels_INT4), [E4M3] = NAME(two_panels_E4M3),
        [E4M3FNUZ] = NAME(two_panels_E4M3), [E5M2] = NAME(two_panels_E5M2)};
    for (int64_t p = first_panel; p < last_panel; p += 2)
        for (int64_t row = from; row < to; row += LANES) (p + 1 < last_panel ? two : one)[job->w->kind](job, row, p);
}
#endif

/* Widen `count` values of a row from k on, which begins the TILED_BYTES of a tiled weight. */
INLINE void NAME(widen_part)(float *values, const Linear *w, int64_t row, int64_t k, int64_t count) {
    const int64_t size = size_of(w->kind), each = w->tiled ? TILED_BYTES / size : count;
    for (int64_t i = 0; i < count; i += each) {
        const char *from = w->tiled ? tiled_at(w, row, k + i) : (const char *)w->weight + (row * w->stride + k) * size;
        NAME(widen_row)(values + i, from, w->kind, least(each, count - i));
    }
}

/* Task: embedding lookup of one row of the weight, dequantized; m ids are in job->x. */
static void NAME(look_up)(void *argument, int64_t token) {
    const LinearJob *job = argument;
    const Linear *w = job->w;
    const int64_t row = ((const int64_t *)job->x)[token];
    float values[GROUP];
    for (int64_t at = 0; at < w->k; at += GROUP) {
        const int64_t count = least(GROUP, w->k - at);
        NAME(widen_part)(values, w, row, at, count);
        for (int64_t i = 0; i < count; i += VL) NAME(store)(values + i, NAME(load)(values + i) * NAME(scale_at)(w, row, at));
        NAME(narrow_row)(job->y, job->kind, token * w->k + at, values, count);
    }
}

static __attribute__((noinline)) void NAME(panels)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel) {
    const Linear *w = job->w;
    float rows[TASK_ROWS * TASK_K] __attribute__((aligned(64)));
    float sums[CHUNK_TOKENS / LANES * TASK_ROWS * LANES] __attribute__((aligned(64)));
    for (int64_t k = 0; k < w->k; k += TASK_K) {
        int64_t depth = least(TASK_K, w->k - k);
        if (w->kind == INT4) depth = (depth + NIBBLES - 1) / NIBBLES * NIBBLES; /* the activations there are zeros */
        for (int64_t row = from; row < to; row++) {
            const char *at = (const char *)w->weight + (row * w->stride + k) * size_of(w->kind);
            float *dst = rows + (row - from) * TASK_K;
            if (w->kind == INT4) {
                NAME(widen_nibbles)(dst, w, row, k, depth);
                continue;
            }
            for (int64_t line = 0; line < depth * size_of(w->kind); line += 64) __builtin_prefetch(at + line + AHEAD);
            NAME(widen_part)(dst, w, row, k, depth);
            for (int64_t g = 0; w->scale_columns && g < depth; g += GROUP) {
                float scale = NAME(scale_at)(w, row, k + g);
                for (int64_t i = g; i < least(g + GROUP, depth); i += VL) NAME(store)(dst + i, NAME(load)(dst + i) * scale);
            }
        }
        for (int64_t p = first_panel; p < last_panel; p++) {
            float *sum = sums + (p - first_panel) * TASK_ROWS * LANES;
            NAME(product)(to - from, least(LANES, job->m - p * LANES), depth, rows, TASK_K, 1, NAME(panel_at)(job, p, k), sum, k > 0);
        }
    }
    for (int64_t p = first_panel; p < last_panel; p++) NAME(finish_panel)(job, p, from, to, sums + (p - first_panel) * TASK_ROWS * LANES);
}

#if DOT
#define IF_PAIRS(call) if (job->pairs) { call; return; }
#else
#define IF_PAIRS(call)
#endif
#if TILES
#define IF_TILES(call) if (job->tiles) { call; return; }
#else
#define IF_TILES(call)
#endif
#define DOTS(m, kind)                                                                                           \
    static __attribute__((noinline)) void NAME(dots_##m##_##kind)(const LinearJob *job, int64_t from, int64_t to) { \
        IF_PAIRS(if (kind >= E4M3 && job->grouped) NAME(dot_of_pairs)(job, from, to, m, kind, 1);                \
                 else NAME(dot_of_pairs)(job, from, to, m, kind, 0))                                             \
        if (job->w->scale_columns) NAME(dot)(job, from, to, m, kind, 1);                                         \
        else NAME(dot)(job, from, to, m, kind, 0);                                                               \
    }
#define DOTS_OF_NIBBLES(m)                                                                                       \
    static __attribute__((noinline)) void NAME(dots_##m##_INT4)(const LinearJob *job, int64_t from, int64_t to) { \
        IF_PAIRS(NAME(dot_of_nibbles)(job, from, to, m, 1))                                                       \
        NAME(dot_of_nibbles)(job, from, to, m, 0);                                                                \
    }
DOTS_OF_NIBBLES(1) DOTS_OF_NIBBLES(2) DOTS_OF_NIBBLES(3) DOTS_OF_NIBBLES(4)
#define EACH_M(kind) DOTS(1, kind) DOTS(2, kind) DOTS(3, kind) DOTS(4, kind)
EACH_M(F32)
EACH_M(BF16)
EACH_M(E4M3)
EACH_M(E5M2)
#define ROW(kind) {NAME(dots_1_##kind), NAME(dots_2_##kind), NAME(dots_3_##kind), NAME(dots_4_##kind)}
static void (*const NAME(dots)[][ROWS_MODE])(const LinearJob *, int64_t, int64_t) = {
    [F32] = ROW(F32), [BF16] = ROW(BF16), [INT4] = ROW(INT4), [E4M3] = ROW(E4M3), [E4M3FNUZ] = ROW(E4M3), [E5M2] = ROW(E5M2)};

static void NAME(multiply)(void *argument, int64_t task) {
    const LinearJob *job = argument;
    int64_t n = job->w->n;
    if (job->is_panel) {
        const int64_t from = task % job->row_tasks * job->task_rows, to = least(from + job->task_rows, n), part = task / job->row_tasks;
        const int64_t panels = (job->m + LANES - 1) / LANES, begin = panels * part / job->token_tasks;
        const int64_t end = panels * (part + 1) / job->token_tasks;
        IF_TILES((job->w->kind == INT4 ? NAME(tiles_INT4) : NAME(tiles))(job, from, to, begin, end))
        IF_PAIRS(NAME(panels_of_pairs)(job, from, to, begin, end))
        NAME(panels)(job, from, to, begin, end);
        return;
    }
#if TILES
    if (job->w->tiled) {
        const int64_t groups = (n + GROUP_ROWS - 1) / GROUP_ROWS, from = groups * task / job->row_tasks;
        (job->w->kind == BF16 ? NAME(groups_BF16) : job->w->kind == E5M2 ? NAME(groups_E5M2) : NAME(groups_E4M3))(
            job, from, groups * (task + 1) / job->row_tasks);
        return;
    }
#endif
    NAME(dots)[job->w->kind][job->m - 1](job, n * task / job->row_tasks, n * (task + 1) / job->row_tasks);
}

#if DOT
#define TRIED 256 /* values along k */
/* Measure whether a tile is faster in pairs than in FP32: some CPUs have half as many units for pairs. Takes 0.1 ms. */
static int NAME(pairs_pay)(void) {
    uint16_t weight[TASK_ROWS * TRIED], y[2 * LANES * TASK_ROWS];
    float x[2 * TRIED * LANES], best[2] = {1, 1};
    for (int i = 0; i < TASK_ROWS * TRIED; i++) weight[i] = 0x3F80;
    for (int i = 0; i < 2 * TRIED * LANES; i++) x[i] = 1.0f;
    const Linear w = {.weight = weight, .n = TASK_ROWS, .k = TRIED, .stride = TRIED, .kind = BF16};
    for (int i = 0; i < 10; i++) {
        const LinearJob job = {.w = &w, .y = y, .panel = x, .m = 2 * LANES, .k_padded = TRIED, .kind = BF16, .y_kind = BF16, .pairs = i % 2};
        const int64_t before = now();
        if (job.pairs) NAME(panels_of_pairs)(&job, 0, TASK_ROWS, 0, 2);
        else NAME(panels)(&job, 0, TASK_ROWS, 0, 2);
        const float took = (float)(now() - before) * 1e-9f;
        if (took < best[i % 2]) best[i % 2] = took;
    }
    return best[1] < best[0];
}
#undef TRIED
#endif

#undef DOTS
#undef DOTS_OF_NIBBLES
#undef IF_PAIRS
#undef IF_TILES
#undef EACH_M
#undef ROW
