/* Products by packed INT4 by matrix tiles: included by linear.h after nibbles.h and tiles.h.

   A product of a code and its group's scale has more bits than BF16, and scaling each group's sum instead would cost more than
   its products do. So a value is the sum of two in BF16, `high` and `low`, and each is multiplied. */

/* TILE_VALUES values of INT4 from k on, which have one scale, as the sum of two rows of tiles: a product of a code and a scale in
   BF16 has 12 significant bits, so `low` is exact; with a scale in FP32 it is the rest to 16 bits. Pair 4 j + i has values j and
   4 + j of the i-th eight. Zeros past the row's end. */
INLINE void NAME(nibble_tile)(const Linear *w, const char *row, int64_t first, int64_t k, int shift, uint16_t *high, uint16_t *low) {
    const int64_t there = w->k - k;
    const float scale = there > 0 ? value_at(w->group_scale, w->group_kind, first + (shift < 0 ? k / w->group : k >> shift)) : 0;
    const char *codes = row + k / 2;
    char tail[TILE_VALUES / 2] = {0};
    if (there < TILE_VALUES) { /* memory after the last row may not be ours to read, and activations are zeros there */
        if (there > 0) memcpy(tail, codes, (size_t)(there + 1) / 2);
        codes = tail;
    }
#if ISA == 4
    const __m512 all = _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_ps(scale));
    const __m512i upper = _mm512_castps_si512(all) & _mm512_set1_epi32((int)0xFFFF0000);
    const __m512i rest = _mm512_castps_si512(_mm512_sub_ps(all, _mm512_castsi512_ps(upper)));
    const __m512i by = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
    const __m512i index = _mm512_srlv_epi32(words, by) & _mm512_set1_epi32(0x000F000F);
    const __m512i highs = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
    const __m512i lows = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rest, 16)));
    _mm512_store_si512(high, _mm512_permutexvar_epi16(index, highs));
    _mm512_store_si512(low, _mm512_permutexvar_epi16(index, lows));
#else
    float values[LANES];
    uint16_t table[2][LANES];
    uint32_t words[4];
    memcpy(words, codes, sizeof words);
    for (int code = 0; code < 16; code++) {
        uint32_t bits;
        values[code] = (float)(code - 8) * scale;
        memcpy(&bits, values + code, 4);
        table[0][code] = (uint16_t)(bits >> 16);
        values[code] -= bf16_to_float(table[0][code]);
        memcpy(&bits, values + code, 4);
        table[1][code] = (uint16_t)(bits >> 16);
    }
    for (int i = 0; i < TILE_VALUES; i++) {
        const uint32_t code = words[i / 2 % 4] >> (4 * (i / 8) + 16 * (i % 2)) & 15;
        high[i] = table[0][code], low[i] = table[1][code];
    }
#endif
}

/* panels_of_tiles() for INT4, one panel too: each value is two of BF16. */
static __attribute__((noinline)) void NAME(tiles_INT4)(const LinearJob *job, int64_t from, int64_t to, int64_t first_panel, int64_t last_panel) {
    enum { DEPTH = BLOCK_DEPTH / 2, TILE = LANES * TILE_VALUES };
    const Linear *w = job->w;
    const int64_t apart = job->k_padded * LANES * 2, rows = to - from, groups = groups_of(w);
    const int shift = NAME(shift_of)(w);
    uint16_t wide[BLOCK_ROWS * BLOCK_DEPTH] __attribute__((aligned(64))); /* [rows / 32][DEPTH / 32][high, low][2 tiles] */
    float sums[CHUNK_TOKENS / LANES * BLOCK_ROWS * LANES] __attribute__((aligned(64)));
    for (int64_t k = 0; k < job->k_padded; k += DEPTH) {
        for (int64_t i = 0; i < (rows + TILED_ROWS - 1) / TILED_ROWS * TILED_ROWS; i++) {
            const int64_t row = least(from + i, w->n - 1), first = row * groups;
            const char *at = (const char *)w->weight + row * w->stride / 2;
            uint16_t *of_row = wide + i / TILED_ROWS * 2 * TILED_ROWS * DEPTH + i % TILED_ROWS * TILE_VALUES;
            __builtin_prefetch(at + k / 2 + DEPTH / 2);
            for (int64_t j = 0; j < DEPTH; j += TILE_VALUES, of_row += 4 * TILE) NAME(nibble_tile)(w, at, first, k + j, shift, of_row, of_row + 2 * TILE);
        }
        TILE_FENCE();
        for (int64_t p = first_panel; p < last_panel; p += 2) {
            const int panels = p + 1 < last_panel ? 2 : 1;
            for (int64_t i = 0; i < rows; i += TILED_ROWS) {
                const char *x = (const char *)NAME(panel_at)(job, p, k);
                const uint16_t *a = wide + i * 2 * DEPTH, *end = a + 2 * TILED_ROWS * DEPTH;
                float *sum = sums + ((p - first_panel) * BLOCK_ROWS + i) * LANES, *more = sum + BLOCK_ROWS * LANES;
                if (k) NAME(load_sums)(sum, more, panels == 2);
                else NAME(zero_sums)();
                for (; a < end; a += 4 * TILE, x += TILE_BYTES) {
                    TILE_STEP(a, a + TILE, x, x + apart, panels);
                    TILE_STEP(a + 2 * TILE, a + 3 * TILE, x, x + apart, panels);
                }
                NAME(store_sums)(sum, more, panels == 2);
            }
        }
        TILE_FENCE();
    }
    for (int64_t p = first_panel; p < last_panel; p++) NAME(finish_panel)(job, p, from, to, sums + (p - first_panel) * BLOCK_ROWS * LANES);
}
