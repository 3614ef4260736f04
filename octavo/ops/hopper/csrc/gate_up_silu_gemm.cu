/* y [tokens, width] = silu(x gate^T) * (x up^T) for FP8 codes with a scale per token and per row of the weight.

   A tile's two boxes are rows of gate and the same rows of up, so the thread that holds a sum of gate also holds the sum of
   up. */

constexpr int STEP = HALF;
#include "gemm_mainloop.cuh"

struct Gated {
    Product product;
    Map out; /* boxes of 16 tokens by 64 values */
    const float *by_token, *by_row;
    int width;
};

struct End {
    const Gated &s;
    Out &out; /* the first and the last 64 of HALF columns */
    float by[2];

    INLINE End(const Gated &s, Out &out) : s(s), out(out) {}
    INLINE void prepare(int token) {
        const int row = token + threadIdx.x % 32 / 4, last = s.product.tokens - 1;
        by[0] = s.by_token[min(row, last)], by[1] = s.by_token[min(row + 8, last)];
    }
    INLINE void finish(const float (&sums)[HALF], int token, int first) {
        const int lane = threadIdx.x % 32;
        await_stores();
#pragma unroll
        for (int i = 0; i < HALF / 8; i += 2) {
            u32 y[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int place = min(first + (i + j) * 8 + lane % 4 * 2, s.width - 2);
                const float2 gate = *(const float2 *)(s.by_row + place), up = *(const float2 *)(s.by_row + s.width + place);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float *g = sums + 4 * (i + j) + 2 * r, *u = g + HALF / 2;
                    y[2 * j + r] = narrow_two(silu(g[0] * by[r] * gate.x) * (u[0] * by[r] * up.x), silu(g[1] * by[r] * gate.y) * (u[1] * by[r] * up.y));
                }
            }
            if (i < 8) put(out[0], i, y);
            if (i >= (HALF - 64) / 8) put(out[1], i - (HALF - 64) / 8, y);
        }
        fence_view_async_shared();
        __syncwarp();
        if (lane) return;
        store_box(s.out, first * 2, token, out[0]);
        if (first + HALF - 64 < s.width) store_box(s.out, (first + HALF - 64) * 2, token, out[1]);
        end_stores();
    }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS, 1) gated_product(const __grid_constant__ Gated s) {
    launch_dependent_grids();
    product<End>(s);
}
