/* Activations as products read them: quantized, then contiguous tokens, or panels of LANES tokens. Included by linear.h.

   In pairs of BF16, a word holds two positions of a token that lie LANES apart, so that one transposition serves 2 * LANES of
   them; pair_words() then puts together the halves of the words that the weight's order asks for. */

/* Permute 4 * VL values: even positions first, then odd ones. */
INLINE void NAME(set_apart)(uint16_t *x) {
    vu words[2];
    memcpy(words, x, sizeof words);
    for (int i = 0; i < 2; i++) {
        vh even = NAME(shorter)(words[i] & 0xFFFF), odd = NAME(shorter)(words[i] >> 16);
        memcpy(x + i * VL, &even, sizeof even);
        memcpy(x + (2 + i) * VL, &odd, sizeof odd);
    }
}

/* Store LANES positions of k [LANES][LANES], the first of them `at`, as pairs of BF16 in `panel`, which begins at position
   0. */
INLINE void NAME(pair_up)(const float *columns, int64_t at, int interleaved, float *panel) {
    const int64_t unit = 4 * VL; /* pairs of the unit's even values come first, then those of its odd ones */
    float *even = panel + (interleaved ? at / unit * unit / 2 + at % unit / 4 : at / 2) * LANES, *odd = even + unit / 4 * LANES;
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
        const int first = interleaved ? i / 2 * 4 + i % 2 : 2 * i, second = first + (interleaved ? 2 : 1);
        float *to = !interleaved ? even + i * LANES : (i % 2 ? odd : even) + i / 2 * LANES;
#pragma GCC unroll 4
        for (int p = 0; p < LANES; p += VL) {
            vu low = (vu)NAME(load)(columns + first * LANES + p), high = (vu)NAME(load)(columns + second * LANES + p);
            NAME(store)(to + p, (vf)(low >> 16 | (high & 0xFFFF0000)));
        }
    }
}

/* Permute a group's values to the order in which dot_of_nibbles() reads them. */
INLINE void NAME(mix_nibbles)(float *x, int pairs) {
    const int each = pairs ? 4 : 8; /* values of a lane */
    float mixed[GROUP];
    for (int i = 0; i < GROUP; i++) mixed[i / NIBBLES * NIBBLES + i % each * (NIBBLES / each) + i % NIBBLES / each] = x[i];
    memcpy(x, mixed, sizeof mixed);
}

/* The same for a panel: LANES positions of k [LANES][LANES], the first of them `at`, to `panel`, which begins at position 0; for
   tiles in the order of nibble_tile(). */
INLINE void NAME(mix_columns)(const float *columns, int64_t at, int pairs, int tiles, float *panel) {
    for (int i = 0; i < LANES; i += 8) {
        const int64_t k = at + i, unit = k / NIBBLES * NIBBLES, lane = k % NIBBLES / 8;
        for (int j = 0; j < 8; j++) {
            const float *from = columns + (i + j) * LANES;
            if (!pairs) memcpy(panel + (unit + j * VL + lane) * LANES, from, LANES * 4);
            for (int p = 0; pairs && j < 4 && p < LANES; p += VL) {
                vu low = (vu)NAME(load)(from + p), high = (vu)NAME(load)(from + 4 * LANES + p);
                const int64_t pair = tiles ? k / TILE_VALUES * LANES + j * 4 + k % TILE_VALUES / 8 : unit / 2 + j * VL + lane;
                NAME(store)(panel + pair * LANES + p, (vf)(low >> 16 | (high & 0xFFFF0000)));
            }
        }
    }
}

/* One token's values, contiguous, in the order in which dot() reads them. */
static void NAME(prepare_row)(const LinearJob *job, int64_t token) {
    const char *x = NAME(token_at)(job, token);
    const float scale = NAME(token_scale)(job, x);
    float values[GROUP], *dst = job->panel + token * job->k_padded;
    for (int64_t at = 0; at < job->k_padded; at += GROUP) {
        const int64_t count = least(GROUP, job->w->k - at), padded = least(GROUP, job->k_padded - at);
        memset(values, 0, sizeof values);
        *x_scale_at(job, token, at) = NAME(quantize_group)(values, job, x + at * size_of(job->kind), count, scale);
        for (int64_t i = 0; MIXED(job->w->kind) && !job->pairs && i < padded; i += 32) NAME(mix)(values + i);
        if (job->w->kind == INT4) NAME(mix_nibbles)(values, job->pairs);
        if (job->pairs) NAME(narrow_row)(job->panel, BF16, token * job->k_padded + at, values, padded);
        else memcpy(dst + at, values, (size_t)padded * 4);
        for (int64_t i = 0; job->pairs && APART(job->w->kind) && i < padded; i += 4 * VL)
            NAME(set_apart)((uint16_t *)job->panel + token * job->k_padded + at + i);
    }
}

/* Values `at` to at + 2 * LANES of a token, zeros behind `k`, as BF16: the i-th is in the lower half of word i, and the one
   LANES behind it in the upper half. */
INLINE void NAME(words_of)(const char *x, int64_t at, int64_t k, float scale, float inverse, int kind, int quantized, Format format,
                           float *words) {
    vf v[2 * PARTS];
    x += at * size_of(kind);
    if (at + 2 * LANES <= k) {
        NAME(widen16)(x, kind, v);
        NAME(widen16)(x + LANES * size_of(kind), kind, v + PARTS);
    } else {
        memset(v, 0, sizeof v);
        if (at < k) NAME(take)(x, kind, k - at, v);
        if (at + LANES < k) NAME(take)(x + LANES * size_of(kind), kind, k - at - LANES, v + PARTS);
    }
#pragma GCC unroll 8
    for (int p = 0; quantized && p < 2 * PARTS; p++) v[p] = NAME(round_quotient)(NAME(quotient)(v[p], scale, inverse), format);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) NAME(store)(words + p * VL, (vf)((vu)v[p] >> 16 | ((vu)v[PARTS + p] & 0xFFFF0000)));
}

/* Store 2 * LANES positions of k, the first of them `at`, as pairs of BF16 in `panel`, which begins at position 0. words
   [LANES][LANES]: those of words_of(), turned. */
INLINE void NAME(pair_words)(const float *words, int64_t at, int interleaved, float *panel) {
    const int64_t unit = 4 * VL; /* pairs of the unit's even values come first, then those of its odd ones */
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
        const int first = interleaved ? i / 2 * 4 + i % 2 : 2 * i, second = first + (interleaved ? 2 : 1);
        const int64_t low = at + first, high = low + LANES;
        float *to = panel + (interleaved ? low / unit * unit / 2 + low % unit / 4 + i % 2 * (unit / 4) : low / 2) * LANES;
        float *more = panel + (interleaved ? high / unit * unit / 2 + high % unit / 4 + i % 2 * (unit / 4) : high / 2) * LANES;
#pragma GCC unroll 4
        for (int p = 0; p < LANES; p += VL) {
            vu a = (vu)NAME(load)(words + first * LANES + p), b = (vu)NAME(load)(words + second * LANES + p);
            NAME(store)(to + p, (vf)((a & 0xFFFF) | b << 16));
            NAME(store)(more + p, (vf)(a >> 16 | (b & 0xFFFF0000)));
        }
    }
}

/* prepare_panel() in pairs. */
INLINE void NAME(prepare_pairs)(const LinearJob *job, int64_t panel, int64_t part, int kind, int quantized, int interleaved) {
    const Format format = FORMATS[job->w->kind];
    float *to = NAME(panel_at)(job, panel, 0);
    const int64_t k = job->w->k, groups = (job->k_padded + GROUP - 1) / GROUP, lanes = least(LANES, job->m - panel * LANES);
    const int own = job->w->activation == PER_GROUP; /* a scale a group */
    const char *x[LANES];
    float words[LANES][GROUP / 2] __attribute__((aligned(64))), turned[LANES * LANES] __attribute__((aligned(64)));
    float scale[LANES], inverse[LANES];
    memset(words, 0, sizeof words);
    for (int64_t i = 0; i < lanes; i++) {
        x[i] = NAME(token_at)(job, panel * LANES + i);
        scale[i] = NAME(token_scale)(job, x[i]), inverse[i] = 1 / scale[i];
        if (!part) x_scale_at(job, panel, 0)[i] = scale[i];
    }
    for (int64_t at = groups * part / job->parts * GROUP; at < least(groups * (part + 1) / job->parts * GROUP, job->k_padded); at += GROUP) {
        const int64_t count = least(GROUP, job->k_padded - at);
        for (int64_t i = 0; job->grouped && i < lanes; i++) {
            if (own) scale[i] = NAME(scale_of)(x[i] + at * size_of(kind), kind, least(GROUP, k - at), format), inverse[i] = 1 / scale[i];
            x_scale_at(job, panel, at)[i] = scale[i];
        }
        for (int64_t i = 0; i < lanes; i++)
            for (int64_t j = 0; j < count; j += 2 * LANES)
                NAME(words_of)(x[i], at + j, k, scale[i], inverse[i], kind, quantized, format, words[i] + j / 2);
        for (int64_t j = 0; j < count; j += 2 * LANES) {
            NAME(transpose)(words[0] + j / 2, GROUP / 2, turned);
            NAME(pair_words)(turned, at + j, interleaved, to);
        }
    }
}

#if DOT
#define PAIRED(name, kind, quantized, interleaved)                                                              \
    static __attribute__((noinline)) void NAME(name)(const LinearJob *job, int64_t panel, int64_t part) {      \
        NAME(prepare_pairs)(job, panel, part, kind, quantized, interleaved);                                   \
    }
PAIRED(pairs_of_values, BF16, 0, 0)
PAIRED(pairs_apart, BF16, 0, 1)
PAIRED(pairs_of_codes, BF16, 1, 1)
PAIRED(pairs_of_wide, F32, 1, 1)
#undef PAIRED
#endif

/* One of `parts` parts of a panel, one group of all its tokens at a time, so that it is written as one stream. */
static void NAME(prepare_panel)(const LinearJob *job, int64_t panel, int64_t part) {
    const int64_t k = job->w->k, size = size_of(job->kind), groups = (k + GROUP - 1) / GROUP;
    const int64_t lanes = least(LANES, job->m - panel * LANES);
#if DOT
    if (job->pairs && job->w->kind != INT4) {
        const int quantized = job->w->activation != NOT_QUANTIZED; /* else values are BF16 */
        if (quantized) (job->kind == BF16 ? NAME(pairs_of_codes) : NAME(pairs_of_wide))(job, panel, part);
        else (APART(job->w->kind) ? NAME(pairs_apart) : NAME(pairs_of_values))(job, panel, part);
        return;
    }
#endif
    const char *x[LANES];
    float rows[LANES][GROUP] __attribute__((aligned(64))), columns[LANES * LANES] __attribute__((aligned(64))), scale[LANES];
    memset(rows, 0, sizeof rows);
    for (int64_t i = 0; i < lanes; i++) {
        x[i] = NAME(token_at)(job, panel * LANES + i);
        scale[i] = NAME(token_scale)(job, x[i]);
        if (!part) job->scale[panel * LANES + i] = scale[i];
    }
    for (int64_t at = groups * part / job->parts * GROUP; at < least(groups * (part + 1) / job->parts * GROUP, k); at += GROUP) {
        const int64_t count = least(GROUP, k - at);
        float *dst = NAME(panel_at)(job, panel, at);
        if (count < GROUP) memset(rows, 0, sizeof rows);
        for (int64_t i = 0; i < lanes; i++) NAME(quantize_group)(rows[i], job, x[i] + at * size, count, scale[i]);
        for (int64_t j = 0; j < (job->pairs || job->w->kind == INT4 ? least(GROUP, job->k_padded - at) : count); j += LANES) {
            NAME(transpose)(rows[0] + j, GROUP, columns);
            if (job->w->kind == INT4) NAME(mix_columns)(columns, j, job->pairs, job->tiles, dst);
            else memcpy(dst + j * LANES, columns, (size_t)least(LANES, count - j) * LANES * 4);
        }
    }
}

/* Task: prepare a part of a panel of tokens, or all of the tokens if they are rows. */
static void NAME(prepare)(void *argument, int64_t task) {
    const LinearJob *job = argument;
    if (job->is_panel) {
        NAME(prepare_panel)(job, task / job->parts, task % job->parts);
        return;
    }
    for (int64_t i = 0; i < job->m; i++) NAME(prepare_row)(job, i);
}
