/* Products by matrix tiles: included by linear.h where pairs.h is, for instruction sets with TILES.

   The first operand of a tile product is 16 rows of a weight by 32 values: BF16 as stored, FP8 widened in the cache. The
   second is 16 pairs of positions by 16 tokens, which is the layout that a panel of pairs has already. So nothing is packed
   for tiles, and a sum is [rows][LANES] as finish_panel() reads it. Products are computed 32 rows by up to 32 tokens at a
   time: four sums, two operands of each kind. */
#define TILED_ROWS 32   /* rows of four sums */
#define BLOCK_ROWS TASK_OF_TILES
#define BLOCK_DEPTH 512 /* values of a task of many tokens that are widened at a time: 32 tokens' values stay in L1 meanwhile, all rows' in L2 */
#define STEP (TILED_ROWS * TILE_VALUES) /* values of a step along k: two tiles */

/* Widen values k to k + CHUNK of TILED_ROWS rows: to [CHUNK / TILE_VALUES][TILED_ROWS][TILE_VALUES], zeros past a row's end.
   `next`: byte offset of the row to prefetch. */
INLINE void NAME(widen_tiles)(const Linear *w, const char *const *at, int64_t next, int64_t k, int kind, uint16_t *to) {
    const int64_t size = size_of(kind), there = w->k - k;
    for (int i = 0; i < TILED_ROWS; i++, to += TILE_VALUES) {
        const char *from = at[i] + k * size;
        char tail[CHUNK * 2];
        for (int line = 0; line < size; line++) __builtin_prefetch(from + next + line * 64, 0, 2);
        if (there < CHUNK) { /* memory after the last row may not be ours to read */
            memset(tail, 0, sizeof tail);
            memcpy(tail, from, (size_t)(there * size));
            from = tail;
        }
        for (int j = 0; j < CHUNK; j += UNIT) {
            vp v[2];
            NAME(widen_unit)(from + j * size, kind, v);
            for (int half = 0; half < 2; half++) {
                const int position = j + half * UNIT / 2;
                memcpy(to + position / TILE_VALUES * STEP + position % TILE_VALUES, v + half, sizeof *v);
            }
        }
    }
}

/* The addresses of TILED_ROWS rows of a weight; the last one again where there are fewer. */
INLINE void NAME(find_rows)(const Linear *w, int64_t from, int kind, const char **at) {
    for (int i = 0; i < TILED_ROWS; i++) at[i] = (const char *)w->weight + least(from + i, w->n - 1) * w->stride * size_of(kind);
}

/* A step along k of a product of two tiles of rows, `stride` bytes from row to row, by one or two panels. */
#define TILE_STEP(first, second, stride, x, x_next, panels)     \
    do {                                                        \
        TILE_LOAD(4, first, stride);                            \
        TILE_LOAD(6, x, 64);                                    \
        TILE_DOT(0, 4, 6);                                      \
        TILE_LOAD(5, second, stride);                           \
        TILE_DOT(1, 5, 6);                                      \
        if ((panels) == 2) {                                    \
            TILE_LOAD(7, x_next, 64);                           \
            TILE_DOT(2, 4, 7);                                  \
            TILE_DOT(3, 5, 7);                                  \
        }                                                       \
    } while (0)

/* TILED_ROWS rows from `from` on times one or two panels, along all of k. */
INLINE void NAME(few_tiles)(const LinearJob *job, int64_t from, int64_t panel, int panels, int kind) {
    const Linear *w = job->w;
    const int64_t size = size_of(kind), row = w->stride * size, next = TILED_ROWS * row, apart = job->k_padded * LANES * 2;
    const char *at[TILED_ROWS], *x = (const char *)NAME(panel_at)(job, panel, 0);
    uint16_t wide[2 * STEP] __attribute__((aligned(64)));
    float sums[2 * TILED_ROWS * LANES] __attribute__((aligned(64)));
    const int64_t in_place = kind == BF16 && from + TILED_ROWS <= w->n ? w->k / CHUNK * CHUNK : 0; /* values read as stored */
    NAME(find_rows)(w, from, kind, at);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t k = 0; k < job->k_padded; k += CHUNK, x += 2 * TILE_BYTES) {
        if (k < in_place) {
            const char *first = at[0] + k * 2, *second = at[TILED_ROWS / 2] + k * 2;
            for (int i = 0; i < TILED_ROWS; i++) {
                __builtin_prefetch(at[i] + k * 2 + next, 0, 2);
                __builtin_prefetch(at[i] + k * 2 + next + 64, 0, 2);
            }
            TILE_STEP(first, second, row, x, x + apart, panels);
            TILE_STEP(first + 64, second + 64, row, x + TILE_BYTES, x + TILE_BYTES + apart, panels);
            continue;
        }
        NAME(widen_tiles)(w, at, next, k, kind, wide);
        TILE_FENCE();
        TILE_STEP(wide, wide + STEP / 2, 64, x, x + apart, panels);
        TILE_STEP(wide + STEP, wide + STEP + STEP / 2, 64, x + TILE_BYTES, x + TILE_BYTES + apart, panels);
        TILE_FENCE();
    }
    TILE_STORE(0, sums, 64);
    TILE_STORE(1, sums + TILED_ROWS / 2 * LANES, 64);
    TILE_STORE(2, sums + TILED_ROWS * LANES, 64);
    TILE_STORE(3, sums + TILED_ROWS / 2 * 3 * LANES, 64);
    TILE_FENCE();
    for (int p = 0; p < panels; p++)
        NAME(finish_panel)(job, panel + p, from, least(from + TILED_ROWS, w->n), sums + p * TILED_ROWS * LANES);
}

/* Up to BLOCK_ROWS rows times many panels: BLOCK_DEPTH values of all rows are widened, then multiplied by all panels. */
INLINE void NAME(many_tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel, int kind) {
    const Linear *w = job->w;
    const int64_t next = BLOCK_ROWS * w->stride * size_of(kind), apart = job->k_padded * LANES * 2;
    uint16_t wide[BLOCK_ROWS * BLOCK_DEPTH] __attribute__((aligned(64)));
    float sums[CHUNK_TOKENS / LANES * BLOCK_ROWS * LANES] __attribute__((aligned(64)));
    for (int64_t k = 0; k < job->k_padded; k += BLOCK_DEPTH) {
        const int64_t depth = least(BLOCK_DEPTH, job->k_padded - k);
        for (int64_t row = from; row < to; row += TILED_ROWS) {
            const char *at[TILED_ROWS];
            NAME(find_rows)(w, row, kind, at);
            for (int64_t j = 0; j < depth; j += CHUNK)
                NAME(widen_tiles)(w, at, next, k + j, kind, wide + ((row - from) * BLOCK_DEPTH + j * TILED_ROWS));
        }
        TILE_FENCE();
        for (int64_t p = first_panel; p < last_panel; p += 2) {
            const int panels = p + 1 < last_panel ? 2 : 1;
            const char *panel = (const char *)NAME(panel_at)(job, p, k);
            for (int64_t row = 0; row < to - from; row += TILED_ROWS) {
                const char *x = panel;
                const uint16_t *a = wide + row * BLOCK_DEPTH, *end = a + depth * TILED_ROWS;
                float *sum = sums + ((p - first_panel) * BLOCK_ROWS + row) * LANES, *more = sum + BLOCK_ROWS * LANES;
                if (k) {
                    TILE_LOAD(0, sum, 64);
                    TILE_LOAD(1, sum + TILED_ROWS / 2 * LANES, 64);
                    if (panels == 2) {
                        TILE_LOAD(2, more, 64);
                        TILE_LOAD(3, more + TILED_ROWS / 2 * LANES, 64);
                    }
                } else {
                    TILE_ZERO(0);
                    TILE_ZERO(1);
                    TILE_ZERO(2);
                    TILE_ZERO(3);
                }
                if (panels == 2) for (; a < end; a += STEP, x += TILE_BYTES) TILE_STEP(a, a + STEP / 2, 64, x, x + apart, 2);
                else for (; a < end; a += STEP, x += TILE_BYTES) TILE_STEP(a, a + STEP / 2, 64, x, x + apart, 1);
                TILE_STORE(0, sum, 64);
                TILE_STORE(1, sum + TILED_ROWS / 2 * LANES, 64);
                if (panels == 2) {
                    TILE_STORE(2, more, 64);
                    TILE_STORE(3, more + TILED_ROWS / 2 * LANES, 64);
                }
            }
        }
        TILE_FENCE();
    }
    for (int64_t p = first_panel; p < last_panel; p++) NAME(finish_panel)(job, p, from, to, sums + (p - first_panel) * BLOCK_ROWS * LANES);
}

#define TILES_OF(kind)                                                                                                          \
    static __attribute__((noinline)) void NAME(tiles_##kind)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, \
                                                             int64_t last_panel) {                                              \
        if (job->task_rows > TILED_ROWS || last_panel - first_panel > 2)                                                        \
            NAME(many_tiles)(job, from, to, first_panel, last_panel, kind);                                                     \
        else if (last_panel - first_panel == 2) NAME(few_tiles)(job, from, first_panel, 2, kind);                               \
        else NAME(few_tiles)(job, from, first_panel, 1, kind);                                                                  \
    }
TILES_OF(BF16)
TILES_OF(E4M3)
TILES_OF(E5M2)
#undef TILES_OF
static void NAME(tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel) {
    static void (*const by_kind[])(const LinearJob *, int64_t, int64_t, int64_t, int64_t) = {
        [BF16] = NAME(tiles_BF16), [E4M3] = NAME(tiles_E4M3), [E4M3FNUZ] = NAME(tiles_E4M3), [E5M2] = NAME(tiles_E5M2)};
    by_kind[job->w->kind](job, from, to, first_panel, last_panel);
}
