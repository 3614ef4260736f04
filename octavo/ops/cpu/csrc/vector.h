/* Vector primitives of one instruction set: included once for each, with VL lanes, the suffix of NAME(x), and on x86 the
   level ISA of intrinsics.

   Arithmetic uses GCC's vector types, in portable C. Intrinsics are used for what C cannot express, like FP8 and BF16 to
   FP32. */
typedef float NAME(vf) __attribute__((vector_size(4 * VL)));
typedef int32_t NAME(vi) __attribute__((vector_size(4 * VL)));
typedef uint32_t NAME(vu) __attribute__((vector_size(4 * VL)));
typedef uint16_t NAME(vh) __attribute__((vector_size(2 * VL)));
typedef uint8_t NAME(vb) __attribute__((vector_size(VL)));
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
#define vh NAME(vh)
#define vb NAME(vb)
#define PARTS (LANES / VL)
#define HALF_UNDO (SHIFT ? 0x1p56f : 1.0f)
#define UNDO (HALF_UNDO * HALF_UNDO) /* factor by which FP8 is smaller where widening is a shift */
#define SELECT(condition, yes, no) ((__typeof__(yes))(((condition) & (vi)(yes)) | (~(condition) & (vi)(no))))
#define INLINE static inline __attribute__((always_inline))

INLINE vf NAME(load)(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void NAME(store)(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf NAME(splat)(float x) { return x - (vf){0}; }
INLINE float NAME(sum)(vf v) {
#if ISA >= 3
    return _mm512_reduce_add_ps((__m512)v);
#elif ISA == 2
    __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* The horizontal sums of LANES consecutive vectors, to `to`: together they take a third of the time of single sums. */
INLINE void NAME(sums)(const float *from, float *to) {
#if ISA >= 3
    __m512 a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d x = (__m512d)a[2 * i], y = (__m512d)a[2 * i + 1];
        a[i] = (__m512)_mm512_unpacklo_pd(x, y) + (__m512)_mm512_unpackhi_pd(x, y);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xDD);
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(a[0], a[1], 0x88) + _mm512_shuffle_f32x4(a[0], a[1], 0xDD));
#else
    for (int i = 0; i < LANES; i++) to[i] = NAME(sum)(NAME(load)(from + i * VL));
#endif
}

/* The largest lane; undefined if a lane is NaN. */
INLINE float NAME(largest)(vf v) {
#if ISA >= 3
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < VL; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* 16-bit integers in 32 bits, and the lower halves of 32. Of a whole register GCC 12 converts each half by itself. */
INLINE vu NAME(longer)(vh x) {
#if ISA >= 3
    return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif ISA == 2
    return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vu);
#endif
}
INLINE vh NAME(shorter)(vu x) {
#if ISA >= 3
    return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, vh);
#endif
}

/* Widen 16 values at p to FP32: exact; FP8 is smaller by the power of two that its scale contains, and by UNDO. */
INLINE void NAME(widen16)(const void *p, int kind, vf out[PARTS]) {
    if (kind == F32) {
        for (int i = 0; i < PARTS; i++) out[i] = NAME(load)((const float *)p + i * VL);
    } else if (kind == BF16) {
        for (int i = 0; i < PARTS; i++) {
            vh half;
            memcpy(&half, (const uint16_t *)p + i * VL, sizeof half);
            out[i] = (vf)(NAME(longer)(half) << 16);
        }
    } else {
#if SHIFT
        /* A code shifted to a float's bits is a float smaller by a power of two; its subnormals are subnormal floats. */
        const int bits = kind == E5M2 ? 21 : 20;
        const __m256i mask = _mm256_set1_epi32((int)(0x80000000u | 0x7Fu << bits));
        for (int i = 0; i < PARTS; i++) {
            __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)p + i * VL)));
            out[i] = (vf)_mm256_and_si256(_mm256_slli_epi32(code, bits), mask);
        }
#elif ISA >= 2
        /* A code shifted to a half's bits is a half smaller by a power of two; the conversion handles subnormals too. */
        __m256i bits = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
        bits = kind == E5M2 ? _mm256_slli_epi16(bits, 8)
                            : _mm256_and_si256(_mm256_slli_epi16(bits, 7), _mm256_set1_epi16((short)0xBFFF));
#if ISA >= 3
        out[0] = (vf)_mm512_cvtph_ps(bits);
#else
        out[0] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(bits));
        out[1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
#endif
#else
        const uint8_t *codes = p;
        float values[LANES];
        for (int i = 0; i < LANES; i++) values[i] = widened[kind == E5M2][codes[i]];
        for (int i = 0; i < PARTS; i++) out[i] = NAME(load)(values + i * VL);
#endif
    }
}

/* Widen 32 values at p as widen16 does, in the order into which mix() permutes the other factor. */
#define MIXED(kind) (SHIFT && (kind) >= E4M3)
INLINE void NAME(widen32)(const void *p, int kind, vf out[2 * PARTS]) {
#if SHIFT
    if (MIXED(kind)) { /* BF16, two in a lane, is a float's upper half: fewer steps */
        const int by = kind == E5M2 ? 3 : 4;
        const __m256i mask = _mm256_set1_epi16((short)(0x8000 | 0x7F << (8 - by))), upper = _mm256_set1_epi32((int)0xFFFF0000);
        const __m256i codes = _mm256_loadu_si256((const __m256i *)p);
        const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(codes, by), mask);
        const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), by), mask);
        out[0] = (vf)_mm256_slli_epi32(even, 16), out[1] = (vf)_mm256_slli_epi32(odd, 16);
        out[2] = (vf)_mm256_and_si256(even, upper), out[3] = (vf)_mm256_and_si256(odd, upper);
        return;
    }
#endif
    NAME(widen16)(p, kind, out);
    NAME(widen16)((const char *)p + LANES * size_of(kind), kind, out + PARTS);
}

/* Permute 32 values: the first of each four, then the second of each, and so on. */
INLINE void NAME(mix)(float *x) {
    float mixed[32];
    for (int i = 0; i < 32; i++) mixed[i % 4 * 8 + i / 4] = x[i];
    memcpy(x, mixed, sizeof mixed);
}

INLINE void NAME(widen_whole)(float *dst, const char *p, int kind, int64_t count) {
    vf v[PARTS];
    for (int64_t i = 0; i < count; i += LANES) {
        NAME(widen16)(p + i * size_of(kind), kind, v);
        for (int j = 0; j < PARTS; j++) NAME(store)(dst + i + j * VL, kind >= E4M3 ? v[j] * UNDO : v[j]);
    }
}

/* Widen count values at p to FP32, followed by zeros up to a multiple of 16, for which dst has room. */
static void NAME(widen_row)(float *dst, const void *p, int kind, int64_t count) {
    int64_t whole = count / LANES * LANES;
    char tail[LANES * 4];
    for (;;) {
        if (kind == F32) NAME(widen_whole)(dst, p, F32, whole);
        else if (kind == BF16) NAME(widen_whole)(dst, p, BF16, whole);
        else if (kind == E5M2) NAME(widen_whole)(dst, p, E5M2, whole);
        else NAME(widen_whole)(dst, p, E4M3, whole);
        if (whole == count) return;
        memset(tail, 0, sizeof tail);
        memcpy(tail, (const char *)p + whole * size_of(kind), (size_t)((count - whole) * size_of(kind)));
        dst += whole, p = tail, count = whole = LANES;
    }
}

/* Round to BF16, ties to even; NaN stays NaN. */
INLINE vf NAME(round_bf16)(vf v) {
    vu bits = (vu)v, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
#if ISA >= 3 /* the compiler's code for SELECT takes twice as long */
    const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return (vf)_mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)bits, _mm512_set1_epi32(0x400000));
#else
    return (vf)SELECT((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded);
#endif
}

/* Store count FP32 values at src, which has room for a multiple of 16, as FP32 or BF16 from value `at` of y on. */
INLINE void NAME(narrow_row)(void *y, int kind, int64_t at, const float *src, int64_t count) {
    if (kind == F32) {
        memcpy((float *)y + at, src, (size_t)count * 4);
        return;
    }
    uint16_t *dst = (uint16_t *)y + at;
    for (int64_t i = 0; i < count; i += VL) {
        vh half = NAME(shorter)((vu)NAME(round_bf16)(NAME(load)(src + i)) >> 16);
        if (i + VL <= count) memcpy(dst + i, &half, sizeof half);
#if ISA >= 3
        else _mm256_mask_storeu_epi16(dst + i, (__mmask16)((1u << (count - i)) - 1), (__m256i)half);
#else
        else memcpy(dst + i, &half, (size_t)(count - i) * 2);
#endif
    }
}

/* LANES values, or the first `count` of them followed by zeros, at p in FP32. */
INLINE void NAME(take)(const char *p, int kind, int64_t count, vf out[PARTS]) {
    char tail[LANES * 4];
    if (count < LANES) {
        memset(tail, 0, sizeof tail);
        memcpy(tail, p, (size_t)(count * size_of(kind)));
        p = tail;
    }
    NAME(widen16)(p, kind, out);
}

/* Store LANES values, or the first `count` of them, at y in FP32 or BF16. */
INLINE void NAME(give)(char *y, int kind, int64_t count, const vf v[PARTS]) {
    float values[LANES];
    if (kind == BF16 && count >= LANES) {
        for (int i = 0; i < PARTS; i++) {
            vh half = NAME(shorter)((vu)NAME(round_bf16)(v[i]) >> 16);
            memcpy(y + i * VL * 2, &half, sizeof half);
        }
        return;
    }
    for (int i = 0; i < PARTS; i++) NAME(store)(values + i * VL, v[i]);
    NAME(narrow_row)(y, kind, 0, values, least(LANES, count));
}

/* Amax of count values, a multiple of VL. NaN if there is one: as integers, NaNs are the largest. */
INLINE float NAME(amax)(const float *x, int64_t count) {
    vi most = {0};
    for (int64_t i = 0; i < count; i += VL) {
        vi bits = (vi)NAME(load)(x + i) & 0x7FFFFFFF;
        most = SELECT(bits > most, bits, most);
    }
    int32_t largest = 0;
    for (int i = 0; i < VL; i++) largest = most[i] > largest ? most[i] : largest;
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

/* Amax of any number of values of `kind`, FP32 or BF16. */
static float NAME(amax_of)(const char *x, int kind, int64_t count) {
    float values[GROUP], peak = 0;
    int64_t at = 0;
#if ISA >= 3
    __m512i most = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(kind == F32 ? 0x7FFFFFFF : 0x7FFF7FFF);
    const int64_t line = 64 / size_of(kind);
    for (; at + line <= count; at += line) {
        __m512i bits = _mm512_loadu_si512(x + at * size_of(kind)) & magnitude;
        most = kind == F32 ? _mm512_max_epi32(most, bits) : _mm512_max_epi16(most, bits);
    }
    if (kind != F32) most = _mm512_max_epi32(_mm512_slli_epi32(most, 16), most & _mm512_set1_epi32((int)0xFFFF0000));
    const int32_t largest = _mm512_reduce_max_epi32(most);
    memcpy(&peak, &largest, 4);
#endif
    for (; at < count && peak == peak; at += GROUP) {
        int64_t some = least(GROUP, count - at);
        NAME(widen_row)(values, x + at * size_of(kind), kind, some);
        float more = NAME(amax)(values, (some + LANES - 1) / LANES * LANES);
        if (!(more <= peak)) peak = more; /* NaN too */
    }
    return peak;
}

/* v, clamped and rounded to the nearest code's value, ties to even. NaN stays NaN.

   Adding and subtracting 1.5 * 2^(e + 23 - mantissa) rounds to `mantissa` bits; e is the exponent of the value, at least
   that of the smallest normal number. */
INLINE vf NAME(round_quotient)(vf v, Format f) {
#if ISA >= 3 /* of a number and NaN these return the second operand; the compiler's code for SELECT takes twice as long */
    v = (vf)_mm512_min_ps(_mm512_set1_ps(f.limit), (__m512)v);
    v = (vf)_mm512_max_ps(_mm512_set1_ps(-f.limit), (__m512)v);
    vi exponent = (vi)_mm512_max_epi32((__m512i)v & 0x7F8000007F800000, _mm512_set1_epi32((f.smallest + 127) << 23));
#else
    v = SELECT(v > f.limit, NAME(splat)(f.limit), v);
    v = SELECT(v < -f.limit, NAME(splat)(-f.limit), v);
    vi exponent = (vi)v & 0x7F800000, smallest = (vi){0} + ((f.smallest + 127) << 23);
    exponent = SELECT(exponent > smallest, exponent, smallest);
#endif
    vf magic = (vf)(((vu)exponent + ((23u - (uint32_t)f.mantissa) << 23)) | 0x400000);
    return (vf)((vi)((v + magic) - magic) | ((vi)v & (int32_t)0x80000000)); /* values rounded to zero keep their sign */
}

/* v / scale, rounded so. */
INLINE vf NAME(round_to)(vf v, float scale, Format f) { return NAME(round_quotient)(v / scale, f); }

/* v / scale, which is at most a format's limit, rounded correctly but for the sign of zero; inverse: 1 / scale. The remainder of
   a quotient that is a bit off gives the right one (Markstein 1990), in a third of a division's time. */
INLINE vf NAME(quotient)(vf v, float scale, float inverse) {
#if ISA >= 3
    const __m512 by = _mm512_set1_ps(inverse), near = (__m512)v * by;
    return (vf)_mm512_fmadd_ps(_mm512_fnmadd_ps(near, _mm512_set1_ps(scale), (__m512)v), by, near);
#else
    return v / scale;
#endif
}

/* 1 / scale if that is exact, so that a product with it is the quotient; else 0. A division takes as long as all else that
   rounding needs. */
static inline float NAME(exact_reciprocal)(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, 4);
    return bits & 0x7FFFFF || bits - 0x00800000 >= 0x7E000000 ? 0 : 1 / scale; /* both are normal numbers */
}

/* The lesser of v and a number; NaN stays NaN. */
INLINE vf NAME(at_most)(vf v, float most) {
#if ISA >= 3
    return (vf)_mm512_min_ps(_mm512_set1_ps(most), (__m512)v);
#else
    return SELECT(v > most, NAME(splat)(most), v);
#endif
}

/* e^x for x <= 87, to 2 ulp; results under e^-87 are treated as 0. */
INLINE vf NAME(exp)(vf x) {
#if ISA >= 3
    x = (vf)_mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x); /* of a number and NaN, NaN */
#else
    x = SELECT(x < -87.0f, NAME(splat)(-87.0f), x);
#endif
    vf whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vf r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vf p = NAME(splat)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    vu power = (vu)__builtin_convertvector(whole, vi) << 23;
    return (vf)((vu)p + power);
}

/* 1 / v for 1 <= v <= 2^125, to 1 ulp. */
INLINE vf NAME(reciprocal)(vf v) {
#if ISA >= 3
    vf near = (vf)_mm512_rcp14_ps((__m512)v);
    return near * (2 - v * near);
#else
    return 1 / v;
#endif
}

/* Transpose LANES rows at `from`, `stride` values apart: to [LANES][LANES]. */
INLINE void NAME(transpose)(const float *from, int64_t stride, float *to) {
#if ISA >= 3
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { /* then a[4 i + j] holds, for four rows, column j of each group of four */
        const int of = i / 4 * 4 + i % 4 / 2;
        a[i] = (__m512)_mm512_unpacklo_pd((__m512d)b[of], (__m512d)b[of + 2]);
        a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[of], (__m512d)b[of + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xDD);
        __m512 more_even = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88), more_odd = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xDD);
        _mm512_storeu_ps(to + i * 16, _mm512_shuffle_f32x4(even, more_even, 0x88));
        _mm512_storeu_ps(to + (4 + i) * 16, _mm512_shuffle_f32x4(odd, more_odd, 0x88));
        _mm512_storeu_ps(to + (8 + i) * 16, _mm512_shuffle_f32x4(even, more_even, 0xDD));
        _mm512_storeu_ps(to + (12 + i) * 16, _mm512_shuffle_f32x4(odd, more_odd, 0xDD));
    }
#else
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) to[j * LANES + i] = from[i * stride + j];
#endif
}

/* Register tile: c[rows][LANES] (+)= sum over k of a[row * rs + k * cs] * b[k * LANES + lane], for `parts` vectors of lanes. */
INLINE void NAME(tile)(int rows, int parts, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b, float *c, int add) {
    vf sum[TILE_ROWS * PARTS];
#pragma GCC unroll 32
    for (int i = 0; i < rows * parts; i++) sum[i] = (vf){0};
    for (int64_t j = 0; j < k; j++, a += cs, b += LANES) {
        vf x[PARTS];
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) x[p] = NAME(load)(b + p * VL);
#pragma GCC unroll 32
        for (int i = 0; i < rows; i++) {
            vf w = NAME(splat)(a[i * rs]);
#pragma GCC unroll 4
            for (int p = 0; p < parts; p++) sum[i * parts + p] += w * x[p];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) {
            float *at = c + i * LANES + p * VL;
            NAME(store)(at, add ? NAME(load)(at) + sum[i * parts + p] : sum[i * parts + p]);
        }
    }
}

/* tile() for any number of rows and 1 to LANES lanes in use. */
static void NAME(product)(int64_t rows, int64_t lanes, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b, float *c,
                          int add) {
    int64_t i = 0;
    if (lanes > LANES / 2 || PARTS == 1) {
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            NAME(tile)(TILE_ROWS, PARTS, k, a + i * rs, rs, cs, b, c + i * LANES, add);
        for (; i + 2 <= rows; i += 2) NAME(tile)(2, PARTS, k, a + i * rs, rs, cs, b, c + i * LANES, add);
        for (; i < rows; i++) NAME(tile)(1, PARTS, k, a + i * rs, rs, cs, b, c + i * LANES, add);
    } else {
        enum { HALF = PARTS > 1 ? PARTS / 2 : 1, MORE = PARTS > 1 ? 2 * TILE_ROWS : TILE_ROWS };
        for (; i + MORE <= rows; i += MORE) NAME(tile)(MORE, HALF, k, a + i * rs, rs, cs, b, c + i * LANES, add);
        for (; i + 4 <= rows; i += 4) NAME(tile)(4, HALF, k, a + i * rs, rs, cs, b, c + i * LANES, add);
        for (; i < rows; i++) NAME(tile)(1, HALF, k, a + i * rs, rs, cs, b, c + i * LANES, add);
    }
}
