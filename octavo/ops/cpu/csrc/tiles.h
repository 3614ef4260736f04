/* Products by matrix tiles: included by linear.h where pairs.h is, for instruction sets with TILES.

   The first operand of a tile product is 16 rows of a weight by 32 values: BF16 as stored, FP8 widened in the cache. The
   second is 16 pairs of positions by 16 tokens, which is the layout that a panel of pairs has already. A sum is [rows][LANES]
   as finish_panel() reads it.

   A tiled weight (types.h) has the codes that are widened together, and those of the next steps, in order, so that few tokens
   are one sequential read. Rows as they are stored are far apart: the lines of one column of 64 rows whose length is a
   multiple of 4096 bytes share a set of the L1 cache, and the hardware prefetches no such pattern. */
#define TILED_ROWS 32            /* rows of two tiles */
#define FEW_TILED TASK_OF_TILES  /* rows of a task with one panel: four sums share what is loaded of it */
#define BLOCK_ROWS BLOCK_OF_TILES
#define BLOCK_DEPTH 256 /* values of a task with more panels that are widened at a time: 32 tokens' stay in L1 meanwhile, all rows' in L2 */
#define TILE_AHEAD 16384 /* bytes to prefetch ahead of a tiled weight, to L2 */

#define TILED_STEP (GROUP_ROWS * TILED_BYTES) /* bytes from a row's bytes in a tiled weight to those that follow them */

/* Where rows of a weight are, of a tiled one every LANES-th; next: byte offset to prefetch. */
typedef struct {
    const char *at[BLOCK_ROWS];
    int64_t next;
} NAME(Place);

INLINE void NAME(find_rows)(const Linear *w, int64_t from, int64_t rows, int64_t ahead, NAME(Place) *place) {
    const int64_t row_bytes = w->stride * size_of(w->kind);
    place->next = ahead * row_bytes;
    for (int64_t i = 0; i < rows; i += w->tiled ? LANES : 1)
        place->at[i] = w->tiled ? tiled_at(w, from + i, 0) : (const char *)w->weight + least(from + i, w->n - 1) * row_bytes;
}

/* Store a unit of widened values, the first of them at `position` of a CHUNK, in tiles [CHUNK / TILE_VALUES][LANES]
   [TILE_VALUES]; `to`: of the row. */
INLINE void NAME(put_unit)(const vp v[2], int position, uint16_t *to) {
    for (int half = 0; half < 2; half++, position += UNIT / 2)
        memcpy(to + position / TILE_VALUES * LANES * TILE_VALUES + position % TILE_VALUES, v + half, sizeof *v);
}

/* Widen values k to k + CHUNK of LANES rows, zeros past a row's end. `next`: byte offset of the row to prefetch. */
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
            NAME(put_unit)(v, j, to);
        }
    }
}

/* widen_tile() of a tiled weight; a function of its own, since inlined wherever it is called it takes long to compile. */
INLINE void NAME(widen_lines)(const char *from, int kind, uint16_t *to) {
    if (kind == BF16) { /* two tiles as they are */
        for (int i = 0; i < LANES; i++) {
            __builtin_prefetch(from + i * TILED_BYTES + TILE_AHEAD, 0, 2);
            __builtin_prefetch(from + i * TILED_BYTES + TILE_AHEAD + TILED_STEP, 0, 2);
        }
        memcpy(to, from, TILE_BYTES);
        memcpy(to + TILE_BYTES / 2, from + TILED_STEP, TILE_BYTES);
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++, from += TILED_BYTES, to += TILE_VALUES) {
        __builtin_prefetch(from + TILE_AHEAD, 0, 2);
        for (int j = 0; j < CHUNK; j += UNIT) {
            vp v[2];
            NAME(widen_unit)(from + j, kind, v);
            NAME(put_unit)(v, j, to);
        }
    }
}

static __attribute__((noinline)) void NAME(widen_group)(const char *from, int kind, uint16_t *to) {
    if (kind == BF16) NAME(widen_lines)(from, BF16, to);
    else if (kind == E5M2) NAME(widen_lines)(from, E5M2, to);
    else NAME(widen_lines)(from, E4M3, to);
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

/* Sums are in tiles 0 to 3: of FEW_TILED rows by one panel, or of TILED_ROWS by two. */
INLINE void NAME(zero_sums)(void) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}

/* Those in tiles 0 and 1 from and to `sum`, those in 2 and 3 `more`, which are a second panel's or FEW_TILED rows' second half. */
INLINE void NAME(load_sums)(const float *sum, const float *more, int both) {
    TILE_LOAD(0, sum, 64);
    TILE_LOAD(1, sum + LANES * LANES, 64);
    if (both) {
        TILE_LOAD(2, more, 64);
        TILE_LOAD(3, more + LANES * LANES, 64);
    }
}

INLINE void NAME(store_sums)(float *sum, float *more, int both) {
    TILE_STORE(0, sum, 64);
    TILE_STORE(1, sum + LANES * LANES, 64);
    if (both) {
        TILE_STORE(2, more, 64);
        TILE_STORE(3, more + LANES * LANES, 64);
    }
}

/* Those by one panel. */
INLINE void NAME(finish_sums)(const LinearJob *job, int64_t panel, int64_t from, int64_t to) {
    float sums[FEW_TILED * LANES] __attribute__((aligned(64)));
    NAME(store_sums)(sums, sums + TILED_ROWS * LANES, 1);
    TILE_FENCE();
    NAME(finish_panel)(job, panel, from, to, sums);
}

/* Up to FEW_TILED rows from `from` on times one panel, along all of k. FP8 of the next CHUNK is widened between products: a
   tile is not loaded before the stores to it have reached the cache. */
INLINE void NAME(one_panel_of_tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t panel, int kind) {
    const Linear *w = job->w;
    const int64_t row = w->stride * size_of(kind), whole = w->k / CHUNK * CHUNK;
    const int tiles = (int)((to - from + LANES - 1) / LANES);
    const char *x = (const char *)NAME(panel_at)(job, panel, 0);
    NAME(Place) place;
    uint16_t wide_of[2][FEW_TILED * CHUNK] __attribute__((aligned(64)));
    NAME(find_rows)(w, from, FEW_TILED, to - from, &place);
    NAME(zero_sums)();
    int64_t k = 0;
    if (kind == BF16 && to - from == FEW_TILED) {
        for (; k < whole; k += CHUNK, x += 2 * TILE_BYTES) { /* BF16 is loaded as it is stored */
            for (int i = 0; i < FEW_TILED; i++) {
                __builtin_prefetch(place.at[i] + k * 2 + place.next, 0, 2);
                __builtin_prefetch(place.at[i] + k * 2 + place.next + 64, 0, 2);
            }
            TILE_LOAD(6, x, 64);
            TILE_LOAD(7, x + TILE_BYTES, 64);
            TILE_OF_CHUNK(0, place.at[0] + k * 2, place.at[0] + k * 2 + 64, row);
            TILE_OF_CHUNK(1, place.at[LANES] + k * 2, place.at[LANES] + k * 2 + 64, row);
            TILE_OF_CHUNK(2, place.at[2 * LANES] + k * 2, place.at[2 * LANES] + k * 2 + 64, row);
            TILE_OF_CHUNK(3, place.at[3 * LANES] + k * 2, place.at[3 * LANES] + k * 2 + 64, row);
        }
    }
#define WIDEN_TILE(tile, k, to) NAME(widen_tile)(w, place.at + (tile) * LANES, place.next, k, kind, (to) + (tile) * LANES * CHUNK)
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
    NAME(finish_sums)(job, panel, from, to);
}

/* Up to BLOCK_ROWS rows times several panels: BLOCK_DEPTH values of all rows are widened, then multiplied by all panels; of a
   grouped job a GROUP, whose sums are scaled before they are added. */
INLINE void NAME(panels_of_tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel, int kind,
                                   int grouped) {
    const Linear *w = job->w;
    const int64_t apart = job->k_padded * LANES * 2, rows = to - from, padded = (rows + TILED_ROWS - 1) / TILED_ROWS * TILED_ROWS;
    const int64_t most = grouped ? GROUP : BLOCK_DEPTH;
    NAME(Place) place;
    uint16_t wide[BLOCK_ROWS * BLOCK_DEPTH] __attribute__((aligned(64)));
    float group_sums[2 * TILED_ROWS * LANES] __attribute__((aligned(64)));
    float sums[CHUNK_TOKENS / LANES * BLOCK_ROWS * LANES] __attribute__((aligned(64)));
    if (grouped) memset(sums, 0, sizeof *sums * (size_t)((last_panel - first_panel) * BLOCK_ROWS * LANES));
    NAME(find_rows)(w, from, BLOCK_ROWS, job->task_rows, &place);
    for (int64_t k = 0; k < job->k_padded; k += most) {
        const int64_t depth = least(most, job->k_padded - k);
        for (int64_t group = 0; group < padded; group += GROUP_ROWS) { /* in the order of a tiled weight */
            for (int64_t j = 0; j < depth; j += CHUNK) {
                for (int64_t i = group; i < least(group + GROUP_ROWS, padded); i += LANES) {
                    uint16_t *to_tile = wide + i / TILED_ROWS * TILED_ROWS * BLOCK_DEPTH + j * TILED_ROWS + i % TILED_ROWS * CHUNK;
                    if (w->tiled) NAME(widen_group)(place.at[i] + (k + j) * size_of(kind) / TILED_BYTES * TILED_STEP, kind, to_tile);
                    else NAME(widen_tile)(w, place.at + i, place.next, k + j, kind, to_tile);
                }
            }
        }
        TILE_FENCE();
        for (int64_t p = first_panel; p < last_panel; p += 2) {
            const int panels = p + 1 < last_panel ? 2 : 1;
            const char *panel = (const char *)NAME(panel_at)(job, p, k);
            for (int64_t i = 0; i < rows; i += TILED_ROWS) {
                const char *x = panel;
                const uint16_t *a = wide + i * BLOCK_DEPTH, *end = a + depth * TILED_ROWS;
                float *sum = sums + ((p - first_panel) * BLOCK_ROWS + i) * LANES, *more = sum + BLOCK_ROWS * LANES;
                if (k && !grouped) NAME(load_sums)(sum, more, panels == 2);
                else NAME(zero_sums)();
#define CHUNK_OF_STEPS(panels)                                                                                              \
    for (; a < end; a += CHUNK * TILED_ROWS, x += 2 * TILE_BYTES) {                                                         \
        TILE_STEP(a, a + LANES * CHUNK, x, x + apart, panels);                                                              \
        TILE_STEP(a + LANES * TILE_VALUES, a + LANES * CHUNK + LANES * TILE_VALUES, x + TILE_BYTES, x + apart + TILE_BYTES, panels); \
    }
                if (panels == 2) CHUNK_OF_STEPS(2)
                else CHUNK_OF_STEPS(1)
#undef CHUNK_OF_STEPS
                float *to_sum = grouped ? group_sums : sum, *to_more = grouped ? group_sums + TILED_ROWS * LANES : more;
                NAME(store_sums)(to_sum, to_more, panels == 2);
                if (!grouped) continue;
                TILE_FENCE();
                NAME(add_group)(job, p, from + i, TILED_ROWS, k, to_sum, sum);
                if (panels == 2) NAME(add_group)(job, p + 1, from + i, TILED_ROWS, k, to_more, more);
                TILE_FENCE();
            }
        }
        TILE_FENCE();
    }
    for (int64_t p = first_panel; p < last_panel; p++) NAME(finish_panel)(job, p, from, to, sums + (p - first_panel) * BLOCK_ROWS * LANES);
}

/* one_panel_of_tiles() of FEW_TILED rows of a tiled weight, whose order lets the loop do without all that differs. */
INLINE void NAME(one_panel_of_groups)(const LinearJob *job, int64_t from, int64_t to, int64_t panel, int kind, int grouped) {
    const int64_t chunks = job->k_padded / CHUNK, tile = LANES * TILED_BYTES;
    const char *x = (const char *)NAME(panel_at)(job, panel, 0), *at = tiled_at(job->w, from, 0);
    uint16_t wide_of[2][FEW_TILED * CHUNK] __attribute__((aligned(64)));
    NAME(zero_sums)();
    if (kind == BF16) { /* loaded as it is stored */
        for (int64_t c = 0; c < chunks; c++, x += 2 * TILE_BYTES, at += 2 * TILED_STEP) {
            TILE_LOAD(6, x, 64);
            TILE_LOAD(7, x + TILE_BYTES, 64);
#define NEXT_TILE(i)                                                                                                   \
    for (int line = 0; line < 2 * LANES; line++)                                                                       \
        __builtin_prefetch(at + (i) * 2 * tile + line * TILED_BYTES + TILE_AHEAD, 0, 2);                               \
    TILE_OF_CHUNK(i, at + (i) * tile, at + (i) * tile + TILED_STEP, 64);
            NEXT_TILE(0)
            NEXT_TILE(1)
            NEXT_TILE(2)
            NEXT_TILE(3)
#undef NEXT_TILE
        }
        NAME(finish_sums)(job, panel, from, to);
        return;
    }
    float sums[FEW_TILED * LANES] __attribute__((aligned(64))), group_sums[FEW_TILED * LANES] __attribute__((aligned(64)));
    if (grouped) memset(sums, 0, sizeof sums);
    for (int i = 0; i < FEW_TILED; i += LANES) NAME(widen_group)(at + i * TILED_BYTES, kind, wide_of[0] + i * CHUNK);
    for (int64_t c = 0; c < chunks; c++, x += 2 * TILE_BYTES) {
        const uint16_t *wide = wide_of[c % 2];
        uint16_t *soon = wide_of[(c + 1) % 2];
        at += TILED_STEP;
        TILE_LOAD(6, x, 64);
        TILE_LOAD(7, x + TILE_BYTES, 64);
#define NEXT_TILE(i)                                                                                                   \
    if (c + 1 < chunks) NAME(widen_group)(at + (i) * tile, kind, soon + (i) * LANES * CHUNK);                          \
    TILE_FENCE();                                                                                                      \
    TILE_OF_CHUNK(i, wide + (i) * LANES * CHUNK, wide + (i) * LANES * CHUNK + LANES * TILE_VALUES, 64);                \
    TILE_FENCE();
        NEXT_TILE(0)
        NEXT_TILE(1)
        NEXT_TILE(2)
        NEXT_TILE(3)
#undef NEXT_TILE
        if (!grouped || (c % 2 == 0 && c + 1 < chunks)) continue;
        NAME(store_sums)(group_sums, group_sums + TILED_ROWS * LANES, 1);
        TILE_FENCE();
        NAME(add_group)(job, panel, from, FEW_TILED, c / 2 * GROUP, group_sums, sums);
        NAME(zero_sums)();
    }
    if (grouped) NAME(finish_panel)(job, panel, from, to, sums);
    else NAME(finish_sums)(job, panel, from, to);
}

#define TILES_OF(kind, name, grouped)                                                                                           \
    static __attribute__((noinline)) void NAME(tiles_##name)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, \
                                                             int64_t last_panel) {                                              \
        if (last_panel - first_panel > 1 || to - from > FEW_TILED)                                                              \
            NAME(panels_of_tiles)(job, from, to, first_panel, last_panel, kind, grouped);                                       \
        else if (job->w->tiled)                                                                                                 \
            NAME(one_panel_of_groups)(job, from, to, first_panel, kind, grouped);                                               \
        else                                                                                                                    \
            NAME(one_panel_of_tiles)(job, from, to, first_panel, kind);                                                         \
    }
TILES_OF(BF16, BF16, 0)
TILES_OF(E4M3, E4M3, 0)
TILES_OF(E5M2, E5M2, 0)
TILES_OF(E4M3, E4M3_grouped, 1)
TILES_OF(E5M2, E5M2_grouped, 1)
#undef TILES_OF
static void NAME(tiles)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel) {
    static void (*const by_kind[])(const LinearJob *, int64_t, int64_t, int64_t, int64_t) = {
        [BF16] = NAME(tiles_BF16), [E4M3] = NAME(tiles_E4M3), [E4M3FNUZ] = NAME(tiles_E4M3), [E5M2] = NAME(tiles_E5M2)};
    if (!job->grouped) by_kind[job->w->kind](job, from, to, first_panel, last_panel);
    else (job->w->kind == E5M2 ? NAME(tiles_E5M2_grouped) : NAME(tiles_E4M3_grouped))(job, from, to, first_panel, last_panel);
}

/* One token times groups of a tiled weight, by the dot product. The sums of a group are in L1, so that it is read in order. */
INLINE void NAME(dot_of_groups)(const LinearJob *job, int64_t from, int64_t to, int kind, int grouped) {
    const Linear *w = job->w;
    const int64_t lines = group_bytes(w) / TILED_STEP, each = TILED_BYTES / size_of(kind);
    const char *at = tiled_at(w, from * GROUP_ROWS, 0);
    float sums[GROUP_ROWS * VL] __attribute__((aligned(64))), columns[GROUP_ROWS], by[GROUP_ROWS], totals[GROUP_ROWS];
    for (int64_t group = from; group < to; group++) {
        const int64_t first = group * GROUP_ROWS;
        memset(sums, 0, sizeof sums);
        if (grouped) memset(totals, 0, sizeof totals);
        for (int64_t line = 0; line < lines; line++) {
            const uint16_t *x = (const uint16_t *)job->panel + line * each;
#pragma GCC unroll 8
            for (int row = 0; row < GROUP_ROWS; row++, at += TILED_BYTES) {
                vf sum = grouped && line * each % GROUP == 0 ? (vf){0} : NAME(load)(sums + row * VL);
                __builtin_prefetch(at + TILE_AHEAD, 0, 2);
                for (int u = 0; u < each; u += kind == BF16 ? UNIT / 2 : UNIT) {
                    vp v[2], even, odd;
                    if (kind == BF16) memcpy(v, at + u * 2, sizeof *v);
                    else NAME(widen_unit)(at + u, kind, v);
                    memcpy(&even, x + u, sizeof even);
                    sum = NAME(dot_pairs)(sum, even, v[0]);
                    if (kind == BF16) continue;
                    memcpy(&odd, x + u + UNIT / 2, sizeof odd);
                    sum = NAME(dot_pairs)(sum, odd, v[1]);
                }
                NAME(store)(sums + row * VL, sum);
            }
            const int64_t next = (line + 1) * each;
            if (!grouped || (next % GROUP && line + 1 < lines)) continue;
            const int by_row = w->scale_rows == 1; /* else all rows are in one block */
            for (int i = 0; i < (by_row ? GROUP_ROWS : 1); i++)
                by[i] = NAME(scale_at)(w, least(first + i, w->n - 1), line * each) * *x_scale_at(job, 0, line * each);
            for (int i = 0; i < GROUP_ROWS; i += LANES) NAME(sums)(sums + i * VL, columns + i);
            for (int i = 0; i < GROUP_ROWS; i += VL)
                NAME(store)(totals + i, NAME(load)(totals + i) + NAME(load)(columns + i) * (by_row ? NAME(load)(by + i) : NAME(splat)(by[0])));
        }
        for (int i = 0; !grouped && i < GROUP_ROWS; i += LANES) NAME(sums)(sums + i * VL, columns + i);
        for (int64_t row = first; row < least(first + GROUP_ROWS, w->n); row++)
            NAME(finish)(job, 0, row, (grouped ? totals : columns)[row - first]);
    }
}

#define GROUPS_OF(kind, grouped) NAME(dot_of_groups)(job, from, to, kind, grouped)
static __attribute__((noinline)) void NAME(groups_BF16)(const LinearJob *job, int64_t from, int64_t to) { GROUPS_OF(BF16, 0); }
static __attribute__((noinline)) void NAME(groups_E4M3)(const LinearJob *job, int64_t from, int64_t to) {
    if (job->grouped) GROUPS_OF(E4M3, 1);
    else GROUPS_OF(E4M3, 0);
}
static __attribute__((noinline)) void NAME(groups_E5M2)(const LinearJob *job, int64_t from, int64_t to) {
    if (job->grouped) GROUPS_OF(E5M2, 1);
    else GROUPS_OF(E5M2, 0);
}
#undef GROUPS_OF
