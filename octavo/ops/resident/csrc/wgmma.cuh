/* What the matrix instructions of a group of four warps have in common. Included by tiles.cuh, prefill.cu and decode.cu. */

/* Of a matrix in shared memory, eight rows of which are adjacent, their 16-byte parts swizzled: the lower half of what the matrix
   unit wants to know. The upper half is 0x40000040 of rows of 128 bytes, 0x80000020 of rows of 64 (PTX ISA, matrix descriptor). */
INLINE u32 descriptor(u32 place) { return 1 << 16 | place >> 4; }
INLINE void begin_matrices() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void end_matrices() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#define OUT4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
/* Sums of products that were begun; none is under way after that. */
template <int N> INLINE void await(float (&x)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
/* What a thread wrote to shared memory is there for the matrix unit and the copy engine, once the thread has met another. */
INLINE void show_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
