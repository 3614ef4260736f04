/* Persistent warp-specialized GEMM of many tokens' FP8 codes by a weight's. Included by gate_up_silu_gemm.cu and
   qkv_rope_kv_write_gemm.cu, which define the epilogues.

   A tile is 128 tokens by two boxes of HALF rows of the weight, which are `second` rows apart; boxes of consecutive tiles
   are STEP rows apart. One persistent CTA runs on each SM. A producer warp issues TMA loads as far ahead as shared memory
   allows; two consumer warpgroups multiply, 64 tokens each. CLUSTER CTAs with vertically adjacent tiles share the weight's
   rows: each loads a part and multicasts it to all. Sums stay in the tensor core, with about 14 bits.

   Where tiles are fewer than multiprocessors, SPLIT is 2: two CTAs of a cluster have the same tile and half of K each. Then
   each sends its sums of 64 tokens into the other's shared memory, and adds up those of the other 64. */

#include "types.cuh"

struct Product {
    Map x, weight; /* boxes of `box` tokens by 128 codes, of HALF rows by 128 codes */
    int tokens, across, steps, second, box; /* across: tiles along the weight; steps of 128 codes */
};

constexpr int DEPTH = 128, TOKENS = 128, TILES_TALL = 8, STAGES = HALF > 64 ? 4 : HALF == 64 ? 6 : 8, GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
constexpr int WARPS = CONSUMERS / 32, X = TOKENS * DEPTH, W = HALF * DEPTH; /* X and W in bytes */

/* A warp's staging buffer for results: 16 tokens by 64 values, twice, in the layout of TMA stores. */
typedef u16 Out[2][16 * 64];
constexpr int CTAS = CLUSTER * SPLIT; /* of a cluster */
static_assert(SPLIT == 1 || (SPLIT == 2 && CLUSTER == 1 && HALF <= 64), "a warpgroup's sums fit into the staging buffers of all warps");
struct Ring {
    u8 x[STAGES][X], weight[STAGES][2][W];
    u64 full[STAGES], empty[STAGES];
    u64 received[4], room[4]; /* SPLIT: sums from the other CTA for a warp; whether it takes a warp's */
};
struct Shared {
    Ring ring;
    __align__(1024) Out out[WARPS];
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

#include "ptx.cuh"
#include "wgmma.cuh"

#define NAMES32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TEN(1) TEN(2) "%30, %31"
#define NAMES110 NAMES60 TEN(6) TEN(7) TEN(8) TEN(9) TEN(10)
#define MULTIPLY(shape, names, A, B, ADD, ...)                                                                             \
    asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%" #A ", 0x40000040}; mov.b64 b, {%" #B ", 0x40000040};\n"     \
                 "setp.ne.b32 p, %" #ADD ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned." shape ".f32.e4m3.e4m3 {" names "}, a, b, p, 1, 1;}"                       \
                 : __VA_ARGS__ : "r"(descriptor(x) + 2 * i), "r"(descriptor(weight) + 2 * i), "r"(i ? 1 : add))

/* Issue sums [64, 2 HALF] = (add ? sums : 0) + x [64, 128] weight [2 HALF, 128]^T, both with rows of 128 bytes. A thread
   holds every fourth pair of columns of two rows 8 apart; sum i is in row i / 2 % 2 of these. */
INLINE void multiply(float (&sums)[HALF], u32 x, u32 weight, bool add) {
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; i++)
#if HALF == 128
        MULTIPLY("m64n256k32", NAMES110 TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127", 128, 129, 130, OUT64(sums), OUT16(sums, 64),
                 OUT16(sums, 80), OUT16(sums, 96), OUT16(sums, 112));
#elif HALF == 112
        MULTIPLY("m64n224k32", NAMES110 "%110, %111", 112, 113, 114, OUT64(sums), OUT16(sums, 64), OUT16(sums, 80), OUT16(sums, 96));
#elif HALF == 64
        MULTIPLY("m64n128k32", NAMES64, 64, 65, 66, OUT64(sums));
#else
        MULTIPLY("m64n64k32", NAMES32, 32, 33, 34, OUT16(sums, 0), OUT16(sums, 16));
#endif
    warpgroup_commit_batch();
}

INLINE u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
INLINE void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/* Arrive at the same mbarrier of another CTA of the cluster. Relaxed: a release would wait for all of the thread's writes. */
INLINE void arrive_at(const u64 *barrier, u32 cta) {
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a];}" ::"r"(address(barrier)),
                 "r"(cta) : "memory");
}
#define COPY "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
INLINE void copy_box(const void *to, const Map &map, int column, int row, const u64 *barrier) {
    asm volatile(COPY " [%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)), "l"(&map), "r"(column), "r"(row), "r"(address(barrier)) : "memory");
}
INLINE void copy_box_to_cluster(const void *to, const Map &map, int column, int row, const u64 *barrier) {
    asm volatile(COPY ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(address(to)), "l"(&map), "r"(column), "r"(row),
                 "r"(address(barrier)), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}

/* The tile scheduler: blocks of TILES_TALL tiles along the tokens by all tiles of the weight, so that operands stay in L2. */
struct Tiles {
    int tall, at, token, row; /* number of tiles along the tokens; current tile; its first token and weight row */
    u32 rank;
    INLINE Tiles(const Product &s) {
        rank = CLUSTER > 1 ? rank_in_cluster() : 0;
        tall = (s.tokens + TOKENS * CLUSTER - 1) / (TOKENS * CLUSTER);
        at = blockIdx.x / CTAS;
    }
    INLINE bool next(const Product &s) {
        if (at >= tall * s.across) return false;
        const int first = at / (TILES_TALL * s.across) * TILES_TALL, size = min(TILES_TALL, tall - first), in = at - first * s.across;
        token = ((first + in % size) * CLUSTER + rank) * TOKENS, row = in / size * STEP;
        at += gridDim.x / CTAS;
        return true;
    }
};

/* This CTA's steps of K. One beyond the last is of zeros, so that each CTA has some. */
struct Share {
    int first, steps;
    INLINE Share(const Product &s) : first(0), steps(s.steps) {
        if (SPLIT > 1) {
            const int each = (s.steps + SPLIT - 1) / SPLIT;
            first = rank_in_cluster() * each, steps = max(min(each, s.steps - first), 1);
        }
    }
};

/* SPLIT: the exchange of a tile's sums with the other CTA. The warpgroup with this CTA's rank adds up its 64 tokens'; the other
   one sends its sums to the warpgroup that does so in the other CTA. They arrive in the staging buffers of this warp and of the
   one that sends in its place. */
struct Exchange {
    Ring &m;
    u8 *buffers;
    u32 parity = 0;
    INLINE static int warp() { return threadIdx.x / 32; }
    INLINE bool adds() const { return SPLIT == 1 || warp() / 4 == (int)rank_in_cluster(); }
    /* Chunk i of a warp's sums: four of each lane. */
    INLINE const u8 *chunk(int i) const { return buffers + ((warp() ^ i / 8 * 4) * 32 * 8 + i % 8 * 32 + threadIdx.x % 32) * 16; }
    /* Tell the other CTA that this warp's buffers take its sums. Stores from them must have ended. */
    INLINE void open() const {
        if (SPLIT > 1 && adds() && threadIdx.x % 32 == 0) arrive_at(m.room + warp() % 4, rank_in_cluster() ^ 1);
    }
    INLINE void wait_for_other(const u64 *barrier) {
        asm volatile("{.reg .pred done;\n"
                     "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                     "@!done bra again;}" ::"r"(address(barrier)), "r"(parity) : "memory");
        parity ^= 1;
    }
    /* Returns whether this warp has the tile's sums now. */
    INLINE bool reduce(float (&sums)[HALF]) {
        if (SPLIT == 1) return true;
        const u64 *received = m.received + warp() % 4;
        if (!adds()) {
            wait_for_other(m.room + warp() % 4);
#pragma unroll
            for (int i = 0; i < HALF / 4; i++)
                asm volatile("{.reg .b32 to, done; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 done, %1, %2;\n"
                             "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [done];}"
                             ::"r"(address(chunk(i))), "r"(address(received)), "r"(rank_in_cluster() ^ 1), "f"(sums[4 * i]),
                             "f"(sums[4 * i + 1]), "f"(sums[4 * i + 2]), "f"(sums[4 * i + 3]) : "memory");
            return false;
        }
        if (threadIdx.x % 32 == 0) expect(received, HALF * 32 * 4);
        wait_for_other(received);
#pragma unroll
        for (int i = 0; i < HALF / 4; i++) {
            const float4 other = *(const float4 *)chunk(i);
            sums[4 * i] += other.x, sums[4 * i + 1] += other.y, sums[4 * i + 2] += other.z, sums[4 * i + 3] += other.w;
        }
        __syncwarp(); /* the buffers are a staging buffer again */
        return true;
    }
};

/* Boxes beyond the last token are not loaded: TMA would take longer to fill them with zeros. Their rows are anything, and no
   result of them is stored. */
INLINE void produce(const Product &s, Ring &m) {
    PipelineState<STAGES> at;
    Tiles tile(s);
    const Share share(s);
    while (tile.next(s)) {
        const int boxes = (min(TOKENS, s.tokens - tile.token) + s.box - 1) / s.box;
#pragma unroll 1
        for (int k = 0; k < share.steps; k++, at.next()) {
            const u64 *full = m.full + at.at;
            const int column = (share.first + k) * DEPTH;
            wait(m.empty + at.at, at.parity ^ 1);
            expect(full, max(boxes, 0) * s.box * DEPTH + 2 * W);
#pragma unroll 1
            for (int i = 0; i < boxes; i++) copy_box(m.x[at.at] + i * s.box * DEPTH, s.x, column, tile.token + i * s.box, full);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = tile.row + i * s.second;
                if (CLUSTER == 1) copy_box(m.weight[at.at][i], s.weight, column, row, full);
                else if (tile.rank == i) copy_box_to_cluster(m.weight[at.at][i], s.weight, column, row, full);
            }
        }
    }
}

INLINE void store_box(const Map &map, int byte, int row, const void *from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(byte), "r"(row),
                 "r"(address(from)) : "memory");
}
INLINE void end_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
INLINE void await_stores() { /* the warp's staging buffer may be reused */
    if (threadIdx.x % 32 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    __syncwarp();
}
/* Per tile: end.prepare(token), the mainloop, then the epilogue end.finish(sums, token, row), for a warp's 16 tokens from
   `token` on. */
template <class End> INLINE void multiply_tiles(const Product &s, Ring &m, Exchange &exchange, End &end) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto release = [&](int stage) {
        if (CLUSTER > 1 && lane < CLUSTER) arrive_at(m.empty + stage, lane);
        if (CLUSTER == 1 && lane == 0) arrive(m.empty + stage);
    };
    PipelineState<STAGES> at;
    Tiles tile(s);
    const Share share(s);
    while (tile.next(s)) {
        float sums[HALF];
        int before = 0;
        if (SPLIT > 1) await_stores(), exchange.open();
        end.prepare(tile.token + warp * 16);
#pragma unroll 1
        for (int k = 0; k < share.steps; k++, at.next()) {
            wait(m.full + at.at, at.parity);
            multiply(sums, address(m.x[at.at]) + warp / 4 * 64 * DEPTH, address(m.weight[at.at]), k > 0);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); /* all but the step just issued are complete */
            if (k > 0) release(before);
            before = at.at;
        }
        warpgroup_wait(sums);
        release(before);
        if (exchange.reduce(sums)) end.finish(sums, tile.token + warp * 16, tile.row);
    }
}

/* Store 16 tokens by 16 values, chunk i of 8 (stmatrix): of sum pairs 2j + r, j selects 8 columns and r 8 rows. */
INLINE void put(u16 *out, int i, const u32 (&y)[4]) {
    const int lane = threadIdx.x % 32;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(out) + lane % 16 * 128 + ((i + lane / 16) ^ lane % 8) * 16),
                 "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3]) : "memory");
}

/* Store a warp's results, 16 tokens by WIDTH values in registers as the sums are, in BF16. */
template <int WIDTH = 128> INLINE void put_row(Out &out, const float *y) {
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i += 2) {
        u32 two[4];
#pragma unroll
        for (int j = 0; j < 4; j++) two[j] = narrow_two(y[4 * i + 2 * j], y[4 * i + 2 * j + 1]);
        put(out[i / 8], i % 8, two);
    }
    fence_view_async_shared();
    __syncwarp();
}

/* The kernel: End(arguments, a warp's staging buffer) is the epilogue. */
template <class End, class Arguments> INLINE void product(const Arguments &arguments) {
    Shared &shared = shared_memory<Shared>();
    const auto &s = arguments.product; /* a Product, or what derives from it */
    Ring &m = shared.ring;
    End end(arguments, shared.out[min(threadIdx.x / 32, WARPS - 1)]);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) init<1>(m.full + i), init<WARPS * CLUSTER>(m.empty + i);
        for (int i = 0; i < 4; i++) init<1>(m.received + i), init<1>(m.room + i);
        fence_barrier_init();
    }
    __syncthreads();
    if (CTAS > 1) cluster_sync();
    wait_on_dependent_grids();
    if (group == GROUPS) { /* 64,512 registers in all: 168 per thread at launch */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMERS) produce(s, m);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Exchange exchange{m, (u8 *)shared.out};
        multiply_tiles(s, m, exchange, end);
        if (threadIdx.x % 32 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    if (CTAS > 1) cluster_sync(); /* no CTA may exit while another writes into its shared memory */
}
