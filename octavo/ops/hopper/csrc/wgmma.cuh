/* WGMMA primitives. Included by wgmma_tiles.cuh, gemm_mainloop.cuh, prefill_attention.cu and decode_attention.cu. */

/* Lower half of a shared-memory matrix descriptor: eight-row groups are contiguous, with swizzled 16-byte chunks. The upper
   half is 0x40000040 for rows of 128 bytes, 0x80000020 for rows of 64 (PTX ISA, matrix descriptor). */
INLINE u32 descriptor(u32 place) { return 1 << 16 | place >> 4; }
INLINE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void warpgroup_commit_batch() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Accumulators as read-write operands, and operand names, ten at a time. */
#define OUT4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define OUT16(x, i) OUT4(x, i), OUT4(x, i + 4), OUT4(x, i + 8), OUT4(x, i + 12)
#define OUT64(x) OUT16(x, 0), OUT16(x, 16), OUT16(x, 32), OUT16(x, 48)
#define TEN(a) "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7, %" #a "8, %" #a "9, "
#define NAMES60 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#define NAMES64 NAMES60 "%60, %61, %62, %63"
/* Wait for all WGMMAs in flight; x holds their accumulators. */
template <int N> INLINE void warpgroup_wait(float (&x)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
/* Make this thread's writes to shared memory visible to WGMMA and TMA (the async proxy), after a barrier with the reading
   thread. */
INLINE void fence_view_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
