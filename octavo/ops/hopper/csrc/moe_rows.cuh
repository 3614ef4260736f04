/* What moe_decode.cu does with a token's row between products: quantize, add and norm, choose experts. */

INLINE void unpack(uint4 w, float (&value)[8]) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; j++) value[2 * j] = low_of(words[j]), value[2 * j + 1] = high_of(words[j]);
}
INLINE float amax_of(uint4 w) {
    const u32 most = larger(larger(w.x & 0x7FFF7FFF, w.y & 0x7FFF7FFF), larger(w.z & 0x7FFF7FFF, w.w & 0x7FFF7FFF));
    return fmaxf(low_of(most), high_of(most));
}
/* Codes of eight values over their scale, times whose inverse is rounded differently: of groups, a step of Newton's corrects it. */
INLINE uint2 codes_of(uint4 w, float scale, float inverse) {
    float x[8];
    unpack(w, x);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float y = x[j] * inverse;
        x[j] = BLOCKS ? fmaf(fmaf(-y, scale, x[j]), inverse, y) : y;
    }
    return {codes_of(x[0], x[1], x[2], x[3]), codes_of(x[4], x[5], x[6], x[7])};
}
INLINE float scale_of(float most) { return fmaxf(most / LIMIT, FLOOR); }

template <bool MOST> INLINE float over_lanes(float x, int lanes) {
#pragma unroll
    for (int i = 16; i; i /= 2)
        if (i < lanes) {
            const float other = __shfl_xor_sync(~0u, x, i);
            x = MOST ? fmaxf(x, other) : x + other;
        }
    return x;
}
/* All-reduce over the LANES threads of a row: sum, or maximum. */
template <bool MOST> INLINE float over_row(float x, float (&room)[WARPS]) {
    x = over_lanes<MOST>(x, 32);
    if (WARPS_OF_ROW == 1) return x;
    if (lane_of() == 0) room[warp_of()] = x;
    consumers_sync();
    const int first = warp_of() / WARPS_OF_ROW * WARPS_OF_ROW;
    x = room[first];
#pragma unroll
    for (int w = 1; w < WARPS_OF_ROW; w++) x = MOST ? fmaxf(x, room[first + w]) : x + room[first + w];
    return x;
}

/* A token's row of WIDTH values: eight contiguous values per thread, repeated every LANES * 8. */
template <int WIDTH> struct Row {
    static constexpr int CHUNKS = up(WIDTH / 8, LANES);
    uint4 words[CHUNKS];
    INLINE static int place(int i) { return ((int)threadIdx.x % LANES + i * LANES) * 8; }
    /* The first `limit` values, then zeros. */
    INLINE void load(const u16 *from, int limit) {
        from += place(0); /* and constant offsets */
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) words[i] = place(i) < limit ? shared_load((const void *)(from + i * LANES * 8)) : uint4{};
    }
    INLINE void find_scale(float *scale, SmemState &smem) const {
        float most = 0;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) most = fmaxf(most, amax_of(words[i]));
        *scale = scale_of(over_row<true>(most, smem.room[2]));
    }
    /* Codes of the first `limit` values, laid out by place_of<STEPS>(). `scale`: the row's; of BLOCKS, set to its groups'. */
    template <int STEPS> INLINE void quantize(u8 *codes, int row, int limit, float *scale) const {
        const float whole = BLOCKS ? 0 : *scale, inverse = BLOCKS ? 0 : 1.0f / whole;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            float its = whole;
            if (BLOCKS) { /* 16 threads have a group of 128 */
                its = scale_of(over_lanes<true>(amax_of(words[i]), 16));
                if (place(i) < limit && place(i) % STEP == 0) scale[place(i) / STEP] = its;
            }
            if (place(i) < limit) *(uint2 *)(codes + place_of<STEPS>(row, place(i))) = codes_of(words[i], its, BLOCKS ? 1.0f / its : inverse);
        }
    }
};

/* Codes of a part of attention's output, O_PART K steps. The first part finds the scales of whole rows. */
INLINE void quantize_attended(const Between &s, u8 *inputs, SmemState &smem, int part) {
    constexpr int STEPS = O_PART < WIDE / STEP ? O_PART : WIDE / STEP;
    const int begin = part * STEPS;
#pragma unroll 1
    for (int row = warp_of() / WARPS_OF_ROW; row < TOKENS; row += WARPS / WARPS_OF_ROW) {
        const bool is_there = row < s.tokens;
        const u16 *from = s.attended + (i64)row * WIDE;
        if (!BLOCKS && STEPS < WIDE / STEP && !part) {
            Row<WIDE> whole;
            whole.load(from, is_there ? WIDE : 0);
            whole.find_scale(smem.scale[row], smem);
        }
        const int limit = is_there ? min(WIDE - begin * STEP, STEPS * STEP) : 0;
        Row<STEPS * STEP> x;
        x.load(from + begin * STEP, limit);
        if (!BLOCKS && STEPS == WIDE / STEP) x.find_scale(smem.scale[row], smem);
        x.template quantize<STEPS>(inputs, row, limit, smem.scale[row] + (BLOCKS ? begin : 0));
    }
}

/* Add a product to the residual and norm it: codes in `inputs`. MIDDLE: behind o, with the router's logits of expert
   blockIdx.x; otherwise behind down. */
template <bool MIDDLE> INLINE void norm_rows(const Between &s, u8 *inputs, SmemState &smem) {
    const u16 *from = MIDDLE ? s.residual : s.middle, *product = MIDDLE ? s.o_out : s.down_out, *norm = MIDDLE ? s.post_norm : s.next_norm;
    const bool routes = MIDDLE && blockIdx.x < EXPERTS;
    Row<HIDDEN> gain, router;
    if (WARPS_OF_ROW > 1) gain.load(norm, norm ? HIDDEN : 0);
    if (MIDDLE && WARPS_OF_ROW > 1) router.load(s.router + (i64)blockIdx.x * HIDDEN, routes ? HIDDEN : 0);
    grid_wait(s, MIDDLE ? O_DONE : DOWN_DONE);
    if (!norm && blockIdx.x >= s.tokens) return; /* behind the last layer only the sum is wanted */
#pragma unroll 1
    for (int row = warp_of() / WARPS_OF_ROW; row < TOKENS; row += WARPS / WARPS_OF_ROW) {
        const bool is_there = row < s.tokens;
        Row<HIDDEN> x, y;
        u16 *to = (MIDDLE ? s.middle : s.residual) + (i64)row * HIDDEN + x.place(0);
        x.load(from + (i64)row * HIDDEN, is_there ? HIDDEN : 0), y.load(product + (i64)row * HIDDEN, is_there ? HIDDEN : 0);
        if (MIDDLE && WARPS_OF_ROW == 1) router.load(s.router + (i64)blockIdx.x * HIDDEN, routes ? HIDDEN : 0);
        float squares = 0, logit = 0;
#pragma unroll
        for (int i = 0; i < Row<HIDDEN>::CHUNKS; i++) {
            float a[8], b[8];
            unpack(x.words[i], a), unpack(y.words[i], b);
            x.words[i] = uint4{narrow_two(a[0] + b[0], a[1] + b[1]), narrow_two(a[2] + b[2], a[3] + b[3]), narrow_two(a[4] + b[4], a[5] + b[5]),
                               narrow_two(a[6] + b[6], a[7] + b[7])};
            if (is_there && blockIdx.x == row && x.place(i) < HIDDEN) *(uint4 *)(to + i * LANES * 8) = x.words[i];
            unpack(x.words[i], a);
#pragma unroll
            for (int j = 0; j < 8; j++) squares += a[j] * a[j];
        }
        const float factor = rsqrtf(over_row<false>(squares, smem.room[0]) / HIDDEN + s.eps);
        if (WARPS_OF_ROW == 1) gain.load(norm, norm ? HIDDEN : 0);
#pragma unroll
        for (int i = 0; i < Row<HIDDEN>::CHUNKS * 4; i++) {
            u32 &two = ((u32 *)x.words)[i];
            two = times(narrow_two(low_of(two) * factor, high_of(two) * factor), ((const u32 *)gain.words)[i]);
            if (MIDDLE) {
                const u32 weight = ((const u32 *)router.words)[i];
                logit += low_of(two) * low_of(weight) + high_of(two) * high_of(weight);
            }
        }
        if (!BLOCKS) x.find_scale(smem.scale[row], smem);
        x.template quantize<HIDDEN / STEP>(inputs, row, is_there ? HIDDEN : 0, smem.scale[row]);
        if (MIDDLE) {
            logit = over_row<false>(logit, smem.room[1]);
            if (routes && is_there && threadIdx.x % LANES == 0) s.logits[row * EXPERTS + blockIdx.x] = logit;
        }
    }
}

/* Softmax over all experts and the TOP_K most likely ones of each token, ties to the smaller number: `mask`, `weight`, `list`,
   and the pairs' order. */
INLINE void route(const Between &s, SmemState &smem) {
    constexpr int EACH = up(EXPERTS, 32);
    const int lane = lane_of();
    grid_wait(s, LOGITS_DONE);
    for (int token = warp_of(); token < s.tokens; token += WARPS) {
        float score[EACH], most = -1e38f, total = 0;
        u32 key[EACH]; /* in the order of scores: 0 is taken, 1 not a number */
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int expert = lane + 32 * i;
            score[i] = expert < EXPERTS ? shared_load(s.logits + token * EXPERTS + expert) : -1e38f;
            most = fmaxf(most, score[i]);
        }
        const bool is_there = __ldg(s.lengths + token) > 0;
        most = over_lanes<true>(most, 32);
#pragma unroll
        for (int i = 0; i < EACH; i++) score[i] = lane + 32 * i < EXPERTS ? __expf(score[i] - most) : 0, total += score[i];
        total = over_lanes<false>(total, 32);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            score[i] /= total;
            key[i] = lane + 32 * i >= EXPERTS ? 0 : score[i] >= 0 ? __float_as_uint(score[i]) + 2 : 1;
        }
        float chosen = 0, mine = 0;
        int of_mine = 0;
#pragma unroll
        for (int k = 0; k < TOP_K; k++) {
            u32 best = 0, found = ~0u;
#pragma unroll
            for (int i = 0; i < EACH; i++) best = max(best, key[i]);
            best = __reduce_max_sync(~0u, best);
            float its = 0;
#pragma unroll
            for (int i = EACH - 1; i >= 0; i--)
                if (key[i] == best) found = lane + 32 * i;
            found = __reduce_min_sync(~0u, found);
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (found == lane + 32 * i) key[i] = 0, its = score[i];
            its = __shfl_sync(~0u, its, found % 32);
            chosen += its;
            if (lane == k) mine = its, of_mine = found;
        }
        if (lane < TOP_K && is_there) {
            atomicOr(smem.mask + of_mine, 1u << token);
            smem.weight[of_mine][token] = (NORMALIZE ? mine / (chosen + 1e-20f) : mine) * s.router_scale;
        }
    }
    consumers_sync();
    if (warp_of() == 0) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const bool in_use = lane + 32 * i < EXPERTS && smem.mask[lane + 32 * i];
            const u32 all = __ballot_sync(~0u, in_use);
            if (in_use) smem.list[count + __popc(all & ((1u << lane) - 1))] = lane + 32 * i;
            count += __popc(all);
        }
        if (lane == 0) smem.active = count;
        __syncwarp();
        if (lane == 0) arrive(&smem.routed);
        int pairs = 0;
        for (int from = 0; from < count; from += 32) {
            const int entry = from + lane;
            u32 tokens = entry < count ? smem.mask[smem.list[entry]] : 0;
            int until = __popc(tokens);
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                const int other = __shfl_up_sync(~0u, until, i);
                if (lane >= i) until += other;
            }
            int pair = pairs + until - __popc(tokens);
            if (entry < count) smem.first[entry] = pair;
            for (; tokens; tokens &= tokens - 1, pair++) smem.entry_of[pair] = entry, smem.token_of[pair] = __ffs(tokens) - 1;
            pairs += __shfl_sync(~0u, until, 31);
        }
        if (lane == 0) smem.first[count] = pairs;
    }
    wait(&smem.routed, 0);
    /* Scales of the experts in use, before the queue for memory grows. */
    constexpr int GATE_UP_LINES = up(BLOCKS ? up(2 * INTER, STEP) * (HIDDEN / STEP) : 2 * INTER, 8), DOWN_LINES = up(BLOCKS ? up(HIDDEN, STEP) * (INTER / STEP) : HIDDEN, 8);
    constexpr int ALL = GATE_UP_LINES + DOWN_LINES;
    for (int i = blockIdx.x * CONSUMERS + threadIdx.x; i < smem.active * ALL; i += CTAS * CONSUMERS) {
        const int expert = smem.list[i / ALL], line = i % ALL;
        if (line < GATE_UP_LINES) prefetch(s.gate_up_scale + expert * (BLOCKS ? up(2 * INTER, STEP) * (HIDDEN / STEP) : 2 * INTER) + line * 8);
        else prefetch(s.down_scale + expert * (BLOCKS ? up(HIDDEN, STEP) * (INTER / STEP) : HIDDEN) + (line - GATE_UP_LINES) * 8);
    }
}

/* Codes of act of all pairs, a warp a row. */
INLINE void quantize_act(const Between &s, u8 *codes, SmemState &smem) {
    constexpr int CHUNKS = up(INTER / 8, 32), AT_ONCE = larger_of(1, smaller_of(PAIRS / WARPS, 12 / CHUNKS));
    const int pairs = smem.first[smem.active], lane = lane_of();
    for (int begin = warp_of(); begin < pairs; begin += WARPS * AT_ONCE) {
        uint4 words[AT_ONCE][CHUNKS];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            const int pair = min(begin + r * WARPS, pairs - 1);
            const u16 *from = s.act + ((i64)smem.entry_of[pair] * TOKENS + smem.token_of[pair]) * INTER + lane * 8;
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) words[r][i] = (lane + 32 * i) * 8 < INTER ? shared_load((const void *)(from + 32 * i * 8)) : uint4{};
        }
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            const int pair = begin + r * WARPS;
            if (pair >= pairs) break;
            float scale = 1.0f;
            if (!BLOCKS) {
                float most = 0;
#pragma unroll
                for (int i = 0; i < CHUNKS; i++) most = fmaxf(most, amax_of(words[r][i]));
                scale = scale_of(over_lanes<true>(most, 32));
            }
            if (lane == 0) smem.by_pair[pair] = scale * smem.weight[smem.list[smem.entry_of[pair]]][smem.token_of[pair]];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const int place = (lane + 32 * i) * 8;
                float of_group = scale;
                if (BLOCKS) {
                    of_group = scale_of(over_lanes<true>(amax_of(words[r][i]), 16));
                    if (place < INTER && place % STEP == 0) smem.act_scale[pair][place / STEP] = of_group;
                }
                if (place < INTER) *(uint2 *)(codes + place_of<DOWN_STEPS>(pair, place)) = codes_of(words[r][i], of_group, 1.0f / of_group);
            }
        }
    }
}
