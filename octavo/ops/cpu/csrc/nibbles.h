/* Packed INT4: codes -8 to 7, stored plus 8, two in a byte, with a scale for each `group` values of a row. Included by
   linear.h.

   A 32-bit lane holds eight values of one row and one group, so its sums are multiplied by one scale. After a shift by 4 j,
   the lowest bits of each lane hold its value j; as 16-bit lanes they hold values j and 4 + j, a pair. Weights never cross
   lanes: instead activations are permuted to this order, once. */

/* Value j of each 32-bit lane. */
INLINE vf NAME(nibbles)(vu words, int j) {
#if ISA >= 3 /* its permute uses an index's lowest four bits */
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps((__m512i)(words >> 4 * j), codes);
#else
    return __builtin_convertvector((vi)((words ^ 0x88888888) << (28 - 4 * j)) >> 28, vf);
#endif
}

/* A row's codes from k on, NIBBLES in VL lanes; zeros past the row's end, since memory there may not be ours to read. */
INLINE vu NAME(words_at)(const Linear *w, const char *row, int64_t k) {
    vu words;
    if (k + NIBBLES <= w->k) {
        memcpy(&words, row + k / 2, sizeof words);
    } else {
        char tail[sizeof words] = {0};
        memcpy(tail, row + k / 2, (size_t)(w->k - k + 1) / 2);
        memcpy(&words, tail, sizeof words);
    }
    return words;
}

/* The shift that divides a position by the group size, or -1 if a division is needed. */
INLINE int NAME(shift_of)(const Linear *w) { return w->group & (w->group - 1) ? -1 : __builtin_ctzll((uint64_t)w->group); }

/* The lanes' scales from value k on; `first` is the row's first scale. */
INLINE vf NAME(group_scales)(const Linear *w, int64_t first, int64_t k, int shift) {
    if (w->group % NIBBLES == 0)
        return NAME(splat)(value_at(w->group_scale, w->group_kind, first + (shift < 0 ? k / w->group : k >> shift)));
#if ISA >= 2
    if (w->group == 32 && k + NIBBLES <= w->k) {
        const int64_t at = first + k / 32;
#if ISA >= 3
        const __m128i four = w->group_kind == F32
            ? _mm_loadu_si128((const __m128i *)((const float *)w->group_scale + at))
            : _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)((const uint16_t *)w->group_scale + at))), 16);
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return (vf)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_castsi128_ps(four)));
#else
        const float low = value_at(w->group_scale, w->group_kind, at), high = value_at(w->group_scale, w->group_kind, at + 1);
        return (vf)_mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
#endif
    }
#endif
    float lanes[VL];
    for (int i = 0; i < VL; i++)
        lanes[i] = value_at(w->group_scale, w->group_kind, first + least(k + 8 * i, w->k - 1) / w->group);
    return NAME(load)(lanes);
}

/* Values k to k + depth of a row in FP32, in natural order. */
static void NAME(widen_nibbles)(float *dst, const Linear *w, int64_t row, int64_t k, int64_t depth) {
    const char *at = (const char *)w->weight + row * w->stride / 2;
    const int64_t first = row * groups_of(w), end = least(k + depth, w->k);
    const int shift = NAME(shift_of)(w);
    for (; k < end; k += NIBBLES, dst += NIBBLES) {
        __builtin_prefetch(at + k / 2 + AHEAD);
        const vu words = NAME(words_at)(w, at, k);
        const vf scale = NAME(group_scales)(w, first, k, shift);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) NAME(store)(dst + j * VL, NAME(nibbles)(words, j) * scale);
    }
}

#if DOT
/* Values j and 4 + j of each 32-bit lane, in BF16. */
INLINE vp NAME(nibble_pairs)(vu words, int j) {
#if ISA == 4 /* its permute uses five bits; the fifth is the next code's */
#define CODES 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0
    static const uint16_t codes[32] = {CODES, CODES};
#undef CODES
    return (vp)_mm512_permutexvar_epi16((__m512i)(words >> 4 * j), _mm512_loadu_si512(codes));
#else
    return (vp)((vu)NAME(nibbles)(words, j) >> 16 | (vu)NAME(nibbles)(words, 4 + j));
#endif
}
#endif

/* Rows `from` to `to` times m tokens, as in dot() and dot_of_pairs(). */
INLINE void NAME(dot_of_nibbles)(const LinearJob *job, int64_t from, int64_t to, int m, int pairs) {
    const Linear *w = job->w;
    const int64_t groups = groups_of(w), padded = job->k_padded;
    const int shift = NAME(shift_of)(w);
    for (int64_t row = from; row < to; row++) {
        const char *at = (const char *)w->weight + row * w->stride / 2;
        vf sum[ROWS_MODE];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) sum[i] = (vf){0};
        for (int64_t k = 0; k < w->k; k += NIBBLES) {
            __builtin_prefetch(at + k / 2 + AHEAD);
            const vu words = NAME(words_at)(w, at, k);
            const vf scale = NAME(group_scales)(w, row * groups, k, shift);
            vf part[ROWS_MODE];
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) part[i] = (vf){0};
#if DOT
            if (pairs) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const vp v = NAME(nibble_pairs)(words, j);
#pragma GCC unroll 4
                    for (int i = 0; i < m; i++) {
                        vp other;
                        memcpy(&other, (const uint16_t *)job->panel + i * padded + k + j * 2 * VL, sizeof other);
                        part[i] = NAME(dot_pairs)(part[i], other, v);
                    }
                }
            } else
#endif
            {
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    const vf v = NAME(nibbles)(words, j);
#pragma GCC unroll 4
                    for (int i = 0; i < m; i++) part[i] += v * NAME(load)(job->panel + i * padded + k + j * VL);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) sum[i] += part[i] * scale;
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) NAME(finish)(job, i, row, NAME(sum)(sum[i]));
    }
}

#if DOT
#define ROWS_OF_NIBBLES(panels) (8 / (panels)) /* rows of a tile: two accumulators each, all in registers */

/* Widen a row's values from k on to BF16, and load their lanes' scales. `next`: byte offset of the row to prefetch for the
   next tile. */
INLINE void NAME(widen_lanes)(const Linear *w, const char *at, int64_t first, int64_t k, int64_t next, int shift, uint16_t *wide,
                              float *scales) {
    __builtin_prefetch(at + k / 2 + NIBBLES);
    __builtin_prefetch(at + k / 2 + next, 0, 2);
    const vu words = NAME(words_at)(w, at, k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const vp v = NAME(nibble_pairs)(words, j);
        memcpy(wide + j * 2 * VL, &v, sizeof v);
    }
    NAME(store)(scales, NAME(group_scales)(w, first, k, shift));
}

/* tile_of_pairs() for packed INT4; lanes: lower bound of the lanes that share a scale. */
INLINE void NAME(tile_of_nibbles)(const LinearJob *job, int64_t from, int64_t panel, int panels, int lanes, float *sums) {
    enum { ROWS = 8 };
    const Linear *w = job->w;
    const int rows = ROWS_OF_NIBBLES(panels), count = rows * panels * PARTS, shift = NAME(shift_of)(w);
    const int step = lanes > VL / 4 ? lanes : VL / 4;
    const int64_t groups = groups_of(w), next = rows * w->stride / 2;
    const char *at[ROWS], *x = (const char *)NAME(panel_at)(job, panel, 0);
    uint16_t wide_of[2][ROWS * NIBBLES] __attribute__((aligned(64)));
    float scales_of[2][ROWS * VL] __attribute__((aligned(64)));
    int64_t first[ROWS];
    vf sum[ROWS * PARTS];
    for (int i = 0; i < rows; i++) {
        const int64_t row = least(from + i, w->n - 1);
        at[i] = (const char *)w->weight + row * w->stride / 2, first[i] = row * groups;
    }
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) sum[i] = (vf){0};
    for (int i = 0; i < rows; i++) NAME(widen_lanes)(w, at[i], first[i], 0, next, shift, wide_of[0] + i * NIBBLES, scales_of[0] + i * VL);
    for (int64_t k = 0; k < w->k; k += NIBBLES, x += NIBBLES * LANES * 2) {
        const int current = (int)(k / NIBBLES % 2);
        const uint16_t *wide = wide_of[current];
        const float *scales = scales_of[current];
        for (int lane = 0; lane < VL; lane += lanes) {
            /* Widening of the next values is interleaved with the products, so that both kinds of execution units stay busy. */
            for (int i = rows * lane / VL; lane % step == 0 && k + NIBBLES < w->k && i < rows * (lane + step) / VL; i++)
                NAME(widen_lanes)(w, at[i], first[i], k + NIBBLES, next, shift, wide_of[!current] + i * NIBBLES, scales_of[!current] + i * VL);
            vf part[ROWS * PARTS];
#pragma GCC unroll 32
            for (int i = 0; i < count; i++) part[i] = (vf){0};
            for (int l = lane; l < lane + lanes; l++) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    vp v[2 * PARTS];
#pragma GCC unroll 2
                    for (int p = 0; p < panels; p++)
                        memcpy(v + p * PARTS, x + p * job->k_padded * LANES * 2 + (j * VL + l) * LANES * 4, PARTS * sizeof *v);
#pragma GCC unroll 8
                    for (int i = 0; i < rows; i++) {
                        uint32_t pair;
                        memcpy(&pair, wide + i * NIBBLES + (j * VL + l) * 2, 4);
#pragma GCC unroll 8
                        for (int p = 0; p < panels * PARTS; p++)
                            part[i * panels * PARTS + p] = NAME(dot_pairs)(part[i * panels * PARTS + p], v[p], (vp)(pair - (vu){0}));
                    }
                }
            }
#pragma GCC unroll 32
            for (int i = 0; i < count; i++) sum[i] += part[i] * scales[i / panels / PARTS * VL + lane];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < count; i++)
        NAME(store)(sums + (i / PARTS % panels * LANES + i / PARTS / panels) * LANES + i % PARTS * VL, sum[i]);
}

/* LANES rows from `from` on times `panels` panels of tokens. */
INLINE void NAME(rows_of_nibbles)(const LinearJob *job, int64_t from, int64_t panel, int panels) {
    const int64_t to = least(from + LANES, job->w->n);
    float sums[2 * LANES * LANES] __attribute__((aligned(64)));
    for (int64_t row = 0; row < to - from; row += ROWS_OF_NIBBLES(panels)) {
        if (job->w->group % 32) NAME(tile_of_nibbles)(job, from + row, panel, panels, 1, sums + row * LANES);
        else NAME(tile_of_nibbles)(job, from + row, panel, panels, 4, sums + row * LANES);
    }
    for (int p = 0; p < panels; p++) NAME(finish_panel)(job, panel + p, from, to, sums + p * LANES * LANES);
}

static __attribute__((noinline)) void NAME(one_panel_INT4)(const LinearJob *job, int64_t from, int64_t panel) {
    NAME(rows_of_nibbles)(job, from, panel, 1);
}
static __attribute__((noinline)) void NAME(two_panels_INT4)(const LinearJob *job, int64_t from, int64_t panel) {
    NAME(rows_of_nibbles)(job, from, panel, 2);
}
#undef ROWS_OF_NIBBLES
#endif
