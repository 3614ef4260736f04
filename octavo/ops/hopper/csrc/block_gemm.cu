/* y [tokens, rows] = x weight^T in BF16, for FP8 codes with block scales.

   A tile is 2 HALF adjacent rows of the weight. */

constexpr int STEP = 2 * HALF;
#define IN_TURN (HALF <= 64 && !BY_ROW)
#include "block_gemm_mainloop.cuh"

struct Plain {
    BlockProduct product;
    Map out; /* boxes of 16 tokens by 64 values */
    int rows;
};

struct End {
    const Plain &s;
    Out &out;

    INLINE End(const Plain &s, Out &out) : s(s), out(out) {}
    INLINE void prepare(int) {}
    INLINE void finish(const float (&sums)[HALF], int token, int first) {
#pragma unroll
        for (int h = 0; h < (HALF + 63) / 64; h++) {
            await_stores();
            put_row<2 * PART>(out, sums + 64 * h);
            if (threadIdx.x % 32 == 0) {
#pragma unroll
                for (int i = 0; i < PART / 32; i++) {
                    const int row = first + 128 * h + 64 * i;
                    if (row < s.rows) store_box(s.out, row * 2, token, out[i]);
                }
                end_stores();
            }
        }
    }
};

extern "C" __global__ void __cluster_dims__(CTAS, 1, 1) __launch_bounds__(THREADS, 1) block_product(const __grid_constant__ Plain s) {
    launch_dependent_grids();
    product<End>(s);
}
