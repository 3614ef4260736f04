/* Grouped GEMM of FP8 codes, sorted by expert, by a stack of experts' weights; with GATED the first product of a mixture of
   experts, y = silu(x gate^T) * (x up^T).

   A tile is ROWS rows of an expert's weight by up to TOKENS of its pairs of token and expert. The weight's rows are WGMMA's M
   side and the pairs its N side, which is as wide as the tile has pairs, in steps of 32: an expert's last tile costs what it
   holds. One persistent CTA runs on each SM: two consumer warpgroups multiply half of the rows each, a producer warp loads
   weights by TMA, and others the codes: by TMA if they lie in sorted order, else (GATED) row by row from their tokens.

   The host does not know how many pairs an expert has. Each CTA counts tiles by `starts` and takes every gridDim.x-th.

   Scales: of codes one a row, of weights one a row; with BLOCKS one for each 128 codes of a row, and one for each 128 x 128 of
   a weight. GATED gives BF16 values, or with IN_GROUPS codes with a scale for each 128 channels, which are a tile's: no CTA
   waits for another, and the second product of few tokens has time to scale each 128 of its sum. Sums of 128 are the tensor
   core's, which keeps about 14 bits; unless scaled in between, so are whole sums. */

#include "types.cuh"

struct Grouped {
    Map weight, x; /* boxes of ROWS rows, of TOKENS pairs, by 128 codes; x without GATED */
    const u8 *codes; /* with GATED, [T, width] */
    const int *order, *starts;
    const float *by_token; /* [rows of codes, groups] */
    const float *by_row; /* [experts, weight's rows], or with BLOCKS [experts, weight's rows / 128, steps] */
    u16 *out; /* BF16 [pairs, channels], unless IN_GROUPS */
    u8 *out_codes; /* IN_GROUPS: [pairs, out_width] */
    float *out_scale; /* [pairs, across] */
    int experts, top_k, width, steps, groups, channels, across, out_width; /* across: tiles along the weight's rows */
};

constexpr bool IN_GROUPS = GATED && (BLOCKS || TOKENS == 32); /* of the result */
constexpr bool PROMOTES = BLOCKS || (!GATED && TOKENS == 32); /* codes have scales in groups */
constexpr int DEPTH = 128, ROWS = 256, HALVES = ROWS / 128; /* a warpgroup multiplies HALVES times 64 rows */
constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128, WARPS = CONSUMERS / 32;
constexpr int X = TOKENS * DEPTH, W = ROWS * DEPTH, STAGES = TOKENS > 32 ? 4 : 5; /* X and W in bytes */
constexpr int TILE = GATED ? ROWS / 2 : ROWS, SLICE = TILE / GROUPS; /* channels of a tile, of a warpgroup */
constexpr int RESIDENT = TOKENS > 32 ? 1 : 2; /* CTAs for whose registers an SM has room: kernels before and behind take the rest */
constexpr int GATHERERS = 96, MOST_EXPERTS = 512, PART = 32; /* PART: pairs that are staged at once */
constexpr float LIMIT = 448.0f, FLOOR = 1.0f / (448 * 512); /* of scales, as in reference.py */

struct Shared {
    u8 weight[STAGES][W], x[STAGES][X];
    u16 staged[GROUPS][PART * SLICE];
    float by_token[GROUPS][TOKENS], by_group[STAGES][TOKENS], most[2][GROUPS][PART];
    int first[MOST_EXPERTS + 1], starts[MOST_EXPERTS + 1]; /* an expert's first tile of pairs, and first pair */
    int rows[TOKENS]; /* GATED: a tile's tokens */
    u64 full[STAGES], empty[STAGES];
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

#include "ptx.cuh"
#include "wgmma_widths.cuh"

INLINE void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }
/* Store 8 channels of each of 32 pairs, transposed (stmatrix): this lane's pair at `to`. */
INLINE void put(u16 *to, const u32 (&y)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(to)), "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3]) : "memory");
}
/* The staging buffer's place of 8 channels of a pair, so that neither the pairs of a chunk nor the chunks of a pair meet in a
   bank. */
INLINE int staged_at(int pair, int chunk) { return pair * SLICE + (chunk ^ pair % 8) * 8; }

/* The tile scheduler. Tiles of the same rows of a weight are next to one another, so that it is read from memory once. */
struct Tiles {
    const Grouped &s;
    const Shared &m;
    int at, expert, place, count, block; /* the tile's first pair; its pairs; its place along the weight's rows */
    INLINE Tiles(const Grouped &s, const Shared &m) : s(s), m(m), at(blockIdx.x) {}
    INLINE bool next() {
        if (at >= m.first[s.experts] * s.across) return false;
        expert = 0;
#pragma unroll 1
        for (int step = MOST_EXPERTS / 2; step; step >>= 1)
            if (expert + step < s.experts && m.first[expert + step] * s.across <= at) expert += step;
        const int first = m.first[expert], tall = m.first[expert + 1] - first, in = at - first * s.across;
        block = in / tall, place = m.starts[expert] + in % tall * TOKENS, count = min(TOKENS, m.starts[expert + 1] - place);
        at += gridDim.x;
        return true;
    }
    INLINE int padded() const { return (count + PART - 1) / PART * PART; }
};
/* A warp counts the experts' tiles. */
INLINE void count_tiles(const Grouped &s, Shared &m) {
    const int each = (s.experts + 31) / 32, begin = min(threadIdx.x * each, s.experts), end = min(begin + each, s.experts);
    int sum = 0;
    for (int e = begin; e < end; e++) {
        const int start = s.starts[e];
        m.starts[e] = start, m.first[e] = sum;
        sum += (s.starts[e + 1] - start + TOKENS - 1) / TOKENS;
    }
    int until = sum;
    for (int i = 1; i < 32; i *= 2) {
        const int other = __shfl_up_sync(~0u, until, i);
        if (threadIdx.x >= i) until += other;
    }
    for (int e = begin; e < end; e++) m.first[e] += until - sum;
    if (threadIdx.x == 31) m.first[s.experts] = until, m.starts[s.experts] = s.starts[s.experts];
}

#define COPY(D) "cp.async.bulk.tensor." #D "d.shared::cluster.global.mbarrier::complete_tx::bytes"
#define COPY_HINTED(D) COPY(D) ".L2::cache_hint [%0], [%1, "
INLINE void produce_weights(const Grouped &s, Shared &m) {
    PipelineState<STAGES> at;
    Tiles tile(s, m);
    u64 policy; /* of few tokens a weight is read once, and should not drive values out of L2 */
    if (TOKENS > 32) asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    else asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    while (tile.next())
#pragma unroll 1
        for (int k = 0; k < s.steps; k++, at.next()) {
            const u32 full = address(m.full + at.at), to = address(m.weight[at.at]);
            wait(m.empty + at.at, at.parity ^ 1);
            expect(m.full + at.at, W);
            if (GATED) /* 8 rows of gate, 8 of up, and so on: a thread that has a channel's gate has its up, too */
                asm volatile(COPY_HINTED(5) "{%2, %3, %3, %4, %5}], [%6], %7;" ::"r"(to), "l"(&s.weight), "r"(k * DEPTH), "r"(0), "r"(tile.block * (TILE / 8)), "r"(tile.expert), "r"(full), "l"(policy) : "memory");
            else asm volatile(COPY_HINTED(3) "{%2, %3, %4}], [%5], %6;" ::"r"(to), "l"(&s.weight), "r"(k * DEPTH), "r"(tile.block * TILE), "r"(tile.expert), "r"(full), "l"(policy) : "memory");
        }
}
/* Copy BYTES, or zeros. */
template <int BYTES> INLINE void copy_async(u32 to, const void *from, bool is) {
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(is ? 4 : 0) : "memory");
}
/* Arrive when this thread's copies so far are complete. */
INLINE void arrive_with_copies(const u64 *barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(barrier)) : "memory"); }
#if GATED
/* Rows of tokens, 16 bytes at a time, in WGMMA's layout. */
INLINE void produce_codes(const Grouped &s, Shared &m) {
    constexpr int PASS = GATHERERS / 8;
    const int thread = threadIdx.x - CONSUMERS - 32, chunk = thread % 8;
    PipelineState<STAGES> at;
    Tiles tile(s, m);
    while (tile.next()) {
        const int rows = tile.padded();
        asm volatile("bar.sync 4, %0;" ::"n"(GATHERERS) : "memory"); /* all have read the last tile's */
        for (int r = thread; r < rows; r += GATHERERS) m.rows[r] = r < tile.count ? s.order[tile.place + r] / s.top_k : -1;
        asm volatile("bar.sync 4, %0;" ::"n"(GATHERERS) : "memory");
#pragma unroll 1
        for (int k = 0; k < s.steps; k++, at.next()) {
            const int column = k * DEPTH + chunk * 16;
            const u32 to = address(m.x[at.at]);
            wait(m.empty + at.at, at.parity ^ 1);
#pragma unroll 4
            for (int r = thread / 8; r < rows; r += PASS) {
                const int token = m.rows[r];
                copy_async<16>(to + r * DEPTH + (chunk ^ r & 7) * 16, s.codes + (i64)max(token, 0) * s.width + column, token >= 0 && column < s.width);
            }
            if (PROMOTES)
                for (int r = thread; r < rows; r += GATHERERS) copy_async<4>(address(m.by_group[at.at] + r), s.by_token + (i64)max(m.rows[r], 0) * s.groups + k, m.rows[r] >= 0);
            arrive_with_copies(m.full + at.at);
        }
    }
}
#else
INLINE void produce_codes(const Grouped &s, Shared &m) {
    const int lane = threadIdx.x % 32;
    PipelineState<STAGES> at;
    Tiles tile(s, m);
    while (tile.next())
#pragma unroll 1
        for (int k = 0; k < s.steps; k++, at.next()) {
            const u64 *full = m.full + at.at;
            wait(m.empty + at.at, at.parity ^ 1);
            if (lane == 0) {
                expect(full, X);
                asm volatile(COPY(2) " [%0], [%1, {%2, %3}], [%4];" ::"r"(address(m.x[at.at])), "l"(&s.x), "r"(k * DEPTH), "r"(tile.place), "r"(address(full)) : "memory");
            }
            if (PROMOTES) {
                for (int r = lane; r < TOKENS; r += 32) copy_async<4>(address(m.by_group[at.at] + r), s.by_token + (i64)(tile.place + min(r, tile.count - 1)) * s.groups + k, r < tile.count);
                arrive_with_copies(full);
            }
        }
}
#endif

/* Value 4j + 2i + c of a thread's sums is of row lane / 4 + 8i of its warp's 16, and of pair 8j + lane % 4 * 2 + c. */
typedef float Sums[HALVES][TOKENS / 2];
/* Issue sums = (add ? sums : 0) + rows [64, 128] x [N, 128]^T, both in rows of 128 bytes. */
template <int N> INLINE void multiply(float *sums, u32 rows, u32 x, bool add) {
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<N>(sums, descriptor(rows) + 2 * k, descriptor(x) + 2 * k, k ? 1 : add);
}
/* Mainloop over K for a tile of at most N pairs. */
template <int N> INLINE void mainloop(const Grouped &s, Shared &m, const Tiles &tile, PipelineState<STAGES> &at, int group, Sums &sums) {
    const int lane = threadIdx.x % 32;
    if constexpr (PROMOTES) {
        const float *scales[2]; /* with BLOCKS, of this thread's rows 8i: of gate and of up, or the same */
        const int each = s.channels / 128, of = GATED ? 2 * each * tile.expert + tile.block : (each + (s.channels % 128 > 0)) * tile.expert + min(tile.block * GROUPS + group, (s.channels - 1) / 128);
        scales[0] = s.by_row + (i64)of * s.steps, scales[1] = GATED ? scales[0] + (i64)each * s.steps : scales[0];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int v = 0; v < N / 2; v++) sums[h][v] = 0;
#pragma unroll 1
        for (int k = 0; k < s.steps; k++, at.next()) {
            const float by_block[2] = {BLOCKS ? __ldg(scales[0] + k) : 1, BLOCKS && GATED ? __ldg(scales[1] + k) : 1}; /* the second of up's */
            wait(m.full + at.at, at.parity);
            if (GATED) fence_view_async_shared(); /* codes came by plain copies */
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float part[N / 2];
                warpgroup_arrive();
                multiply<N>(part, address(m.weight[at.at]) + (group * HALVES + h) * 64 * DEPTH, address(m.x[at.at]), false);
                warpgroup_commit_batch();
                warpgroup_wait(part);
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
                    const float2 by = *(const float2 *)(m.by_group[at.at] + 8 * j + lane % 4 * 2);
                    const float low[2] = {by.x * by_block[0], GATED ? by.x * by_block[1] : by.x * by_block[0]}, high[2] = {by.y * by_block[0], GATED ? by.y * by_block[1] : by.y * by_block[0]};
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float *y = sums[h] + 4 * j + 2 * i, *x = part + 4 * j + 2 * i;
                        y[0] = fmaf(x[0], low[i], y[0]), y[1] = fmaf(x[1], high[i], y[1]);
                    }
                }
            }
            __syncwarp(); /* all lanes have read their scales */
            if (lane == 0) arrive(m.empty + at.at);
        }
    } else {
        int before = 0;
#pragma unroll 1
        for (int k = 0; k < s.steps; k++, at.next()) {
            wait(m.full + at.at, at.parity);
            if (GATED) fence_view_async_shared();
            warpgroup_arrive();
#pragma unroll
            for (int h = 0; h < HALVES; h++) multiply<N>(sums[h], address(m.weight[at.at]) + (group * HALVES + h) * 64 * DEPTH, address(m.x[at.at]), k > 0);
            warpgroup_commit_batch();
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); /* all but the step just issued are complete */
            if (k > 0 && lane == 0) arrive(m.empty + before);
            before = at.at;
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) warpgroup_wait(sums[h]);
        if (lane == 0) arrive(m.empty + before);
    }
}

/* Store a part of a tile's pairs that this warpgroup has staged, [PART, SLICE], from `place` on, as BF16. */
INLINE void store_values(const Grouped &s, const u16 *staged, int place, int count, int channel) {
    constexpr int CHUNKS = SLICE / 8; /* of a pair, 16 bytes each */
#pragma unroll
    for (int i = 0; i < PART * CHUNKS / 128; i++) {
        const int at = threadIdx.x % 128 + 128 * i, pair = at / CHUNKS, chunk = at % CHUNKS;
        if (pair < count && channel + chunk * 8 < s.channels)
            *(uint4 *)(s.out + (i64)(place + pair) * s.channels + channel + chunk * 8) = *(const uint4 *)(staged + staged_at(pair, chunk));
    }
}
/* Or as codes with a scale for both warpgroups' channels. `turn` alternates, so that maxima are not overwritten unread. */
INLINE void store_codes(const Grouped &s, Shared &m, int group, const u16 *staged, int place, int count, int channel, int block, int turn) {
    uint4 y[2];
    float most[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pair = threadIdx.x % 128 / 8 + 16 * i, chunk = threadIdx.x % 8;
        constexpr u32 ABS = 0x7FFF7FFF;
        y[i] = *(const uint4 *)(staged + staged_at(pair, chunk));
        u32 two = larger(larger(y[i].x & ABS, y[i].y & ABS), larger(y[i].z & ABS, y[i].w & ABS));
#pragma unroll
        for (int d = 4; d; d /= 2) two = larger(two, __shfl_xor_sync(~0u, two, d));
        most[i] = fmaxf(low_of(two), high_of(two));
        if (chunk == 0) m.most[turn][group][pair] = most[i];
    }
    consumers_sync();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pair = threadIdx.x % 128 / 8 + 16 * i, chunk = threadIdx.x % 8, at = channel + chunk * 8;
        const float scale = fmaxf(__fdiv_rn(fmaxf(most[i], m.most[turn][1 - group][pair]), LIMIT), FLOOR), by = __frcp_rn(scale);
        if (pair >= count) continue;
        const u32 low = codes_of(low_of(y[i].x) * by, high_of(y[i].x) * by, low_of(y[i].y) * by, high_of(y[i].y) * by);
        const u32 high = codes_of(low_of(y[i].z) * by, high_of(y[i].z) * by, low_of(y[i].w) * by, high_of(y[i].w) * by);
        if (at < s.out_width) *(uint2 *)(s.out_codes + (i64)(place + pair) * s.out_width + at) = make_uint2(low, high);
        if (group == 0 && chunk == 0) s.out_scale[(i64)(place + pair) * s.across + block] = scale;
    }
}

/* A warpgroup's half of a tile: mainloop and epilogue. */
INLINE void multiply_tile(const Grouped &s, Shared &m, const Tiles &tile, PipelineState<STAGES> &at, int group, int &turn) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x % 128, warp = thread / 32;
    const int channel = tile.block * TILE + group * SLICE;
    float by_row[HALVES][2], by_token = 0;
    if (!PROMOTES && thread < tile.count) by_token = s.by_token[GATED ? s.order[tile.place + thread] / s.top_k : tile.place + thread];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int within = GATED ? (4 * h + warp) * 8 + lane / 4 : h * 64 + warp * 16 + i * 8 + lane / 4, c = min(channel + within, s.channels - 1);
            by_row[h][i] = BLOCKS ? 1 : s.by_row[GATED ? (2 * tile.expert + i) * s.channels + c : tile.expert * s.channels + c];
        }
    Sums sums;
    if (tile.count <= 32) mainloop<32>(s, m, tile, at, group, sums);
#if TOKENS > 32
    else if (tile.count <= 64) mainloop<64>(s, m, tile, at, group, sums);
    else if (tile.count <= 96) mainloop<96>(s, m, tile, at, group, sums);
    else mainloop<TOKENS>(s, m, tile, at, group, sums);
#endif
    if (!PROMOTES) {
        if (thread < TOKENS) m.by_token[group][thread] = by_token; /* the last tile's were read before its last barrier */
        group_sync(group);
    }
    u16 *staged = m.staged[group];
#pragma unroll
    for (int part = 0; part < TOKENS / PART; part++) {
        if (part * PART >= tile.count) break;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            u32 y[2][4];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int j = 4 * part + q;
                float2 by = make_float2(1, 1);
                if (!PROMOTES) by = *(const float2 *)(m.by_token[group] + 8 * j + lane % 4 * 2);
                const float *v = sums[h] + 4 * j;
                float z[2][2];
#pragma unroll
                for (int i = 0; i < 2; i++) z[i][0] = v[2 * i] * (by.x * by_row[h][i]), z[i][1] = v[2 * i + 1] * (by.y * by_row[h][i]);
                if (GATED) y[0][q] = narrow_two(silu(z[0][0]) * z[1][0], silu(z[0][1]) * z[1][1]);
                else y[0][q] = narrow_two(z[0][0], z[0][1]), y[1][q] = narrow_two(z[1][0], z[1][1]);
            }
#pragma unroll
            for (int i = 0; i < (GATED ? 1 : 2); i++) put(staged + staged_at(lane, GATED ? 4 * h + warp : 8 * h + 2 * warp + i), y[i]);
        }
        group_sync(group);
        const int place = tile.place + part * PART, count = tile.count - part * PART;
        if (IN_GROUPS) store_codes(s, m, group, staged, place, count, channel, tile.block, turn), turn ^= 1;
        else store_values(s, staged, place, count, channel);
        group_sync(group);
    }
}

/* Without GATED this is launched behind the launch with GATED, which waits for `starts` before it lets this one begin, or
   behind one that reads its results and so began later. Tiles are counted and weights loaded before those results are there. */
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) grouped_product(const __grid_constant__ Grouped s) {
    Shared &m = shared_memory<Shared>();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) init<GATED ? 1 + GATHERERS : PROMOTES ? 2 + 32 : 2>(m.full + i), init<WARPS>(m.empty + i);
        fence_barrier_init();
    }
    if (GATED) wait_on_dependent_grids();
    if (warp == 0) count_tiles(s, m);
    __syncthreads();
    launch_dependent_grids();
    if (group == GROUPS) { /* at launch a thread has 168 registers, or 80 */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == WARPS) {
            if (threadIdx.x % 32 == 0) produce_weights(s, m);
        } else if (GATED) produce_codes(s, m);
        else if (warp == WARPS + 1) wait_on_dependent_grids(), produce_codes(s, m);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(RESIDENT == 1 ? 232 : 96));
        if (!GATED) wait_on_dependent_grids();
        PipelineState<STAGES> at;
        Tiles tile(s, m);
        int turn = 0;
        while (tile.next()) multiply_tile(s, m, tile, at, group, turn);
    }
}
