/* y [tokens, width] = silu(x gate^T) * (x up^T) for FP8 codes with block scales; in BF16, in codes with a scale per 128
   values, or both.

   A tile's two boxes are 128 rows of gate and the same rows of up, so four threads hold a token's whole group of results. */

constexpr int STEP = HALF;
#include "block_gemm_mainloop.cuh"

struct Gated {
    BlockProduct product;
    Map dense, codes; /* boxes of 16 tokens by 64 values, by 128 codes */
    float *scale; /* of the codes, [tokens, width / 128]; null without them */
    int width, makes_dense;
};

constexpr float LIMIT = 448, FLOOR = 1.0f / (448 * 512);

struct End {
    const Gated &s;
    Out &out;

    INLINE End(const Gated &s, Out &out) : s(s), out(out) {}
    INLINE void prepare(int) {}
    INLINE void finish(float (&sums)[HALF], int token, int first) {
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = silu(sums[i]) * sums[64 + i];
        if (s.makes_dense) write_dense(sums, token, first);
        if (s.scale) write_codes(sums, token, first);
    }
    INLINE void write_dense(const float (&y)[HALF], int token, int first) {
        await_stores();
        put_row(out, y);
        if (threadIdx.x % 32) return;
        store_box(s.dense, first * 2, token, out[0]), store_box(s.dense, first * 2 + 128, token, out[1]);
        end_stores();
    }
    INLINE void write_codes(const float (&y)[HALF], int token, int first) {
        const int lane = threadIdx.x % 32;
        u8 *to = (u8 *)out;
        await_stores();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) most = fmaxf(most, fmaxf(fabsf(y[4 * i + 2 * r]), fabsf(y[4 * i + 2 * r + 1])));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float scale = fmaxf(__fdiv_rn(most, LIMIT), FLOOR), by = __frcp_rn(scale);
            const int row = lane / 4 + 8 * r;
            if (lane % 4 == 0 && token + row < s.product.tokens) s.scale[(i64)(token + row) * (s.width / 128) + first / 128] = scale;
#pragma unroll
            for (int i = 0; i < 16; i++) /* 16-byte chunks are swizzled as TMA reads them */
                *(u16 *)(to + row * 128 + (8 * i + lane % 4 * 2 ^ lane / 4 * 16)) = codes_of(y[4 * i + 2 * r] * by, y[4 * i + 2 * r + 1] * by);
        }
        fence_view_async_shared();
        __syncwarp();
        if (lane) return;
        store_box(s.codes, first, token, to);
        end_stores();
    }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS, 1) gated_product(const __grid_constant__ Gated s) {
    launch_dependent_grids();
    product<End>(s);
}
