/* Gram matrices x^T x for one instruction set: included after vector.h.

   Products of 16-bit integers, two in a lane, whose sum is 32 bits wide: exact, so that sums do not depend on their order, and
   twice as many an instruction as FP32 has. */
#define GRAM_ROWS (VL == 16 ? 8 : 4) /* rows of the result in registers */

/* In each lane the sum of the products of the lower and of the upper halves. */
INLINE vi NAME(dot16)(vi a, vi b) {
#if ISA >= 3
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif ISA == 2
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Task: GROUP columns of up to GRAM_TOKENS tokens, as codes of 12 bits with a scale for each column: [panel of LANES columns,
   pair of tokens, LANES], two tokens in a code's halves. */
static void NAME(gram_codes)(void *argument, int64_t task) {
    const Gram *g = argument;
    const int64_t groups = (g->panels * LANES + GROUP - 1) / GROUP, chunk = task / groups, first = task % groups * GROUP;
    const int64_t count = least(GROUP, g->width - first), start = chunk * GRAM_TOKENS;
    const int64_t tokens = least(GRAM_TOKENS, g->tokens - start), size = size_of(g->kind);
    const char *x = (const char *)g->x + (start * g->stride + first) * size;
    const vi zero = (vi)NAME(splat)(0x1.8p23f), low = (vi){0} + 0xFFFF; /* 1.5 * 2^23 plus an integer: its lower bits */
    float values[GROUP] = {0}, next[GROUP] = {0}, most[GROUP] = {0}, wrong[GROUP] = {0}, factor[GROUP];
    for (int64_t t = 0; t < tokens; t++) {
        NAME(widen_row)(values, x + t * g->stride * size, g->kind, count);
        for (int64_t i = 0; i < count; i += VL) {
            const vf v = NAME(load)(values + i), above = (vf)((vi)v & 0x7FFFFFFF), top = NAME(load)(most + i);
            NAME(store)(most + i, SELECT(above > top, above, top));
            NAME(store)(wrong + i, NAME(load)(wrong + i) + v * 0.0f); /* NaN where a value is not finite */
        }
    }
    float *scale = g->scale + chunk * g->panels * LANES + first;
    for (int64_t i = 0; i < GROUP; i++) {
        const int some = i < count && most[i] >= 1e-30f; /* smaller values are zero here */
        factor[i] = some ? GRAM_MOST / most[i] : 0;
        if (first + i < g->panels * LANES) scale[i] = (some ? most[i] / GRAM_MOST : 0) + (i < count ? wrong[i] : 0);
    }
    for (int64_t t = 0; t < tokens; t += 2) {
        NAME(widen_row)(values, x + t * g->stride * size, g->kind, count);
        if (t + 1 < tokens) NAME(widen_row)(next, x + (t + 1) * g->stride * size, g->kind, count);
        else memset(next, 0, sizeof next);
        for (int64_t i = 0; i < GROUP && first + i < g->panels * LANES; i += VL) {
            const vf by = NAME(load)(factor + i);
            const vi one = (vi)(NAME(load)(values + i) * by + 0x1.8p23f) - zero, two = (vi)(NAME(load)(next + i) * by + 0x1.8p23f) - zero;
            const vi both = (one & low) | (vi)((vu)two << 16);
            int32_t *to = g->codes + ((chunk * g->panels + (first + i) / LANES) * (GRAM_TOKENS / 2) + t / 2) * LANES + i % LANES;
            memcpy(to, &both, sizeof both);
        }
    }
}

/* Task: the part of GRAM_STRIP rows of the result that is not below the diagonal's panels. */
static void NAME(gram_products)(void *argument, int64_t task) {
    const Gram *g = argument;
    const int64_t chunks = (g->tokens + GRAM_TOKENS - 1) / GRAM_TOKENS, top = task * GRAM_STRIP, bottom = least(top + GRAM_STRIP, g->width);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t pairs = (least(GRAM_TOKENS, g->tokens - chunk * GRAM_TOKENS) + 1) / 2;
        const int32_t *codes = g->codes + chunk * g->panels * (GRAM_TOKENS / 2) * LANES;
        const float *scale = g->scale + chunk * g->panels * LANES;
        for (int64_t panel = top / LANES; panel < g->panels; panel++) {
            const int32_t *b = codes + panel * (GRAM_TOKENS / 2) * LANES;
            const int64_t column = panel * LANES, columns = least(LANES, g->width - column);
            for (int64_t row = top; row < least(bottom, column + LANES); row += GRAM_ROWS) {
                const int32_t *a = codes + row / LANES * (GRAM_TOKENS / 2) * LANES + row % LANES;
                vi sum[GRAM_ROWS][PARTS] = {{{0}}};
                for (int64_t pair = 0; pair < pairs; pair++) {
                    vi other[PARTS];
#pragma GCC unroll 4
                    for (int i = 0; i < PARTS; i++) other[i] = (vi)NAME(load)((const float *)(b + pair * LANES) + i * VL);
#pragma GCC unroll 8
                    for (int r = 0; r < GRAM_ROWS; r++) {
                        const vi one = (vi){0} + a[pair * LANES + r];
#pragma GCC unroll 4
                        for (int i = 0; i < PARTS; i++) sum[r][i] += NAME(dot16)(one, other[i]);
                    }
                }
                float lines[GRAM_ROWS][LANES];
#pragma GCC unroll 8
                for (int r = 0; r < GRAM_ROWS; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < PARTS; i++) NAME(store)(lines[r] + i * VL, __builtin_convertvector(sum[r][i], vf));
                for (int r = 0; r < GRAM_ROWS && row + r < g->width; r++) {
                    float *to = g->total + (row + r) * g->width + column;
                    for (int64_t i = 0; i < columns; i++) to[i] += lines[r][i] * (scale[row + r] * scale[column + i]);
                }
            }
        }
    }
}
