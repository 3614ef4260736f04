/* Work distribution, query preparation and the per-tile computation of decode_attention.cu. It defines HEADS, the maximum
   number of query heads per KV head (4 or 8), and GROUPS consumer warpgroups (CONSUMERS threads in all), which take tiles of
   64 tokens round-robin.

   The context is the M side of WGMMA and the query heads the narrow N side. Queries and probabilities are split into a code
   and the code of the residual, which together keep 8 bits like BF16; the two are adjacent columns of one product. The
   tensor core's sum over 64 tokens is accumulated in FP32. A context that several CTAs share (split-KV) is merged by the
   last of them, in a fixed order of its parts.

   PER_TOKEN_HEAD: a key's scale multiplies its score. A value's scale adds its logarithm to the score, so that the codes are of
   probability times scale, relative to the largest such product; the sum of probabilities divides by it. */

struct Call {
    const u16 *q, *k, *v; /* BF16 heads of 128, q and k not rotated; k and v null: the cache already holds them */
    u16 *out; /* [requests, kv_heads * group, 128] */
    const int *tables, *lengths; /* [requests, table_width] blocks; [requests] */
    const i64 *rotary_rows, *slots; /* [requests], of the new tokens */
    const float *cos_sin; /* [rows, rotated], cosines first */
    const u16 *q_norm, *k_norm; /* [128], or null */
    u8 *k_cache;
    float *parts; /* [CTAs, 2, PART] */
    u32 *counters; /* [requests, kv_heads] zeros */
    float *k_scale, *v_scale; /* of the cache: per layer, or PER_TOKEN_HEAD those of block 0 */
    i64 q_stride, kv_stride;
    int requests, table_width, kv_heads, group, rotated;
    float eps, qk_scale; /* qk_scale includes log2(e) */
};

constexpr int TILE = BLOCK * DIM, COLUMNS = 2 * HEADS, SUMS = COLUMNS / 2, PART = HEADS * (DIM + 2);
constexpr float LEFT = 16.0f, Q_LIMIT = 224.0f, P_LIMIT = 128.0f; /* residuals are scaled by 16 */

/* Consecutive tiles of one request that a CTA computes: part `part` of `parts`, the first of which belongs to CTA `owner`. */
struct Segment { int request, length, first, tiles, part, parts, owner; };
/* A segment's prepared data: queries as code and residual rows in WGMMA's layout, and the new token's key and value. */
struct __align__(1024) Ready {
    u8 queries[COLUMNS * DIM], key[DIM], value[DIM];
    float scale[HEADS], key_scale, value_scale; /* of queries; PER_TOKEN_HEAD: of the new token */
};
struct __align__(512) Probabilities { u8 codes[COLUMNS * BLOCK]; };
struct Sums { float o[HEADS][DIM], peak[HEADS], total[HEADS]; };
typedef float OfWarps[4][HEADS];

/* x [64, COLUMNS] (+)= a [64, 32] b [COLUMNS, 32]^T, with rows of 128 bytes, or of 64. */
template <bool LONG> INLINE void multiply_heads(float (&x)[SUMS], u32 a, u32 b, int add) {
#if HEADS == 4
    asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%4, %7}; mov.b64 b, {%5, %7}; setp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, a, b, p, 1, 1;}"
                 : OUT4(x, 0) : "r"(a), "r"(b), "r"(add), "n"(LONG ? 0x40000040 : 0x80000020));
#else
    asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%8, %11}; mov.b64 b, {%9, %11}; setp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, p, 1, 1;}"
                 : OUT4(x, 0), OUT4(x, 4) : "r"(a), "r"(b), "r"(add), "n"(LONG ? 0x40000040 : 0x80000020));
#endif
}
INLINE float largest(float x, int least) { /* over the lanes that differ in bits from `least` on */
#pragma unroll
    for (int lane = 16; lane >= 1; lane /= 2)
        if (lane >= least) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}
INLINE float sum(float x, int least) {
#pragma unroll
    for (int lane = 16; lane >= 1; lane /= 2)
        if (lane >= least) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
INLINE void group_meets(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 2) : "memory"); }

/* Four adjacent dimensions of a head in each lane of a warp. */
struct Head {
    float x[4];
    INLINE void take(float2 two, float (&to)[4]) {
        const u32 a = __float_as_uint(two.x), b = __float_as_uint(two.y);
        to[0] = low_of(a), to[1] = high_of(a), to[2] = low_of(b), to[3] = high_of(b);
    }
    INLINE void load(const u16 *from) { take(shared_load((const float2 *)(from + threadIdx.x % 32 * 4)), x); }
    /* Norm and rotate as reference.rotate does, rounding to BF16 where the reference stores BF16. */
    INLINE void load_rotated(const u16 *from, const Call &c, const u16 *norm, i64 row) {
        const int d = threadIdx.x % 32 * 4, half = c.rotated / 2, other = d < half ? d + half : d < c.rotated ? d - half : d;
        float y[4];
        load(from);
        take(shared_load((const float2 *)(from + other)), y);
        if (norm) {
            const float factor = rsqrtf(sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], 1) / DIM + c.eps);
            float gain[4], other_gain[4];
            take(*(const float2 *)(norm + d), gain), take(*(const float2 *)(norm + other), other_gain);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = rounded(rounded(x[i] * factor) * gain[i]), y[i] = rounded(rounded(y[i] * factor) * other_gain[i]);
        }
        if (d >= c.rotated) return;
        const float *angles = c.cos_sin + row * c.rotated + (d < half ? d : d - half);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = rounded(x[i] * angles[i] + y[i] * (d < half ? -angles[half + i] : angles[half + i]));
    }
    /* Finite values x / by as codes. */
    INLINE u32 codes(float by) const { return codes_of(finite(x[0]) / by, finite(x[1]) / by, finite(x[2]) / by, finite(x[3]) / by); }
    INLINE float most_finite() const {
        return largest(fmaxf(fmaxf(fabsf(finite(x[0])), fabsf(finite(x[1]))), fmaxf(fabsf(finite(x[2])), fabsf(finite(x[3])))), 1);
    }
};

/* By one warp: one head of a request's queries, as codes and residual codes. */
INLINE void prepare_head(const Call &c, Ready &to, int request, int kv_head, int h, float k_scale) {
    const int lane = threadIdx.x % 32;
    u32 code = 0, left = 0;
    if (h < c.group) {
        Head head;
        const u16 *from = c.q + request * c.q_stride + (kv_head * c.group + h) * DIM;
        if (c.k) head.load_rotated(from, c, c.q_norm, c.rotary_rows[request]);
        else head.load(from);
        const float most = largest(fmaxf(fmaxf(fabsf(head.x[0]), fabsf(head.x[1])), fmaxf(fabsf(head.x[2]), fabsf(head.x[3]))), 1);
        const float scale = fmaxf(most / Q_LIMIT, 1e-12f);
        float back[4];
#pragma unroll
        for (int i = 0; i < 4; i++) head.x[i] /= scale;
        code = codes_of(head.x[0], head.x[1], head.x[2], head.x[3]);
        values_of(code, back);
#pragma unroll
        for (int i = 0; i < 4; i++) head.x[i] = (head.x[i] - back[i]) * LEFT;
        left = codes_of(head.x[0], head.x[1], head.x[2], head.x[3]);
        if (lane == 0) to.scale[h] = scale * (c.qk_scale * k_scale);
    }
    *(u32 *)(to.queries + 2 * h * DIM + ((lane / 4 ^ 2 * h) & 7) * 16 + lane % 4 * 4) = code;
    *(u32 *)(to.queries + (2 * h + 1) * DIM + ((lane / 4 ^ (2 * h + 1)) & 7) * 16 + lane % 4 * 4) = left;
}
INLINE bool ends_with_new_token(const Call &c, const Segment &g) { return c.k && (g.first + g.tiles) * BLOCK >= g.length; }
/* By one warp: the new token's key, or its value, as codes, four per lane. `by`: the scale; PER_TOKEN_HEAD makes it. */
INLINE u32 prepare_new(const Call &c, Ready &to, int request, int kv_head, bool key, float &by) {
    Head head;
    const i64 from = request * c.kv_stride + kv_head * DIM;
    if (key) head.load_rotated(c.k + from, c, c.k_norm, c.rotary_rows[request]);
    else head.load(c.v + from);
    if (PER_TOKEN_HEAD) by = scale_of(head.most_finite()), (key ? to.key_scale : to.value_scale) = by;
    const u32 codes = head.codes(by);
    *(u32 *)((key ? to.key : to.value) + threadIdx.x % 32 * 4) = codes;
    return codes;
}
/* By one warp: zeros for requests without a context, which pad a batch and have no tile; all CTAs of a KV head share this
   work. */
INLINE void clear_empty(const Call &c, int kv_head) {
    const int lane = threadIdx.x % 32, ctas = gridDim.x / c.kv_heads;
    for (int from = blockIdx.x / c.kv_heads; from < c.requests; from += 32 * ctas) {
        const int candidate = from + lane * ctas;
        for (u32 empty = __ballot_sync(~0u, candidate < c.requests && c.lengths[candidate] == 0); empty; empty &= empty - 1) {
            const int request = from + (__ffs(empty) - 1) * ctas;
            u32 *to = (u32 *)(c.out + ((i64)request * c.kv_heads + kv_head) * c.group * DIM);
            for (int i = lane; i < c.group * (DIM / 2); i += 32) to[i] = 0;
        }
    }
}
INLINE void store_key(const Call &c, int request, int kv_head, u32 codes) {
    *(u32 *)(c.k_cache + key_place(c.slots[request], c.kv_heads, kv_head) + threadIdx.x % 32 * 4) = codes;
}
INLINE void store_scale(const Call &c, int request, int kv_head, bool key, float scale) {
    if (threadIdx.x % 32 == 0) (key ? c.k_scale : c.v_scale)[scale_place(c.slots[request], c.kv_heads, kv_head)] = scale;
}

/* A warpgroup's online-softmax state for a segment: each thread has rows and sums of heads 4 * i + threadIdx.x % 4. */
struct State {
    float o[2][SUMS / 2], peak[HEADS / 4], total[HEADS / 4]; /* o: dimensions 64 * half + row + 8 * r, at [half][2 * i + r] */
    float factor[HEADS / 4];
    INLINE State(const Ready &ready, int group) : o{}, total{} {
#pragma unroll
        for (int i = 0; i < HEADS / 4; i++) peak[i] = -1e30f, factor[i] = 4 * i + threadIdx.x % 4 < group ? ready.scale[4 * i + threadIdx.x % 4] : 0;
    }

    /* One tile. A thread's rows are tokens 16 apart, which TMA has placed 8 apart. `left`: context tokens from the tile's
       start on. `scales`: PER_TOKEN_HEAD. */
    INLINE void take(const u8 *keys, const u8 *values, const TokenScales<BLOCK> *scales, const u8 *queries, u8 *p, OfWarps &most_of, int group, int left) {
        const int thread = threadIdx.x % 128, warp = thread / 32, part = thread % 4, row = thread % 32 / 4;
        const int token = warp % 2 * 32 + row / 2 * 4 + warp / 2 * 2 + row % 2;
        float x[SUMS], s[HEADS / 4][2], shrink[HEADS / 4], by[2] = {1, 1}, more[2] = {}, inverse[2] = {1, 1};
#pragma unroll
        for (int r = 0; r < 2 * PER_TOKEN_HEAD; r++) {
            const float scale = scales->values[token + 16 * r];
            by[r] = scales->keys[token + 16 * r], more[r] = log2_of(scale), inverse[r] = inverse_of(scale);
        }
        warpgroup_arrive();
#pragma unroll
        for (int i = 0; i < 4; i++) multiply_heads<true>(x, descriptor(address(keys)) + 2 * i, descriptor(address(queries)) + 2 * i, i);
        warpgroup_commit_batch();
        warpgroup_wait(x);
#pragma unroll
        for (int i = 0; i < HEADS / 4; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float score = (x[4 * i + 2 * r] + x[4 * i + 2 * r + 1] * (1 / LEFT)) * factor[i];
                s[i][r] = token + 16 * r < left ? (PER_TOKEN_HEAD ? fmaf(score, by[r], more[r]) : score) : -1e30f;
            }
            const float most = largest(fmaxf(s[i][0], s[i][1]), 4);
            if (row == 0) most_of[warp][4 * i + part] = most;
        }
        group_meets(group);
#pragma unroll
        for (int i = 0; i < HEADS / 4; i++) {
            const int head = 4 * i + part;
            const float higher = fmaxf(fmaxf(fmaxf(most_of[0][head], most_of[1][head]), fmaxf(most_of[2][head], most_of[3][head])), peak[i]);
            shrink[i] = exp2_of(peak[i] - higher);
            peak[i] = higher;
            total[i] *= shrink[i];
            float y[2], back[4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                y[r] = exp2_of(s[i][r] - higher);
                total[i] = PER_TOKEN_HEAD ? fmaf(y[r], inverse[r], total[i]) : total[i] + y[r];
                y[r] *= P_LIMIT;
            }
            const u32 code = codes_of(y[0], y[1]);
            values_of(code, back);
            const u32 left_over = codes_of((y[0] - back[0]) * LEFT, (y[1] - back[1]) * LEFT);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = token + 16 * r, place = ((at / 16 ^ head) & 3) * 16 + at % 16; /* both rows' chunks are swizzled by row / 2 */
                p[2 * head * BLOCK + place] = code >> 8 * r, p[(2 * head + 1) * BLOCK + place] = left_over >> 8 * r;
            }
        }
        fence_view_async_shared();
        group_meets(group);
        float y[2][SUMS];
        warpgroup_arrive();
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_heads<false>(y[half], descriptor(address(values) + half * (TILE / 2)) + 2 * i, descriptor(address(p)) + 2 * i, i);
        warpgroup_commit_batch();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            warpgroup_wait(y[half]);
#pragma unroll
            for (int v = 0; v < SUMS / 2; v++) o[half][v] = fmaf(o[half][v], shrink[v / 2], (y[half][2 * v] + y[half][2 * v + 1] * (1 / LEFT)) * (1 / P_LIMIT));
        }
    }

    INLINE void keep(Sums &to, OfWarps &totals, int group) const {
        const int thread = threadIdx.x % 128, warp = thread / 32, part = thread % 4, row = thread % 32 / 4;
#pragma unroll
        for (int i = 0; i < HEADS / 4; i++) {
            const float all = sum(total[i], 4);
            if (row == 0) totals[warp][4 * i + part] = all;
            if (row == 0 && warp == 0) to.peak[4 * i + part] = peak[i];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int r = 0; r < 2; r++) to.o[4 * i + part][half * 64 + warp * 16 + row + 8 * r] = o[half][2 * i + r];
        }
        group_meets(group);
        if (thread < HEADS) to.total[thread] = totals[0][thread] + totals[1][thread] + totals[2][thread] + totals[3][thread];
    }
};

/* By a warpgroup: insert the new token's key and value into the tile in shared memory. The tile's values are then stored to
   the cache as a whole: one token's values are bytes far apart, each of which would read and write a memory sector. */
INLINE void insert(const Call &c, const Map &map, const Ready &from, u8 *keys, u8 *values, TokenScales<BLOCK> *scales, int token, int group, int request, int kv_head) {
    const int d = threadIdx.x % 128, row = token % 4 / 2 * 32 + token / 16 * 8 + token % 16 / 4 * 2 + token % 2;
    if (PER_TOKEN_HEAD && d == 0) scales->keys[token] = from.key_scale, scales->values[token] = from.value_scale;
    keys[row * DIM + ((d / 16 ^ row) & 7) * 16 + d % 16] = from.key[d];
    values[d * BLOCK + ((token / 16 ^ d / 2) & 3) * 16 + token % 16] = from.value[d];
    fence_view_async_shared();
    group_meets(group);
    if (d == 0)
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];\n"
                     "cp.async.bulk.commit_group;" ::"l"(&map), "r"(0), "r"(kv_head * DIM), "r"((int)(c.slots[request] / BLOCK)), "r"(address(values)) : "memory");
}
INLINE void await_insertions() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); } /* until shared memory has been read */
INLINE void end_insertions() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Accumulate online-softmax results over consecutive parts of a context. */
struct Together {
    float peak = -1e30f, total = 0, o = 0;
    INLINE void add(float their_peak, float their_total, float their_o) {
        const float higher = fmaxf(peak, their_peak), old_weight = exp2_of(peak - higher), new_weight = exp2_of(their_peak - higher);
        peak = higher, total = total * old_weight + their_total * new_weight, o = o * old_weight + their_o * new_weight;
    }
};
/* Merge the warpgroups' results; for a shared context, the last CTA to finish merges those of all CTAs. */
INLINE void finish(const Call &c, const Segment &g, int kv_head, const Sums (&sums)[GROUPS], const float &v_scale, bool &last) {
    constexpr int EACH = (HEADS * DIM + CONSUMERS - 1) / CONSUMERS;
    consumers_sync();
    Together all[EACH];
    float *my_part = c.parts + ((i64)blockIdx.x * 2 + (g.part == 0)) * PART;
#pragma unroll
    for (int at = threadIdx.x, i = 0; i < EACH; i++, at += CONSUMERS) {
        if (at >= c.group * DIM) break;
        const int head = at / DIM, d = at % DIM;
        for (int group = 0; group < min(GROUPS, g.tiles); group++) all[i].add(sums[group].peak[head], sums[group].total[head], sums[group].o[head][d]);
        if (g.parts > 1) {
            my_part[at] = all[i].o;
            if (d == 0) my_part[HEADS * DIM + head] = all[i].peak, my_part[HEADS * DIM + HEADS + head] = all[i].total;
        }
    }
    if (g.parts > 1) {
        consumers_sync();
        if (threadIdx.x == 0) {
            u32 *counter = c.counters + g.request * c.kv_heads + kv_head;
            last = signal_and_count(counter) == g.parts - 1;
            if (last) *counter = 0; /* reset for the next launch */
        }
        consumers_sync();
        if (!last) return;
    }
#pragma unroll
    for (int at = threadIdx.x, i = 0; i < EACH; i++, at += CONSUMERS) {
        if (at >= c.group * DIM) break;
        const int head = at / DIM;
        if (g.parts > 1) {
            all[i] = Together();
            for (int part = 0; part < g.parts; part++) {
                const float *other = c.parts + ((i64)((g.owner + part) * c.kv_heads + kv_head) * 2 + (part == 0)) * PART;
                all[i].add(shared_load(other + HEADS * DIM + head), shared_load(other + HEADS * DIM + HEADS + head), shared_load(other + at));
            }
        }
        c.out[((i64)g.request * c.kv_heads + kv_head) * c.group * DIM + at] = narrow(all[i].o * (v_scale / all[i].total));
    }
}

/* TMA loads of a block: keys, with token 16u + 4t + 2i + e at 32i + 8u + 2t + e; its values; its scales. */
INLINE void copy_block(const Call &c, u8 *keys, u8 *values, TokenScales<BLOCK> *scales, const Map &key_map, const Map &value_map, const u64 *full, int kv_head, int block) {
    expect(full, 2 * TILE + PER_TOKEN_HEAD * 8 * BLOCK);
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%2, {%4, %5, %5, %5, %6}], [%7];\n"
                 "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%1], [%3, {%5, %4, %6}], [%7];"
                 ::"r"(address(keys)), "r"(address(values)), "l"(&key_map), "l"(&value_map), "r"(kv_head * DIM), "r"(0), "r"(block),
                   "r"(address(full)) : "memory");
    if (PER_TOKEN_HEAD) copy_scales(scales->keys, scales->values, c.k_scale, c.v_scale, block, c.kv_heads, kv_head, full);
}

/* Tile scheduler: the tiles of all contexts, concatenated, are divided evenly; each CTA of a KV head takes a contiguous
   range. A warp enumerates the CTA's segments one by one. */
struct Dealer {
    i64 shares, share;
    int all = 0, begin, end, first = -32, base = 0, length, tiles, until; /* each lane has a request from `first` on, whose tiles end at `until` */
    u32 owned = 0; /* mask of lanes whose requests have tiles in the CTA's range */

    INLINE int length_of(const Call &c, int request) { return request < c.requests ? c.lengths[request] : 0; }
    INLINE Dealer(const Call &c) {
        const int lane = threadIdx.x % 32;
        for (int from = 0; from < c.requests; from += 32) all += (length_of(c, from + lane) + BLOCK - 1) / BLOCK;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) all += __shfl_xor_sync(~0u, all, i);
        shares = min((int)gridDim.x / c.kv_heads, all), share = blockIdx.x / c.kv_heads;
        begin = share < shares ? all * share / shares : all, end = share < shares ? all * (share + 1) / shares : all;
    }
    INLINE Segment next(const Call &c) {
        const int lane = threadIdx.x % 32;
        while (!owned) {
            first += 32;
            if (first >= c.requests || base >= end) return {};
            length = length_of(c, first + lane), until = tiles = (length + BLOCK - 1) / BLOCK;
#pragma unroll
            for (int i = 1; i < 32; i *= 2) {
                const int other = __shfl_up_sync(~0u, until, i);
                if (lane >= i) until += other;
            }
            until += base;
            base = __shfl_sync(~0u, until, 31);
            owned = __ballot_sync(~0u, tiles && until > begin && until - tiles < end);
        }
        const int which = __ffs(owned) - 1, stop = __shfl_sync(~0u, until, which), start = stop - __shfl_sync(~0u, tiles, which);
        owned &= owned - 1;
        const int from = max(start, begin) - start;
        /* the CTA that owns a tile: the last whose range begins at or before it */
        const int owner = ((i64)(start + 1) * shares + all - 1) / all - 1, last = ((i64)stop * shares + all - 1) / all - 1;
        return {first + which, __shfl_sync(~0u, length, which), from, min(stop, end) - start - from, (int)share - owner, last - owner + 1, owner};
    }
};
