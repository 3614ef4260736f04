/* Sums of BF16 rows over RANKS ranks of one host, optionally with what reads them: residual add, RMSNorm and FP8 codes.

   exchange.cuh says how ranks exchange values.

   In one shot a rank stores its rows to all peers. In two, it stores a row to the rank that owns it, which stores the sum to
   all: 2 / RANKS of the traffic, and one more way. Values are added in the order of ranks, so all get the same bits.

   One CTA a row. All CTAs are resident, since they wait for those of other ranks.

   Compile-time constants: RANKS (2 to 8), VECTORS (of 8 values, of a row and thread). */

#include "types.cuh"

constexpr int MOST = 1024, CONSUMERS = MOST; /* threads */
extern "C" __device__ const int threads = MOST;
extern "C" __device__ const int shared_bytes = 0;

#include "ptx.cuh"
#include "exchange.cuh"

struct Rows {
    Exchange at;
    const u16 *x, *residual, *weight; /* [rows, width], the same or null, [width] or null for the sum alone */
    u16 *sum, *dense; /* [rows, width] x's sum, plus the residual if there is one; the norm of that, or null */
    u8 *codes; /* [rows, width] of the norm, or null */
    float *scales; /* [rows, groups] */
    int rows, width, groups, two_shots;
    float eps;
};

constexpr int BATCH = RANKS * VECTORS < 7 ? RANKS - 1 : VECTORS < 2 ? 2 : 1; /* peers polled at once */
constexpr float LIMIT = 448.0f, FLOOR = 1.0f / (448 * 512);

INLINE void add(float (&to)[8], uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) to[2 * j] += low_of(words[j]), to[2 * j + 1] += high_of(words[j]);
}
INLINE uint4 narrow_eight(const float (&x)[8]) {
    return {narrow_two(x[0], x[1]), narrow_two(x[2], x[3]), narrow_two(x[4], x[5]), narrow_two(x[6], x[7])};
}

/* All-reduce over the CTA's threads: sum, or maximum. Calls in turn use rooms 0 and 1. */
template <bool LARGEST> INLINE float over_threads(float x, float (&rooms)[2][32], int &turn) {
    float(&room)[32] = rooms[turn ^= 1];
#pragma unroll
    for (int i = 16; i; i /= 2) {
        const float other = __shfl_xor_sync(~0u, x, i);
        x = LARGEST ? fmaxf(x, other) : x + other;
    }
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? room[threadIdx.x % 32] : 0;
#pragma unroll
    for (int i = 16; i; i /= 2) {
        const float other = __shfl_xor_sync(~0u, x, i);
        x = LARGEST ? fmaxf(x, other) : x + other;
    }
    return x;
}

struct Call {
    const Rows &s;
    u64 offset; /* of the half that this call uses */
    int turn = 0;

    INLINE static int place(int i) { return (threadIdx.x + i * blockDim.x) * 8; }
    INLINE bool inside(int i) const { return place(i) < s.width; }
    INLINE i64 at(int row, int i) const { return (i64)row * s.width + place(i); }
    /* Where rank `to` gets values of a row of its peer number `peer`, or in two shots the sum of its owner (RANKS - 1). */
    INLINE u8 *slot(int to, int peer, int row, int i) const { return s.at.buffers[to] + offset + 2 * ((i64)peer * s.rows * s.width + at(row, i)); }
    INLINE uint4 load(const u16 *from, int row, int i) const { return shared_load((const void *)(from + at(row, i))); }

    INLINE uint4 own(int row, int i) const { return sendable(load(s.x, row, i)); }
    INLINE void to_peers(uint4 v, int row, int i, bool summed) const {
#pragma unroll
        for (int k = 1; k < RANKS; k++) {
            const int to = (s.at.rank + k) % RANKS;
            push(slot(to, summed ? RANKS - 1 : s.at.rank - (s.at.rank > to), row, i), v);
        }
    }
    /* Waits for all peers' values, and gives the sum in the order of ranks. */
    INLINE uint4 summed(uint4 mine, int row, int i) const {
        float sum[8] = {};
#pragma unroll
        for (int first = 0; first < RANKS - 1; first += BATCH) {
            uint4 got[BATCH];
            for (bool waits = true; waits;) {
                waits = false;
#pragma unroll
                for (int j = 0; j < BATCH && first + j < RANKS - 1; j++) got[j] = peek(slot(s.at.rank, first + j, row, i));
#pragma unroll
                for (int j = 0; j < BATCH && first + j < RANKS - 1; j++) waits |= has_empty(got[j]);
            }
#pragma unroll
            for (int j = 0; j < BATCH && first + j < RANKS - 1; j++) {
                if (first + j == s.at.rank) add(sum, mine);
                add(sum, got[j]), clear(slot(s.at.rank, first + j, row, i));
            }
        }
        if (s.at.rank == RANKS - 1) add(sum, mine);
        return sendable(narrow_eight(sum));
    }
    INLINE uint4 from_owner(int row, int i) const {
        u8 *from = slot(s.at.rank, RANKS - 1, row, i);
        uint4 v;
        do v = peek(from);
        while (has_empty(v));
        clear(from);
        return v;
    }
    /* The residual, while peers' values are on their way; with several vectors there are no registers for it. */
    INLINE uint4 prefetched(int row) const { return VECTORS == 1 && s.residual && inside(0) ? load(s.residual, row, 0) : uint4{}; }
    INLINE int owner(int row) const { return (row + row / (int)gridDim.x) % RANKS; }

    /* The steps of a row, of which a thread has VECTORS vectors. */
    INLINE void send(int row) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) to_peers(own(row, i), row, i, false);
    }
    INLINE void sum(uint4 (&v)[VECTORS], int row) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) v[i] = summed(own(row, i), row, i);
    }
    INLINE void send_to_owner(int row) const {
        const int to = owner(row);
        if (to == s.at.rank) return;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) push(slot(to, s.at.rank - (s.at.rank > to), row, i), own(row, i));
    }
    INLINE void sum_and_send(uint4 (&v)[VECTORS], int row) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) v[i] = summed(own(row, i), row, i), to_peers(v[i], row, i, true);
    }
    INLINE void receive(uint4 (&v)[VECTORS], int row) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) v[i] = from_owner(row, i);
    }
    /* Stores what is wanted of a row's sum. */
    INLINE void finish(uint4 (&v)[VECTORS], const uint4 (&gains)[VECTORS], const uint4 &before, int row, float (&rooms)[2][32]) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!inside(i)) continue;
            float y[8] = {};
            add(y, v[i]);
            if (s.residual) {
                add(y, VECTORS == 1 ? before : load(s.residual, row, i));
                v[i] = narrow_eight(y);
            }
            *(uint4 *)(s.sum + at(row, i)) = v[i];
            const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
            for (int j = 0; j < 4; j++) squares += low_of(words[j]) * low_of(words[j]) + high_of(words[j]) * high_of(words[j]);
        }
        if (!s.weight) return;
        const float by = rsqrtf(over_threads<false>(squares, rooms, turn) / s.width + s.eps);
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (!inside(i)) continue;
            u32 *words = (u32 *)&v[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                words[j] = times(narrow_two(low_of(words[j]) * by, high_of(words[j]) * by), ((const u32 *)&gains[i])[j]);
                most = larger(most, words[j] & 0x7FFF7FFF);
            }
            if (s.dense) *(uint4 *)(s.dense + at(row, i)) = v[i];
            if (s.groups > 1) { /* of 128 values: those of 16 lanes */
                float amax = fmaxf(low_of(most), high_of(most));
#pragma unroll
                for (int j = 8; j; j /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xFFFFu << (threadIdx.x & 16), amax, j));
                store_codes(v[i], fmaxf(amax / LIMIT, FLOOR), row, i, place(i) / 128, threadIdx.x % 16 == 0);
                most = 0;
            }
        }
        if (s.groups != 1) return;
        const float scale = fmaxf(over_threads<true>(fmaxf(low_of(most), high_of(most)), rooms, turn) / LIMIT, FLOOR);
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (inside(i)) store_codes(v[i], scale, row, i, 0, threadIdx.x == 0 && i == 0);
    }
    INLINE void store_codes(uint4 v, float scale, int row, int i, int group, bool first) const {
        const float by = 1 / scale;
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        u32 codes[4];
#pragma unroll
        for (int j = 0; j < 4; j++) codes[j] = codes_of(low_of(words[j]) * by, high_of(words[j]) * by);
        *(uint2 *)(s.codes + at(row, i)) = uint2{codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
        if (first) s.scales[(i64)row * s.groups + group] = scale;
    }
};

extern "C" __global__ void __launch_bounds__(MOST, 1) all_reduce(const __grid_constant__ Rows s) {
    __shared__ float rooms[2][32];
    uint4 gains[VECTORS], v[VECTORS];
    launch_dependent_grids();
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (s.weight && Call::place(i) < s.width) gains[i] = *(const uint4 *)(s.weight + Call::place(i));
    wait_on_dependent_grids();
    const u32 calls = calls_so_far(s.at);
    Call c{s, calls % 2 * s.at.half};
    const int first = blockIdx.x, step = gridDim.x;
    if (!s.two_shots) {
        c.send(first);
        for (int row = first; row < s.rows; row += step) {
            if (row + step < s.rows) c.send(row + step);
            const uint4 before = c.prefetched(row);
            c.sum(v, row), c.finish(v, gains, before, row, rooms);
        }
    } else {
        for (int row = first; row < s.rows; row += step) c.send_to_owner(row);
        for (int row = first; row < s.rows; row += step) {
            if (c.owner(row) != s.at.rank) continue;
            const uint4 before = c.prefetched(row);
            c.sum_and_send(v, row), c.finish(v, gains, before, row, rooms);
        }
        for (int row = first; row < s.rows; row += step) {
            if (c.owner(row) == s.at.rank) continue;
            const uint4 before = c.prefetched(row);
            c.receive(v, row), c.finish(v, gains, before, row, rooms);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) count_calls(s.at, calls + 1, gridDim.x);
}

/* Argmax over ranks: each has the part [rows, width] of BF16 logits that begins at token rank * width. One CTA. */
struct Choice {
    Exchange at;
    const u16 *logits;
    const i64 *local; /* [rows] the argmax within this rank's part */
    i64 *out; /* [rows] */
    i64 stride;
    int rows, width;
};

extern "C" __global__ void __launch_bounds__(MOST, 1) argmax_over_ranks(const __grid_constant__ Choice s) {
    launch_dependent_grids();
    wait_on_dependent_grids();
    const u32 calls = calls_so_far(s.at);
    const u64 offset = calls % 2 * s.at.half;
    const int rank = s.at.rank;
    for (int row = threadIdx.x; row < s.rows; row += blockDim.x) {
        i64 local;
        asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(local) : "l"(s.local + row) : "memory");
        /* A BF16 value as FP32, and an index, are never EMPTY. NaN is the largest, as in argmax. */
        const float value = wide(shared_load(s.logits + row * s.stride + local));
        const uint2 mine = {value == value ? __float_as_uint(value) : 0x7F800000u, (u32)(local + (i64)rank * s.width)};
#pragma unroll
        for (int k = 1; k < RANKS; k++) {
            const int to = (rank + k) % RANKS;
            asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(s.at.buffers[to] + offset + 8 * ((i64)(rank - (rank > to)) * s.rows + row)),
                         "r"(mine.x), "r"(mine.y) : "memory");
        }
        uint2 best = mine;
#pragma unroll
        for (int k = 0; k < RANKS - 1; k++) {
            u8 *from = s.at.buffers[rank] + offset + 8 * ((i64)k * s.rows + row);
            uint2 got;
            do asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(got.x), "=r"(got.y) : "l"(from) : "memory");
            while (got.x == EMPTY || got.y == EMPTY);
            *(uint2 *)from = uint2{EMPTY, EMPTY};
            const float one = __uint_as_float(got.x), most = __uint_as_float(best.x);
            if (one > most || (one == most && got.y < best.y)) best = got;
        }
        s.out[row] = best.y;
    }
    __syncthreads();
    if (threadIdx.x == 0) count_calls(s.at, calls + 1, gridDim.x);
}
