/* Causal attention over a paged cache for one instruction set: included after vector.h.

   A task computes up to TASK_QUERIES query rows (tokens of a request, and the query heads of one KV head) over their whole
   context, TOKENS positions at a time, with online softmax (FlashAttention, arXiv:2205.14135). Few rows are multiplied along the
   head's dimension; of more, LANES are the lanes of a vector, and all of a task's share what is widened. Values past a request's
   end are not read. */
#define TOKENS 32
#define FEW_ROWS 4
#define MAX_DIM 256
#define QUERY_PANELS (TASK_QUERIES / LANES)

typedef struct {
    int64_t count;
    const char *k[TOKENS], *v[TOKENS];      /* addresses of each token's key and value */
    float k_scale[TOKENS], v_scale[TOKENS]; /* per-token scales, if the cache stores them */
} NAME(Found);

typedef struct {
    NAME(Found) found[2]; /* those being computed, and the next ones */
    float k[TOKENS * MAX_DIM], v[TOKENS * MAX_DIM];
    float q[TASK_QUERIES * MAX_DIM], o[TASK_QUERIES * MAX_DIM]; /* [row][dim] for few rows, else [panel][dim][LANES] */
    float scores[TOKENS * LANES];                 /* [row][TOKENS], or [token][LANES] */
    float parts[FEW_ROWS * TOKENS * VL];          /* partial scores before the horizontal sum: [row][TOKENS][VL] */
    float most[TASK_QUERIES], total[TASK_QUERIES], shrink[LANES];
    int64_t position[TASK_QUERIES];
} NAME(Flash);

/* Find keys and values of up to TOKENS tokens from `start` on. */
INLINE void NAME(find)(const Cache *c, const int32_t *table, int64_t head, int64_t start, int64_t last, NAME(Found) *f) {
    int64_t entry = start / c->block_size, offset = start % c->block_size;
    f->count = start < last ? least(TOKENS, last - start) : 0;
    for (int64_t t = 0; t < f->count; t++, offset++) {
        if (offset == c->block_size) entry++, offset = 0;
        int64_t block = table[entry], at = block * c->block + offset * c->token + head * c->head;
        f->k[t] = (const char *)c->k + at, f->v[t] = (const char *)c->v + at;
        if (!c->k_scale) continue;
        int64_t scale = block * c->scale_block + offset * c->scale_token;
        f->k_scale[t] = ((const float *)((const char *)c->k_scale + scale))[head];
        f->v_scale[t] = ((const float *)((const char *)c->v_scale + scale))[head];
    }
}

/* Blocks are scattered, so the hardware prefetcher cannot predict the next one. */
INLINE void NAME(expect)(const NAME(Found) *soon, int64_t t, int64_t bytes) {
    if (t >= soon->count) return;
    for (int64_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(soon->k[t] + line);
        __builtin_prefetch(soon->v[t] + line);
    }
}

/* Dequantize what was found to FP32 [count][padded], with per-token scales applied; `found` then points there. */
static void NAME(fetch)(const Cache *c, NAME(Found) *now, const NAME(Found) *soon, int64_t padded, NAME(Flash) *f) {
    for (int64_t t = 0; t < now->count; t++) {
        float *k = f->k + t * padded, *v = f->v + t * padded;
        NAME(expect)(soon, t, c->dim * size_of(c->kind));
        NAME(widen_row)(k, now->k[t], c->kind, c->dim);
        NAME(widen_row)(v, now->v[t], c->kind, c->dim);
        now->k[t] = (const char *)k, now->v[t] = (const char *)v;
        for (int64_t d = 0; c->k_scale && d < padded; d += VL) {
            NAME(store)(k + d, NAME(load)(k + d) * now->k_scale[t]);
            NAME(store)(v + d, NAME(load)(v + d) * now->v_scale[t]);
        }
    }
}

/* Few rows: scores [row][TOKENS], then the weighted values; keys and values of `kind` are widened as they are read. */
INLINE void NAME(few)(NAME(Flash) *f, const NAME(Found) *now, const NAME(Found) *soon, int rows, int kind, int scaled, int64_t start,
                      int64_t padded, int64_t window, float factor) {
    const int64_t size = size_of(kind), count = now->count;
    for (int64_t t = 0; t < count; t++) {
        const char *at = now->k[t];
        NAME(expect)(soon, t, padded * size);
        vf sum[FEW_ROWS], k[PARTS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = (vf){0};
        for (int64_t d = 0; d < padded; d += LANES) {
            NAME(widen16)(at + d * size, kind, k);
#pragma GCC unroll 16
            for (int i = 0; i < rows * PARTS; i++)
                sum[i / PARTS] += k[i % PARTS] * NAME(load)(f->q + i / PARTS * padded + d + i % PARTS * VL);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) NAME(store)(f->parts + (r * TOKENS + t) * VL, sum[r]);
    }
    for (int r = 0; r < rows; r++) {
        float *scores = f->scores + r * TOKENS, most = f->most[r];
        int64_t from = window ? f->position[r] - window + 1 - start : 0, to = least(f->position[r] + 1 - start, count);
        vf largest = NAME(splat)(most);
        for (int64_t t = 0; t < TOKENS; t += LANES) NAME(sums)(f->parts + (r * TOKENS + t) * VL, scores + t);
        for (int64_t t = 0; t < TOKENS; t += VL) NAME(store)(scores + t, NAME(load)(scores + t) * (kind >= E4M3 ? factor * HALF_UNDO : factor));
        for (int64_t t = 0; scaled && t < count; t++) scores[t] *= now->k_scale[t];
        for (int64_t t = 0; (from > 0 || to < TOKENS) && t < TOKENS; t++)
            if (t < from || t >= to) scores[t] = -INFINITY;
        for (int64_t t = 0; t < TOKENS; t += VL) {
            vf s = NAME(load)(scores + t);
            largest = SELECT(s > largest, s, largest);
        }
        most = NAME(largest)(largest);
        float shrink = f->most[r] == most ? 1 : expf(f->most[r] - most);
        vf total = {0};
        for (int64_t t = 0; t < TOKENS; t += VL) {
            vf s = NAME(load)(scores + t), p = NAME(exp)(s - most);
            p = SELECT(s == -INFINITY, (vf){0}, p);
            total += p;
            NAME(store)(scores + t, kind >= E4M3 ? p * HALF_UNDO : p);
        }
        f->total[r] = f->total[r] * shrink + NAME(sum)(total);
        f->most[r] = most, f->shrink[r] = shrink;
        for (int64_t t = 0; scaled && t < count; t++) scores[t] *= now->v_scale[t];
    }
    for (int64_t d = 0; d < padded; d += LANES) {
        vf o[FEW_ROWS * PARTS];
#pragma GCC unroll 16
        for (int i = 0; i < rows * PARTS; i++)
            o[i] = NAME(load)(f->o + i / PARTS * padded + d + i % PARTS * VL) * f->shrink[i / PARTS];
        for (int64_t t = 0; t < count; t++) {
            vf v[PARTS];
            NAME(widen16)(now->v[t] + d * size, kind, v);
#pragma GCC unroll 16
            for (int i = 0; i < rows * PARTS; i++) o[i] += v[i % PARTS] * f->scores[i / PARTS * TOKENS + t];
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows * PARTS; i++) NAME(store)(f->o + i / PARTS * padded + d + i % PARTS * VL, o[i]);
    }
}

#define FEW(kind)                                                                                                        \
    static __attribute__((noinline)) void NAME(few_##kind)(NAME(Flash) *f, const NAME(Found) *now, const NAME(Found) *soon, \
                                                           int64_t rows, int scaled, int64_t start, int64_t padded,      \
                                                           int64_t window, float factor) {                               \
        if (rows == 1) NAME(few)(f, now, soon, 1, kind, scaled, start, padded, window, factor);                          \
        else if (rows == 2) NAME(few)(f, now, soon, 2, kind, scaled, start, padded, window, factor);                     \
        else if (rows == 3) NAME(few)(f, now, soon, 3, kind, scaled, start, padded, window, factor);                     \
        else NAME(few)(f, now, soon, 4, kind, scaled, start, padded, window, factor);                                    \
    }
FEW(F32)
FEW(BF16)
FEW(E4M3)
FEW(E5M2)
#undef FEW
static void (*const NAME(few_of)[])(NAME(Flash) *, const NAME(Found) *, const NAME(Found) *, int64_t, int, int64_t, int64_t, int64_t,
                                    float) = {
    [F32] = NAME(few_F32), [BF16] = NAME(few_BF16), [E4M3] = NAME(few_E4M3), [E4M3FNUZ] = NAME(few_E4M3), [E5M2] = NAME(few_E5M2)};

/* Online softmax over scores [count][LANES] of positions from `start` on, for up to LANES rows, one per lane: scores become
   weights, and the accumulators are rescaled to the new maximum. */
INLINE void NAME(soften)(float *scores, float *largest, float *totals, float *shrinks, const int64_t *positions, int64_t rows,
                         int64_t start, int64_t count, int64_t window, float factor, float *sums, int64_t dim) {
    int used = rows > LANES / 2 || PARTS == 1 ? PARTS : PARTS / 2;
    for (int p = 0; p < used; p++) {
        vf most = NAME(load)(largest + p * VL), before = most, total = {0};
        vi position, first;
        for (int i = 0; i < VL; i++) {
            position[i] = (int32_t)(positions[p * VL + i] - start);
            first[i] = window ? position[i] - (int32_t)window + 1 : 0;
        }
        for (int64_t t = 0; t < count; t++) {
            float *at = scores + t * LANES + p * VL;
            vf s = NAME(load)(at) * factor;
            s = SELECT(((vi){0} + (int32_t)t > position) | ((vi){0} + (int32_t)t < first), NAME(splat)(-INFINITY), s);
            NAME(store)(at, s);
            most = SELECT((s > most) | (s != s), s, most);
        }
        for (int64_t t = 0; t < count; t++) {
            float *at = scores + t * LANES + p * VL;
            vf s = NAME(load)(at), weight = NAME(exp)(s - most);
            weight = SELECT(s == -INFINITY, (vf){0}, weight);
            total += weight;
            NAME(store)(at, weight);
        }
        vf shrink = SELECT(before == most, NAME(splat)(1), NAME(exp)(before - most));
        NAME(store)(shrinks + p * VL, shrink);
        NAME(store)(largest + p * VL, most);
        NAME(store)(totals + p * VL, NAME(load)(totals + p * VL) * shrink + total);
    }
    for (int p = 0; p < used; p++) {
        vf shrink = NAME(load)(shrinks + p * VL);
        for (int64_t d = 0; d < dim; d++) {
            float *at = sums + d * LANES + p * VL;
            NAME(store)(at, NAME(load)(at) * shrink);
        }
    }
}

/* `few` for a panel of up to LANES rows, one per lane. */
INLINE void NAME(many)(NAME(Flash) *f, int64_t panel, int64_t rows, int64_t start, int64_t count, int64_t dim, int64_t padded,
                       int64_t window, float factor) {
    const int64_t first = panel * LANES;
    float *o = f->o + first * padded;
    NAME(product)(count, rows, dim, f->k, padded, 1, f->q + first * padded, f->scores, 0);
    NAME(soften)(f->scores, f->most + first, f->total + first, f->shrink, f->position + first, rows, start, count, window, factor, o, dim);
    NAME(product)(dim, rows, count, f->v, 1, padded, f->scores, o, 1);
}

#if TILES
#include "tiled_attention.h"
#endif

static void NAME(attend)(void *argument, int64_t task) {
    const AttentionJob *job = argument;
    const Attention *a = job->a;
    const Cache *c = job->cache;
    int64_t block = task / c->kv_heads, head = task % c->kv_heads, group = a->heads / c->kv_heads;
    int64_t request = owner_of(job->first, a->requests, block); /* the request of this block of queries */
    int64_t tokens = a->starts[request + 1] - a->starts[request], dim = c->dim, padded = (dim + LANES - 1) / LANES * LANES;
    int64_t each = rows_of_task(tokens * group, job->tiles), from = (block - job->first[request]) * each, rows = least(each, tokens * group - from);
    int64_t before = a->lengths[request] - tokens; /* context before this step's tokens */
    const int32_t *table = a->tables + request * a->table_stride;
    int few = rows <= FEW_ROWS, in_place = few && dim == padded;
#if TILES
    if (job->tiles && !few) {
        NAME(attend_by_tiles)(job, request, head, from, rows);
        return;
    }
#endif
    float k_factor = a->k_factor * k_scale_of(c, head), v_factor = a->v_factor * v_scale_of(c, head);
    NAME(Flash) flash, *f = &flash;
    float line[MAX_DIM];
    const int64_t panels = (rows + LANES - 1) / LANES;
    memset(f->o, 0, (size_t)((few ? rows : panels * LANES) * padded) * 4);
    if (!few) memset(f->q, 0, (size_t)(panels * LANES * padded) * 4);
    for (int64_t r = 0; r < panels * LANES; r++) {
        f->most[r] = -1e30f, f->total[r] = 0, f->position[r] = -1;
        if (r >= rows) continue;
        int64_t token = a->starts[request] + (from + r) / group, q_head = head * group + (from + r) % group;
        f->position[r] = before + (from + r) / group;
        const char *q = (const char *)a->q + (token * a->q_token + q_head * a->q_head) * size_of(a->kind);
        NAME(widen_row)(few ? f->q + r * padded : line, q, a->kind, dim);
        for (int64_t d = 0; d < dim && in_place && c->kind >= E4M3; d++) f->q[r * padded + d] *= HALF_UNDO;
        for (int64_t d = 0; d < dim && !few; d++) f->q[r / LANES * LANES * padded + d * LANES + r % LANES] = line[d];
    }
    int64_t last = f->position[rows - 1] + 1, start = a->window && f->position[0] >= a->window ? f->position[0] - a->window + 1 : 0;
    NAME(find)(c, table, head, start, last, &f->found[0]);
    for (int current = 0; start < last; start += TOKENS, current = !current) {
        NAME(Found) *now = &f->found[current], *soon = &f->found[!current];
        NAME(find)(c, table, head, start + TOKENS, last, soon);
        if (!in_place) NAME(fetch)(c, now, soon, padded, f);
        if (few) NAME(few_of)[in_place ? c->kind : F32](f, now, soon, rows, in_place && c->k_scale, start, padded, a->window, k_factor);
        else for (int64_t p = 0; p < panels; p++) {
            const int64_t here = least(LANES, rows - p * LANES);
            if (f->position[p * LANES + here - 1] < start) continue; /* its rows attend to earlier tokens only */
            NAME(many)(f, p, here, start, now->count, dim, padded, a->window, k_factor);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = a->starts[request] + (from + r) / group, q_head = head * group + (from + r) % group;
        float factor = v_factor / f->total[r] * (in_place && c->kind >= E4M3 ? HALF_UNDO : 1);
        if (!a->lengths[request]) factor = 0; /* the row pads a batch: zeros */
        for (int64_t d = 0; d < dim; d++) line[d] = f->o[few ? r * padded + d : r / LANES * LANES * padded + d * LANES + r % LANES] * factor;
        NAME(narrow_row)(a->out, a->kind, (token * a->heads + q_head) * dim, line, dim);
    }
}
