/* The QKV GEMM for many tokens with the following ops as its epilogue. Query and key heads are optionally normed, then
   rotated (dimension i with i + 64, by the token's cosine and sine). Queries are written as BF16, keys and values as e4m3
   into their tokens' slots of a paged cache.

   A tile is HALF / 64 heads of 128 rows of the weight. BLOCKS: codes have block scales. PER_TOKEN_HEAD: the cache has a scale
   for each token and head, which is computed here. */

constexpr int STEP = 2 * HALF;
#if BLOCKS
#include "block_gemm_mainloop.cuh"
typedef BlockProduct Factors;
#else
#include "gemm_mainloop.cuh"
typedef Product Factors;
#endif
#include "cache_blocks.cuh"

struct Qkv {
    Factors product;
    Map queries; /* BF16 [tokens, q_heads * 128] in boxes of 16 tokens by 64 values */
    const float *by_token, *by_row; /* unless BLOCKS */
    const u16 *q_norm, *k_norm; /* BF16 [128], or null */
    const float *cos_sin; /* [rows, 128], cosines first */
    const i64 *rotary_rows, *slots; /* a slot is 64 * block + offset */
    u8 *cache; /* as cache_blocks.cuh has it */
    float *k_scale, *v_scale; /* of the cache: per layer, or PER_TOKEN_HEAD those of block 0 */
    int q_heads, kv_heads;
    float eps;
};

/* Register layout of a head of 16 tokens: a thread has two rows 8 apart. Dimension 8i + 2t + e of row 8r is y[4i + 2r + e];
   t is the thread's index in its quad. */
INLINE void norm(float *y, const u16 *gains, float eps) {
    float by[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 64; i++) by[i / 2 % 2] = fmaf(y[i], y[i], by[i / 2 % 2]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        by[r] += __shfl_xor_sync(~0u, by[r], 1);
        by[r] += __shfl_xor_sync(~0u, by[r], 2);
        by[r] = rsqrtf(by[r] * (1.0f / DIM) + eps);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 gain = *(const u32 *)(gains + 8 * i + threadIdx.x % 4 * 2);
#pragma unroll
        for (int r = 0; r < 2; r++) y[4 * i + 2 * r] *= by[r] * low_of(gain), y[4 * i + 2 * r + 1] *= by[r] * high_of(gain);
    }
}
INLINE void rotate(float *y, const float2 (&cosines)[2][8], const float2 (&sines)[2][8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 cosine = cosines[r][i], sine = sines[r][i];
            float *low = y + 4 * i + 2 * r, *high = low + 32;
            const float a = low[0], b = low[1];
            low[0] = a * cosine.x - high[0] * sine.x, low[1] = b * cosine.y - high[1] * sine.y;
            high[0] = high[0] * cosine.x + a * sine.x, high[1] = high[1] * cosine.y + b * sine.y;
        }
}
INLINE u32 two_codes(const float *y, float by) {
    return PER_TOKEN_HEAD ? codes_of(y[0] * by, y[1] * by) : codes_of(finite(y[0]) * by, finite(y[1]) * by);
}

INLINE void write_queries(const Map &map, Out &out, const float *y, int token, int head) {
    put_row(out, y);
    if (threadIdx.x % 32) return;
    store_box(map, head * DIM * 2, token, out[0]), store_box(map, head * DIM * 2 + 128, token, out[1]);
    end_stores();
}
/* Reciprocals of the scales of a thread's two rows; PER_TOKEN_HEAD computes and stores these. */
INLINE void inverse_scales(const Qkv &s, float (&by)[2], float *scales, float *y, i64 slot, int tokens, int head) {
#if PER_TOKEN_HEAD
    const int lane = threadIdx.x % 32;
    float most[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 64; i++) {
        y[i] = finite(y[i]);
        most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(y[i]));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
        most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
        const float scale = scale_of(most[r]);
        const i64 to = __shfl_sync(~0u, slot, lane / 4 + 8 * r);
        if (lane % 4 == 0 && lane / 4 + 8 * r < tokens) scales[scale_place(to, s.kv_heads, head)] = scale;
        by[r] = __frcp_rn(scale);
    }
#else
    by[0] = by[1] = __frcp_rn(__ldg(scales));
#endif
}
/* Store a row of keys, 16 bytes at a time; the staging buffer is swizzled to avoid bank conflicts between rows. */
INLINE void write_keys(const Qkv &s, u8 *out, float *y, i64 slot, int tokens, int head) {
    const int lane = threadIdx.x % 32;
    float by[2];
    inverse_scales(s, by, s.k_scale, y, slot, tokens, head);
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            *(u16 *)(out + (lane / 4 + 8 * r) * DIM + (8 * i + lane % 4 * 2 ^ lane / 4 * 16)) = two_codes(y + 4 * i + 2 * r, by[r]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = lane / 8 + 4 * i;
        const i64 to = __shfl_sync(~0u, slot, row);
        if (row < tokens)
            *(uint4 *)(s.cache + key_place(to, s.kv_heads, head) + lane % 8 * 16) =
                *(const uint4 *)(out + row * DIM + (lane % 8 ^ row % 8) * 16);
    }
    __syncwarp();
}
/* Store 16 tokens of a dimension of values at a time; they are mostly contiguous in the cache. */
INLINE void write_values(const Qkv &s, u8 *out, float *y, i64 slot, int tokens, int head) {
    const int lane = threadIdx.x % 32;
    float by[2];
    inverse_scales(s, by, s.v_scale, y, slot, tokens, head);
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 two = two_codes(y + 4 * i + 2 * r, by[r]);
            u8 *to = out + (8 * i + lane % 4 * 2) * 16 + lane / 4 + 8 * r;
            to[0] = two, to[16] = two >> 8;
        }
    __syncwarp();
    const i64 first = __shfl_sync(~0u, slot, 0);
    const bool adjacent = __all_sync(~0u, first % 16 == 0 && slot == first + lane % 16);
    u8 *to = s.cache + value_place(slot, s.kv_heads, head);
    if (adjacent) {
#pragma unroll
        for (int d = lane; d < DIM; d += 32) *(uint4 *)(to - lane % 16 + d * BLOCK) = *(const uint4 *)(out + d * 16);
    } else if (lane % 16 < tokens) {
#pragma unroll 8
        for (int d = lane / 16; d < DIM; d += 2) to[d * BLOCK] = out[d * 16 + lane % 16];
    }
    __syncwarp();
}

/* Cosines and sines are loaded before a tile's mainloop where registers allow it, so that they have arrived by the epilogue. */
constexpr bool EARLY = !BLOCKS || HALF == 64;
INLINE float2 load_two(const float *p) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}
struct End {
    const Qkv &s;
    Out &out; /* queries, or codes of a head: keys 16 by 128, values 128 by 16 */
    float by[2];
    float2 cosines[2][8], sines[2][8];
    i64 slot;

    INLINE End(const Qkv &s, Out &out) : s(s), out(out) {}
    INLINE void prepare(int token) {
        const int lane = threadIdx.x % 32, last = s.product.tokens - 1;
        slot = s.slots[min(token + lane % 16, last)];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (!BLOCKS) by[r] = s.by_token[min(token + lane / 4 + 8 * r, last)];
            if (EARLY) load_rotation(token, r);
        }
    }
    INLINE void load_rotation(int token, int r) {
        const int lane = threadIdx.x % 32, last = s.product.tokens - 1;
        const float *of = s.cos_sin + s.rotary_rows[min(token + lane / 4 + 8 * r, last)] * DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) cosines[r][i] = load_two(of + 8 * i), sines[r][i] = load_two(of + 64 + 8 * i);
    }
    INLINE void finish(float (&sums)[HALF], int token, int row) {
        const int lane = threadIdx.x % 32;
        if (!EARLY) load_rotation(token, 0), load_rotation(token, 1);
#pragma unroll
        for (int h = 0; h < HALF / 64; h++) {
            const int head = row / DIM + h;
            float *y = sums + 64 * h;
            if (head >= s.q_heads + 2 * s.kv_heads) break;
#pragma unroll
            for (int i = 0; i < 16 * !BLOCKS; i++) {
                const float2 by_row = *(const float2 *)(s.by_row + head * DIM + 8 * i + lane % 4 * 2);
#pragma unroll
                for (int r = 0; r < 2; r++) y[4 * i + 2 * r] *= by[r] * by_row.x, y[4 * i + 2 * r + 1] *= by[r] * by_row.y;
            }
            await_stores();
            const int kv_head = head - s.q_heads;
            if (kv_head >= s.kv_heads) {
                write_values(s, (u8 *)out, y, slot, s.product.tokens - token, kv_head - s.kv_heads);
                continue;
            }
            if (s.q_norm) norm(y, kv_head < 0 ? s.q_norm : s.k_norm, s.eps);
            rotate(y, cosines, sines);
            if (kv_head < 0) write_queries(s.queries, out, y, token, head);
            else write_keys(s, (u8 *)out, y, slot, s.product.tokens - token, kv_head);
        }
    }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS, 1) qkv_product(const __grid_constant__ Qkv s) {
    product<End>(s);
}
