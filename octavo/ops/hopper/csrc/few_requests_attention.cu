/* Decode attention of a few requests over an FP8 cache, in which latency is all: one launch from the product of queries, keys and
   values to attention's output, with rotary embedding and cache write.

   A cluster of SPLITS CTAs has a request's KV head with its query heads (GQA), and each CTA a part of the context, of up to HELD
   blocks, in registers: cached keys and values are asked for before the kernel ahead has ended, so that behind it only the new
   token's are waited for. Codes are widened to FP16, which is exact, and multiplied by mma.sync; queries are FP16 relative to
   their head's largest, probabilities FP16, sums FP32. Parts are merged out of the CTAs' shared memory, in a fixed order. */

#include "types.cuh"

#define PER_TOKEN_HEAD 0
constexpr int HEADS = 8, HELD = 8, THREADS = 512, CONSUMERS = THREADS, WARPS = THREADS / 32; /* HEADS: query heads of a KV head */

#include "ptx.cuh"
#include "cache_blocks.cuh"

struct Attention {
    const u16 *q, *k, *v; /* BF16 heads of 128, q and k not rotated */
    u16 *out; /* [requests, kv_heads * group, 128] */
    const int *tables, *lengths; /* [requests, table_width] blocks; [requests] */
    const i64 *rotary_rows, *slots; /* [requests], of the new tokens */
    const float *cos_sin; /* [rows, 128], cosines first */
    const u16 *q_norm, *k_norm; /* [128], or null */
    u8 *cache;
    const u8 *next_cache; /* of the next layer, whose part of the same tokens is brought into L2; or null */
    const float *k_scale, *v_scale;
    i64 q_stride, kv_stride;
    int table_width, kv_heads, group;
    float eps, qk_scale; /* qk_scale includes log2(e) */
};

constexpr int TOKENS = HELD * BLOCK, ROUNDS = 2; /* of a warp: 16 tokens of a round's four blocks */
constexpr float LOWEST = -1e30f, Q_LARGEST = 256;

struct Shared {
    u16 query[HEADS][DIM], p[HEADS][TOKENS + 8]; /* FP16; + 8: heads start in different banks */
    u8 key[DIM], value[DIM]; /* the new token's codes */
    float factor[HEADS], most[WARPS][HEADS], sums[WARPS][HEADS];
    float o[2][HEADS][DIM], peak[HEADS], total[HEADS];
};
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

INLINE u32 halves_of(u32 codes) { /* the low two of e4m3 codes as FP16 */
    u32 y;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, a;}" : "=r"(y) : "r"(codes));
    return y;
}
INLINE u32 half_two(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
/* y [16, 8] += a [16, 16] b [8, 16]^T in FP16. */
INLINE void multiply(float (&y)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* Sixteen codes of each of two rows, by the same places of eight heads in FP16: since a sum's order is free, these need not be
   the places that the instruction names. */
INLINE void multiply_codes(float (&y)[4], uint4 top, uint4 bottom, const u16 *heads) {
    const u32 a[4] = {top.x, top.y, top.z, top.w}, c[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
    const uint4 first = *(const uint4 *)heads, second = *(const uint4 *)(heads + 8);
    const u32 b[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(y, halves_of(a[i]), halves_of(c[i]), halves_of(a[i] >> 16), halves_of(c[i] >> 16), b[2 * i], b[2 * i + 1]);
}
/* Code `at` of sixteen replaced. */
INLINE uint4 with_code(uint4 codes, int at, u32 code) {
    const int shift = at % 4 * 8;
    const u32 kept = ~(0xFFu << shift), put = code << shift;
    return {at / 4 == 0 ? (codes.x & kept) | put : codes.x, at / 4 == 1 ? (codes.y & kept) | put : codes.y,
            at / 4 == 2 ? (codes.z & kept) | put : codes.z, at / 4 == 3 ? (codes.w & kept) | put : codes.w};
}
template <bool MOST> INLINE float over(float x, int least) { /* maximum or sum, over the lanes that differ in bits from `least` on */
#pragma unroll
    for (int lane = 16; lane; lane /= 2)
        if (lane >= least) {
            const float other = __shfl_xor_sync(~0u, x, lane);
            x = MOST ? fmaxf(x, other) : x + other;
        }
    return x;
}
INLINE uint4 load(const u8 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
INLINE float from_cta(const float *p, int cta) { /* of the cluster */
    float v;
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a];}" : "=f"(v) : "r"(address(p)), "r"(cta) : "memory");
    return v;
}

/* Four adjacent dimensions of a head in each lane, and what rotating them takes. */
struct Rotation {
    float gain[4], cosine[4], sine[4];
    bool has_norm;
    INLINE void load(const Attention &s, const u16 *norm, i64 row) {
        const int d = threadIdx.x % 32 * 4;
        has_norm = norm != nullptr;
        const uint2 two = has_norm ? __ldg((const uint2 *)(norm + d)) : make_uint2(0, 0);
        const float4 c = __ldg((const float4 *)(s.cos_sin + row * DIM + d % (DIM / 2))), n = __ldg((const float4 *)(s.cos_sin + row * DIM + DIM / 2 + d % (DIM / 2)));
        gain[0] = low_of(two.x), gain[1] = high_of(two.x), gain[2] = low_of(two.y), gain[3] = high_of(two.y);
        cosine[0] = c.x, cosine[1] = c.y, cosine[2] = c.z, cosine[3] = c.w, sine[0] = n.x, sine[1] = n.y, sine[2] = n.z, sine[3] = n.w;
    }
    /* As reference.rotate does, rounding to BF16 where the reference stores BF16. */
    INLINE void apply(float (&x)[4], float eps) const {
        if (has_norm) {
            const float by = rsqrtf(over<false>(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], 1) / DIM + eps);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = rounded(rounded(x[i] * by) * gain[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float other = __shfl_xor_sync(~0u, x[i], 16);
            x[i] = rounded(x[i] * cosine[i] + other * (threadIdx.x % 32 < 16 ? -sine[i] : sine[i]));
        }
    }
};
INLINE void take(const u16 *head, float (&x)[4]) {
    const float2 v = shared_load((const float2 *)(head + threadIdx.x % 32 * 4));
    const u32 a = __float_as_uint(v.x), b = __float_as_uint(v.y);
    x[0] = low_of(a), x[1] = high_of(a), x[2] = low_of(b), x[3] = high_of(b);
}

/* By one warp: a head of queries in FP16, and what a score counts. */
INLINE void prepare_query(const Attention &s, Shared &m, const Rotation &rotation, int request, int kv_head, int h, float k_scale) {
    const int lane = threadIdx.x % 32;
    float x[4] = {};
    if (h < s.group) {
        take(s.q + request * s.q_stride + (kv_head * s.group + h) * DIM, x);
        rotation.apply(x, s.eps);
    }
    const float scale = fmaxf(over<true>(fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3]))), 1) / Q_LARGEST, 1e-12f), by = 1 / scale;
    *(uint2 *)(m.query[h] + lane * 4) = make_uint2(half_two(x[0] * by, x[1] * by), half_two(x[2] * by, x[3] * by));
    if (lane == 0) m.factor[h] = scale * (s.qk_scale * k_scale);
}
/* By one warp: the new token's key, or value, to shared memory and, `stores`, to the cache. */
INLINE void prepare_new(const Attention &s, Shared &m, const Rotation &rotation, int request, int kv_head, bool is_key, i64 slot, float scale) {
    const int d = threadIdx.x % 32 * 4;
    float x[4];
    take((is_key ? s.k : s.v) + request * s.kv_stride + kv_head * DIM, x);
    if (is_key) rotation.apply(x, s.eps);
    const u32 codes = codes_of(finite(x[0]) / scale, finite(x[1]) / scale, finite(x[2]) / scale, finite(x[3]) / scale);
    *(u32 *)((is_key ? m.key : m.value) + d) = codes;
    if (is_key) *(u32 *)(s.cache + key_place(slot, s.kv_heads, kv_head) + d) = codes;
    else
#pragma unroll
        for (int i = 0; i < 4; i++) s.cache[value_place(slot, s.kv_heads, kv_head) + (d + i) * BLOCK] = (u8)(codes >> 8 * i);
}

/* Bring into L2 what the next layer's launch will load. */
INLINE void expect_next(const Attention &s, int request, int kv_head, int first, int count) {
    const int *table = s.tables + request * s.table_width + first;
    constexpr int LINES = BLOCK * DIM / 32; /* of a block's keys, or values, of a head */
    for (int i = threadIdx.x; i < count * LINES; i += THREADS) {
        const i64 slot = (i64)__ldg(table + i / LINES) * BLOCK;
        const int line = i % LINES;
        prefetch(s.next_cache + key_place(slot + line / 4, s.kv_heads, kv_head) + line % 4 * 32);
        prefetch(s.next_cache + value_place(slot, s.kv_heads, kv_head) + line * 32);
    }
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS, 1) few_requests_attention(const __grid_constant__ Attention s) {
    Shared &m = shared_memory<Shared>();
    const int split = blockIdx.x % SPLITS, kv_head = blockIdx.x / SPLITS % s.kv_heads, request = blockIdx.x / SPLITS / s.kv_heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, part = lane % 4;
    launch_dependent_grids();
    /* What no kernel of this step writes is loaded before the one ahead has ended. */
    const int length = __ldg(s.lengths + request), blocks = (length + BLOCK - 1) / BLOCK, each = (blocks + SPLITS - 1) / SPLITS;
    const int first = split * each, count = min(each, blocks - first), newest = length - 1 - first * BLOCK; /* count may be negative; newest: the new token's place */
    uint4 keys[ROUNDS][2][2] = {}, values[HELD / 2][2] = {};
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int block = 4 * i + warp / 4;
        if (block < count) {
            const i64 slot = (i64)__ldg(s.tables + request * s.table_width + first + block) * BLOCK + warp % 4 * 16 + row;
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int c = 0; c < 2; c++) keys[i][r][c] = load(s.cache + key_place(slot + 8 * r, s.kv_heads, kv_head) + part * 32 + c * 16);
        }
    }
#pragma unroll
    for (int j = 0; j < HELD / 2; j++) {
        const int block = 2 * j + warp / 8;
        if (block < count) {
            const u8 *from = s.cache + value_place((i64)__ldg(s.tables + request * s.table_width + first + block) * BLOCK, s.kv_heads, kv_head);
#pragma unroll
            for (int r = 0; r < 2; r++) values[j][r] = load(from + (warp % 8 * 16 + row + 8 * r) * BLOCK + part * 16);
        }
    }
    const bool brings = newest >= 0 && newest < count * BLOCK, rotates = warp < HEADS || (brings && warp == HEADS);
    if (s.next_cache) expect_next(s, request, kv_head, first, count);
    const float k_scale = __ldg(s.k_scale), v_scale = __ldg(s.v_scale);
    const i64 slot = __ldg(s.slots + request);
    Rotation rotation;
    if (rotates) rotation.load(s, warp < HEADS ? s.q_norm : s.k_norm, __ldg(s.rotary_rows + request));
    wait_on_dependent_grids();
    if (warp < HEADS) prepare_query(s, m, rotation, request, kv_head, warp, k_scale);
    else if (brings && warp < HEADS + 2) prepare_new(s, m, rotation, request, kv_head, warp == HEADS, slot, warp == HEADS ? k_scale : v_scale);
    __syncthreads();
    float score[ROUNDS][4], most[2] = {LOWEST, LOWEST};
    const float factor[2] = {m.factor[part * 2], m.factor[part * 2 + 1]};
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int at = (4 * i + warp / 4) * BLOCK + warp % 4 * 16 + row; /* of this thread's first token */
        float y[4] = {};
        if (4 * i + warp / 4 < count) {
#pragma unroll
            for (int r = 0; r < 2; r++)
                if (at + 8 * r == newest) keys[i][r][0] = *(const uint4 *)(m.key + part * 32), keys[i][r][1] = *(const uint4 *)(m.key + part * 32 + 16);
            __syncwarp();
#pragma unroll
            for (int c = 0; c < 2; c++) multiply_codes(y, keys[i][0][c], keys[i][1][c], m.query[row] + part * 32 + c * 16);
        }
#pragma unroll
        for (int v = 0; v < 4; v++) {
            score[i][v] = at + v / 2 * 8 <= newest && 4 * i + warp / 4 < count ? y[v] * factor[v % 2] : LOWEST;
            most[v % 2] = fmaxf(most[v % 2], score[i][v]);
        }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
        most[c] = over<true>(most[c], 4);
        if (row == 0) m.most[warp][part * 2 + c] = most[c];
    }
    __syncthreads();
    float total[2] = {};
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float peak = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, m.most[w][part * 2 + c]);
        if (threadIdx.x < 4) m.peak[part * 2 + c] = peak;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float p = score[i][2 * r + c] > LOWEST ? exp2_of(score[i][2 * r + c] - peak) : 0;
                total[c] += p;
                m.p[part * 2 + c][(4 * i + warp / 4) * BLOCK + warp % 4 * 16 + row + 8 * r] = (u16)half_two(p, 0);
            }
        total[c] = over<false>(total[c], 4);
        if (row == 0) m.sums[warp][part * 2 + c] = total[c];
    }
    __syncthreads();
    float o[4] = {};
#pragma unroll
    for (int j = 0; j < HELD / 2; j++) {
        const int block = 2 * j + warp / 8, d = warp % 8 * 16 + row, within = newest - block * BLOCK - part * 16; /* the new token's place of 16 */
        if (block >= count) continue;
        if (within >= 0 && within < 16)
#pragma unroll
            for (int r = 0; r < 2; r++) values[j][r] = with_code(values[j][r], within, m.value[d + 8 * r]);
        __syncwarp();
        multiply_codes(o, values[j][0], values[j][1], m.p[row] + block * BLOCK + part * 16);
    }
#pragma unroll
    for (int v = 0; v < 4; v++) m.o[warp / 8][part * 2 + v % 2][warp % 8 * 16 + row + v / 2 * 8] = o[v];
    if (threadIdx.x < HEADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += m.sums[w][threadIdx.x];
        m.total[threadIdx.x] = sum;
    }
    if (SPLITS > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
    constexpr int OWN = HEADS * DIM / SPLITS;
    for (int i = 2 * threadIdx.x; i < OWN; i += 2 * THREADS) {
        const int at = split * OWN + i, h = at / DIM, d = at % DIM;
        float peaks[SPLITS], totals[SPLITS], parts[SPLITS][2], peak = LOWEST, all = 0, y[2] = {};
#pragma unroll
        for (int c = 0; c < SPLITS; c++) {
            peaks[c] = from_cta(m.peak + h, c), totals[c] = from_cta(m.total + h, c);
#pragma unroll
            for (int e = 0; e < 2; e++) parts[c][e] = from_cta(&m.o[0][h][d + e], c) + from_cta(&m.o[1][h][d + e], c);
            peak = fmaxf(peak, peaks[c]);
        }
#pragma unroll
        for (int c = 0; c < SPLITS; c++) {
            const float by = exp2_of(peaks[c] - peak);
            all += totals[c] * by, y[0] += parts[c][0] * by, y[1] += parts[c][1] * by;
        }
        const float by = length > 0 ? v_scale / all : 0; /* a request without a context pads a batch: zeros */
        if (h < s.group) *(u32 *)(s.out + ((i64)(request * s.kv_heads + kv_head) * s.group + h) * DIM + d) = narrow_two(y[0] * by, y[1] * by);
    }
    if (SPLITS > 1) cluster_arrive(), cluster_wait(); /* others may still read this CTA's sums */
}
