/* DeepSeek's indexer for one instruction set: included after latent.h. It writes index keys and selects the positions of a
   context with the highest scores. LANES heads are the lanes of a vector. */

#define SCORED 192 /* positions that a task scores: a multiple of SOME */

/* Multiply by the orthogonal Hadamard matrix (Sylvester's construction) with butterflies; dim is a power of two. */
static void NAME(transform)(float *x, int64_t dim) {
    for (int64_t half = 1; half < dim; half *= 2) {
        for (int64_t from = 0; from < dim; from += 2 * half) {
            if (half >= VL) {
                for (int64_t i = from; i < from + half; i += VL) {
                    const vf a = NAME(load)(x + i), b = NAME(load)(x + i + half);
                    NAME(store)(x + i, a + b);
                    NAME(store)(x + i + half, a - b);
                }
                continue;
            }
            for (int64_t i = from; i < from + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
        }
    }
    const float factor = 1 / sqrtf((float)dim);
    for (int64_t i = 0; i < dim; i++) x[i] *= factor;
}

/* Task: store some tokens' index keys at their slots. */
static void NAME(write_index_keys)(void *argument, int64_t task) {
    const Store *s = argument;
    const Shared *c = s->cache;
    const int64_t dim = c->width;
    char row[MAX_SHARED * 4];
    float values[MAX_SHARED], weight[MAX_SHARED], bias[MAX_SHARED] = {0};
    NAME(widen_row)(weight, s->weight, s->kind, dim);
    if (s->bias) NAME(widen_row)(bias, s->bias, s->kind, dim);
    for (int64_t t = task * s->per_task; t < least((task + 1) * s->per_task, s->tokens); t++) {
        double mean = 0, square = 0;
        NAME(widen_row)(values, (const char *)s->x + t * s->stride * size_of(s->kind), s->kind, dim);
        for (int64_t i = 0; i < dim; i++) mean += values[i];
        mean /= (double)dim;
        for (int64_t i = 0; i < dim; i++) square += (values[i] - mean) * (values[i] - mean);
        const double factor = 1 / sqrt(square / (double)dim + s->eps);
        for (int64_t i = 0; i < dim; i++) values[i] = (float)((values[i] - mean) * factor) * weight[i] + bias[i];
        NAME(narrow_row)(row, s->kind, 0, values, dim);
        NAME(rotate_pairs)(row, row, s->cos_sin + s->rotary_rows[t] * s->rotated, s->rotated, dim, s->interleaved, s->kind);
        NAME(widen_row)(values, row, s->kind, dim);
        NAME(keep_finite)(values, dim);
        if (c->scale) NAME(transform)(values, dim);
        NAME(write_row)(c, s->slots[t] / c->block_size, s->slots[t] % c->block_size, values);
    }
}

/* The request of a token, and the number of positions it sees. */
INLINE int64_t NAME(seen_by)(const Select *s, int64_t token, int64_t *request) {
    int64_t low = 0, high = s->requests;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (s->starts[middle] <= token) low = middle;
        else high = middle;
    }
    *request = low;
    return s->lengths[low] - s->starts[low + 1] + token + 1;
}

#define DEPTH(s) (((s)->cache->width + LANES - 1) / LANES * LANES)
#define PANELS(s) (((s)->heads + LANES - 1) / LANES)
#define PANEL_AT(s, token, panel) ((s)->panels + ((token) * PANELS(s) + (panel)) * (DEPTH(s) + 1) * LANES)

/* Task: queries of LANES heads of a token, as scored, and their weights. */
static void NAME(select_prepare)(void *argument, int64_t task) {
    const Select *s = argument;
    const Shared *c = s->cache;
    const int64_t panel = task % PANELS(s), token = s->first + task / PANELS(s), dim = c->width, depth = DEPTH(s);
    int64_t request;
    if (NAME(seen_by)(s, token, &request) <= s->top_k) return;
    float rows[LANES * MAX_SHARED], *to = PANEL_AT(s, token - s->first, panel), *weights = to + depth * LANES;
    char row[MAX_SHARED * 4];
    memset(rows, 0, (size_t)(LANES * depth) * 4);
    for (int64_t i = 0; i < LANES; i++) {
        const int64_t head = panel * LANES + i;
        weights[i] = head < s->heads ? value_at(s->weights, s->kind, token * s->weights_token + head) : 0;
        if (head >= s->heads) continue;
        float *values = rows + i * depth;
        NAME(rotate_pairs)((const char *)s->q + (token * s->q_token + head * s->q_head) * size_of(s->kind), row,
                       s->cos_sin + s->rotary_rows[token] * s->rotated, s->rotated, dim, s->interleaved, s->kind);
        NAME(widen_row)(values, row, s->kind, dim);
        if (!c->scale) continue;
        NAME(transform)(values, dim);
        for (int64_t g = 0; g < depth; g += GROUP) {
            const int64_t count = least(GROUP, depth - g);
            const float scale = NAME(power_of_two)(NAME(amax)(values + g, count), c->kind);
            for (int64_t d = g; d < g + count; d += VL)
                NAME(store)(values + d, NAME(round_to)(NAME(load)(values + d), scale, FORMATS[c->kind]) * scale);
        }
    }
    for (int64_t d = 0; d < depth; d += LANES) NAME(transpose)(rows + d, depth, to + d * LANES);
}

/* Task: a token's scores over a part of its context, as ordered integers; NaN is the smallest. */
static void NAME(select_score)(void *argument, int64_t task) {
    const Select *s = argument;
    const Shared *c = s->cache;
    const int64_t index = task / s->parts, dim = c->width, padded = DEPTH(s) + LANES;
    int64_t request;
    const int64_t seen = NAME(seen_by)(s, s->first + index, &request), begin = task % s->parts * SCORED;
    if (seen <= s->top_k) return;
    const int32_t *table = s->tables + request * s->table_stride;
    float k[SOME * (MAX_SHARED + LANES)], scores[SOME * LANES], sums[SOME * VL], total[SOME];
    for (int64_t start = begin; start < least(begin + SCORED, seen); start += SOME) {
        const int64_t count = least(SOME, least(begin + SCORED, seen) - start);
        for (int64_t t = 0; t < count; t++) NAME(shared_row)(c, table[(start + t) / c->block_size], (start + t) % c->block_size, k + t * padded);
        memset(sums, 0, sizeof sums);
        for (int64_t panel = 0; panel < PANELS(s); panel++) {
            const float *q = PANEL_AT(s, index, panel), *weights = q + DEPTH(s) * LANES;
            NAME(product)(count, LANES, dim, k, padded, 1, q, scores, 0);
            for (int64_t t = 0; t < count; t++) {
                vf sum = NAME(load)(sums + t * VL);
                for (int p = 0; p < LANES; p += VL) {
                    const vf v = NAME(load)(scores + t * LANES + p);
                    sum += SELECT(v < 0, (vf){0}, v) * NAME(load)(weights + p); /* NaN stays NaN */
                }
                NAME(store)(sums + t * VL, sum);
            }
        }
        for (int64_t t = 0; t < SOME; t += LANES) NAME(sums)(sums + t * VL, total + t);
        for (int64_t t = 0; t < count; t++) {
            const float score = total[t] == total[t] ? total[t] + 0.0f : -INFINITY; /* no negative zero */
            const uint32_t bits = bits_of(score);
            s->scores[index * s->longest + start + t] = bits >> 31 ? ~bits : bits | 0x80000000;
        }
    }
}

#undef DEPTH
#undef PANELS
#undef PANEL_AT
