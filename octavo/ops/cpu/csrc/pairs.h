/* Products of pairs of BF16 values by the dot-product instruction: included by linear.h where it exists.

   A code is exact in BF16. Once widened it is at least 2^-17, far above what the instruction flushes to zero. */
#define UNIT (4 * VL) /* codes in a vector; values in two vectors of BF16 */
#define ONE_PANEL 16  /* rows of a tile with one panel of tokens, */
#define TWO_PANELS 8 /* and with two: accumulators enough to hide the dot product's latency, and registers left for widening */
#define WIDEN_STEPS 4       /* widening of the next values is interleaved with products, in this many steps */
typedef uint16_t NAME(vp) __attribute__((vector_size(4 * VL)));
typedef int16_t NAME(vs) __attribute__((vector_size(4 * VL)));
#define vp NAME(vp)
#define vs NAME(vs)

/* sum += x[2 lane] * w[2 lane] + x[2 lane + 1] * w[2 lane + 1] in each lane. */
INLINE vf NAME(dot_pairs)(vf sum, vp x, vp w) {
#if ISA == 4
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else /* the same in C, for testing the code around it */
    return sum + (vf)((vu)x << 16) * (vf)((vu)w << 16) + (vf)((vu)x & 0xFFFF0000) * (vf)((vu)w & 0xFFFF0000);
#endif
}

/* (bits & mask) | more */
INLINE vp NAME(masked_or)(vs bits, uint16_t mask, uint16_t more) {
#if ISA == 4
    return (vp)_mm512_ternarylogic_epi32((__m512i)bits, _mm512_set1_epi16((short)mask), _mm512_set1_epi16((short)more), 0xEA);
#else
    return ((vp)bits & mask) | more;
#endif
}

/* Whether a byte of `codes` has no bit of `mask` set. */
INLINE int NAME(any_without)(vp codes, uint8_t mask) {
#if ISA == 4
    return _mm512_testn_epi8_mask((__m512i)codes, _mm512_set1_epi8((char)mask)) != 0;
#else
    uint8_t bytes[UNIT], found = 0;
    memcpy(bytes, &codes, sizeof bytes);
    for (int i = 0; i < UNIT; i++) found |= !(bytes[i] & mask);
    return found;
#endif
}

/* Fix subnormal codes: where `bits` (a code in BF16's position) has no exponent, the number is its mantissa times the
   smallest subnormal; elsewhere it is `value`. */
INLINE vp NAME(without_leading_one)(vp bits, vp value, int e5m2) {
    const uint16_t exponent = e5m2 ? 0x0F80 : 0x0780;
#if ISA == 4
    static const uint16_t numbers[2][32] = {{0, 0x3700, 0x3780, 0x37C0, 0x3800, 0x3820, 0x3840, 0x3860}, {0, 0x3780, 0x3800, 0x3840}};
    const __m512i table = _mm512_loadu_si512(numbers[e5m2]); /* the numbers of all mantissas in BF16 */
    const __m512i mantissa = _mm512_srli_epi16((__m512i)bits, e5m2 ? 5 : 4);
    const __mmask32 small = _mm512_testn_epi16_mask((__m512i)bits, _mm512_set1_epi16((short)exponent));
    return (vp)_mm512_mask_permutexvar_epi16((__m512i)value, small, mantissa, table) | (bits & 0x8000);
#else
    const float step = e5m2 ? 0x1p-16f : 0x1p-17f;
    vu whole = (vu)(e5m2 ? bits >> 5 & 3 : bits >> 4 & 7);
    vf even = __builtin_convertvector((vi)(whole & 0xFFFF), vf) * step, odd = __builtin_convertvector((vi)(whole >> 16), vf) * step;
    vp exact = (vp)((vu)even >> 16 | (vu)odd), small = (vp)((bits & exponent) == 0);
    return (small & (exact | (bits & 0x8000))) | (~small & value);
#endif
}

/* Widen UNIT values at p to BF16: exact; FP8 is smaller by the same power of two as in widen16. Codes at even positions come
   first, then those at odd ones: each is shifted within its 16 bits, and nothing crosses lanes.

   A code shifted to BF16's position needs the difference of exponent biases added. Subnormal codes, which are rare, are
   fixed separately. */
INLINE void NAME(widen_unit)(const char *p, int kind, vp out[2]) {
    if (kind == BF16) {
        memcpy(out, p, sizeof *out);
        memcpy(out + 1, p + sizeof *out, sizeof *out);
        return;
    }
    vp codes;
    memcpy(&codes, p, sizeof codes);
    const int by = kind == E5M2 ? 3 : 4;
#if ISA == 4 /* a shuffle: the other steps are shifts and dot products, which Intel's CPUs compute on one port */
#define UP(i) -1, i, -1, i + 2, -1, i + 4, -1, i + 6, -1, i + 8, -1, i + 10, -1, i + 12, -1, i + 14
    static const int8_t up[64] __attribute__((aligned(64))) = {UP(0), UP(0), UP(0), UP(0)}; /* within 16 bytes each */
#undef UP
    const vs upper = (vs)_mm512_shuffle_epi8((__m512i)codes, _mm512_load_si512(up));
#else
    const vs upper = (vs)(codes << 8);
#endif
    const vs even = upper >> by, odd = (vs)codes >> by; /* the sign stays in bit 15 */
    if (kind == E5M2) {
        out[0] = ((vp)even & 0x8FE0) + (112 << 7), out[1] = ((vp)odd & 0x8FE0) + (112 << 7);
    } else { /* no bit of the exponent overlaps the bias */
        out[0] = NAME(masked_or)(even, 0x87F0, 112 << 7), out[1] = NAME(masked_or)(odd, 0x87F0, 112 << 7);
    }
    if (__builtin_expect(NAME(any_without)(codes, kind == E5M2 ? 0x7C : 0x78), 0)) {
        const uint16_t mask = kind == E5M2 ? 0x8FE0 : 0x87F0;
        out[0] = NAME(without_leading_one)((vp)even & mask, out[0], kind == E5M2);
        out[1] = NAME(without_leading_one)((vp)odd & mask, out[1], kind == E5M2);
    }
}

/* CHUNK values of a row at `from`, of which `there` are left in it; behind them zeros, in `tail`, since memory after the last
   row may not be ours to read. */
INLINE const char *NAME(whole_chunk)(const char *from, int64_t there, int64_t size, char tail[CHUNK * 2]) {
    if (there >= CHUNK) return from;
    memset(tail, 0, CHUNK * 2);
    memcpy(tail, from, (size_t)(there * size));
    return tail;
}

/* Widen values k to k + CHUNK of `rows` rows, zeros past their end. `next`: byte offset of the row to prefetch for the next
   tile. */
INLINE void NAME(widen_chunk)(const Linear *w, const char *const *at, int rows, int64_t next, int64_t k, int kind, uint16_t *to) {
    const int64_t size = size_of(kind), there = w->k - k;
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++, to += CHUNK) {
        const char *from = at[i] + k * size;
        char tail[CHUNK * 2];
        for (int line = 0; line < size; line++) {
            __builtin_prefetch(from + CHUNK * size + line * 64);
            __builtin_prefetch(from + next + line * 64, 0, 2);
        }
        from = NAME(whole_chunk)(from, there, size, tail);
        for (int j = 0; j < CHUNK; j += UNIT) {
            vp v[2];
            NAME(widen_unit)(from + j * size, kind, v);
            memcpy(to + j, v, sizeof *v);
            memcpy(to + j + UNIT / 2, v + 1, sizeof *v);
        }
    }
}

/* sums [panels][LANES][LANES] of `rows` rows from `from` on (the last one is repeated if there are fewer) times `panels`
   panels of tokens. While some values of k are multiplied, the next are widened. grouped: as the job is. */
INLINE void NAME(tile_of_pairs)(const LinearJob *job, int64_t from, int64_t panel, int rows, int panels, int kind, int grouped, float *sums) {
    const Linear *w = job->w;
    const int64_t chunks = job->k_padded / CHUNK, next = rows * w->stride * size_of(kind);
    const char *at[ONE_PANEL], *x = (const char *)NAME(panel_at)(job, panel, 0);
    uint16_t wide[2][ONE_PANEL * CHUNK] __attribute__((aligned(64)));
    vf sum[2 * TWO_PANELS * PARTS];
    const float *scale[ONE_PANEL];
    for (int i = 0; i < rows; i++) {
        const int64_t row = least(from + i, w->n - 1);
        at[i] = (const char *)w->weight + row * w->stride * size_of(kind);
        if (grouped) scale[i] = w->scale + row / w->scale_rows * w->scale_columns;
    }
#pragma GCC unroll 128
    for (int i = 0; i < rows * panels * PARTS; i++) sum[i] = (vf){0};
    NAME(widen_chunk)(w, at, rows, next, 0, kind, wide[0]);
    for (int64_t c = 0; c < chunks; c++) {
        const uint16_t *a = wide[c % 2];
        for (int piece = 0; piece < WIDEN_STEPS; piece++) {
            const int row = rows / WIDEN_STEPS * piece;
            if (c + 1 < chunks)
                NAME(widen_chunk)(w, at + row, rows / WIDEN_STEPS, next, (c + 1) * CHUNK, kind, wide[(c + 1) % 2] + row * CHUNK);
            for (int j = 0; j < CHUNK / 2 / WIDEN_STEPS; j++, a += 2, x += LANES * 4) {
                vp v[2 * PARTS];
#pragma GCC unroll 2
                for (int p = 0; p < panels; p++) memcpy(v + p * PARTS, x + p * job->k_padded * LANES * 2, PARTS * sizeof *v);
#pragma GCC unroll 16
                for (int i = 0; i < rows; i++) {
                    uint32_t pair;
                    memcpy(&pair, a + i * CHUNK, 4);
#pragma GCC unroll 8
                    for (int p = 0; p < panels * PARTS; p++)
                        sum[i * panels * PARTS + p] = NAME(dot_pairs)(sum[i * panels * PARTS + p], v[p], (vp)(pair - (vu){0}));
                }
            }
        }
        if (c + 1 < chunks && !(grouped && c % 2)) continue; /* neither the end of a group nor of k */
#pragma GCC unroll 128
        for (int i = 0; i < rows * panels * PARTS; i++) {
            const int p = i / PARTS % panels, row = i / PARTS / panels;
            float *to = sums + (p * LANES + row) * LANES + i % PARTS * VL;
            const float *x_scale = x_scale_at(job, panel + p, c * CHUNK) + i % PARTS * VL;
            /* In one expression, so that all forms contract it. */
            NAME(store)(to, grouped ? NAME(load)(to) + sum[i] * (NAME(load)(x_scale) * scale[row][c / 2]) : sum[i]);
            sum[i] = (vf){0};
        }
    }
}

/* LANES rows from `from` on times `panels` panels of tokens. */
INLINE void NAME(rows_of_pairs)(const LinearJob *job, int64_t from, int64_t panel, int panels, int kind, int grouped) {
    const int64_t to = least(from + LANES, job->w->n);
    float sums[2 * LANES * LANES] __attribute__((aligned(64)));
    if (grouped) memset(sums, 0, sizeof sums);
    if (panels == 1) NAME(tile_of_pairs)(job, from, panel, ONE_PANEL, 1, kind, grouped, sums);
    else for (int64_t row = 0; row < to - from; row += TWO_PANELS)
        NAME(tile_of_pairs)(job, from + row, panel, TWO_PANELS, 2, kind, grouped, sums + row * LANES);
    for (int p = 0; p < panels; p++) NAME(finish_panel)(job, panel + p, from, to, sums + p * LANES * LANES);
}

#define PANELS(kind)                                                                                                        \
    static __attribute__((noinline)) void NAME(one_panel_##kind)(const LinearJob *job, int64_t from, int64_t panel) {      \
        if (kind >= E4M3 && job->grouped) NAME(rows_of_pairs)(job, from, panel, 1, kind, 1);                               \
        else NAME(rows_of_pairs)(job, from, panel, 1, kind, 0);                                                            \
    }                                                                                                                      \
    static __attribute__((noinline)) void NAME(two_panels_##kind)(const LinearJob *job, int64_t from, int64_t panel) {     \
        if (kind >= E4M3 && job->grouped) NAME(rows_of_pairs)(job, from, panel, 2, kind, 1);                               \
        else NAME(rows_of_pairs)(job, from, panel, 2, kind, 0);                                                            \
    }
PANELS(BF16)
PANELS(E4M3)
PANELS(E5M2)
#undef PANELS
