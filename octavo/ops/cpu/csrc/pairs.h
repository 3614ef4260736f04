/* BF16 values two by two, as the dot product takes them: included by linear.h where there is one.

   A code is exact in BF16 too, and once widened at least 2^-17, far above what the instruction takes for zero. */
#define PAIRED (2 * VL) /* values that a vector of BF16 holds */
typedef uint16_t NAME(vp) __attribute__((vector_size(4 * VL)));
typedef int16_t NAME(vs) __attribute__((vector_size(4 * VL)));
typedef int8_t NAME(vc) __attribute__((vector_size(2 * VL)));
#define vp NAME(vp)

/* sum += x[2 lane] * w[2 lane] + x[2 lane + 1] * w[2 lane + 1] in every lane. */
INLINE vf NAME(dot_pairs)(vf sum, vp x, vp w) {
#if ISA == 4
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else /* the same in C, for testing what is around it */
    return sum + (vf)((vu)x << 16) * (vf)((vu)w << 16) + (vf)((vu)x & 0xFFFF0000) * (vf)((vu)w & 0xFFFF0000);
#endif
}

/* Whether a lane of `bits` has none of the bits of `mask`. */
INLINE int NAME(any_without)(vp bits, uint16_t mask) {
#if ISA == 4
    return _mm512_testn_epi16_mask((__m512i)bits, _mm512_set1_epi16((short)mask)) != 0;
#else
    vp missing = (vp)((bits & mask) == 0);
    uint64_t parts[sizeof missing / 8], found = 0;
    memcpy(parts, &missing, sizeof missing);
    for (size_t i = 0; i < sizeof missing / 8; i++) found |= parts[i];
    return found != 0;
#endif
}

/* 2 * VL values at p as BF16: exact, FP8 smaller by the same power of two as in widen16.

   A code's bits moved to BF16's places are right but for the exponent's bias, which is added, and for numbers without a leading
   one, which are seldom and come from their mantissa as a whole number. */
INLINE vp NAME(widen_pairs)(const char *p, int kind) {
    vp bits;
    if (kind == BF16) {
        memcpy(&bits, p, sizeof bits);
        return bits;
    }
    const int e5m2 = kind == E5M2;
    const uint16_t exponent = e5m2 ? 0x0F80 : 0x0780, bias = 112 << 7;
#if ISA == 4
    bits = (vp)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); /* the sign goes up to bit 15 */
#else
    NAME(vc) codes;
    memcpy(&codes, p, sizeof codes);
    bits = (vp)__builtin_convertvector(codes, NAME(vs));
#endif
    bits = e5m2 ? bits << 5 & 0x8FE0 : bits << 4 & 0x87F0;
    vp value = bits + bias;
    if (__builtin_expect(NAME(any_without)(bits, exponent), 0)) {
        const float step = e5m2 ? 0x1p-16f : 0x1p-17f;
        vu whole = (vu)(e5m2 ? bits >> 5 & 3 : bits >> 4 & 7);
        vf even = __builtin_convertvector((vi)(whole & 0xFFFF), vf) * step, odd = __builtin_convertvector((vi)(whole >> 16), vf) * step;
        vp exact = (vp)((vu)even >> 16 | (vu)odd), small = (vp)((bits & exponent) == 0);
        value = (small & (exact | (bits & 0x8000))) | (~small & value);
    }
    return value;
}

/* count values at p as BF16, zeros up to a whole vector after them, for which dst has room. */
INLINE void NAME(widen_to_pairs)(uint16_t *dst, const char *p, int kind, int64_t count) {
    const int64_t size = size_of(kind), whole = count / PAIRED * PAIRED;
    char tail[PAIRED * 2] = {0};
    for (int64_t i = 0; i < whole; i += PAIRED) {
        vp v = NAME(widen_pairs)(p + i * size, kind);
        memcpy(dst + i, &v, sizeof v);
    }
    if (whole < count) {
        memcpy(tail, p + whole * size, (size_t)((count - whole) * size));
        vp v = NAME(widen_pairs)(tail, kind);
        memcpy(dst + whole, &v, sizeof v);
    }
}

INLINE void NAME(tile_of_pairs)(int rows, int64_t pairs, const uint16_t *a, int64_t rs, const uint16_t *b, float *c, int add) {
    vf sum[TILE_ROWS][PARTS] = {0};
    for (int64_t j = 0; j < pairs; j++, a += 2, b += 2 * LANES) {
        vp x[PARTS];
        memcpy(x, b, sizeof x);
#pragma GCC unroll 32
        for (int i = 0; i < rows; i++) {
            uint32_t pair;
            memcpy(&pair, a + i * rs, 4);
            for (int p = 0; p < PARTS; p++) sum[i][p] = NAME(dot_pairs)(sum[i][p], x[p], (vp)(pair - (vu){0}));
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows; i++) {
        for (int p = 0; p < PARTS; p++) {
            float *at = c + i * LANES + p * VL;
            NAME(store)(at, add ? NAME(load)(at) + sum[i][p] : sum[i][p]);
        }
    }
}

static void NAME(product_of_pairs)(int64_t rows, int64_t pairs, const uint16_t *a, int64_t rs, const uint16_t *b, float *c, int add) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) NAME(tile_of_pairs)(TILE_ROWS, pairs, a + i * rs, rs, b, c + i * LANES, add);
    for (; i < rows; i++) NAME(tile_of_pairs)(1, pairs, a + i * rs, rs, b, c + i * LANES, add);
}

#define TRIED 256 /* values along k */
static double NAME(seconds)(int paired, const float *a, const float *b, float *c) {
    struct timespec before, after;
    double best = 1;
    for (int i = 0; i < 5; i++) {
        clock_gettime(CLOCK_MONOTONIC, &before);
        for (int j = 0; j < 8; j++) {
            if (paired) NAME(tile_of_pairs)(TILE_ROWS, TRIED / 2, (const uint16_t *)a, 2 * TRIED, (const uint16_t *)b, c, 0);
            else NAME(tile)(TILE_ROWS, PARTS, TRIED, a, TRIED, 1, b, c, 0);
            __asm__ volatile("" ::: "memory");
        }
        clock_gettime(CLOCK_MONOTONIC, &after);
        double took = (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
        if (took < best) best = took;
    }
    return best;
}

/* Whether tiles are multiplied faster in pairs than in FP32: some CPUs have half as many units for them. Takes 0.1 ms. */
static int NAME(pairs_pay)(void) {
    float a[TILE_ROWS * TRIED], b[TRIED * LANES], c[TILE_ROWS * LANES];
    for (int i = 0; i < TILE_ROWS * TRIED; i++) a[i] = 1.0f + (float)i;
    for (int i = 0; i < TRIED * LANES; i++) b[i] = 1.0f + (float)i;
    return NAME(seconds)(1, a, b, c) < NAME(seconds)(0, a, b, c);
}
#undef TRIED
