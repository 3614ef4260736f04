/* PTX wrappers: conversions, loads, mbarriers and bulk copies. Included by all kernels. */
#define INLINE __device__ __forceinline__

INLINE float wide(u32 bf16) { return __uint_as_float(bf16 << 16); }
INLINE float low_of(u32 two) { return wide(two & 0xFFFF); } /* of two packed BF16 */
INLINE float high_of(u32 two) { return __uint_as_float(two & 0xFFFF0000); }
INLINE u32 narrow(float x) { /* to BF16, ties to even */
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
INLINE u32 narrow_two(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
INLINE u32 times(u32 a, u32 b) { /* of two packed BF16 each */
    u32 y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u)); /* -0 keeps a zero's sign */
    return y;
}
INLINE u32 larger(u32 a, u32 b) {
    u32 y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
INLINE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE float silu(float x) { return __fdividef(x, 1 + exp2_of(x * -1.44269504f)); }
INLINE float finite(float x) { return fabsf(x) < __int_as_float(0x7F800000) ? x : 0; } /* the cache holds finite values only */
INLINE float rounded(float x) { return wide(narrow(x)); }
INLINE u32 codes_of(float low, float high) {
    u16 y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
    return y;
}
INLINE u32 codes_of(float a, float b, float c, float d) { return codes_of(a, b) | codes_of(c, d) << 16; }
INLINE void values_of(u32 codes, float (&out)[4]) {
    u32 low, high;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(low), "=r"(high) : "r"(codes));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(out[0]), "=f"(out[1]) : "r"(low));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(out[2]), "=f"(out[3]) : "r"(high));
}
/* Codes of what rounding two values to `codes` has left of them, in sixteenths: a code keeps a sixteenth of a value at least, so
   none is out of range. Both codes together keep 8 bits, like BF16. */
constexpr float OF_REST = 1.0f / 16;
INLINE u32 rests_of(u32 codes, float low, float high) {
    u32 y;
    asm("{.reg .b16 a; .reg .b32 b; cvt.u16.u32 a, %1; cvt.rn.f16x2.e4m3x2 %0, a;}" : "=r"(y) : "r"(codes));
    float a, b;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(a), "=f"(b) : "r"(y));
    return codes_of((low - a) / OF_REST, (high - b) / OF_REST);
}

/* Load from L2 what other CTAs wrote in this launch; L1 is not coherent. */
INLINE uint4 shared_load(const void *p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
INLINE float2 shared_load(const float2 *p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
INLINE float shared_load(const float *p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
INLINE u16 shared_load(const u16 *p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return v;
}
/* A flagged packet: two BF16 values and a 32-bit phase number, written and read atomically (as in NCCL's LL protocol). */
INLINE void send(u64 *to, u32 values, u32 number) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)number << 32 | values) : "memory");
}
INLINE u64 look(const u64 *from) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}
INLINE u32 look(const u32 *from) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
INLINE ulonglong2 look_at_two(const u64 *from) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(from) : "memory");
    return v;
}
/* Four words that other CTAs may be writing concurrently: unlike shared_load, a relaxed load of their current values. */
INLINE uint4 look_at_four(const u32 *from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
INLINE bool is_there(u64 sent, u32 number) { return (int)((u32)(sent >> 32) - number) >= 0; }

INLINE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

INLINE u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
/* The CTA's dynamic shared memory, aligned to 1,024 bytes as swizzled boxes require. */
template <class Shared> INLINE Shared &shared_memory() {
    extern __shared__ u8 raw[];
    return *(Shared *)(raw + (1024 - address(raw) % 1024) % 1024);
}
INLINE void wait(const u64 *barrier, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(address(barrier)), "r"(parity) : "memory");
}
template <int ARRIVALS> INLINE void init(const u64 *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "n"(ARRIVALS) : "memory");
}
INLINE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); } /* visible to TMA */
INLINE void expect(const u64 *barrier, u32 bytes) { /* arrive and expect bytes */
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
INLINE void arrive(const u64 *barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory"); }
/* Grid-wide counter in L2 with release semantics: what a CTA wrote before is visible to whoever has seen its arrival. */
INLINE void signal(u32 *counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
INLINE u32 signal_and_count(u32 *counter) { /* number of earlier arrivals; acquires their writes */
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
INLINE u32 arrived(const u32 *counter) {
    u32 seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    return seen;
}
INLINE void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); } /* consumer warps only */

INLINE void copy(u32 to, const void *from, u32 bytes, u32 full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(full) : "memory");
}
INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
INLINE void launch_dependent_grids() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
INLINE void wait_on_dependent_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/* Position in a ring of mbarriers, as CUTLASS's PipelineState. */
template <int SIZE> struct PipelineState {
    int at = 0;
    u32 parity = 0;
    INLINE void next() {
        if (++at == SIZE) at = 0, parity ^= 1;
    }
};
