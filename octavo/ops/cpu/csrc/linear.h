/* y = x W^T for one instruction set: included after vector.h.

   Weights stay as they are stored, row by row. Up to ROWS_MODE tokens, a weight is widened in registers and multiplied along
   k: what bounds that is reading it. For more, some rows at a time are widened to FP32 in the cache, and a tile of them
   times a panel of LANES tokens is summed in registers. */
#define ROWS_MODE 4
#define TASK_ROWS 24 /* a multiple of TILE_ROWS */
#define TASK_K 512   /* TASK_ROWS * TASK_K floats lie in the second-level cache */
#define CHUNK_TOKENS 512
#define CHUNK 64   /* values of a row that are multiplied in one turn */
#define AHEAD 4096 /* bytes: rows are read in one stream, and a CPU's own prefetching stops at the end of each page */

/* Where a panel's values of position k begin: [k][LANES] FP32, or [k / 2][LANES][2] BF16, which are as exact for codes. */
INLINE float *NAME(panel_at)(const LinearJob *job, int64_t panel, int64_t k) {
    if (job->pairs) return job->panel + (panel * ((job->w->k + 1) / 2) + k / 2) * LANES;
    return job->panel + (panel * job->w->k + k) * LANES;
}

/* A token's scale where all its values share one, else 1. */
static float NAME(token_scale)(const LinearJob *job, const char *x) {
    const Linear *w = job->w;
    float values[GROUP], peak = 0;
    if (w->activation != PER_TOKEN) return 1;
    for (int64_t at = 0; at < w->k && peak == peak; at += GROUP) {
        int64_t count = least(GROUP, w->k - at);
        NAME(widen_row)(values, x + at * size_of(job->kind), job->kind, count);
        float most = NAME(amax)(values, (count + LANES - 1) / LANES * LANES);
        if (!(most <= peak)) peak = most; /* NaN too */
    }
    float scale = peak / FORMATS[w->kind].limit;
    return scale < SCALE_FLOOR ? SCALE_FLOOR : scale;
}

/* `count` values of a token, a group at most, as FP32, quantized as the weight's scheme says; zeros up to whole vectors. */
INLINE void NAME(quantize_group)(float *values, const LinearJob *job, const char *x, int64_t count, float scale) {
    const int activation = job->w->activation;
    const Format format = FORMATS[job->w->kind];
    int64_t whole = (count + LANES - 1) / LANES * LANES;
    NAME(widen_row)(values, x, job->kind, count);
    if (activation == NOT_QUANTIZED) return;
    if (activation == PER_GROUP) {
        scale = NAME(amax)(values, whole) / format.limit;
        if (scale < SCALE_FLOOR) scale = SCALE_FLOOR;
    }
    for (int64_t i = 0; i < whole; i += VL) {
        vf v = NAME(round_to)(NAME(load)(values + i), scale, format);
        NAME(store)(values + i, activation == PER_GROUP ? v * scale : v);
    }
}

/* One token's values, one after another, in the order in which dot() reads them. */
static void NAME(prepare_row)(const LinearJob *job, int64_t token) {
    const char *x = (const char *)job->x + token * job->x_stride * size_of(job->kind);
    const float scale = NAME(token_scale)(job, x);
    float values[GROUP], *dst = job->panel + token * job->k_padded;
    job->scale[token] = scale;
    for (int64_t at = 0; at < job->k_padded; at += GROUP) {
        const int64_t count = least(GROUP, job->w->k - at), padded = least(GROUP, job->k_padded - at);
        memset(values, 0, sizeof values);
        if (count > 0) NAME(quantize_group)(values, job, x + at * size_of(job->kind), count, scale);
        for (int64_t i = 0; MIXED(job->w->kind) && !job->pairs && i < padded; i += 32) NAME(mix)(values + i);
        if (job->pairs) NAME(narrow_row)(job->panel, BF16, token * job->k_padded + at, values, padded);
        else memcpy(dst + at, values, (size_t)padded * 4);
    }
}

/* One of `parts` parts of a panel, a group of all its tokens at a time, so that it is written in one stream. */
static void NAME(prepare_panel)(const LinearJob *job, int64_t panel, int64_t part) {
    const int64_t k = job->w->k, size = size_of(job->kind), groups = (k + GROUP - 1) / GROUP;
    const int64_t lanes = least(LANES, job->m - panel * LANES);
    const char *x = (const char *)job->x + panel * LANES * job->x_stride * size;
    float rows[LANES][GROUP] __attribute__((aligned(64))), scale[LANES];
    memset(rows[lanes - 1], 0, (size_t)(LANES - lanes + 1) * sizeof rows[0]);
    for (int64_t i = 0; i < lanes; i++) {
        scale[i] = NAME(token_scale)(job, x + i * job->x_stride * size);
        if (!part) job->scale[panel * LANES + i] = scale[i];
    }
    for (int64_t at = groups * part / job->parts * GROUP; at < least(groups * (part + 1) / job->parts * GROUP, k); at += GROUP) {
        const int64_t count = least(GROUP, k - at);
        float *dst = NAME(panel_at)(job, panel, at);
        for (int64_t i = 0; i < lanes; i++) NAME(quantize_group)(rows[i], job, x + (i * job->x_stride + at) * size, count, scale[i]);
        if (job->pairs) {
            for (int64_t i = 0; i < lanes; i++) NAME(narrow_row)(rows[i], BF16, 0, rows[i], count + count % 2);
            for (int64_t j = 0; j < count + count % 2; j += 2, dst += LANES)
                for (int i = 0; i < LANES; i++) memcpy(dst + i, (uint16_t *)rows[i] + j, 4);
        } else {
            for (int64_t j = 0; j < count; j++, dst += LANES)
                for (int i = 0; i < LANES; i++) dst[i] = rows[i][j];
        }
    }
}

/* Task: a part of a panel of tokens, or all of them where they are rows. */
static void NAME(prepare)(void *argument, int64_t task) {
    const LinearJob *job = argument;
    if (job->is_panel) {
        NAME(prepare_panel)(job, task / job->parts, task % job->parts);
        return;
    }
    for (int64_t i = 0; i < job->m; i++) NAME(prepare_row)(job, i);
}

/* Task: one token's codes. */
static void NAME(round)(void *argument, int64_t token) { NAME(prepare_row)(argument, token); }

/* The scale of a row of the weight, or of its part that begins at k. */
INLINE float NAME(scale_at)(const Linear *w, int64_t row, int64_t k) {
    if (!w->scale) return 1;
    return w->scale_columns ? w->scale[row / w->scale_rows * w->scale_columns + k / GROUP] : w->scale[row];
}

INLINE void NAME(finish)(const LinearJob *job, int64_t token, int64_t row, float sum) {
    const Linear *w = job->w;
    if (w->activation == PER_TOKEN) sum *= job->scale[token];
    if (!w->scale_columns && w->scale) sum *= w->scale[row];
    put(job->y, job->kind, token * w->n + row, sum);
}

/* finish() for sums [rows][LANES] of a panel of tokens. */
static void NAME(finish_panel)(const LinearJob *job, int64_t panel, int64_t from, int64_t to, const float *sum) {
    const Linear *w = job->w;
    const int64_t first = panel * LANES, lanes = least(LANES, job->m - first), rows = to - from;
    float values[TASK_ROWS][LANES];
    uint16_t halves[TASK_ROWS][LANES];
    for (int64_t row = 0; row < rows; row++) {
        for (int p = 0; p < LANES; p += VL) {
            vf v = NAME(load)(sum + row * LANES + p);
            if (w->activation == PER_TOKEN) v *= NAME(load)(job->scale + first + p);
            if (!w->scale_columns && w->scale) v *= w->scale[from + row];
            NAME(store)(values[row] + p, v);
        }
        if (job->kind == BF16) NAME(narrow_row)(halves[row], BF16, 0, values[row], LANES);
    }
    for (int64_t i = 0; i < lanes; i++) {
        const int64_t at = (first + i) * w->n + from;
        if (job->kind == BF16) for (int64_t row = 0; row < rows; row++) ((uint16_t *)job->y)[at + row] = halves[row][i];
        else for (int64_t row = 0; row < rows; row++) ((float *)job->y)[at + row] = values[row][i];
    }
}

/* Rows `from` to `to` times m tokens, each result a sum along k in vectors; grouped: a scale every 128 values of a row. */
INLINE void NAME(dot)(const LinearJob *job, int64_t from, int64_t to, int m, int kind, int grouped) {
    enum { SUMS = CHUNK / LANES * PARTS }; /* few tokens have more than one each, to hide what an addition takes */
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
            memset(tail, 0, sizeof tail); /* what lies after the last row is not ours to read */
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

#if DOT
#include "pairs.h"

/* dot() over pairs. */
INLINE void NAME(dot_of_pairs)(const LinearJob *job, int64_t from, int64_t to, int m, int kind) {
    enum { PARTS_OF_PAIRS = CHUNK / PAIRED };
    const Linear *w = job->w;
    const uint16_t *x = (const uint16_t *)job->panel;
    const int64_t size = size_of(kind), whole = w->k / CHUNK * CHUNK, padded = job->k_padded;
    for (int64_t row = from; row < to; row++) {
        const char *at = (const char *)w->weight + row * w->stride * size;
        char tail[CHUNK * 2];
        vf sum[ROWS_MODE][PARTS_OF_PAIRS];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS_OF_PAIRS; part++) sum[i][part] = (vf){0};
        for (int64_t k = 0, end = whole;; end = padded) {
            for (; k < end; k += CHUNK) {
#pragma GCC unroll 2
                for (int line = 0; line < size; line++) __builtin_prefetch(at + k * size + line * 64 + AHEAD);
#pragma GCC unroll 8
                for (int part = 0; part < PARTS_OF_PAIRS; part++) {
                    vp v = NAME(widen_pairs)(at + (k + part * PAIRED) * size, kind), other;
#pragma GCC unroll 4
                    for (int i = 0; i < m; i++) {
                        memcpy(&other, x + i * padded + k + part * PAIRED, sizeof other);
                        sum[i][part] = NAME(dot_pairs)(sum[i][part], other, v);
                    }
                }
            }
            if (k == padded) break;
            memset(tail, 0, sizeof tail); /* what lies after the last row is not ours to read */
            memcpy(tail, at + whole * size, (size_t)((w->k - whole) * size));
            at = tail - whole * size;
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) {
#pragma GCC unroll 8
            for (int part = 1; part < PARTS_OF_PAIRS; part++) sum[i][0] += sum[i][part];
            NAME(finish)(job, i, row, NAME(sum)(sum[i][0]));
        }
    }
}
#endif

/* Task: a row of the weight, of codes times their scales, that a token is looked up as; m tokens' rows are job->x. */
static void NAME(look_up)(void *argument, int64_t token) {
    const LinearJob *job = argument;
    const Linear *w = job->w;
    const int64_t row = ((const int64_t *)job->x)[token];
    float values[GROUP];
    for (int64_t at = 0; at < w->k; at += GROUP) {
        const int64_t count = least(GROUP, w->k - at);
        NAME(widen_row)(values, (const char *)w->weight + (row * w->stride + at) * size_of(w->kind), w->kind, count);
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
        for (int64_t row = from; row < to; row++) {
            const char *at = (const char *)w->weight + (row * w->stride + k) * size_of(w->kind);
            float *dst = rows + (row - from) * TASK_K;
            for (int64_t line = 0; line < depth * size_of(w->kind); line += 64) __builtin_prefetch(at + line + AHEAD);
#if DOT
            if (job->pairs) {
                NAME(widen_to_pairs)((uint16_t *)dst, at, w->kind, depth);
                continue;
            }
#endif
            NAME(widen_row)(dst, at, w->kind, depth);
            for (int64_t g = 0; w->scale_columns && g < depth; g += GROUP) {
                float scale = NAME(scale_at)(w, row, k + g);
                for (int64_t i = g; i < least(g + GROUP, depth); i += VL) NAME(store)(dst + i, NAME(load)(dst + i) * scale);
            }
        }
        for (int64_t p = first_panel; p < last_panel; p++) {
            float *sum = sums + (p - first_panel) * TASK_ROWS * LANES;
#if DOT
            if (job->pairs) {
                NAME(product_of_pairs)(to - from, (depth + 1) / 2, (uint16_t *)rows, 2 * TASK_K, (uint16_t *)NAME(panel_at)(job, p, k),
                                       sum, k > 0);
                continue;
            }
#endif
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
#define DOTS(m, kind)                                                                                           \
    static __attribute__((noinline)) void NAME(dots_##m##_##kind)(const LinearJob *job, int64_t from, int64_t to) { \
        IF_PAIRS(NAME(dot_of_pairs)(job, from, to, m, kind))                                                     \
        if (job->w->scale_columns) NAME(dot)(job, from, to, m, kind, 1);                                         \
        else NAME(dot)(job, from, to, m, kind, 0);                                                               \
    }
#define EACH_M(kind) DOTS(1, kind) DOTS(2, kind) DOTS(3, kind) DOTS(4, kind)
EACH_M(F32)
EACH_M(BF16)
EACH_M(E4M3)
EACH_M(E5M2)
#define ROW(kind) {NAME(dots_1_##kind), NAME(dots_2_##kind), NAME(dots_3_##kind), NAME(dots_4_##kind)}
static void (*const NAME(dots)[][ROWS_MODE])(const LinearJob *, int64_t, int64_t) = {
    [F32] = ROW(F32), [BF16] = ROW(BF16), [E4M3] = ROW(E4M3), [E4M3FNUZ] = ROW(E4M3), [E5M2] = ROW(E5M2)};

static void NAME(multiply)(void *argument, int64_t task) {
    const LinearJob *job = argument;
    int64_t n = job->w->n, from = task % job->row_tasks * TASK_ROWS, to = least(from + TASK_ROWS, n);
    if (job->is_panel) {
        int64_t panels = (job->m + LANES - 1) / LANES, part = task / job->row_tasks;
        NAME(panels)(job, from, to, panels * part / job->token_tasks, panels * (part + 1) / job->token_tasks);
        return;
    }
    NAME(dots)[job->w->kind][job->m - 1](job, n * task / job->row_tasks, n * (task + 1) / job->row_tasks);
}

#undef DOTS
#undef IF_PAIRS
#undef EACH_M
#undef ROW
