/* Products by matrix tiles: included by linear.h where pairs.h is, for instruction sets with TILES.

   The first operand of a tile product is 16 rows of a weight by 32 values: BF16 as stored, FP8 widened in the cache. The
   second is 16 pairs of positions by 16 tokens, which is the layout that a panel of pairs has already. So nothing is packed
   for tiles, and a sum is [rows][LANES] as finish_panel() reads it. Products are computed 32 rows by up to 32 tokens at a
   time: four sums, two operands of each kind. */
#define TILED_ROWS 32            /* rows of two tiles */
#define FEW_TILED TASK_OF_TILES  /* rows of a task with one panel: four sums share what is loaded of it */
#define BLOCK_ROWS BLOCK_OF_TILES
#define BLOCK_DEPTH 512 /* values of a task with more panels that are widened at a time: 32 tokens' stay in L1 meanwhile, all rows' in L2 */

/* Widen values k to k + CHUNK of LANES rows: to [CHUNK / TILE_VALUES][LANES][TILE_VALUES], zeros past a row's end. `next`:
   byte offset of the row to prefetch. */
INLINE void NAME(widen_tile)(const Linear *w, const char *const *at, int64_t next, int64_t k, int kind, uint16_t *to) {
    const int64_t size = size_of(kind), there = w->k - k;
    for (int i = 0; i < LANES; i++, to += TILE_VALUES) {
        const char *from = at[i] + k * size;
        char tail[CHUNK * 2];
        for (int line = 0; line < size; line++) __builtin_prefetch(from + next + line * 64, 0, 2);
        from = NAME(whole_chunk)(from, there, size, tail);
        for (int j = 0; j < CHUNK; j += UNIT) {
            vp v[2];
            NAME(widen_unit)(from + j * size, kind, v);
            for (int half = 0; half < 2; half++) {
                const int position = j + half * UNIT / 2;
                memcpy(to + position / TILE_VALUES * LANES * TILE_VALUES + position % TILE_VALUES, v + half, sizeof *v);
            }
        }
    }
}

/* A step along k of a product of two tiles of rows by one or two panels. */
#define TILE_STEP(first, second, x, x_next, panels) \
    do {                                            \
        TILE_LOAD(4, first, 64);                    \
        TILE_LOAD(6, x, 64);                        \
        TILE_DOT(0, 4, 6);                          \
        TILE_LOAD(5, second, 64);                   \
        TILE_DOT(1, 5, 6);                          \
        if ((panels) == 2) {                        \
            TILE_LOAD(7, x_next, 64);               \
            TILE_DOT(2, 4, 7);                      \
            TILE_DOT(3, 5, 7);                      \
        }                                           \
    } while (0)

/* A tile of rows by a panel whose CHUNK positions are in tiles 6 and 7. */
#define TILE_OF_CHUNK(sum, a, a_next, stride) \
    do {                                      \
        TILE_LOAD(4, a, stride);              \
        TILE_LOAD(5, a_next, stride);         \
        TILE_DOT(sum, 4, 6);                  \
        TILE_DOT(sum, 5, 7);                  \
    } while (0)

/* Up to FEW_TILED rows from `from` on times one panel, along all of k. FP8 of the next CHUNK is widened between products: a
   tile is not loaded before the stores to it have reached the cache. */
INLINE void NAME(one_panel_of_tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t panel, int kind) {
    const Linear *w = job->w;
    const int64_t row = w->stride * size_of(kind), next = (to - from) * row, whole = w->k / CHUNK * CHUNK;
    const int tiles = (int)((to - from + LANES - 1) / LANES);
    const char *at[FEW_TILED], *x = (const char *)NAME(panel_at)(job, panel, 0);
    uint16_t wide_of[2][FEW_TILED * CHUNK] __attribute__((aligned(64)));
    float sums[FEW_TILED * LANES] __attribute__((aligned(64)));
    for (int i = 0; i < FEW_TILED; i++) at[i] = (const char *)w->weight + least(from + i, w->n - 1) * row;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    int64_t k = 0;
    if (kind == BF16 && to - from == FEW_TILED) {
        for (; k < whole; k += CHUNK, x += 2 * TILE_BYTES) { /* BF16 is loaded as it is stored */
            for (int i = 0; i < FEW_TILED; i++) {
                __builtin_prefetch(at[i] + k * 2 + next, 0, 2);
                __builtin_prefetch(at[i] + k * 2 + next + 64, 0, 2);
            }
            TILE_LOAD(6, x, 64);
            TILE_LOAD(7, x + TILE_BYTES, 64);
            TILE_OF_CHUNK(0, at[0] + k * 2, at[0] + k * 2 + 64, row);
            TILE_OF_CHUNK(1, at[LANES] + k * 2, at[LANES] + k * 2 + 64, row);
            TILE_OF_CHUNK(2, at[2 * LANES] + k * 2, at[2 * LANES] + k * 2 + 64, row);
            TILE_OF_CHUNK(3, at[3 * LANES] + k * 2, at[3 * LANES] + k * 2 + 64, row);
        }
    }
#define WIDEN_TILE(tile, k, to) NAME(widen_tile)(w, at + (tile) * LANES, next, k, kind, (to) + (tile) * LANES * CHUNK)
#define NEXT_TILE(tile)                                                                                        \
    if ((tile) < tiles) {                                                                                      \
        const uint16_t *a = wide + (tile) * LANES * CHUNK;                                                     \
        if (k + CHUNK < job->k_padded) WIDEN_TILE(tile, k + CHUNK, soon);                                      \
        TILE_FENCE();                                                                                          \
        TILE_OF_CHUNK(tile, a, a + LANES * TILE_VALUES, 64);                                                   \
        TILE_FENCE();                                                                                          \
    }
    for (int tile = 0; k < job->k_padded && tile < tiles; tile++) WIDEN_TILE(tile, k, wide_of[k / CHUNK % 2]);
    for (; k < job->k_padded; k += CHUNK, x += 2 * TILE_BYTES) {
        const uint16_t *wide = wide_of[k / CHUNK % 2];
        uint16_t *soon = wide_of[(k / CHUNK + 1) % 2];
        TILE_LOAD(6, x, 64);
        TILE_LOAD(7, x + TILE_BYTES, 64);
        NEXT_TILE(0)
        NEXT_TILE(1)
        NEXT_TILE(2)
        NEXT_TILE(3)
    }
#undef NEXT_TILE
#undef WIDEN_TILE
    TILE_STORE(0, sums, 64);
    TILE_STORE(1, sums + LANES * LANES, 64);
    TILE_STORE(2, sums + 2 * LANES * LANES, 64);
    TILE_STORE(3, sums + 3 * LANES * LANES, 64);
    TILE_FENCE();
    NAME(finish_panel)(job, panel, from, to, sums);
}

/* Up to BLOCK_ROWS rows times several panels: BLOCK_DEPTH values of all rows are widened, then multiplied by all panels. */
INLINE void NAME(panels_of_tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel, int kind) {
    const Linear *w = job->w;
    const int64_t row = w->stride * size_of(kind), next = job->task_rows * row, apart = job->k_padded * LANES * 2;
    const char *at[BLOCK_ROWS];
    uint16_t wide[BLOCK_ROWS * BLOCK_DEPTH] __attribute__((aligned(64)));
    float sums[CHUNK_TOKENS / LANES * BLOCK_ROWS * LANES] __attribute__((aligned(64)));
    for (int64_t i = 0; i < BLOCK_ROWS; i++) at[i] = (const char *)w->weight + least(from + i, w->n - 1) * row;
    for (int64_t k = 0; k < job->k_padded; k += BLOCK_DEPTH) {
        const int64_t depth = least(BLOCK_DEPTH, job->k_padded - k);
        for (int64_t i = 0; i < to - from; i += TILED_ROWS) {
            for (int64_t j = 0; j < depth; j += CHUNK) {
                NAME(widen_tile)(w, at + i, next, k + j, kind, wide + i * BLOCK_DEPTH + j * TILED_ROWS);
                NAME(widen_tile)(w, at + i + LANES, next, k + j, kind, wide + i * BLOCK_DEPTH + j * TILED_ROWS + LANES * CHUNK);
            }
        }
        TILE_FENCE();
        for (int64_t p = first_panel; p < last_panel; p += 2) {
            const int panels = p + 1 < last_panel ? 2 : 1;
            const char *panel = (const char *)NAME(panel_at)(job, p, k);
            for (int64_t i = 0; i < to - from; i += TILED_ROWS) {
                const char *x = panel, *soon = panel + (i ? 3 : 2) * apart; /* the next panels, which L2 may not hold */
                const uint16_t *a = wide + i * BLOCK_DEPTH, *end = a + depth * TILED_ROWS;
                float *sum = sums + ((p - first_panel) * BLOCK_ROWS + i) * LANES, *more = sum + BLOCK_ROWS * LANES;
                if (k) {
                    TILE_LOAD(0, sum, 64);
                    TILE_LOAD(1, sum + LANES * LANES, 64);
                    if (panels == 2) {
                        TILE_LOAD(2, more, 64);
                        TILE_LOAD(3, more + LANES * LANES, 64);
                    }
                } else {
                    TILE_ZERO(0);
                    TILE_ZERO(1);
                    TILE_ZERO(2);
                    TILE_ZERO(3);
                }
#define CHUNK_OF_STEPS(panels)                                                                                              \
    for (; a < end; a += CHUNK * TILED_ROWS, x += 2 * TILE_BYTES, soon += 2 * TILE_BYTES) {                                 \
        for (int line = 0; i < 2 * TILED_ROWS && line < 2 * TILE_BYTES; line += 64) __builtin_prefetch(soon + line, 0, 2);  \
        TILE_STEP(a, a + LANES * CHUNK, x, x + apart, panels);                                                              \
        TILE_STEP(a + LANES * TILE_VALUES, a + LANES * CHUNK + LANES * TILE_VALUES, x + TILE_BYTES, x + apart + TILE_BYTES, panels); \
    }
                if (panels == 2) CHUNK_OF_STEPS(2)
                else CHUNK_OF_STEPS(1)
#undef CHUNK_OF_STEPS
                TILE_STORE(0, sum, 64);
                TILE_STORE(1, sum + LANES * LANES, 64);
                if (panels == 2) {
                    TILE_STORE(2, more, 64);
                    TILE_STORE(3, more + LANES * LANES, 64);
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
        if (last_panel - first_panel > 1 || to - from > FEW_TILED)                                                              \
            NAME(panels_of_tiles)(job, from, to, first_panel, last_panel, kind);                                                \
        else                                                                                                                    \
            NAME(one_panel_of_tiles)(job, from, to, first_panel, kind);                                                         \
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
