/* Norms, activations, rotary embedding and writing to the cache for one instruction set: included after vector.h. */

INLINE const char *NAME(row_of)(const Rows *r, int64_t row) {
    return (const char *)r->x + (row / r->inner * r->outer_stride + row % r->inner * r->inner_stride) * size_of(r->kind);
}

#define EACH_ROW(r, task) \
    for (int64_t row = (task) * (r)->per_task, end = least(row + (r)->per_task, (r)->rows); row < end; row++)

static void NAME(rms_norm)(void *argument, int64_t task) {
    const Rows *r = argument;
    EACH_ROW(r, task) {
        const char *x = NAME(row_of)(r, row);
        const char *residual = r->residual ? (const char *)r->residual + row * r->residual_stride * size_of(r->kind) : NULL;
        vf square = {0};
        float values[GROUP], more[GROUP];
        for (int pass = 0; pass < 2; pass++) {
            float factor = pass ? 1 / sqrtf(NAME(sum)(square) / (float)r->width + r->eps) : 0;
            for (int64_t at = 0; at < r->width; at += GROUP) {
                int64_t count = least(GROUP, r->width - at), offset = at * size_of(r->kind);
                const char *from = pass && residual ? (const char *)r->sum + row * r->width * size_of(r->kind) : x;
                NAME(widen_row)(values, from + offset, r->kind, count);
                if (!pass && residual) {
                    NAME(widen_row)(more, residual + offset, r->kind, count);
                    for (int64_t i = 0; i < count; i += VL) {
                        vf v = NAME(load)(values + i) + NAME(load)(more + i);
                        NAME(store)(values + i, r->kind == BF16 ? NAME(round_bf16)(v) : v); /* as a model's own code has it */
                    }
                    NAME(narrow_row)(r->sum, r->kind, row * r->width + at, values, count);
                }
                if (!pass) {
                    for (int64_t i = 0; i < count; i += VL) square += NAME(load)(values + i) * NAME(load)(values + i);
                    continue;
                }
                NAME(widen_row)(more, (const char *)r->weight + offset, r->kind, count);
                for (int64_t i = 0; i < count; i += VL) {
                    vf v = NAME(load)(values + i) * factor;
                    NAME(store)(values + i, (r->kind == BF16 ? NAME(round_bf16)(v) : v) * NAME(load)(more + i));
                }
                NAME(narrow_row)(r->y, r->kind, row * r->width + at, values, count);
            }
        }
    }
}

static void NAME(silu_mul)(void *argument, int64_t task) {
    const Rows *r = argument;
    float gate[GROUP], up[GROUP];
    EACH_ROW(r, task) {
        const char *x = NAME(row_of)(r, row);
        for (int64_t at = 0; at < r->width; at += GROUP) {
            int64_t count = least(GROUP, r->width - at);
            NAME(widen_row)(gate, x + at * size_of(r->kind), r->kind, count);
            NAME(widen_row)(up, x + (r->width + at) * size_of(r->kind), r->kind, count);
            for (int64_t i = 0; i < count; i += VL) {
                vf g = NAME(load)(gate + i), small = NAME(exp)(SELECT(g > 0, -g, g)); /* no exponential of what is large */
                vf part = SELECT(g > 0, NAME(splat)(1), small) / (1 + small);
                NAME(store)(gate + i, g * part * NAME(load)(up + i));
            }
            NAME(narrow_row)(r->y, r->kind, row * r->width + at, gate, count);
        }
    }
}

static void NAME(rotate)(void *argument, int64_t task) {
    const Rows *r = argument;
    int64_t half = r->rotated / 2;
    EACH_ROW(r, task) {
        const char *x = NAME(row_of)(r, row);
        const float *cosines = r->cos_sin + r->positions[row / r->inner] * r->rotated, *sines = cosines + half;
        int64_t y = row * r->width;
        for (int64_t i = 0; i < half; i++) {
            float a = value_at(x, r->kind, i), b = value_at(x, r->kind, half + i);
            put(r->y, r->kind, y + i, a * cosines[i] - b * sines[i]);
            put(r->y, r->kind, y + half + i, b * cosines[i] + a * sines[i]);
        }
        memcpy((char *)r->y + (y + r->rotated) * size_of(r->kind), x + r->rotated * size_of(r->kind),
               (size_t)((r->width - r->rotated) * size_of(r->kind)));
    }
}

/* One head's values to its place; NaN and infinity as 0. */
static void NAME(write_head)(const char *x, int kind, char *to, float *own_scale, float scale, int to_kind, int64_t dim) {
    float values[GROUP];
    const Format format = FORMATS[to_kind];
    for (int pass = own_scale ? 0 : 1; pass < 2; pass++) {
        float most = 0;
        for (int64_t at = 0; at < dim; at += GROUP) {
            int64_t count = least(GROUP, dim - at);
            NAME(widen_row)(values, x + at * size_of(kind), kind, count);
            for (int64_t i = 0; i < count; i += VL) {
                vf v = NAME(load)(values + i);
                NAME(store)(values + i, (vf)((vi)v & (((vi)v & 0x7F800000) != 0x7F800000)));
            }
            if (!pass) {
                float peak = NAME(amax)(values, (count + LANES - 1) / LANES * LANES);
                most = peak > most ? peak : most;
            } else if (to_kind <= BF16) {
                NAME(narrow_row)(to, to_kind, at, values, count);
            } else {
                int smallest = format.smallest, mantissa = format.mantissa;
                float quantum = ldexpf(1, mantissa - smallest), normal = ldexpf(1, smallest);
                for (int64_t i = 0; i < count; i += VL) {
                    vf v = NAME(round_to)(NAME(load)(values + i), scale, format);
                    vi magnitude = (vi)v & 0x7FFFFFFF;
                    vi code = SELECT((vf)magnitude < normal, __builtin_convertvector((vf)magnitude * quantum, vi),
                                     (magnitude >> (23 - mantissa)) - ((127 - format.bias) << mantissa));
                    vi sign = (vi)((vu)v >> 24) & 0x80;
                    code |= to_kind == E4M3FNUZ ? sign & (code != 0) : sign; /* which has no negative zero */
                    for (int64_t j = 0; j < least(VL, count - i); j++) to[at + i + j] = (char)code[j];
                }
            }
        }
        if (!pass) {
            scale = most / format.limit;
            if (scale < SCALE_FLOOR) scale = SCALE_FLOOR;
            *own_scale = scale;
        }
    }
}

static void NAME(write_kv)(void *argument, int64_t task) {
    const Write *w = argument;
    const Cache *c = w->cache;
    for (int64_t t = task * w->per_task; t < least((task + 1) * w->per_task, w->tokens); t++) {
        int64_t block = w->slots[t] / c->block_size, offset = w->slots[t] % c->block_size;
        int64_t token = block * c->block + offset * c->token, scale = block * c->scale_block + offset * c->scale_token;
        for (int64_t h = 0; h < c->kv_heads; h++) {
            const char *k = (const char *)w->k + (t * w->k_token + h * w->k_head) * size_of(w->kind);
            const char *v = (const char *)w->v + (t * w->v_token + h * w->v_head) * size_of(w->kind);
            float *k_scale = c->k_scale ? (float *)((char *)c->k_scale + scale) + h : NULL;
            float *v_scale = c->v_scale ? (float *)((char *)c->v_scale + scale) + h : NULL;
            NAME(write_head)(k, w->kind, (char *)c->k + token + h * c->head, k_scale, w->k_scale, c->kind, c->dim);
            NAME(write_head)(v, w->kind, (char *)c->v + token + h * c->head, v_scale, w->v_scale, c->kind, c->dim);
        }
    }
}
