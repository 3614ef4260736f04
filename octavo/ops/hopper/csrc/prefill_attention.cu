/* Prefill attention over an FP8 paged cache, with both products in FP8 WGMMA.

   A persistent CTA on each SM takes one work item (piece) after another, longest first: some rows of one request and KV
   head; a row is a token and one of the query heads of the KV head (GQA packing). Three consumer warpgroups compute 64 rows
   each. A producer warp issues loads as far ahead as shared memory allows: the queries of the next piece, and by TMA keys
   and values directly from the cache's blocks, which all warpgroups share.

   Queries are quantized to FP8 with one scale per row. Probabilities are quantized in the threads that hold them: the
   accumulator's register layout differs from an FP8 operand's, so TMA places the keys in the matching order. The tensor
   core's sum over 128 keys, which has about 14 bits, is accumulated in FP32 (online softmax: Milakov and Gimelshein, 2018;
   Dao et al., 2022).

   PER_TOKEN_HEAD: the cache has a scale for each token and head. A key's scale multiplies its column of scores. A value's
   scale adds its logarithm to the column, so that the codes are of probability times scale, relative to the row's largest
   such product; the sum of probabilities divides by it. Then queries have one scale for a warpgroup's rows, which is all that
   softmax needs: its errors are those of a score's size, whatever the row. A preparer warp for each warpgroup multiplies that
   into the keys' scales and takes logarithms and reciprocals of the values', once for all rows. */

#include "types.cuh"

/* Rows of one request: they begin at query head `skip` of the KV head, of the token with this row of q and this position. */
struct Tile { int request, token, position, skip, rows; };

struct Prefill {
    Map keys, values; /* boxes of a block of one head: 64 tokens by 128, 128 by 64 tokens */
    const u16 *queries; /* BF16 [tokens, kv_heads * group, 128] */
    u16 *out; /* likewise */
    const int *tables; /* [requests, table_width] blocks */
    const Tile *tiles; /* longest contexts first */
    u32 *claimed; /* [2] zeros: pieces claimed beyond the first of each CTA; CTAs that are done */
    const float *k_scale, *v_scale; /* of the cache: per layer, or PER_TOKEN_HEAD those of block 0 */
    int table_width, pieces, kv_heads, group; /* query heads per KV head */
    float qk_scale; /* includes log2(e) */
};

constexpr int GROUPS = 3, ROWS = 64 * GROUPS, STAGES = 4, COLUMN_STAGES = 2;
constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
constexpr float LIFT = 7.0f; /* probabilities up to 2**7: few underflow, none overflows */

#include "ptx.cuh"
#include "wgmma.cuh"
#include "cache_blocks.cuh"

constexpr int KEYS = 128, TILE = KEYS * DIM;

struct Piece { Tile tile; int kv_head, tiles; float qk_scale, v_scale; };
/* For each key of a tile: the factor of its scores, the logarithm of its value's scale, and that scale's reciprocal. */
struct __align__(16) Columns { float factor[KEYS], log2_scale[KEYS], inverse[KEYS]; };
struct Shared {
    u8 keys[STAGES][TILE], values[STAGES][TILE], codes[ROWS * DIM];
    u16 queries[ROWS * DIM];
    Piece pieces[2];
    u64 full_k[STAGES], empty_k[STAGES], full_v[STAGES], empty_v[STAGES], full[2], empty;
#if PER_TOKEN_HEAD
    TokenScales<KEYS> scales[STAGES];
    Columns columns[GROUPS][COLUMN_STAGES];
    float most[GROUPS][4], scale[GROUPS]; /* of a warpgroup's queries: amax of a warp's, scale */
    u64 rounded[GROUPS], prepared[GROUPS][COLUMN_STAGES], used[GROUPS][COLUMN_STAGES];
#else
    float scale[ROWS];
#endif
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

/* x / by for 0 <= x < 256 and by <= 64 */
struct Division {
    int factor;
    INLINE Division(int by) : factor(65536 / by + 1) {}
    INLINE int of(int x) const { return x * factor >> 16; }
};

/* Issue x [64, 128] = a [64, 128] b [128, 128]^T, both with rows of 128 bytes. */
INLINE void begin_scores(float (&x)[64], u32 a, u32 b) {
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%64, 0x40000040}; mov.b64 b, {%65, 0x40000040}; setp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAMES64 "}, a, b, p, 1, 1;}"
                     : OUT64(x) : "r"(descriptor(a) + 2 * i), "r"(descriptor(b) + 2 * i), "r"(i));
    warpgroup_commit_batch();
}
/* Issue x [64, 128] = p [64, 128] v [128, 128]^T; p in registers, v two blocks of 128 rows of 64 bytes. */
INLINE void begin_values(float (&x)[64], const u32 (&p)[16], u32 v) {
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm volatile("{.reg .pred p; .reg .b64 b; mov.b64 b, {%68, 0x80000020}; setp.ne.b32 p, %69, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NAMES64 "}, {%64, %65, %66, %67}, b, p, 1, 1;}"
                     : OUT64(x) : "r"(p[4 * i]), "r"(p[4 * i + 1]), "r"(p[4 * i + 2]), "r"(p[4 * i + 3]),
                       "r"(descriptor(v + i / 2 * (TILE / 2)) + i % 2 * 2), "r"(i));
    warpgroup_commit_batch();
}

/* A thread's two rows of a warpgroup's 64: 8 apart, with every fourth pair of columns. Value i of 64 is in row i / 2 % 2. */
struct Rows {
    float peak[2], total[2], factor[2], shrink[2];
    int position[2];
};
/* The value of column 2 * half + e of a row's four for 16 keys, in the order in which TMA has placed a block's keys. */
INLINE constexpr int value_of(int keys, int half, int row, int e) { return keys / 4 * 32 + half * 16 + keys % 4 * 4 + row * 2 + e; }

/* Online softmax: scores become probabilities relative to the row's maximum, times 2**LIFT, and then codes. `hidden`: a
   causal mask is needed. `columns`: PER_TOKEN_HEAD. */
INLINE void soften(float (&s)[64], u32 (&p)[16], Rows &rows, int key, bool hidden, const Columns *columns) {
    const int mine = threadIdx.x % 4 * 4; /* four adjacent keys of each 16 */
    if (PER_TOKEN_HEAD)
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float4 by = *(const float4 *)(columns->factor + 16 * k + mine), more = *(const float4 *)(columns->log2_scale + 16 * k + mine);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float *low = s + value_of(k, 0, r, 0), *high = s + value_of(k, 1, r, 0);
                low[0] = fmaf(low[0], by.x, more.x), low[1] = fmaf(low[1], by.y, more.y);
                high[0] = fmaf(high[0], by.z, more.z), high[1] = fmaf(high[1], by.w, more.w);
            }
        }
    if (hidden) {
#pragma unroll
        for (int i = 0; i < 64; i++)
            if (key + mine + i / 32 * 64 + i / 4 % 4 * 16 + i / 16 % 2 * 2 + i % 2 > rows.position[i / 2 % 2]) s[i] = -1e30f;
    }
    float most[2] = {s[0], s[2]}, less[2];
#pragma unroll
    for (int i = 0; i < 64; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        const float higher = fmaxf(rows.peak[r], PER_TOKEN_HEAD ? most[r] : most[r] * rows.factor[r]);
        rows.shrink[r] = exp2_of(rows.peak[r] - higher);
        rows.peak[r] = higher;
        rows.total[r] *= rows.shrink[r];
        less[r] = higher - LIFT;
    }
#if PER_TOKEN_HEAD
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float4 by = *(const float4 *)(columns->inverse + 16 * k + mine);
        const float inverse[4] = {by.x, by.y, by.z, by.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = i / 2 % 2;
            float &x = s[value_of(k, i / 4, r, i % 2)];
            x = exp2_of(x - less[r]);
            rows.total[r] = fmaf(x, inverse[i / 4 * 2 + i % 2], rows.total[r]);
        }
    }
#else
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int r = i / 2 % 2;
        s[i] = exp2_of(fmaf(s[i], rows.factor[r], -less[r]));
        rows.total[r] += s[i];
    }
#endif
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
        for (int r = 0; r < 2; r++) p[2 * k + r] = codes_of(s[value_of(k, 0, r, 0)], s[value_of(k, 0, r, 1)], s[value_of(k, 1, r, 0)], s[value_of(k, 1, r, 1)]);
}

INLINE void group_meets(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
/* Number of key tiles that a warpgroup's rows of a piece see. */
INLINE int seen_tiles(const Tile &t, int group, const Division &by_group) {
    const int first = t.skip + group * 64, end = t.skip + min(group * 64 + 64, t.rows);
    return first < end ? (t.position + by_group.of(end - 1)) / KEYS + 1 : 0;
}

struct Consumer {
    PipelineState<STAGES> at;
    PipelineState<2> piece;
    PipelineState<COLUMN_STAGES> columns;

    /* Quantize a warpgroup's queries: codes, swizzled, and scales. Each warp has 16 rows. `rows`: of the piece. */
    INLINE void round_queries(Shared &m, int group, int rows) {
        const int lane = threadIdx.x % 16;
        float scale = PER_TOKEN_HEAD ? scale_of_all(m, group, rows) : 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 16 + 2 * i;
            const uint4 x = *(const uint4 *)(m.queries + row * DIM + lane * 8);
            const float y[8] = {low_of(x.x), high_of(x.x), low_of(x.y), high_of(x.y), low_of(x.z), high_of(x.z), low_of(x.w), high_of(x.w)};
            if (!PER_TOKEN_HEAD) {
                float most = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(y[j]));
#pragma unroll
                for (int j = 1; j < 16; j *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, j));
                scale = fmaxf(most * (1 / LARGEST_CODE), 1e-12f);
            }
            const float inverse = __fdividef(1, scale);
            uint2 c;
            c.x = codes_of(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse);
            c.y = codes_of(y[4] * inverse, y[5] * inverse, y[6] * inverse, y[7] * inverse);
            *(uint2 *)(m.codes + row * DIM + ((lane / 2 ^ row) & 7) * 16 + lane % 2 * 8) = c;
            if (!PER_TOKEN_HEAD && lane == 0) m.scale[row] = scale;
        }
        if (PER_TOKEN_HEAD && threadIdx.x % 128 == 0) m.scale[group] = scale;
        fence_view_async_shared();
        group_meets(group);
    }
#if PER_TOKEN_HEAD
    INLINE float scale_of_all(Shared &m, int group, int rows) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 16;
        u32 most = 0; /* two BF16 */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint4 x = *(const uint4 *)(m.queries + (row + 2 * i) * DIM + threadIdx.x % 16 * 8);
            const u32 four = larger(larger(x.x & 0x7FFF7FFF, x.y & 0x7FFF7FFF), larger(x.z & 0x7FFF7FFF, x.w & 0x7FFF7FFF));
            if (row + 2 * i < rows) most = larger(most, four); /* behind the piece's rows are those of other pieces */
        }
#pragma unroll
        for (int j = 1; j < 32; j *= 2) most = larger(most, __shfl_xor_sync(~0u, most, j));
        if (threadIdx.x % 32 == 0) m.most[group][threadIdx.x / 32 % 4] = fmaxf(low_of(most), high_of(most));
        group_meets(group);
        const float4 all = *(const float4 *)m.most[group];
        return fmaxf(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)) * (1 / LARGEST_CODE), 1e-12f);
    }
#else
    INLINE float scale_of_all(Shared &, int, int) { return 0; }
#endif

    INLINE void run(const Prefill &s, Shared &m, int group) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; /* of the piece's rows; and the row 8 below */
        const bool leads = threadIdx.x % 32 == 0;
        const Division by_group(s.group);
        const u32 q = address(m.codes) + group * 64 * DIM;
        for (;;) {
            const Piece &work = m.pieces[piece.at];
            const Tile &t = work.tile;
            wait(m.full + piece.at, piece.parity);
            if (t.rows == 0) break;
            round_queries(m, group, t.rows);
            if (leads) arrive(&m.empty);
#if PER_TOKEN_HEAD
            if (threadIdx.x % 128 == 0) arrive(m.rounded + group);
#endif
            /* number of key tiles that all of the warpgroup's rows see, and that any of them sees */
            const int whole = (t.position + by_group.of(t.skip + group * 64) + 1) / KEYS, seen = seen_tiles(t, group, by_group);
            Rows rows;
            float o[64];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                rows.peak[r] = -1e30f, rows.total[r] = 0;
#if !PER_TOKEN_HEAD
                rows.factor[r] = m.scale[row + 8 * r] * work.qk_scale;
#endif
                rows.position[r] = t.position + by_group.of(t.skip + row + 8 * r);
            }
#pragma unroll
            for (int i = 0; i < 64; i++) o[i] = 0;
#pragma unroll 1
            for (int j = 0; j < seen; j++) {
                float x[64];
                u32 p[16];
                wait(m.full_k + at.at, at.parity);
                begin_scores(x, q, address(m.keys[at.at]));
                warpgroup_wait(x);
                if (leads) arrive(m.empty_k + at.at);
#if PER_TOKEN_HEAD
                wait(m.prepared[group] + columns.at, columns.parity);
                soften(x, p, rows, j * KEYS, j >= whole, &m.columns[group][columns.at]);
                __syncwarp();
                if (leads) arrive(m.used[group] + columns.at);
                columns.next();
#else
                soften(x, p, rows, j * KEYS, j >= whole, nullptr);
#endif
                wait(m.full_v + at.at, at.parity);
                begin_values(x, p, address(m.values[at.at]));
                warpgroup_wait(x);
                if (leads) arrive(m.empty_v + at.at);
                at.next();
#pragma unroll
                for (int i = 0; i < 64; i++) o[i] = fmaf(o[i], rows.shrink[i / 2 % 2], x[i]);
            }
#pragma unroll 1
            for (int j = seen; j < work.tiles; j++, at.next()) {
                wait(m.full_k + at.at, at.parity);
                wait(m.full_v + at.at, at.parity);
                if (leads) arrive(m.empty_k + at.at), arrive(m.empty_v + at.at);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float total = rows.total[r];
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                const float by = work.v_scale / total;
                const int head = t.skip + row + 8 * r, token = by_group.of(head);
                if (row + 8 * r >= t.rows) continue;
                u16 *to = s.out + (((i64)(t.token + token) * s.kv_heads + work.kv_head) * s.group + head - token * s.group) * DIM + threadIdx.x % 4 * 2;
#pragma unroll
                for (int i = 0; i < 16; i++) *(u32 *)(to + 8 * i) = narrow_two(o[4 * i + 2 * r] * by, o[4 * i + 2 * r + 1] * by);
            }
            piece.next();
        }
    }
};

/* TMA loads of a block's keys: token 16u + 4t + 2i + e is placed at 32i + 8u + 2t + e. */
INLINE void copy_keys(u32 to, const Map &map, int column, int block, const u64 *barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %3, %4}], [%5];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(0), "r"(block), "r"(address(barrier)) : "memory");
}
INLINE void copy_values(u32 to, const Map &map, int row, int block, const u64 *barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(to), "l"(&map), "r"(0), "r"(row), "r"(block), "r"(address(barrier)) : "memory");
}

/* The producer warp claims pieces and loads their queries; its first thread issues the TMA loads of keys and values. */
INLINE void produce(const Prefill &s, Shared &m) {
    PipelineState<STAGES> at;
    PipelineState<2> piece;
    PipelineState<1> emptied; /* release of the queries' buffer */
    const int lane = threadIdx.x % 32;
    const Division by_group(s.group);
    for (int which = blockIdx.x;; piece.next(), emptied.next()) {
        wait(&m.empty, emptied.parity ^ 1);
        if (which >= s.pieces) break;
        const Tile t = s.tiles[which / s.kv_heads];
        const int kv_head = which % s.kv_heads, tokens = by_group.of(t.skip + t.rows - 1) + 1, last = t.position + tokens - 1, tiles = last / KEYS + 1;
        if (lane == 0) {
            m.pieces[piece.at] = {t, kv_head, tiles, PER_TOKEN_HEAD ? s.qk_scale : s.qk_scale * __ldg(s.k_scale), PER_TOKEN_HEAD ? 1.0f : __ldg(s.v_scale)};
            expect(m.full + piece.at, t.rows * DIM * 2);
            which = gridDim.x + atomicAdd(s.claimed, 1);
        }
        __syncwarp();
        for (int i = lane; i < tokens; i += 32) {
            const int first = i ? 0 : t.skip, count = min(s.group, t.skip + t.rows - i * s.group) - first;
            copy(address(m.queries + (i * s.group + first - t.skip) * DIM), s.queries + (((i64)(t.token + i) * s.kv_heads + kv_head) * s.group + first) * DIM,
                 count * DIM * 2, address(m.full + piece.at));
        }
        which = __shfl_sync(~0u, which, 0);
        if (lane == 0) {
            const int *table = s.tables + (i64)t.request * s.table_width;
            int even = table[0], odd = table[min(1, last / BLOCK)];
#pragma unroll 1
            for (int j = 0; j < tiles; j++, at.next()) {
                const int next_even = table[min(2 * j + 2, last / BLOCK)], next_odd = table[min(2 * j + 3, last / BLOCK)];
                wait(m.empty_k + at.at, at.parity ^ 1);
                expect(m.full_k + at.at, TILE + PER_TOKEN_HEAD * 8 * KEYS);
                copy_keys(address(m.keys[at.at]), s.keys, kv_head * DIM, even, m.full_k + at.at);
                copy_keys(address(m.keys[at.at]) + TILE / 2, s.keys, kv_head * DIM, odd, m.full_k + at.at);
#if PER_TOKEN_HEAD
                TokenScales<KEYS> &to = m.scales[at.at];
                copy_scales(to.keys, to.values, s.k_scale, s.v_scale, even, s.kv_heads, kv_head, m.full_k + at.at);
                copy_scales(to.keys + BLOCK, to.values + BLOCK, s.k_scale, s.v_scale, odd, s.kv_heads, kv_head, m.full_k + at.at);
#endif
                wait(m.empty_v + at.at, at.parity ^ 1);
                expect(m.full_v + at.at, TILE);
                copy_values(address(m.values[at.at]), s.values, kv_head * DIM, even, m.full_v + at.at);
                copy_values(address(m.values[at.at]) + TILE / 2, s.values, kv_head * DIM, odd, m.full_v + at.at);
                even = next_even, odd = next_odd;
            }
        }
        __syncwarp();
    }
    if (lane) return;
    m.pieces[piece.at].tile.rows = 0;
    arrive(m.full + piece.at);
    if (atomicAdd(s.claimed + 1, 1) == gridDim.x - 1) s.claimed[0] = s.claimed[1] = 0; /* reset for the next launch */
}

#if PER_TOKEN_HEAD
/* By one warp for each consumer warpgroup: the columns of the tiles that it sees. */
INLINE void prepare_columns(const Prefill &s, Shared &m, int group) {
    PipelineState<STAGES> at;
    PipelineState<2> piece;
    PipelineState<1> rounded;
    PipelineState<COLUMN_STAGES> columns;
    const int lane = threadIdx.x % 32;
    const Division by_group(s.group);
    for (;; piece.next(), rounded.next()) {
        wait(m.full + piece.at, piece.parity);
        const Piece &work = m.pieces[piece.at];
        const int tiles = work.tiles;
        if (work.tile.rows == 0) break;
        const int seen = seen_tiles(work.tile, group, by_group);
        wait(m.rounded + group, rounded.parity);
        const float by = m.scale[group] * work.qk_scale;
        __syncwarp();
        if (lane == 0) arrive(&m.empty); /* only then is the next piece's scale made */
#pragma unroll 1
        for (int j = 0; j < tiles; j++, at.next()) {
            wait(m.full_k + at.at, at.parity);
            if (j < seen) {
                const float4 k = ((const float4 *)m.scales[at.at].keys)[lane], v = ((const float4 *)m.scales[at.at].values)[lane];
                wait(m.used[group] + columns.at, columns.parity ^ 1);
                Columns &to = m.columns[group][columns.at];
                ((float4 *)to.factor)[lane] = {k.x * by, k.y * by, k.z * by, k.w * by};
                ((float4 *)to.log2_scale)[lane] = {log2_of(v.x), log2_of(v.y), log2_of(v.z), log2_of(v.w)};
                ((float4 *)to.inverse)[lane] = {inverse_of(v.x), inverse_of(v.y), inverse_of(v.z), inverse_of(v.w)};
                __syncwarp();
                if (lane == 0) arrive(m.prepared[group] + columns.at);
                columns.next();
            }
            __syncwarp();
            if (lane == 0) arrive(m.empty_k + at.at);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention(const __grid_constant__ Prefill s) {
    Shared &m = shared_memory<Shared>();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) init<1>(m.full_k + i), init<GROUPS * (4 + PER_TOKEN_HEAD)>(m.empty_k + i), init<1>(m.full_v + i), init<GROUPS * 4>(m.empty_v + i);
        init<1>(m.full), init<1>(m.full + 1), init<GROUPS * (4 + PER_TOKEN_HEAD)>(&m.empty);
#if PER_TOKEN_HEAD
        for (int i = 0; i < GROUPS; i++) {
            init<1>(m.rounded + i);
            for (int j = 0; j < COLUMN_STAGES; j++) init<1>(m.prepared[i] + j), init<4>(m.used[i] + j);
        }
#endif
        fence_barrier_init();
    }
    __syncthreads();
    wait_on_dependent_grids();
    if (group == GROUPS) { /* 65,536 registers in all */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - GROUPS * 4;
        if (warp == 0) produce(s, m);
#if PER_TOKEN_HEAD
        else prepare_columns(s, m, warp - 1);
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        Consumer().run(s, m, group);
    }
}
