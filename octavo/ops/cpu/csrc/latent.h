/* Multi-head latent attention for one instruction set: included after elementwise.h. Reading and writing of rows that all
   heads share is here too, for select.h.

   All heads attend to the same latents, so a latent is widened once and multiplied with LANES query rows, one per lane. A
   latent is a key and, without its rope part, a value. A long context is split into parts, whose partial sums are then
   merged (split-KV). */
#define SOME 48 /* positions that are widened, then multiplied, at a time: a multiple of LANES and of every TILE_ROWS */
#define MAX_SHARED 1024 /* values of a row with its rope part; also in latent.py */
#define PART 192        /* minimum positions of a part, so that merging is cheap in comparison */
#define MAX_PARTS 256  /* parts of a context; with more panels than this, no context is split */
#define JOINS 8 /* tasks that merge a panel's parts */

typedef struct {
    float k[SOME * (MAX_SHARED + LANES)];
    float q[MAX_SHARED * LANES];           /* [dim][LANES] */
    float sums[(MAX_SHARED + 2) * LANES];  /* each lane's maximum, sum of weights, then weighted values [dim][LANES] */
    float scores[SOME * LANES], shrink[LANES];
    int64_t position[LANES];
} NAME(Panel);

/* Load a row as FP32, followed by its rope part and zeros up to a multiple of LANES. */
INLINE void NAME(shared_row)(const Shared *c, int64_t block, int64_t offset, float *to) {
    const char *at = (const char *)c->values + block * c->block + offset * c->token;
    if (!c->scale) {
        NAME(widen_row)(to, at, c->kind, c->width);
    } else {
        const float *scale = (const float *)((const char *)c->scale + block * c->scale_block + offset * c->scale_token);
        for (int64_t g = 0; g < c->width; g += GROUP) {
            const int64_t count = least(GROUP, c->width - g);
            const float factor = scale[g / GROUP] * NARROWED[c->kind];
            NAME(widen_row)(to + g, at + g, c->kind, count);
            for (int64_t i = g; i < g + count; i += VL) NAME(store)(to + i, NAME(load)(to + i) * factor);
        }
    }
    if (c->rope) NAME(widen_row)(to + c->width, (const char *)c->rope + block * c->rope_block + offset * c->rope_token, c->rope_kind, c->rope_width);
}

/* Prefetch a row that is read soon; the hardware prefetcher cannot predict it. */
INLINE void NAME(expect_row)(const Shared *c, int64_t block, int64_t offset) {
    const char *at = (const char *)c->values + block * c->block + offset * c->token;
    for (int64_t line = 0; line < c->token; line += 64) __builtin_prefetch(at + line);
}

/* Rotate the first `rotated` values of x, in either pairing; y may be x. */
static void NAME(rotate_pairs)(const char *x, char *y, const float *cosines, int64_t rotated, int64_t width, int interleaved, int kind) {
    if (!interleaved) {
        NAME(rotate_row)(x, y, cosines, rotated, width, kind);
        return;
    }
    for (int64_t i = 0; i < rotated / 2; i++) {
        const float a = value_at(x, kind, 2 * i), b = value_at(x, kind, 2 * i + 1), c = cosines[i], s = cosines[rotated / 2 + i];
        put(y, kind, 2 * i, a * c - b * s);
        put(y, kind, 2 * i + 1, b * c + a * s);
    }
    if (x != y) memcpy(y + rotated * size_of(kind), x + rotated * size_of(kind), (size_t)((width - rotated) * size_of(kind)));
}

/* The smallest power of two that brings values up to `peak` into the codes' range. */
INLINE float NAME(power_of_two)(float peak, int kind) {
    const float ratio = (peak < PEAK_FLOOR ? PEAK_FLOOR : peak) / FORMATS[kind].limit;
    uint32_t bits;
    float scale;
    memcpy(&bits, &ratio, 4);
    bits = (bits + 0x7FFFFF) & 0x7F800000;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* Store width finite values, with room up to a multiple of LANES behind them, to a row of the cache. */
static void NAME(write_row)(const Shared *c, int64_t block, int64_t offset, const float *values) {
    char *to = (char *)c->values + block * c->block + offset * c->token;
    float *scale = c->scale ? (float *)((char *)c->scale + block * c->scale_block + offset * c->scale_token) : NULL;
    if (!scale) NAME(narrow_row)(to, c->kind, 0, values, c->width);
    for (int64_t g = 0; scale && g < c->width; g += GROUP) {
        const int64_t count = least(GROUP, c->width - g);
        float group[GROUP] = {0};
        memcpy(group, values + g, (size_t)count * 4);
        scale[g / GROUP] = NAME(power_of_two)(NAME(amax)(group, GROUP), c->kind);
        NAME(encode)(group, to + g, c->kind, scale[g / GROUP], count);
    }
}

/* Task: store some tokens' latents and rope keys at their slots. */
static void NAME(write_latent)(void *argument, int64_t task) {
    const Store *s = argument;
    const Shared *c = s->cache;
    char row[MAX_SHARED * 4];
    float values[MAX_SHARED];
    for (int64_t t = task * s->per_task; t < least((task + 1) * s->per_task, s->tokens); t++) {
        const char *x = (const char *)s->x + t * s->stride * size_of(s->kind);
        const int64_t block = s->slots[t] / c->block_size, offset = s->slots[t] % c->block_size;
        NAME(norm_row)(x, NULL, s->weight, row, NULL, c->width, s->eps, s->kind);
        NAME(widen_row)(values, row, s->kind, c->width);
        NAME(keep_finite)(values, c->width);
        NAME(write_row)(c, block, offset, values);
        NAME(rotate_pairs)(x + c->width * size_of(s->kind), row, s->cos_sin + s->rotary_rows[t] * s->rotated, s->rotated, c->rope_width,
                       s->interleaved, s->kind);
        NAME(widen_row)(values, row, s->kind, c->rope_width);
        NAME(keep_finite)(values, c->rope_width);
        NAME(narrow_row)((char *)c->rope + block * c->rope_block + offset * c->rope_token, c->rope_kind, 0, values, c->rope_width);
    }
}

/* Address of the values of a token's head. */
#define X_AT(h, token, head) ((const char *)(h)->x + ((token) * (h)->x_token + (head) * (h)->x_head) * size_of((h)->kind))

/* Columns [from, to) of the products of up to ROWS_MODE tokens by a matrix that is contiguous along k, or along columns if
   `across`: x [m][k] by w, which is read once, in place. */
INLINE void NAME(few_columns)(const Heads *h, const char *w, const float *x, int64_t k_padded, float *y, int64_t from, int64_t to,
                              int m, int kind, int across) {
    const int64_t size = size_of(kind);
    if (across) { /* y += x[k] * row k: 2 * LANES columns at a time */
        for (int64_t n = from; n < to; n += 2 * LANES) {
            vf sum[ROWS_MODE * 2 * PARTS], v[2 * PARTS];
#pragma GCC unroll 32
            for (int i = 0; i < m * 2 * PARTS; i++) sum[i] = (vf){0};
            const char *at = w + n * size;
            for (int64_t k = 0; k < h->k; k++, at += h->w_k * size) {
                __builtin_prefetch(at + 8 * h->w_k * size);
                NAME(widen16)(at, kind, v);
                NAME(widen16)(at + LANES * size, kind, v + PARTS);
#pragma GCC unroll 32
                for (int i = 0; i < m * 2 * PARTS; i++) sum[i] += v[i % (2 * PARTS)] * x[i / (2 * PARTS) * k_padded + k];
            }
#pragma GCC unroll 32
            for (int i = 0; i < m * 2 * PARTS; i++)
                NAME(store)(y + i / (2 * PARTS) * MAX_SHARED + n - from + i % (2 * PARTS) * VL, sum[i]);
        }
        return;
    }
    for (int64_t n = from; n < to; n += LANES) {
        float parts[ROWS_MODE * LANES * VL];
        for (int64_t row = 0; row < LANES; row++) {
            const char *at = w + (n + row) * h->w_n * size;
            vf sum[ROWS_MODE * PARTS], v[PARTS];
#pragma GCC unroll 16
            for (int i = 0; i < m * PARTS; i++) sum[i] = (vf){0};
            for (int64_t k = 0; k < h->k; k += LANES) {
                NAME(widen16)(at + k * size, kind, v);
#pragma GCC unroll 16
                for (int i = 0; i < m * PARTS; i++) sum[i] += v[i % PARTS] * NAME(load)(x + i / PARTS * k_padded + k + i % PARTS * VL);
            }
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) {
                for (int p = 1; p < PARTS; p++) sum[i * PARTS] += sum[i * PARTS + p];
                NAME(store)(parts + (i * LANES + row) * VL, sum[i * PARTS]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) NAME(sums)(parts + i * LANES * VL, y + i * MAX_SHARED + n - from);
    }
}

#define FEW_COLUMNS(kind, across)                                                                                              \
    static __attribute__((noinline)) void NAME(few_columns_##kind##_##across)(const Heads *h, const char *w, const float *x,   \
                                                                              int64_t k_padded, float *y, int64_t from,        \
                                                                              int64_t to, int64_t m) {                         \
        if (m == 1) NAME(few_columns)(h, w, x, k_padded, y, from, to, 1, kind, across);                                        \
        else NAME(few_columns)(h, w, x, k_padded, y, from, to, ROWS_MODE, kind, across);                                       \
    }
FEW_COLUMNS(F32, 0)
FEW_COLUMNS(F32, 1)
FEW_COLUMNS(BF16, 0)
FEW_COLUMNS(BF16, 1)
#undef FEW_COLUMNS

/* The same for up to LANES tokens and any shape: x [k][LANES], y [columns][LANES]. */
static __attribute__((noinline)) void NAME(many_columns)(const Heads *h, const char *w, const float *x, float *y, int64_t from,
                                                         int64_t to) {
    float wide[SOME * (MAX_SHARED + LANES)];
    const int64_t across = h->w_n == 1, size = size_of(h->w_kind), stride = across ? SOME + LANES : (h->k + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; across && i < h->k; i++) NAME(widen_row)(wide + i * SOME, w + (i * h->w_k + from) * size, h->w_kind, to - from);
    for (int64_t i = from; !across && i < to; i++) NAME(widen_row)(wide + (i - from) * stride, w + i * h->w_n * size, h->w_kind, h->k);
    NAME(product)(to - from, LANES, h->k, wide, across ? 1 : stride, across ? SOME : 1, x, y, 0);
}

/* Task: some columns of some tokens' products by a head's matrix. The task of the first columns also rotates the rope part. */
static void NAME(heads)(void *argument, int64_t task) {
    const Heads *h = argument;
    const int64_t column_tasks = (h->n + h->columns - 1) / h->columns, head = task / column_tasks % h->heads;
    const int64_t first = task / column_tasks / h->heads * h->rows, m = least(h->rows, h->tokens - first);
    const int64_t from = task % column_tasks * h->columns, to = least(from + h->columns, h->n), size = size_of(h->kind);
    const int64_t padded = (h->k + LANES - 1) / LANES * LANES;
    const char *w = (const char *)h->w + head * h->w_head * size_of(h->w_kind);
    float rows[LANES * MAX_SHARED], x[LANES * MAX_SHARED], y[LANES * MAX_SHARED];
    const int few = h->rows <= ROWS_MODE;
    memset(rows, 0, (size_t)((few ? ROWS_MODE : LANES) * padded) * 4);
    for (int64_t i = 0; i < m; i++) NAME(widen_row)(rows + i * padded, X_AT(h, first + i, head), h->kind, h->k);
    if (few) {
        const int across = h->w_n == 1;
        if (h->w_kind == F32) (across ? NAME(few_columns_F32_1) : NAME(few_columns_F32_0))(h, w, rows, padded, y, from, to, m);
        else (across ? NAME(few_columns_BF16_1) : NAME(few_columns_BF16_0))(h, w, rows, padded, y, from, to, m);
    } else {
        for (int64_t k = 0; k < padded; k += LANES) NAME(transpose)(rows + k, padded, x + k * LANES);
        NAME(many_columns)(h, w, x, rows, from, to);
        for (int64_t n = 0; n < to - from; n += LANES) {
            float transposed[LANES * LANES];
            NAME(transpose)(rows + n * LANES, LANES, transposed);
            for (int64_t i = 0; i < m; i++) memcpy(y + i * MAX_SHARED + n, transposed + i * LANES, LANES * 4);
        }
    }
    for (int64_t i = 0; i < m; i++) {
        char *at = (char *)h->y + ((first + i) * h->y_token + head * h->y_head) * size;
        NAME(narrow_row)(at, h->kind, from, y + i * MAX_SHARED, to - from);
        if (h->cos_sin && !from)
            NAME(rotate_pairs)(X_AT(h, first + i, head) + h->k * size, at + h->n * size,
                           h->cos_sin + h->rotary_rows[first + i] * h->rotated, h->rotated, h->rotated, h->interleaved, h->kind);
    }
}
#undef X_AT

/* A panel's rows: `count` from `row` on of its request's (token, head) rows; and the positions that they see. */
typedef struct { int64_t request, panel, part, row, count, last; const int32_t *list; } NAME(Rows_of);

INLINE NAME(Rows_of) NAME(rows_of)(const LatentJob *job, int64_t request, int64_t panel, int64_t part) {
    const Attention *a = job->a;
    const int64_t tokens = a->starts[request + 1] - a->starts[request], each = (a->heads + LANES - 1) / LANES;
    NAME(Rows_of) r = {.request = request, .panel = panel, .part = part, .row = panel * LANES};
    r.count = least(LANES, tokens * a->heads - r.row);
    if (job->chosen) { /* heads of one token only, since they attend to the same positions */
        const int64_t head = panel % each * LANES;
        r.row = panel / each * a->heads + head, r.count = least(LANES, a->heads - head);
        r.list = job->chosen + (a->starts[request] + panel / each) * job->top_k;
        for (int64_t high = job->top_k; r.last < high;) { /* the padding of -1 is last */
            const int64_t middle = (r.last + high) / 2;
            if (r.list[middle] < 0) high = middle;
            else r.last = middle + 1;
        }
    } else {
        r.last = a->lengths[request] - tokens + (r.row + r.count - 1) / a->heads + 1;
    }
    return r;
}

/* Output dimensions [from, to) of a panel, from the partial sums of its parts, which are `stride` values apart. */
static void NAME(settle)(const LatentJob *job, const NAME(Rows_of) *r, const float *sums, int64_t stride, int64_t parts, int64_t from,
                         int64_t to) {
    const Attention *a = job->a;
    const int64_t rank = job->cache->width;
    float weight[MAX_PARTS * LANES], sum[LANES * LANES], rows[LANES * LANES];
    for (int p = 0; p < LANES; p += VL) {
        vf most = NAME(splat)(-INFINITY), total = {0};
        for (int64_t i = 0; i < parts; i++) {
            const vf other = NAME(load)(sums + i * stride + p);
            most = SELECT((other > most) | (other != other), other, most);
        }
        for (int64_t i = 0; i < parts; i++) {
            const vf by = NAME(exp)(NAME(load)(sums + i * stride + p) - most);
            total += by * NAME(load)(sums + i * stride + LANES + p);
            NAME(store)(weight + i * LANES + p, by);
        }
        const vf factor = SELECT(total == 0, (vf){0}, 1 / total); /* 0 for a row that pads a graph and attends to nothing */
        for (int64_t i = 0; i < parts; i++) NAME(store)(weight + i * LANES + p, NAME(load)(weight + i * LANES + p) * factor);
    }
    for (int64_t d = from; d < to; d += LANES) {
        memset(sum, 0, sizeof sum);
        for (int64_t i = 0; i < parts; i++) {
            const float *at = sums + i * stride + (2 + d) * LANES;
            for (int p = 0; p < LANES; p += VL) {
                const vf by = NAME(load)(weight + i * LANES + p);
                for (int j = 0; j < LANES; j++) NAME(store)(sum + j * LANES + p, NAME(load)(sum + j * LANES + p) + NAME(load)(at + j * LANES + p) * by);
            }
        }
        NAME(transpose)(sum, LANES, rows);
        for (int64_t i = 0; i < r->count; i++)
            NAME(narrow_row)(a->out, a->kind, (a->starts[r->request] * a->heads + r->row + i) * rank + d, rows + i * LANES, least(LANES, to - d));
    }
}

/* Task: a panel over one part of its context. */
static void NAME(latent_attend)(void *argument, int64_t task) {
    const LatentJob *job = argument;
    const Attention *a = job->a;
    const Shared *c = job->cache;
    const int64_t request = owner_of(job->task, a->requests, task), parts = job->parts[request], at = task - job->task[request];
    const NAME(Rows_of) r = NAME(rows_of)(job, request, at / parts, at % parts);
    const int64_t rank = c->width, dim = rank + c->rope_width, padded = (dim + 2 * LANES - 1) / LANES * LANES;
    const int64_t begin = r.part * job->step[request], end = parts == 1 ? r.last : least(begin + job->step[request], r.last);
    const int32_t *table = a->tables + request * a->table_stride;
    NAME(Panel) panel, *f = &panel;
    float *most = f->sums, *total = most + LANES, *o = total + LANES, *row = f->k;
    memset(o, 0, (size_t)((rank + LANES - 1) / LANES * LANES * LANES) * 4);
    memset(f->q, 0, (size_t)(dim * LANES) * 4);
    for (int64_t i = 0; i < LANES; i++) {
        most[i] = -1e30f, total[i] = 0, f->position[i] = -1;
        if (i >= r.count || begin >= end) continue;
        const int64_t token = a->starts[request] + (r.row + i) / a->heads, head = (r.row + i) % a->heads;
        f->position[i] = r.list ? r.last - 1 : a->lengths[request] - a->starts[request + 1] + token;
        NAME(widen_row)(row, (const char *)a->q + (token * a->q_token + head * a->q_head) * size_of(a->kind), a->kind, dim);
        for (int64_t d = 0; d < dim; d++) f->q[d * LANES + i] = row[d];
    }
    for (int64_t start = begin; start < end; start += SOME) {
        const int64_t count = least(SOME, end - start);
        for (int64_t t = 0; t < count; t++) {
            const int64_t next = start + t + SOME, place = r.list ? r.list[start + t] : start + t;
            if (next < end) {
                const int64_t soon = r.list ? r.list[next] : next;
                NAME(expect_row)(c, table[soon / c->block_size], soon % c->block_size);
            }
            NAME(shared_row)(c, table[place / c->block_size], place % c->block_size, f->k + t * padded);
        }
        NAME(product)(count, r.count, dim, f->k, padded, 1, f->q, f->scores, 0);
        NAME(soften)(f->scores, most, total, f->shrink, f->position, r.count, start, count, 0, a->k_factor, o, rank);
        NAME(product)(rank, r.count, count, f->k, 1, padded, f->scores, o, 1);
    }
    if (parts == 1) {
        NAME(settle)(job, &r, f->sums, 0, 1, 0, rank);
        return;
    }
    const int64_t held = (2 + (rank + LANES - 1) / LANES * LANES) * LANES;
    memcpy(job->sums + (job->sum[request] + at) * held, f->sums, (size_t)held * 4);
}

/* Task: merge the parts of a panel, for some dimensions. */
static void NAME(latent_join)(void *argument, int64_t task) {
    const LatentJob *job = argument;
    const int64_t rank = job->cache->width, groups = (rank + LANES - 1) / LANES, held = (2 + groups * LANES) * LANES;
    const int64_t all = task / JOINS, request = owner_of(job->panel, job->a->requests, all), parts = job->parts[request];
    if (parts == 1) return;
    const NAME(Rows_of) r = NAME(rows_of)(job, request, all - job->panel[request], 0);
    const float *sums = job->sums + (job->sum[request] + r.panel * parts) * held;
    NAME(settle)(job, &r, sums, held, parts, groups * (task % JOINS) / JOINS * LANES,
                 least(groups * (task % JOINS + 1) / JOINS * LANES, rank));
}
