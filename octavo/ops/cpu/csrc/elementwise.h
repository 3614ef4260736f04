/* Norms, activations, rotary embedding and cache writes for one instruction set: included after vector.h. */

INLINE const char *NAME(row_of)(const Rows *r, int64_t row) {
    return (const char *)r->x + (row / r->inner * r->outer + row % r->inner * r->inside) * size_of(r->kind);
}

#define EACH_ROW(r, task) \
    for (int64_t row = (task) * (r)->per_task, end = least(row + (r)->per_task, (r)->rows); row < end; row++)

/* One row of y = norm(x + residual) * weight and sum = x + residual; without a residual no sum is stored. Rounds where the
   models' reference code rounds. */
INLINE void NAME(norm_values)(const char *x, const char *residual, const char *weight, char *y, char *sum, int64_t width, float eps,
                              int kind) {
    const int64_t size = size_of(kind);
    vf square[PARTS], v[PARTS], more[PARTS];
    for (int p = 0; p < PARTS; p++) square[p] = (vf){0};
    for (int64_t at = 0; at < width; at += LANES) {
        NAME(take)(x + at * size, kind, width - at, v);
        if (residual) {
            NAME(take)(residual + at * size, kind, width - at, more);
            for (int p = 0; p < PARTS; p++) v[p] = kind == BF16 ? NAME(round_bf16)(v[p] + more[p]) : v[p] + more[p];
            NAME(give)(sum + at * size, kind, width - at, v);
        }
        for (int p = 0; p < PARTS; p++) square[p] += v[p] * v[p];
    }
    for (int p = 1; p < PARTS; p++) square[0] += square[p];
    const float factor = 1 / sqrtf(NAME(sum)(square[0]) / (float)width + eps);
    for (int64_t at = 0; at < width; at += LANES) {
        NAME(take)((residual ? sum : x) + at * size, kind, width - at, v);
        NAME(take)(weight + at * size, kind, width - at, more);
        for (int p = 0; p < PARTS; p++) {
            v[p] *= factor;
            v[p] = (kind == BF16 ? NAME(round_bf16)(v[p]) : v[p]) * more[p];
        }
        NAME(give)(y + at * size, kind, width - at, v);
    }
}

static void NAME(norm_row)(const char *x, const char *residual, const char *weight, char *y, char *sum, int64_t width, float eps,
                           int kind) {
    if (kind == BF16) NAME(norm_values)(x, residual, weight, y, sum, width, eps, BF16);
    else NAME(norm_values)(x, residual, weight, y, sum, width, eps, F32);
}

static void NAME(rms_norm)(void *argument, int64_t task) {
    const Rows *r = argument;
    EACH_ROW(r, task) {
        int64_t offset = row * r->width * size_of(r->kind);
        const char *residual = r->residual ? (const char *)r->residual + offset : NULL;
        NAME(norm_row)(NAME(row_of)(r, row), residual, r->weight, (char *)r->y + offset, (char *)r->sum + offset, r->width, r->eps,
                       r->kind);
    }
}

/* Argmax: y [rows], int64: the index of a row's first largest value; NaN ranks as infinity. */
static void NAME(argmax)(void *argument, int64_t task) {
    const Rows *r = argument;
    float values[GROUP], lane[VL];
    EACH_ROW(r, task) {
        const char *x = NAME(row_of)(r, row);
        float best = -INFINITY;
        int64_t found = 0;
        for (int64_t at = 0; at < r->width; at += GROUP) {
            int64_t count = least(GROUP, r->width - at);
            NAME(widen_row)(values, x + at * size_of(r->kind), r->kind, count);
            for (int64_t i = count; i % VL; i++) values[i] = -INFINITY;
            vf top = NAME(splat)(best);
            for (int64_t i = 0; i < count; i += VL) {
                vf v = NAME(load)(values + i);
                v = SELECT(v == v, v, NAME(splat)(INFINITY));
                NAME(store)(values + i, v);
                top = SELECT(v > top, v, top);
            }
            NAME(store)(lane, top);
            float most = best;
            for (int i = 0; i < VL; i++) most = lane[i] > most ? lane[i] : most;
            if (most == best) continue;
            for (found = at; values[found - at] != most; found++) {}
            best = most;
        }
        ((int64_t *)r->y)[row] = found;
    }
}

INLINE void NAME(silu_row)(const char *x, char *y, int64_t width, int kind) {
    const int64_t size = size_of(kind);
    vf gate[PARTS], up[PARTS];
    for (int64_t at = 0; at < width; at += LANES) {
        NAME(take)(x + at * size, kind, width - at, gate);
        NAME(take)(x + (width + at) * size, kind, width - at, up);
        for (int p = 0; p < PARTS; p++) {
            const vf power = NAME(exp)(NAME(at_most)(-gate[p], 87)); /* more is no number in FP32, less does not count */
            gate[p] = gate[p] * NAME(reciprocal)(1 + power) * up[p];
        }
        NAME(give)(y + at * size, kind, width - at, gate);
    }
}

static void NAME(silu_mul)(void *argument, int64_t task) {
    const Rows *r = argument;
    EACH_ROW(r, task) {
        char *y = (char *)r->y + row * r->width * size_of(r->kind);
        if (r->kind == BF16) NAME(silu_row)(NAME(row_of)(r, row), y, r->width, BF16);
        else NAME(silu_row)(NAME(row_of)(r, row), y, r->width, F32);
    }
}

/* Rotary embedding of the first `rotated` values of a head; cosines are followed by sines; y may be x. */
INLINE void NAME(rotate_values)(const char *x, char *y, const float *cosines, int64_t rotated, int64_t width, int kind) {
    int64_t half = rotated / 2, size = size_of(kind);
    float a[GROUP], b[GROUP], cosine[GROUP], sine[GROUP];
    int64_t at = 0;
    for (; at + LANES <= half; at += LANES) { /* in registers */
        vf u[PARTS], v[PARTS];
        NAME(widen16)(x + at * size, kind, u);
        NAME(widen16)(x + (half + at) * size, kind, v);
        for (int p = 0; p < PARTS; p++) {
            vf c = NAME(load)(cosines + at + p * VL), s = NAME(load)(cosines + half + at + p * VL);
            const vf turned = u[p] * c - v[p] * s;
            v[p] = v[p] * c + u[p] * s, u[p] = turned;
        }
        NAME(give)(y + at * size, kind, LANES, u);
        NAME(give)(y + (half + at) * size, kind, LANES, v);
    }
    for (; at < half; at += GROUP) {
        int64_t count = least(GROUP, half - at);
        NAME(widen_row)(a, x + at * size, kind, count);
        NAME(widen_row)(b, x + (half + at) * size, kind, count);
        NAME(widen_row)(cosine, cosines + at, F32, count);
        NAME(widen_row)(sine, cosines + half + at, F32, count);
        for (int64_t i = 0; i < count; i += VL) {
            vf u = NAME(load)(a + i), v = NAME(load)(b + i), c = NAME(load)(cosine + i), s = NAME(load)(sine + i);
            NAME(store)(a + i, u * c - v * s);
            NAME(store)(b + i, v * c + u * s);
        }
        NAME(narrow_row)(y, kind, at, a, count);
        NAME(narrow_row)(y, kind, half + at, b, count);
    }
    if (x != y && rotated < width) memcpy(y + rotated * size, x + rotated * size, (size_t)((width - rotated) * size));
}

static void NAME(rotate_row)(const char *x, char *y, const float *cosines, int64_t rotated, int64_t width, int kind) {
    if (kind == BF16) NAME(rotate_values)(x, y, cosines, rotated, width, BF16);
    else NAME(rotate_values)(x, y, cosines, rotated, width, F32);
}

static void NAME(rotate)(void *argument, int64_t task) {
    const Rows *r = argument;
    EACH_ROW(r, task) {
        const float *cosines = r->cos_sin + r->rotary_rows[row / r->inner] * r->rotated;
        NAME(rotate_row)(NAME(row_of)(r, row), (char *)r->y + row * r->width * size_of(r->kind), cosines, r->rotated, r->width, r->kind);
    }
}

/* NaN and infinity as 0. */
INLINE vf NAME(finite)(vf v) {
#if ISA >= 3
    return (vf)_mm512_maskz_mov_ps(_mm512_cmp_epi32_mask((__m512i)v & _mm512_set1_epi32(0x7F800000), _mm512_set1_epi32(0x7F800000), _MM_CMPINT_NE), (__m512)v);
#else
    return (vf)((vi)v & (((vi)v & 0x7F800000) != 0x7F800000));
#endif
}

INLINE void NAME(keep_finite)(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i += VL) NAME(store)(values + i, NAME(finite)(NAME(load)(values + i)));
}

/* Store up to VL finite values, divided by `scale`, as codes of `to_kind`; exact: exact_reciprocal() of the scale. */
INLINE void NAME(encode_vector)(vf v, char *to, int to_kind, float scale, float exact, int64_t count) {
    const Format format = FORMATS[to_kind];
    const int smallest = format.smallest, mantissa = format.mantissa;
    const float quantum = power_of_two(mantissa - smallest), normal = power_of_two(smallest);
    v = NAME(round_quotient)(exact != 0 ? v * exact : v / scale, format);
    vi magnitude = (vi)v & 0x7FFFFFFF;
    vi code = SELECT((vf)magnitude < normal, __builtin_convertvector((vf)magnitude * quantum, vi),
                     (magnitude >> (23 - mantissa)) - ((127 - format.bias) << mantissa));
    vi sign = (vi)((vu)v >> 24) & 0x80;
    code |= to_kind == E4M3FNUZ ? sign & (code != 0) : sign; /* the format has no negative zero */
#if ISA >= 3
    if (count >= VL) {
        const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)code);
        memcpy(to, &bytes, sizeof bytes);
    } else {
        _mm512_mask_cvtepi32_storeu_epi8(to, (__mmask16)((1u << count) - 1), (__m512i)code);
    }
#else
    for (int64_t j = 0; j < least(VL, count); j++) to[j] = (char)code[j];
#endif
}

/* Quantize count finite values, divided by `scale`, to codes of `to_kind`. */
INLINE void NAME(encode)(const float *values, char *to, int to_kind, float scale, int64_t count) {
    const float exact = NAME(exact_reciprocal)(scale);
    for (int64_t i = 0; i < count; i += VL) NAME(encode_vector)(NAME(load)(values + i), to + i, to_kind, scale, exact, count - i);
}

/* Store one head's values in the cache; NaN and infinity as 0. */
INLINE void NAME(write_values)(const char *x, int kind, char *to, float *own_scale, float scale, int to_kind, int64_t dim) {
    vf v[PARTS];
    if (own_scale) {
        float values[LANES], most = 0;
        for (int64_t at = 0; at < dim; at += LANES) {
            NAME(take)(x + at * size_of(kind), kind, dim - at, v);
            for (int p = 0; p < PARTS; p++) NAME(store)(values + p * VL, NAME(finite)(v[p]));
            const float peak = NAME(amax)(values, LANES);
            most = peak > most ? peak : most;
        }
        scale = most / FORMATS[to_kind].limit;
        if (scale < SCALE_FLOOR) scale = SCALE_FLOOR;
        *own_scale = scale;
    }
    const float exact = NAME(exact_reciprocal)(scale);
    for (int64_t at = 0; at < dim; at += LANES) {
        NAME(take)(x + at * size_of(kind), kind, dim - at, v);
        for (int p = 0; p < PARTS; p++) v[p] = NAME(finite)(v[p]);
        if (to_kind <= BF16) NAME(give)(to + at * size_of(to_kind), to_kind, dim - at, v);
        for (int p = 0; to_kind > BF16 && p < PARTS && at + p * VL < dim; p++)
            NAME(encode_vector)(v[p], to + at + p * VL, to_kind, scale, exact, dim - at - p * VL);
    }
}

static void NAME(write_head)(const char *x, int kind, char *to, float *own_scale, float scale, int to_kind, int64_t dim) {
    if (kind == BF16 && to_kind == E4M3) NAME(write_values)(x, BF16, to, own_scale, scale, E4M3, dim);
    else NAME(write_values)(x, kind, to, own_scale, scale, to_kind, dim);
}

/* Norm (if there is a weight) and rotate a head into y. */
INLINE void NAME(norm_rotate)(const Rope *r, const char *x, const void *norm, const float *cosines, char *y) {
    if (norm) NAME(norm_row)(x, NULL, norm, y, NULL, r->cache->dim, r->eps, r->kind);
    NAME(rotate_row)(norm ? y : x, y, cosines, r->rotated, r->cache->dim, r->kind);
}

static void NAME(rope)(void *argument, int64_t task) {
    const Rope *r = argument;
    const Cache *c = r->cache;
    int64_t size = size_of(r->kind);
    char rotated_key[MAX_DIM * 4];
    for (int64_t t = task * r->per_task; t < least((task + 1) * r->per_task, r->tokens); t++) {
        int64_t block = r->slots[t] / c->block_size, offset = r->slots[t] % c->block_size;
        int64_t token = block * c->block + offset * c->token, scale = block * c->scale_block + offset * c->scale_token;
        const float *cosines = r->q ? r->cos_sin + r->rotary_rows[t] * r->rotated : NULL;
        for (int64_t h = 0; r->q && h < r->heads; h++)
            NAME(norm_rotate)(r, (const char *)r->q + (t * r->q_token + h * r->q_head) * size, r->q_norm, cosines,
                       (char *)r->out + (t * r->heads + h) * c->dim * size);
        for (int64_t h = 0; h < c->kv_heads; h++) {
            const char *k = (const char *)r->k + (t * r->k_token + h * r->k_head) * size;
            const char *v = (const char *)r->v + (t * r->v_token + h * r->v_head) * size;
            float *k_scale = c->k_scale ? (float *)((char *)c->k_scale + scale) + h : NULL;
            float *v_scale = c->v_scale ? (float *)((char *)c->v_scale + scale) + h : NULL;
            if (r->q) NAME(norm_rotate)(r, k, r->k_norm, cosines, rotated_key), k = rotated_key;
            NAME(write_head)(k, r->kind, (char *)c->k + token + h * c->head, k_scale, k_scale_of(c, h), c->kind, c->dim);
            NAME(write_head)(v, r->kind, (char *)c->v + token + h * c->head, v_scale, v_scale_of(c, h), c->kind, c->dim);
        }
    }
}

/* Task: some tokens' weighted sums of their experts' outputs. */
static void NAME(combine)(void *argument, int64_t task) {
    const Combine *c = argument;
    const int64_t first = task * c->per_task, last = least(first + c->per_task, c->tokens);
    float sum[GROUP], values[GROUP];
    for (int64_t t = first; t < last; t++) {
        for (int64_t at = 0; at < c->width; at += GROUP) {
            const int64_t count = least(GROUP, c->width - at);
            memset(sum, 0, sizeof sum);
            for (int64_t pair = t * c->top_k; pair < (t + 1) * c->top_k; pair++) {
                if (c->experts[pair] < 0) continue;
                NAME(widen_row)(values, (const char *)c->y + (c->place[pair] * c->width + at) * size_of(c->kind), c->kind, count);
                for (int64_t i = 0; i < count; i += VL)
                    NAME(store)(sum + i, NAME(load)(sum + i) + NAME(load)(values + i) * c->weights[pair]);
            }
            NAME(narrow_row)(c->out, c->kind, t * c->width + at, sum, count);
        }
    }
}
