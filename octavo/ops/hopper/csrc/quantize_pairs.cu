/* Codes of BF16 rows of up to 2,048 values with a scale a row, for very many rows: a warp has AT_ONCE rows in flight. */

#include "types.cuh"

struct Rows {
    const u16 *x; /* [rows, width] */
    u8 *codes; /* [rows, padded] */
    float *scale; /* [rows] */
    const int *count; /* rows that count; the rest are left alone */
    int width, padded;
};
constexpr int THREADS = 256, CONSUMERS = THREADS, WARPS = THREADS / 32;
constexpr float LIMIT = 448.0f, FLOOR = 1.0f / (448 * 512); /* of scales, as in reference.py */
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 0;

#include "ptx.cuh"

/* A row is CHUNKS times 256 values or less. */
template <int CHUNKS, int AT_ONCE> INLINE void quantize(const Rows &s) {
    const int lane = threadIdx.x % 32, count = *s.count;
    for (int row = (blockIdx.x * WARPS + threadIdx.x / 32) * AT_ONCE; row < count; row += gridDim.x * WARPS * AT_ONCE) {
        uint4 y[AT_ONCE][CHUNKS];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int at = c * 256 + lane * 8;
                y[r][c] = make_uint4(0, 0, 0, 0);
                if (row + r < count && at < s.width) y[r][c] = shared_load((const void *)(s.x + (i64)(row + r) * s.width + at));
            }
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            if (row + r >= count) break;
            u32 two = 0;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                constexpr u32 ABS = 0x7FFF7FFF;
                two = larger(two, larger(larger(y[r][c].x & ABS, y[r][c].y & ABS), larger(y[r][c].z & ABS, y[r][c].w & ABS)));
            }
#pragma unroll
            for (int i = 16; i; i /= 2) two = larger(two, __shfl_xor_sync(~0u, two, i));
            const float scale = fmaxf(__fdiv_rn(fmaxf(low_of(two), high_of(two)), LIMIT), FLOOR), by = __frcp_rn(scale);
            if (lane == 0) s.scale[row + r] = scale;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int at = c * 256 + lane * 8;
                const u32 v[4] = {y[r][c].x, y[r][c].y, y[r][c].z, y[r][c].w};
                u32 codes[2];
#pragma unroll
                for (int i = 0; i < 2; i++) codes[i] = codes_of(low_of(v[2 * i]) * by, high_of(v[2 * i]) * by, low_of(v[2 * i + 1]) * by, high_of(v[2 * i + 1]) * by);
                if (at < s.padded) *(uint2 *)(s.codes + (i64)(row + r) * s.padded + at) = make_uint2(codes[0], codes[1]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_pairs(const __grid_constant__ Rows s) {
    wait_on_dependent_grids();
    launch_dependent_grids(); /* only now, so that what begins early may read what earlier launches than the last have made */
    if (s.padded <= 256) quantize<1, 4>(s);
    else if (s.padded <= 768) quantize<3, 4>(s);
    else quantize<8, 2>(s);
}
