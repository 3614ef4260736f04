/* Decode attention (one new token per request) over an FP8 paged cache, bound by reading keys and values.

   A persistent CTA on each SM handles one KV head with its query heads (GQA); CTAs of different heads read the same blocks
   at the same time. A producer warp issues TMA loads of keys and values, as far ahead as shared memory allows. If this
   launch itself writes the new tokens' keys and values, it starts before earlier kernels are done: the cache already holds
   all older tokens. Three consumer warpgroups take tiles round-robin. Preparer warps quantize the next request's queries and
   write the new tokens' keys.

   Compile-time constants: HEADS (4 or 8), the maximum number of query heads per KV head; PER_TOKEN_HEAD, whether the cache has
   a scale for each token and head instead of one for keys and one for values. */

#include "types.cuh"

constexpr int SLOTS = HEADS == 4 ? 12 : 11, AHEAD = 3, SEGMENTS = 4, PREPARERS = 7;
constexpr int GROUPS = 3, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 32 * (1 + PREPARERS);

#include "ptx.cuh"
#include "wgmma.cuh"
#include "cache_blocks.cuh"
#include "decode_attention.cuh"

struct Decode {
    Map keys, values; /* boxes of a block of one head: 64 tokens by 128, 128 by 64 tokens */
    Call call;
};
struct Shared {
    u8 keys[SLOTS][TILE], values[SLOTS][TILE];
#if PER_TOKEN_HEAD
    TokenScales<BLOCK> scales[SLOTS];
#endif
    Ready ready[SEGMENTS];
    Probabilities p[GROUPS];
    Sums sums[2][GROUPS]; /* of the current segment and the previous one */
    Segment segments[SEGMENTS];
    OfWarps most[GROUPS], totals[GROUPS];
    u64 full[SLOTS], empty[SLOTS], described[SEGMENTS], prepared[SEGMENTS], done[SEGMENTS];
    float v_scale; /* valid once a segment is prepared */
    bool last;

    INLINE TokenScales<BLOCK> *scales_of(int slot) {
#if PER_TOKEN_HEAD
        return scales + slot;
#else
        return nullptr;
#endif
    }
};
static_assert(alignof(Shared) == 1024, "swizzled shared memory that WGMMA reads");
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

/* Preparer warps: for each segment, quantize its queries and, if it ends with the new token, that token's key and value. */
INLINE void prepare(const Decode &s, Shared &m, int kv_head) {
    const int preparer = threadIdx.x / 32 - CONSUMERS / 32 - 1, lane = threadIdx.x % 32;
    const float k_scale = PER_TOKEN_HEAD ? 1 : __ldg(s.call.k_scale), v_scale = PER_TOKEN_HEAD ? 1 : __ldg(s.call.v_scale);
    for (PipelineState<SEGMENTS> at;; at.next()) {
        Ready &to = m.ready[at.at];
        wait(m.described + at.at, at.parity);
        const Segment g = m.segments[at.at];
        if (g.tiles) {
            for (int h = preparer; h < HEADS; h += PREPARERS) prepare_head(s.call, to, g.request, kv_head, h, k_scale);
            const bool brings = ends_with_new_token(s.call, g) && preparer >= PREPARERS - 2, key = preparer == PREPARERS - 1;
            float scale = key ? k_scale : v_scale;
            const u32 codes = brings ? prepare_new(s.call, to, g.request, kv_head, key, scale) : 0;
            if (preparer == PREPARERS - 3 && lane == 0) m.v_scale = v_scale; /* a constant; its load has completed by now */
            fence_view_async_shared();
            __syncwarp();
            if (lane == 0) arrive(m.prepared + at.at);
            if (brings && key) store_key(s.call, g.request, kv_head, codes); /* last: a fence waits for stores */
            if (PER_TOKEN_HEAD && brings) store_scale(s.call, g.request, kv_head, key, scale);
        } else {
            if (lane == 0) arrive(m.prepared + at.at);
            break;
        }
    }
    if (preparer == 0) clear_empty(s.call, kv_head);
}

INLINE void consume(const Decode &s, Shared &m, int kv_head) {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const bool leads = threadIdx.x % 32 == 0;
    u32 before = 0; /* tiles of earlier segments */
    int even = 0;
    for (PipelineState<SEGMENTS> at;; at.next(), even ^= 1) {
        const Ready &ready = m.ready[at.at];
        wait(m.prepared + at.at, at.parity);
        const Segment g = m.segments[at.at];
        if (g.tiles == 0) break;
        State state(ready, s.call.group);
#pragma unroll 1
        for (int j = group; j < g.tiles; j += GROUPS) {
            const u32 number = before + j, slot = number % SLOTS;
            const int left = g.length - (g.first + j) * BLOCK; /* context tokens from this tile's start on */
            const bool brings = s.call.k && left <= BLOCK;
            wait(m.full + slot, number / SLOTS % 2);
            if (brings) insert(s.call, s.values, ready, m.keys[slot], m.values[slot], m.scales_of(slot), left - 1, group, g.request, kv_head);
            state.take(m.keys[slot], m.values[slot], m.scales_of(slot), ready.queries, m.p[group].codes, m.most[group], group, left);
            if (brings) await_insertions();
            __syncwarp();
            if (leads) arrive(m.empty + slot);
        }
        before += g.tiles;
        __syncwarp();
        if (leads) arrive(m.done + at.at);
        state.keep(m.sums[even][group], m.totals[group], group);
        finish(s.call, g, kv_head, m.sums[even], m.v_scale, m.last);
    }
    end_insertions();
}

/* The producer warp publishes the CTA's segments and issues TMA loads of their tiles; block ids are loaded well ahead. */
INLINE void produce(const Decode &s, Shared &m, int kv_head) {
    const int lane = threadIdx.x % 32;
    Dealer dealer(s.call);
    PipelineState<SEGMENTS> described;
    PipelineState<SLOTS> at, landing;
    int in_flight = 0; /* loads in flight, at most AHEAD */
    auto look_up = [&](const Segment &g, int from) { return from + lane < g.tiles ? s.call.tables[(i64)g.request * s.call.table_width + g.first + from + lane] : 0; };
    Segment g = dealer.next(s.call);
    int later = look_up(g, 0);
    while (g.tiles) {
        const Segment next = dealer.next(s.call);
        wait(m.done + described.at, described.parity ^ 1);
        if (lane == 0) {
            m.segments[described.at] = g;
            arrive(m.described + described.at);
        }
        described.next();
#pragma unroll 1
        for (int i = 0; i < g.tiles; i += 32) {
            const int blocks = later;
            later = i + 32 < g.tiles ? look_up(g, i + 32) : look_up(next, 0);
#pragma unroll 1
            for (int j = 0; j < min(32, g.tiles - i); j++, at.next()) {
                const int block = __shfl_sync(~0u, blocks, j);
                if (in_flight == AHEAD) wait(m.full + landing.at, landing.parity), landing.next();
                else in_flight++;
                wait(m.empty + at.at, at.parity ^ 1);
                if (lane == 0) copy_block(s.call, m.keys[at.at], m.values[at.at], m.scales_of(at.at), s.keys, s.values, m.full + at.at, kv_head, block);
                __syncwarp();
            }
        }
        g = next;
    }
    wait(m.done + described.at, described.parity ^ 1);
    if (lane == 0) {
        m.segments[described.at].tiles = 0;
        arrive(m.described + described.at);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Decode s) {
    Shared &m = shared_memory<Shared>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) init<1>(m.full + i), init<4>(m.empty + i);
        for (int i = 0; i < SEGMENTS; i++) init<1>(m.described + i), init<PREPARERS>(m.prepared + i), init<CONSUMERS / 32>(m.done + i);
        fence_barrier_init();
    }
    __syncthreads();
    launch_dependent_grids();
    const int kv_head = blockIdx.x % s.call.kv_heads;
    const bool is_producer = threadIdx.x / 32 == CONSUMERS / 32;
    if (!is_producer || !s.call.k) wait_on_dependent_grids();
    if (is_producer) produce(s, m, kv_head);
    else if (threadIdx.x >= CONSUMERS) prepare(s, m, kv_head);
    else consume(s, m, kv_head);
}
