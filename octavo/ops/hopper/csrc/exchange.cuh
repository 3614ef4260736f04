/* How ranks of one host exchange values within a kernel, for RANKS of them: over buffers that all of them can write.

   A rank stores its values into its peers' buffers, and each polls its own. There are no flags: a buffer's words are EMPTY
   until a value has come, no rank sends EMPTY, and who has read a word makes it EMPTY again (as in TensorRT-LLM's Lamport
   all-reduces). Words are of 32 bits, which a store does not tear.

   Calls alternate between the two halves of a buffer. That suffices: a rank stores into a half again two calls later, so its
   call between has ended; that one has waited for a value of every rank, and a rank sends none before its earlier calls have
   ended, with all that they have made EMPTY. Calls follow one another on a stream, in the same order on all ranks. To be
   included behind ptx.cuh. */

struct Exchange {
    u8 *buffers[8]; /* each rank's, as this process sees it */
    u32 *state; /* calls so far, and CTAs of this one that are done */
    u64 half; /* bytes of half a buffer */
    int rank;
};

constexpr u32 EMPTY = 0x80008000; /* two BF16 of -0; a rank sends 0 instead */

INLINE void push(void *to, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
INLINE uint4 peek(const void *from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
INLINE void clear(void *at) { *(uint4 *)at = uint4{EMPTY, EMPTY, EMPTY, EMPTY}; }
INLINE u32 sendable(u32 w) { return w == EMPTY ? 0 : w; }
INLINE uint4 sendable(uint4 v) { return {sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w)}; }
INLINE bool has_empty(uint4 v) { return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY; }

INLINE u32 calls_so_far(const Exchange &at) {
    u32 calls;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(calls) : "l"(at.state) : "memory");
    return calls;
}
/* To be called by one thread of each of `ctas` CTAs, when all threads of the CTA have read calls_so_far: `calls` from now on. */
INLINE void count_calls(const Exchange &at, u32 calls, u32 ctas) {
    if (atomicAdd(at.state + 1, 1) == ctas - 1) at.state[1] = 0, at.state[0] = calls;
}
