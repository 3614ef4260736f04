/* A router and the sorting of its pairs of token and expert, in one launch for up to a few hundred tokens: logits of BF16 tokens
   in FP32, softmax or sigmoid, the TOP_K most likely experts, and pairs sorted by expert.

   A cluster of SPLITS CTAs has TOKENS tokens: each multiplies a part of K, then chooses for its share of the tokens, whose
   logits are the parts' sums in a fixed order. The CTA that is the last of all to finish sorts. The router's weight is loaded
   before the preceding kernel has ended. */

#include "types.cuh"

struct Route {
    const u16 *x, *weight; /* BF16 [tokens, stride] and [count, width] */
    const float *bias; /* [count], or null: added to scores for the choice alone */
    const int *live, *lengths; /* a token counts if it is below *live, if lengths[token] > 0; or null */
    int *experts; /* [tokens, top_k] */
    float *weights;
    int *order, *place, *starts; /* as in Dispatch */
    u32 *arrivals; /* zero before and after each launch */
    int tokens, count, width, stride, top_k, sigmoid, normalize;
    float scale;
};

constexpr int SPLITS = 8, THREADS = 256, OWN = TOKENS / SPLITS, CONSUMERS = THREADS;
constexpr int BLOCKS = EXPERTS / 128, HELD = 2 / BLOCKS, EIGHTS = TOKENS / 8, PER_LANE = EXPERTS / 32, STEP = 128, MOST_PAIRS = 4096; /* HELD times STEP of K are loaded at once */
constexpr int LOWEST = 1 << 31;
#define INFINITE __int_as_float(0x7F800000)

struct Shared {
    float part[TOKENS][EXPERTS + 4], logits[OWN][EXPERTS]; /* + 4: rows start in different banks */
    int bins[EXPERTS + 1], is_last;
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

#include "ptx.cuh"

INLINE uint4 load(const u16 *p, bool inside) { return inside ? __ldg((const uint4 *)p) : make_uint4(0, 0, 0, 0); }
/* y [16, 8] += a [16, 16] b [8, 16]^T in BF16. */
INLINE void multiply(float (&y)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
INLINE float load_from(const float *p, int cta) { /* another CTA's shared memory */
    float v;
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a];}" : "=f"(v) : "r"(address(p)), "r"(cta) : "memory");
    return v;
}
INLINE float over_warp(float x) {
#pragma unroll
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
/* An int in the order of x, which is no NaN; both zeros are equal. */
INLINE int ordered(float x) {
    const int bits = __float_as_int(x + 0.0f);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

/* A warp's part of the logits of TOKENS tokens: this CTA's part of K, 16 experts of each 128. A thread loads 8 adjacent values
   of a row for two matrix instructions; since a sum's order is free, they need not be the ones that the instruction names. */
INLINE void partial_logits(const Route &s, Shared &m, int first, int split) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, steps = (s.width + SPLITS * STEP - 1) / (SPLITS * STEP);
    float sums[BLOCKS][EIGHTS][4] = {};
    const u16 *x[EIGHTS];
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) x[n] = s.x + (i64)min(first + 8 * n + lane / 4, s.tokens - 1) * s.stride;
    for (int from = 0; from < steps; from += HELD) {
        const auto place = [&](int held, int i) { return from + held < steps ? (split * steps + from + held) * STEP + lane % 4 * 8 + 32 * i : s.width; };
        uint4 w[HELD][STEP / 32][BLOCKS][2];
#pragma unroll
        for (int held = 0; held < HELD; held++)
#pragma unroll
            for (int i = 0; i < STEP / 32; i++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int e = 128 * b + row + 8 * h, at = place(held, i);
                        w[held][i][b][h] = load(s.weight + (i64)e * s.width + at, e < s.count && at < s.width);
                    }
        if (from == 0) wait_on_dependent_grids();
#pragma unroll
        for (int held = 0; held < HELD; held++)
#pragma unroll
            for (int i = 0; i < STEP / 32; i++) {
                const int at = place(held, i);
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) {
                    const uint4 v = at < s.width ? *(const uint4 *)(x[n] + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++) {
                        const uint4(&rows)[2] = w[held][i][b];
                        multiply(sums[b][n], rows[0].x, rows[1].x, rows[0].y, rows[1].y, v.x, v.y);
                        multiply(sums[b][n], rows[0].z, rows[1].z, rows[0].w, rows[1].w, v.z, v.w);
                    }
                }
            }
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) m.part[8 * n + lane % 4 * 2 + i % 2][128 * b + row + i / 2 * 8] = sums[b][n][i];
}

/* A warp chooses the experts of a token. Expert lane + 32i is value i of a lane. */
INLINE void choose(const Route &s, const float *logits, int token) {
    const int lane = threadIdx.x % 32;
    float score[PER_LANE], most = -INFINITE, total = 0;
    int key[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const bool valid = lane + 32 * i < s.count;
        score[i] = valid ? logits[lane + 32 * i] : -INFINITE;
        most = fmaxf(most, score[i]);
    }
    if (s.sigmoid) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) score[i] = 1.0f / (1.0f + __expf(-score[i]));
    } else {
#pragma unroll
        for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) score[i] = lane + 32 * i < s.count ? __expf(score[i] - most) : 0, total += score[i];
        const float by = 1.0f / over_warp(total);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) score[i] *= by;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + 32 * i;
        const float rank = score[i] + (s.bias && e < s.count ? s.bias[e] : 0.0f);
        key[i] = e < s.count ? ordered(rank == rank ? rank : -INFINITE) : LOWEST;
    }
    int chosen = -1;
    float given = 0;
    for (int k = 0; k < s.top_k; k++) {
        int best = LOWEST, which = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (key[i] > best) best = key[i], which = i;
        const int top = __reduce_max_sync(~0u, best), winner = __reduce_min_sync(~0u, best == top ? lane + 32 * which : EXPERTS);
        float found = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (winner == lane + 32 * i) found = score[i], key[i] = LOWEST;
        found = __shfl_sync(~0u, found, winner % 32);
        if (lane == k) chosen = winner, given = found;
    }
    if (s.normalize) given /= over_warp(given) + 1e-20f;
    const bool is_token = s.live ? token < *s.live : !s.lengths || s.lengths[token] > 0;
    if (lane < s.top_k) {
        s.experts[(i64)token * s.top_k + lane] = is_token ? chosen : -1;
        s.weights[(i64)token * s.top_k + lane] = is_token ? given * s.scale : 0;
    }
}

/* One CTA sorts all pairs; those of an expert in any order. */
INLINE void sort(const Route &s, Shared &m) {
    constexpr int EACH = MOST_PAIRS / THREADS;
    const int pairs = s.tokens * s.top_k;
    int expert[EACH], rank[EACH];
    for (int e = threadIdx.x; e <= s.count; e += THREADS) m.bins[e] = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int pair = threadIdx.x + THREADS * i;
        expert[i] = -1;
        if (pair < pairs) asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(expert[i]) : "l"(s.experts + pair) : "memory");
        if (expert[i] < 0) expert[i] = s.count;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (threadIdx.x + THREADS * i < pairs) rank[i] = atomicAdd(m.bins + expert[i], 1);
    __syncthreads();
    if (threadIdx.x < 32) {
        const int each = (s.count + 32) / 32, begin = threadIdx.x * each;
        int sum = 0, until;
        for (int e = begin; e < min(begin + each, s.count + 1); e++) sum += m.bins[e];
        until = sum;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(~0u, until, i);
            if (threadIdx.x >= i) until += other;
        }
        until -= sum;
        for (int e = begin; e < min(begin + each, s.count + 1); e++) {
            const int found = m.bins[e];
            m.bins[e] = s.starts[e] = until;
            until += found;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int pair = threadIdx.x + THREADS * i;
        if (pair >= pairs) break;
        const int to = m.bins[expert[i]] + rank[i];
        s.place[pair] = to, s.order[to] = pair;
    }
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS, EXPERTS > 128 ? 1 : 2) route(const __grid_constant__ Route s) {
    Shared &m = shared_memory<Shared>();
    const int split = blockIdx.x % SPLITS, first = blockIdx.x / SPLITS * TOKENS, warp = threadIdx.x / 32;
    launch_dependent_grids();
    partial_logits(s, m, first, split);
    cluster_arrive(), cluster_wait();
    for (int at = threadIdx.x; at < OWN * EXPERTS; at += THREADS) {
        const int own = at / EXPERTS, e = at % EXPERTS;
        float parts[SPLITS], sum = 0;
#pragma unroll
        for (int i = 0; i < SPLITS; i++) parts[i] = load_from(&m.part[split * OWN + own][e], i);
#pragma unroll
        for (int i = 0; i < SPLITS; i++) sum += parts[i];
        m.logits[own][e] = sum;
    }
    cluster_arrive();
    __syncthreads();
    if (warp < OWN && first + split * OWN + warp < s.tokens) choose(s, m.logits[warp], first + split * OWN + warp);
    __syncthreads();
    if (threadIdx.x == 0) {
        m.is_last = signal_and_count(s.arrivals) == gridDim.x - 1;
        if (m.is_last) *s.arrivals = 0;
    }
    __syncthreads();
    if (m.is_last) sort(s, m);
    cluster_wait(); /* others may still read this CTA's parts */
}
