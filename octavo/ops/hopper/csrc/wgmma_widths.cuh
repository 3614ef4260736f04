/* WGMMA of 64 rows by N columns and K = 32 in FP8, for every N that is a multiple of 32. Included by grouped_gemm.cu, whose
   TOKENS is the largest N. */
#include "wgmma.cuh"

#define NAMES10 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define WGMMA(N, names, A, B, ADD, ...)                                                                                    \
    INLINE void wgmma##N(float *y, u32 a, u32 b, int add) {                                                                \
        asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%" #A ", 0x40000040}; mov.b64 b, {%" #B ", 0x40000040};\n" \
                     "setp.ne.b32 p, %" #ADD ", 0;\n"                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" names "}, a, b, p, 1, 1;}"               \
                     : __VA_ARGS__ : "r"(a), "r"(b), "r"(add));                                                            \
    }
WGMMA(32, NAMES10 "%10, %11, %12, %13, %14, %15", 16, 17, 18, OUT16(y, 0))
#if TOKENS > 32
WGMMA(64, NAMES10 TEN(1) TEN(2) "%30, %31", 32, 33, 34, OUT16(y, 0), OUT16(y, 16))
WGMMA(96, NAMES10 TEN(1) TEN(2) TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47", 48, 49, 50, OUT16(y, 0), OUT16(y, 16), OUT16(y, 32))
WGMMA(128, NAMES64, 64, 65, 66, OUT64(y))
#endif
/* Issue y [64, N] = (add ? y : 0) + a [64, 32] b [N, 32]^T of two matrix descriptors' lower halves. */
template <int N> INLINE void wgmma(float *y, u32 a, u32 b, int add) {
    if constexpr (N == 32) wgmma32(y, a, b, add);
#if TOKENS > 32
    if constexpr (N == 64) wgmma64(y, a, b, add);
    if constexpr (N == 96) wgmma96(y, a, b, add);
    if constexpr (N == 128) wgmma128(y, a, b, add);
#endif
}
