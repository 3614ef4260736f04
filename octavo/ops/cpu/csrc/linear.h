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

/* One token's values as FP32, quantized as the weight's scheme says; `step` apart at dst. */
static void NAME(quantize_row)(const LinearJob *job, int64_t token, float *dst, int64_t step) {
    const Linear *w = job->w;
    const char *x = (const char *)job->x + token * job->x_stride * size_of(job->kind);
    const Format format = FORMATS[w->kind];
    float values[GROUP], scale = 1;
    if (w->activation == PER_TOKEN) {
        float peak = 0;
        for (int64_t at = 0; at < w->k; at += GROUP) {
            int64_t count = least(GROUP, w->k - at);
            NAME(widen_row)(values, x + at * size_of(job->kind), job->kind, count);
            float most = NAME(amax)(values, (count + LANES - 1) / LANES * LANES);
            if (!(most <= peak)) peak = most; /* NaN too */
            if (peak != peak) break;
        }
        scale = peak / format.limit;
        if (scale < SCALE_FLOOR) scale = SCALE_FLOOR;
        job->scale[token] = scale;
    }
    for (int64_t at = 0; at < w->k; at += GROUP) {
        int64_t count = least(GROUP, w->k - at), whole = (count + LANES - 1) / LANES * LANES;
        NAME(widen_row)(values, x + at * size_of(job->kind), job->kind, count);
        if (w->activation == PER_GROUP) {
            scale = NAME(amax)(values, whole) / format.limit;
            if (scale < SCALE_FLOOR) scale = SCALE_FLOOR;
        }
        if (w->activation != NOT_QUANTIZED) {
            for (int64_t i = 0; i < whole; i += VL) {
                vf v = NAME(round_to)(NAME(load)(values + i), scale, format);
                NAME(store)(values + i, w->activation == PER_GROUP ? v * scale : v);
            }
        }
        if (step == 1) {
            for (int64_t i = 0; i < whole; i += VL) NAME(store)(dst + at + i, NAME(load)(values + i));
        } else {
            for (int64_t i = 0; i < count; i++) dst[(at + i) * step] = values[i];
        }
    }
    for (int64_t i = (w->k + LANES - 1) / LANES * LANES; step == 1 && i < job->k_padded; i++) dst[i] = 0;
}

/* Task: one panel of tokens, or all of them where they are rows. */
static void NAME(prepare)(void *argument, int64_t task) {
    const LinearJob *job = argument;
    int64_t first = job->is_panel ? task * LANES : 0, lanes = least(LANES, job->m - first);
    for (int64_t i = 0; i < lanes; i++) {
        float *dst = job->is_panel ? job->panel + task * job->w->k * LANES + i : job->panel + i * job->k_padded;
        NAME(quantize_row)(job, first + i, dst, job->is_panel ? LANES : 1);
    }
    if (!job->is_panel || lanes == LANES) return;
    for (int64_t k = 0; k < job->w->k; k++)
        for (int64_t i = lanes; i < LANES; i++) job->panel[(task * job->w->k + k) * LANES + i] = 0;
}

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

/* Rows `from` to `to` times m tokens, each result a sum along k in vectors. */
INLINE void NAME(dot)(const LinearJob *job, int64_t from, int64_t to, int m, int kind) {
    enum { SUMS = CHUNK / LANES * PARTS }; /* few tokens have more than one each, to hide what an addition takes */
    const Linear *w = job->w;
    const float *x = job->panel;
    const int64_t size = size_of(kind), whole = w->k / CHUNK * CHUNK, padded = job->k_padded;
    const int grouped = w->scale_columns > 0, sums = m == 1 ? SUMS : m == 2 ? SUMS / 2 : PARTS;
    for (int64_t row = from; row < to; row++) {
        const char *at = (const char *)w->weight + row * w->stride * size;
        char tail[CHUNK * 4];
        vf sum[SUMS], v[PARTS];
#pragma GCC unroll 32
        for (int i = 0; i < m * sums; i++) sum[i] = (vf){0};
        for (int64_t k = 0, end = whole;; end = padded) {
            for (; k < end; k += CHUNK) {
                float scale = grouped ? NAME(scale_at)(w, row, k) : 1;
#pragma GCC unroll 4
                for (int line = 0; line < size; line++) __builtin_prefetch(at + k * size + line * 64 + AHEAD);
#pragma GCC unroll 4
                for (int part = 0; part < CHUNK / LANES; part++) {
                    NAME(widen16)(at + (k + part * LANES) * size, kind, v);
#pragma GCC unroll 4
                    for (int p = 0; p < PARTS; p++) {
                        if (grouped) v[p] *= scale;
#pragma GCC unroll 4
                        for (int i = 0; i < m; i++)
                            sum[i * sums + (part * PARTS + p) % sums] += v[p] * NAME(load)(x + i * padded + k + part * LANES + p * VL);
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
#pragma GCC unroll 16
            for (int j = 1; j < sums; j++) sum[i * sums] += sum[i * sums + j];
            NAME(finish)(job, i, row, NAME(sum)(sum[i * sums]));
        }
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
            NAME(widen_row)(dst, at, w->kind, depth);
            for (int64_t g = 0; w->scale_columns && g < depth; g += GROUP) {
                float scale = NAME(scale_at)(w, row, k + g);
                for (int64_t i = g; i < least(g + GROUP, depth); i += VL) NAME(store)(dst + i, NAME(load)(dst + i) * scale);
            }
        }
        for (int64_t p = first_panel; p < last_panel; p++)
            NAME(product)(to - from, least(LANES, job->m - p * LANES), depth, rows, TASK_K, 1, job->panel + (p * w->k + k) * LANES,
                          sums + (p - first_panel) * TASK_ROWS * LANES, k > 0);
    }
    for (int64_t p = first_panel; p < last_panel; p++) {
        const float *sum = sums + (p - first_panel) * TASK_ROWS * LANES;
        for (int64_t i = 0; i < least(LANES, job->m - p * LANES); i++)
            for (int64_t row = from; row < to; row++) NAME(finish)(job, p * LANES + i, row, sum[(row - from) * LANES + i]);
    }
}

#define DOTS(m, kind)                                                                                           \
    static __attribute__((noinline)) void NAME(dots_##m##_##kind)(const LinearJob *job, int64_t from, int64_t to) { \
        NAME(dot)(job, from, to, m, kind);                                                                       \
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
#undef EACH_M
#undef ROW
