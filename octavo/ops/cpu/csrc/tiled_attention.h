/* Attention's two products by matrix tiles, for prompts: included after attention.h for instruction sets with TILES.

   Queries are BF16, and so are the keys and values, as stored or widened: products are exact, sums FP32. Softmax's weights
   are rounded to BF16, each by 2^-9 at most. A task computes up to QUERY_PANELS panels of LANES query rows, for which keys
   and values are widened once.

   Scores [TOKENS][LANES] are keys [TOKENS][dim] times queries in pairs of dimensions. Sums [dim][LANES] are values
   [dim][TOKENS] times weights in pairs of tokens; so values are transposed, two tokens at a time as 32 bits. */

typedef struct {
    NAME(Found) found[2]; /* those being computed, and the next ones */
    uint16_t k[TOKENS * MAX_DIM] __attribute__((aligned(64))), v[MAX_DIM * TOKENS] __attribute__((aligned(64)));
    uint16_t q[QUERY_PANELS * MAX_DIM * LANES] __attribute__((aligned(64))), weights[TOKENS * LANES] __attribute__((aligned(64)));
    float o[QUERY_PANELS * MAX_DIM * LANES] __attribute__((aligned(64))), scores[TOKENS * LANES] __attribute__((aligned(64)));
    float most[QUERY_PANELS * LANES], total[QUERY_PANELS * LANES], shrink[LANES];
    int64_t position[QUERY_PANELS * LANES];
} NAME(TiledFlash);

/* Widen a token's `dim` values to BF16 in the order of widen_unit(), followed by zeros up to `padded`, a multiple of CHUNK. */
INLINE void NAME(widen_head)(const char *from, int kind, int64_t dim, int64_t padded, uint16_t *to) {
    char tail[CHUNK * 2];
    for (int64_t at = 0; at < padded; at += UNIT) {
        const char *p = from + at * size_of(kind);
        if (at + UNIT > dim) {
            memset(tail, 0, sizeof tail);
            if (at < dim) memcpy(tail, p, (size_t)((dim - at) * size_of(kind)));
            p = tail;
        }
        NAME(widen_unit)(p, kind, (vp *)__builtin_assume_aligned(to + at, sizeof(vp)));
    }
}

/* Keys [TOKENS][padded], and values [padded][TOKENS], of the tokens found; those that are missing are zeros. */
INLINE void NAME(widen_tokens)(NAME(TiledFlash) *f, const NAME(Found) *now, const NAME(Found) *soon, int kind, int64_t dim, int64_t padded) {
    uint16_t two[2][MAX_DIM] __attribute__((aligned(64)));
    float pairs[TOKENS / 2 * MAX_DIM] __attribute__((aligned(64))), turned[LANES * LANES] __attribute__((aligned(64)));
    for (int64_t t = 0; t < TOKENS; t++) {
        uint16_t *k = f->k + t * padded, *v = two[t % 2];
        NAME(expect)(soon, t, dim * size_of(kind));
        if (t < now->count) {
            NAME(widen_head)(now->k[t], kind, dim, padded, k);
            NAME(widen_head)(now->v[t], kind, dim, padded, v);
        } else {
            memset(k, 0, (size_t)padded * 2);
            memset(v, 0, (size_t)padded * 2);
        }
        for (int64_t d = 0; t % 2 && d < padded; d += VL) {
            vh low, high;
            memcpy(&low, two[0] + d, sizeof low);
            memcpy(&high, two[1] + d, sizeof high);
            NAME(store)(pairs + t / 2 * padded + d, (vf)(NAME(longer)(low) | NAME(longer)(high) << 16));
        }
    }
    for (int64_t d = 0; d < padded; d += LANES) {
        NAME(transpose)(pairs + d, padded, turned);
        memcpy(f->v + d * TOKENS, turned, sizeof turned);
    }
}

/* One panel of queries over the tokens found. */
INLINE void NAME(attend_panel)(NAME(TiledFlash) *f, const NAME(Found) *now, const Cache *c, int64_t panel, int64_t rows, int64_t start,
                               int64_t padded, int64_t window, float factor) {
    const char *q = (const char *)(f->q + panel * padded * LANES);
    float *o = f->o + panel * padded * LANES, *scores = f->scores;
    TILE_ZERO(0);
    TILE_ZERO(1);
    for (int64_t d = 0; d < padded; d += TILE_VALUES, q += TILE_BYTES) {
        TILE_LOAD(4, f->k + d, padded * 2);
        TILE_LOAD(6, q, 64);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(5, f->k + TOKENS / 2 * padded + d, padded * 2);
        TILE_DOT(1, 5, 6);
    }
    TILE_STORE(0, scores, 64);
    TILE_STORE(1, scores + TOKENS / 2 * LANES, 64);
    TILE_FENCE();
    for (int64_t i = 0; c->k_scale && i < now->count * LANES; i += VL)
        NAME(store)(scores + i, NAME(load)(scores + i) * now->k_scale[i / LANES]);
    NAME(soften)(scores, f->most + panel * LANES, f->total + panel * LANES, f->shrink, f->position + panel * LANES, rows, start,
                 now->count, window, factor, o, padded);
    for (int64_t i = 0; i < TOKENS * LANES; i += 2 * LANES) {
        const int64_t t = i / LANES;
        for (int64_t lane = 0; lane < LANES; lane += VL) {
            vf low = NAME(load)(scores + i + lane), high = NAME(load)(scores + i + LANES + lane);
            if (c->v_scale && t < now->count) low *= now->v_scale[t];
            if (c->v_scale && t + 1 < now->count) high *= now->v_scale[t + 1];
            low = t < now->count && lane < rows ? NAME(round_bf16)(low) : (vf){0};
            high = t + 1 < now->count && lane < rows ? NAME(round_bf16)(high) : (vf){0};
            NAME(store)((float *)f->weights + i / 2 + lane, (vf)((vu)low >> 16 | (vu)high));
        }
    }
    TILE_FENCE();
    TILE_LOAD(6, f->weights, 64);
    for (int64_t d = 0; d < padded; d += 2 * LANES, o += 2 * LANES * LANES) {
        TILE_LOAD(0, o, 64);
        TILE_LOAD(4, f->v + d * TOKENS, 64);
        TILE_LOAD(1, o + LANES * LANES, 64);
        TILE_LOAD(5, f->v + (d + LANES) * TOKENS, 64);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 5, 6);
        TILE_STORE(0, o, 64);
        TILE_STORE(1, o + LANES * LANES, 64);
    }
    TILE_FENCE();
}

/* attend() for `rows` query rows of a request and a KV head, of which the first is `from`. */
INLINE void NAME(attend_rows)(const AttentionJob *job, int64_t request, int64_t head, int64_t from, int64_t rows, int kind) {
    const Attention *a = job->a;
    const Cache *c = job->cache;
    const int64_t group = a->heads / c->kv_heads, tokens = a->starts[request + 1] - a->starts[request], dim = c->dim;
    const int64_t before = a->lengths[request] - tokens, padded = (dim + CHUNK - 1) / CHUNK * CHUNK, panels = (rows + LANES - 1) / LANES;
    const int32_t *table = a->tables + request * a->table_stride;
    const float k_factor = a->k_factor * k_scale_of(c, head), v_factor = a->v_factor * v_scale_of(c, head);
    NAME(TiledFlash) flash, *f = &flash;
    float line[MAX_DIM], columns[LANES * LANES] __attribute__((aligned(64))), lines[LANES * MAX_DIM] __attribute__((aligned(64)));
    memset(f->o, 0, (size_t)(panels * padded * LANES) * 4);
    for (int64_t r = 0; r < panels * LANES; r++) {
        float *to = lines + r % LANES * padded;
        f->most[r] = -1e30f, f->total[r] = 0, f->position[r] = -1;
        memset(to, 0, (size_t)padded * 4);
        if (r < rows) {
            const int64_t token = a->starts[request] + (from + r) / group, q_head = head * group + (from + r) % group;
            f->position[r] = before + (from + r) / group;
            NAME(widen_row)(to, (const char *)a->q + (token * a->q_token + q_head * a->q_head) * 2, BF16, dim);
        }
        for (int64_t d = 0; r % LANES == LANES - 1 && d < padded; d += LANES) {
            NAME(transpose)(lines + d, padded, columns);
            NAME(pair_up)(columns, d, APART(kind), (float *)(f->q + r / LANES * padded * LANES));
        }
    }
    const int64_t last = f->position[rows - 1] + 1;
    int64_t start = a->window && f->position[0] >= a->window ? f->position[0] - a->window + 1 : 0;
    NAME(find)(c, table, head, start, last, &f->found[0]);
    for (int current = 0; start < last; start += TOKENS, current = !current) {
        NAME(Found) *now = &f->found[current], *soon = &f->found[!current];
        NAME(find)(c, table, head, start + TOKENS, last, soon);
        NAME(widen_tokens)(f, now, soon, kind, dim, padded);
        for (int64_t p = 0; p < panels; p++) {
            const int64_t here = least(LANES, rows - p * LANES);
            if (f->position[p * LANES + here - 1] < start) continue; /* its rows attend to earlier tokens only */
            NAME(attend_panel)(f, now, c, p, here, start, padded, a->window, k_factor);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = a->starts[request] + (from + r) / group, q_head = head * group + (from + r) % group;
        const float factor = a->lengths[request] ? v_factor / f->total[r] : 0; /* without a context, the row pads a batch: zeros */
        for (int64_t d = 0; r % LANES == 0 && d < padded; d++) {
            const int64_t in_unit = d % UNIT, at = APART(kind) ? d - in_unit + in_unit % 2 * (UNIT / 2) + in_unit / 2 : d;
            memcpy(columns + d % LANES * LANES, f->o + r * padded + at * LANES, LANES * 4);
            if (d % LANES == LANES - 1) NAME(transpose)(columns, LANES, lines + (d - d % LANES) * LANES);
        }
        for (int64_t d = 0; d < dim; d += VL) NAME(store)(line + d, NAME(load)(lines + (d - d % LANES + r % LANES) * LANES + d % LANES) * factor);
        NAME(narrow_row)(a->out, a->kind, (token * a->heads + q_head) * dim, line, dim);
    }
}

#define ATTEND(kind)                                                                                                       \
    static __attribute__((noinline)) void NAME(attend_##kind)(const AttentionJob *job, int64_t request, int64_t head,     \
                                                              int64_t from, int64_t rows) {                               \
        NAME(attend_rows)(job, request, head, from, rows, kind);                                                          \
    }
ATTEND(BF16)
ATTEND(E4M3)
ATTEND(E5M2)
#undef ATTEND
static void NAME(attend_by_tiles)(const AttentionJob *job, int64_t request, int64_t head, int64_t from, int64_t rows) {
    static void (*const by_kind[])(const AttentionJob *, int64_t, int64_t, int64_t, int64_t) = {
        [BF16] = NAME(attend_BF16), [E4M3] = NAME(attend_E4M3), [E4M3FNUZ] = NAME(attend_E4M3), [E5M2] = NAME(attend_E5M2)};
    by_kind[job->cache->kind](job, request, head, from, rows);
}
