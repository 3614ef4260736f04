/* FP8 product of up to 32 tokens, y = x w^T, bound by reading the weight; scales of tokens and channels, or with BLOCKS of each
   token's 128 codes and of the weight's tiles of 128 x 128.

   The weight's rows are WGMMA's M side and the tokens its N side. A CTA has ROWS rows and a part of K, which its shared memory
   holds whole: it asks for all of its weights before the kernel ahead has ended, and behind that waits for the tokens' codes
   alone. A cluster has the SPLITS parts of K, and its CTAs add them up out of each other's shared memory, in a fixed order. Sums
   of 128 are the tensor core's, which keeps about 14 bits; they are added in FP32. */

#include "types.cuh"

struct Few {
    Map weight, x; /* boxes of ROWS rows, of TOKENS tokens, by 128 codes */
    const float *by_row, *by_token; /* [rows], [tokens]; with BLOCKS [rows / 128, steps], [tokens, steps] */
    u16 *out; /* BF16 [tokens, rows] */
    int tokens, rows, steps; /* steps: of K, 128 codes each */
};

constexpr int TOKENS = 32, ROWS = 64, DEPTH = 128, STEPS = 8, THREADS = 128, CONSUMERS = THREADS;
constexpr int OWN = ROWS / SPLITS, QUADS = TOKENS * OWN / 4; /* of a CTA's results, four rows each */

struct Shared {
    u8 weight[STEPS][ROWS * DEPTH], x[STEPS][TOKENS * DEPTH];
    float sums[TOKENS][ROWS + 4]; /* + 4: tokens start in different banks */
    u64 has_weight[STEPS], has_x[STEPS];
    float by_group[BLOCKS ? STEPS : 1][TOKENS]; /* BLOCKS: of a K step's products */
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

#include "ptx.cuh"
#include "wgmma_widths.cuh"

INLINE void load_box(const Map &map, u8 *to, const u64 *full, int k, int row, int bytes) {
    expect(full, bytes);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)), "l"(&map), "r"(k * DEPTH), "r"(row), "r"(address(full)) : "memory");
}
INLINE float4 four_from(const float *p, int cta) { /* another CTA's shared memory */
    float4 v;
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];}" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address(p)), "r"(cta) : "memory");
    return v;
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS) few_tokens_product(const __grid_constant__ Few s) {
    Shared &m = shared_memory<Shared>();
    const int split = blockIdx.x % SPLITS, row = blockIdx.x / SPLITS * ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int each = (s.steps + SPLITS - 1) / SPLITS, begin = split * each, count = min(each, s.steps - begin); /* may be negative */
    if (threadIdx.x == 0) {
        for (int k = 0; k < STEPS; k++) init<1>(m.has_weight + k), init<1>(m.has_x + k);
        fence_barrier_init();
        for (int k = 0; k < count; k++) load_box(s.weight, m.weight[k], m.has_weight + k, begin + k, row, ROWS * DEPTH);
    }
    const int scaled = threadIdx.x % STEPS; /* BLOCKS: the K step whose scales this thread multiplies, as its neighbours have the next ones */
    const float of_block = BLOCKS && scaled < count ? __ldg(s.by_row + (i64)(row / DEPTH) * s.steps + begin + scaled) : 0;
    __syncthreads();
    launch_dependent_grids();
    wait_on_dependent_grids();
    if (threadIdx.x == 0)
        for (int k = 0; k < count; k++) load_box(s.x, m.x[k], m.has_x + k, begin + k, 0, TOKENS * DEPTH);
    if (BLOCKS) {
#pragma unroll
        for (int i = 0; i < TOKENS * STEPS / THREADS; i++) {
            const int token = threadIdx.x / STEPS + i * (THREADS / STEPS);
            if (scaled < count && token < s.tokens) m.by_group[scaled][token] = of_block * shared_load(s.by_token + (i64)token * s.steps + begin + scaled);
        }
        __syncthreads();
    }
    float sum[TOKENS / 2] = {};
#pragma unroll 1
    for (int k = 0; k < count; k++) {
        float part[TOKENS / 2];
        wait(m.has_weight + k, 0), wait(m.has_x + k, 0);
        warpgroup_arrive();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma<TOKENS>(part, descriptor(address(m.weight[k])) + 2 * i, descriptor(address(m.x[k])) + 2 * i, i);
        warpgroup_commit_batch();
        warpgroup_wait(part);
#pragma unroll
        for (int v = 0; v < TOKENS / 2; v++) sum[v] = BLOCKS ? fmaf(part[v], m.by_group[k][v / 4 * 8 + lane % 4 * 2 + v % 2], sum[v]) : sum[v] + part[v];
    }
#pragma unroll
    for (int v = 0; v < TOKENS / 2; v++) m.sums[v / 4 * 8 + lane % 4 * 2 + v % 2][warp * 16 + lane / 4 + v / 2 % 2 * 8] = sum[v];
    cluster_arrive(), cluster_wait();
    for (int at = threadIdx.x; at < QUADS; at += THREADS) {
        const int token = at / (OWN / 4), within = split * OWN + at % (OWN / 4) * 4;
        float4 parts[SPLITS], y = {};
#pragma unroll
        for (int i = 0; i < SPLITS; i++) parts[i] = four_from(&m.sums[token][within], i);
#pragma unroll
        for (int i = 0; i < SPLITS; i++) y.x += parts[i].x, y.y += parts[i].y, y.z += parts[i].z, y.w += parts[i].w;
        if (token >= s.tokens || row + within >= s.rows) continue;
        const float4 by = BLOCKS ? make_float4(1, 1, 1, 1) : *(const float4 *)(s.by_row + row + within);
        const float by_token = BLOCKS ? 1 : s.by_token[token];
        *(uint2 *)(s.out + (i64)token * s.rows + row + within) = make_uint2(narrow_two(y.x * by.x * by_token, y.y * by.y * by_token), narrow_two(y.z * by.z * by_token, y.w * by.w * by_token));
    }
    cluster_arrive(), cluster_wait(); /* others may still read this CTA's sums */
}
