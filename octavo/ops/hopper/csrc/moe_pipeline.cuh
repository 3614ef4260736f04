/* What moe_decode.cu is made of: its shared memory, the thread that loads weights, and products of 16 rows by tokens.

   All weights are read 16 rows at a time. A stage holds 16 rows by 8 K steps of 128, [step][row][128], and half of it, 64
   rows of shared memory, is the M side of one WGMMA: four K steps of the same 16 rows. The N side is four K steps of the same 8
   tokens. Of the product, a warp keeps the block of its own K step; the others are products of unlike steps. So a product of few
   rows by few tokens takes whole matrix instructions, and a warp's sum is over 128 values of K, as FP32 sums want it. */
#include "wgmma.cuh"

INLINE int lane_of() { return threadIdx.x % 32; }
INLINE int warp_of() { return threadIdx.x / 32; }
INLINE int group_of() { return __shfl_sync(~0u, threadIdx.x / 128, 0); } /* the warpgroup */
INLINE void warpgroup_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }

/* Offset of code k of row `row` in inputs of STEPS K steps: eight rows by a K step are contiguous, swizzled. */
template <int STEPS> INLINE int place_of(int row, int k) {
    return ((row / 8 * STEPS + k / STEP) * 8 + row % 8) * STEP + ((k / 16 ^ row) & 7) * 16 + k % 16;
}

/* Grid barriers of the launch, a cache line each. What a CTA wrote before its arrival is visible to the waiting CTAs. */
enum { O_DONE, LOGITS_DONE, ACT_DONE, DOWN_DONE, BARRIERS };
constexpr int LINE = 32;
INLINE void grid_arrive(const Between &s, int which) {
    consumers_sync();
    if (threadIdx.x == 0) signal(s.grid_barriers + which * LINE);
}
INLINE void grid_wait(const Between &s, int which) {
    if (threadIdx.x == 0)
        while (arrived(s.grid_barriers + which * LINE) < CTAS) {}
    consumers_sync();
}

/* This CTA's part of the units of gate and up: eight channels of an expert in use each, in the order of `list`. */
struct Share {
    int first, count;
    INLINE Share(int active) {
        const int all = active * (INTER / 8);
        first = all * (int)blockIdx.x / CTAS, count = all * ((int)blockIdx.x + 1) / CTAS - first;
    }
};

#define COPY_BOX(rank, coordinates, ...)                                                                                              \
    asm volatile("{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"                                           \
                 "cp.async.bulk.tensor." #rank "d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {" coordinates \
                 "}], [%2], once;}" ::"r"(to), "l"(&map), "r"(address(full)), __VA_ARGS__ : "memory")

constexpr int STAGES_AHEAD = TOKENS == 1 ? 2 : 3; /* loads in flight: longer queues for memory would delay the loads that others wait for */

/* The thread that loads weights, in the order in which consumers read them, as far ahead as the ring has room. Loops are not
   unrolled: unrolled code would have to be fetched first. */
struct Producer {
    u8 *ring;
    SmemState &smem;
    int n = 0, landed = 0; /* stages asked for, and those that have arrived */
    template <class Copy> INLINE void stage(Copy copy_to) {
        const int slot = n % STAGES;
        for (; n - landed >= STAGES_AHEAD; landed++) wait(smem.full + landed % STAGES, landed / STAGES & 1);
        wait(smem.empty + slot, (n / STAGES & 1) ^ 1);
        expect(smem.full + slot, STAGE);
        copy_to(address(ring + slot * STAGE), smem.full + slot);
        n++;
    }
    INLINE void dense(const Map &map, int units, int steps) {
#pragma unroll 1
        for (int unit = blockIdx.x; unit < units; unit += CTAS)
#pragma unroll 1
            for (int step = 0; step < steps; step += STAGE_STEPS)
                stage([&](u32 to, const u64 *full) { COPY_BOX(3, "%3, %4, %5", "r"(0), "r"(unit * ROWS), "r"(step)); });
    }
    INLINE void gate_up(const Map &map) {
        const Share share(smem.active);
#pragma unroll 1
        for (int i = 0; i < share.count; i++) {
            const int unit = share.first + i, expert = smem.list[unit / (INTER / 8)], channel = unit % (INTER / 8) * 8;
#pragma unroll 1
            for (int step = 0; step < HIDDEN / STEP; step += STAGE_STEPS)
                stage([&](u32 to, const u64 *full) {
                    COPY_BOX(5, "%3, %4, %5, %6, %7", "r"(0), "r"(channel), "r"(0), "r"(step), "r"(expert));
                });
        }
    }
    INLINE void down(const Map &map) {
#pragma unroll 1
        for (int unit = blockIdx.x; unit < HIDDEN / ROWS; unit += CTAS)
#pragma unroll 1
            for (int i = 0; i < smem.active; i++)
#pragma unroll 1
                for (int step = 0; step < INTER / STEP; step += STAGE_STEPS)
                    stage([&](u32 to, const u64 *full) {
                        COPY_BOX(4, "%3, %4, %5, %6", "r"(0), "r"(unit * ROWS), "r"(step), "r"((int)smem.list[i]));
                    });
    }
};

/* m64 x n32 x k32; without `add`, the previous contents of `x` are ignored. */
INLINE void multiply(float (&x)[16], u32 a, u32 b, int add) {
    asm volatile("{.reg .pred p; .reg .b64 a, b; mov.b64 a, {%16, 0x40000040}; mov.b64 b, {%17, 0x40000040};\n"
                 "setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "a, b, p, 1, 1;}" : OUT16(x, 0) : "r"(a), "r"(b), "r"(add));
}
/* Add to `sum` the products of a stage's rows by eight tokens. `steps`: those of the stage that count. Value 2 * i + c of a
   thread is at row lane / 4 + 8 * i and token lane % 4 * 2 + c; by(tile, value) is its scale. */
template <class By> INLINE void multiply_stage(float (&sum)[4], u32 rows, u32 tokens, int steps, By by) {
    float product[2][16];
    const int warp = warp_of() % 4;
    asm volatile("" : "+r"(rows), "+r"(tokens)); /* or descriptors of all loops would be kept in registers */
    warpgroup_arrive();
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            multiply(product[tile], descriptor(rows + tile * STAGE / 2) + 2 * k, descriptor(tokens + tile * 4 * 8 * STEP) + 2 * k, k);
    warpgroup_commit_batch();
    warpgroup_wait(product[0]);
    warpgroup_wait(product[1]);
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const float low = warp % 2 ? product[tile][4 + v] : product[tile][v], high = warp % 2 ? product[tile][12 + v] : product[tile][8 + v];
            if (tile * 4 + warp < steps) sum[v] += (warp / 2 ? high : low) * by(tile, v);
        }
}

/* The ring as a warpgroup reads it. A stage is read by one of the warpgroups. */
struct Reader {
    u8 *ring;
    SmemState &smem;
    INLINE u32 wait_for(int n) {
        wait(smem.full + n % STAGES, n / STAGES & 1);
        return address(ring + n % STAGES * STAGE);
    }
    INLINE void release(int n) {
        if (lane_of() == 0) arrive(smem.empty + n % STAGES);
    }
};
