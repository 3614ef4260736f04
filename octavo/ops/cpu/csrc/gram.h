/* Gram matrices x^T x for one instruction set: included after vector.h.

   Products of integers, some in a lane, whose sum is 32 bits wide: exact, so that sums do not depend on their order, and faster
   than FP32's: of 16 bits twice, of 8 bits (where the CPU has VNNI) four times as many an instruction.

   The instruction of 8 bits multiplies unsigned by signed values. Codes are kept with 128 added; one factor has it taken away
   again, and the other one's 128 add as many times the first one's sum, which `sums` has for each column. */
#define GRAM_BYTES (ISA == 4) /* codes of 8 bits, else of 16 */
#define GRAM_MOST (GRAM_BYTES ? 127 : 2047) /* the largest code: of 12 bits, for a sum of GRAM_TOKENS products to have 32 */
#define GRAM_EACH (GRAM_BYTES ? 4 : 2)     /* tokens in a lane */
#define GRAM_STEPS (GRAM_TOKENS / GRAM_EACH) /* lanes that a column of GRAM_TOKENS tokens takes */
#define GRAM_ROWS (VL == 16 ? 16 : 4)       /* rows of the result in registers */

/* sum plus, in each lane, the products of the lane's tokens. */
INLINE vi NAME(gram_dot)(vi sum, vi a, vi b) {
#if ISA == 4
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif ISA == 3
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif ISA == 2
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* Task: GROUP columns of up to GRAM_TOKENS tokens, as codes with a scale for each column: [panel of LANES columns, GRAM_EACH tokens,
   LANES]. */
static void NAME(gram_codes)(void *argument, int64_t task) {
    const Gram *g = argument;
    const int64_t groups = (g->panels * LANES + GROUP - 1) / GROUP, chunk = task / groups, first = task % groups * GROUP;
    const int64_t count = least(GROUP, g->width - first), held = least(GROUP, g->panels * LANES - first), start = chunk * GRAM_TOKENS;
    const int64_t tokens = least(GRAM_TOKENS, g->tokens - start), size = size_of(g->kind);
    const char *x = (const char *)g->x + (start * g->stride + first) * size;
    const vi zero = (vi)NAME(splat)(0x1.8p23f), low = (vi){0} + (GRAM_BYTES ? 0xFF : 0xFFFF); /* 1.5 * 2^23 plus an integer: its lower bits */
    float values[GROUP] = {0}, most[GROUP] = {0}, wrong[GROUP] = {0}, factor[GROUP];
    int32_t sums[GROUP] = {0};
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
        if (i < held) scale[i] = (some ? most[i] / GRAM_MOST : 0) + (i < count ? wrong[i] : 0);
    }
    for (int64_t t = 0; t < tokens; t += GRAM_EACH) {
        vi codes[GROUP / VL];
        for (int64_t i = 0; i < held; i += VL) codes[i / VL] = (vi){0};
        for (int each = 0; each < GRAM_EACH; each++) {
            if (t + each < tokens) NAME(widen_row)(values, x + (t + each) * g->stride * size, g->kind, count);
            else memset(values, 0, sizeof values);
            for (int64_t i = 0; i < held; i += VL) {
                const vi code = (vi)(NAME(load)(values + i) * NAME(load)(factor + i) + 0x1.8p23f) - zero;
                NAME(store)((float *)sums + i, (vf)((vi)NAME(load)((float *)sums + i) + code));
                codes[i / VL] |= (vi)((vu)((code + (GRAM_BYTES ? 128 : 0)) & low) << each * (GRAM_BYTES ? 8 : 16));
            }
        }
        for (int64_t i = 0; i < held; i += VL) {
            int32_t *to = g->codes + ((chunk * g->panels + (first + i) / LANES) * GRAM_STEPS + t / GRAM_EACH) * LANES + i % LANES;
            memcpy(to, &codes[i / VL], sizeof *codes);
        }
    }
    memcpy(g->sums + chunk * g->panels * LANES + first, sums, (size_t)held * sizeof *sums);
}

/* Task: the part of GRAM_STRIP rows of the result that is not below the diagonal's panels. */
static void NAME(gram_products)(void *argument, int64_t task) {
    const Gram *g = argument;
    const int64_t chunks = (g->tokens + GRAM_TOKENS - 1) / GRAM_TOKENS, top = task * GRAM_STRIP, bottom = least(top + GRAM_STRIP, g->width);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t steps = (least(GRAM_TOKENS, g->tokens - chunk * GRAM_TOKENS) + GRAM_EACH - 1) / GRAM_EACH;
        const int32_t *codes = g->codes + chunk * g->panels * GRAM_STEPS * LANES, *sums = g->sums + chunk * g->panels * LANES;
        const float *scale = g->scale + chunk * g->panels * LANES;
        for (int64_t panel = top / LANES; panel < g->panels; panel++) {
            const int32_t *b = codes + panel * GRAM_STEPS * LANES;
            const int64_t column = panel * LANES, columns = least(LANES, g->width - column);
            for (int64_t row = top; row < least(bottom, column + LANES); row += GRAM_ROWS) {
                const int32_t *a = codes + row / LANES * GRAM_STEPS * LANES + row % LANES;
                vi sum[GRAM_ROWS][PARTS] = {{{0}}};
                for (int64_t step = 0; step < steps; step++) {
                    vi other[PARTS];
#pragma GCC unroll 4
                    for (int i = 0; i < PARTS; i++)
                        other[i] = (vi)NAME(load)((const float *)(b + step * LANES) + i * VL) ^ (GRAM_BYTES ? (int32_t)0x80808080 : 0);
#pragma GCC unroll 16
                    for (int r = 0; r < GRAM_ROWS; r++) {
                        const vi one = (vi){0} + a[step * LANES + r];
#pragma GCC unroll 4
                        for (int i = 0; i < PARTS; i++) sum[r][i] = NAME(gram_dot)(sum[r][i], one, other[i]);
                    }
                }
                float lines[GRAM_ROWS][LANES];
#pragma GCC unroll 16
                for (int r = 0; r < GRAM_ROWS; r++)
#pragma GCC unroll 4
                    for (int i = 0; i < PARTS; i++) {
                        const vi added = (vi)NAME(load)((const float *)(sums + column) + i * VL) << 7;
                        NAME(store)(lines[r] + i * VL, __builtin_convertvector(GRAM_BYTES ? sum[r][i] - added : sum[r][i], vf));
                    }
                for (int r = 0; r < GRAM_ROWS && row + r < g->width; r++) {
                    float *to = g->total + (row + r) * g->width + column;
                    for (int64_t i = 0; i < columns; i++) to[i] += lines[r][i] * (scale[row + r] * scale[column + i]);
                }
            }
        }
    }
}
