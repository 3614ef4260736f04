/* Attention of single new tokens over an FP8 cache in blocks, where reading keys and values is all the time there is.

   A program stays on a multiprocessor and has one KV head with the query heads that share it; the programs of different heads
   read the same blocks at the same time. One warp asks the copy engine for keys and values, as far ahead as shared memory holds,
   and, where this launch itself writes what the new tokens bring, before earlier kernels are done: the cache holds all older
   tokens by then. Three groups of warps take tile after tile in turn. Other warps get the queries of the next request ready and
   write the new tokens' keys.

   Compiled at run time with the most query heads of a KV head as a constant: HEADS, 4 or 8. */

#include "types.cuh"

constexpr int SLOTS = HEADS == 4 ? 12 : 11, AHEAD = 3, SEGMENTS = 4, PREPARERS = 7;
constexpr int GROUPS = 3, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 32 * (1 + PREPARERS);

#include "ptx.cuh"
#include "wgmma.cuh"
#include "decode_attention.cuh"

struct Decode {
    Map keys, values; /* boxes of a block of one head: 64 tokens by 128, 128 by 64 tokens */
    Call call;
};
struct Shared {
    u8 keys[SLOTS][TILE], values[SLOTS][TILE];
    Ready ready[SEGMENTS];
    Probabilities p[GROUPS];
    Sums sums[2][GROUPS]; /* of this segment and the one before it */
    Segment segments[SEGMENTS];
    OfWarps most[GROUPS], totals[GROUPS];
    u64 full[SLOTS], empty[SLOTS], told[SEGMENTS], prepared[SEGMENTS], done[SEGMENTS];
    float v_scale; /* there once a segment is prepared */
    bool last;
};
static_assert(alignof(Shared) == 1024, "what the matrix unit reads swizzled");
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + (int)sizeof(Shared);

/* Segment after segment: its queries, and, if it ends with the new token, that one's key and value. */
INLINE void prepare(const Decode &s, Shared &m, int kv_head) {
    const int own = threadIdx.x / 32 - CONSUMERS / 32 - 1, lane = threadIdx.x % 32;
    const float k_scale = __ldg(s.call.k_scale), v_scale = __ldg(s.call.v_scale);
    for (Place<SEGMENTS> at;; at.next()) {
        Ready &to = m.ready[at.at];
        wait(m.told + at.at, at.parity);
        const Segment g = m.segments[at.at];
        if (g.tiles) {
            for (int h = own; h < HEADS; h += PREPARERS) prepare_head(s.call, to, g.request, kv_head, h, k_scale);
            const bool brings = ends_with_new_token(s.call, g) && own >= PREPARERS - 2, key = own == PREPARERS - 1;
            const u32 codes = brings ? prepare_new(s.call, to, g.request, kv_head, key, key ? k_scale : v_scale) : 0;
            if (own == PREPARERS - 3 && lane == 0) m.v_scale = v_scale; /* the same each time; here it has come, and nobody waits for it */
            show_matrix_unit();
            __syncwarp();
            if (lane == 0) arrive(m.prepared + at.at);
            if (brings && key) store_key(s.call, g.request, kv_head, codes); /* after that, for a fence waits until stores are done */
        } else {
            if (lane == 0) arrive(m.prepared + at.at);
            break;
        }
    }
    if (own == 0) clear_empty(s.call, kv_head);
}

INLINE void consume(const Decode &s, Shared &m, int kv_head) {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const bool leads = threadIdx.x % 32 == 0;
    u32 before = 0; /* tiles of earlier segments */
    int even = 0;
    for (Place<SEGMENTS> at;; at.next(), even ^= 1) {
        const Ready &ready = m.ready[at.at];
        wait(m.prepared + at.at, at.parity);
        const Segment g = m.segments[at.at];
        if (g.tiles == 0) break;
        State state(ready, s.call.group);
#pragma unroll 1
        for (int j = group; j < g.tiles; j += GROUPS) {
            const u32 number = before + j, slot = number % SLOTS;
            const int left = g.length - (g.first + j) * BLOCK; /* tokens of the tile, or more */
            const bool brings = s.call.k && left <= BLOCK;
            wait(m.full + slot, number / SLOTS % 2);
            if (brings) insert(s.call, s.values, ready, m.keys[slot], m.values[slot], left - 1, group, g.request, kv_head);
            state.take(m.keys[slot], m.values[slot], ready.queries, m.p[group].codes, m.most[group], group, left);
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

/* One warp says what the program's segments are and fetches their tiles; blocks are looked up well before. */
INLINE void ask(const Decode &s, Shared &m, int kv_head) {
    const int lane = threadIdx.x % 32;
    Dealer dealer(s.call);
    Place<SEGMENTS> told;
    Place<SLOTS> at, landing;
    int asked = 0; /* and not there yet, at most AHEAD */
    auto look_up = [&](const Segment &g, int from) { return from + lane < g.tiles ? s.call.tables[(i64)g.request * s.call.table_width + g.first + from + lane] : 0; };
    Segment g = dealer.next(s.call);
    int later = look_up(g, 0);
    while (g.tiles) {
        const Segment next = dealer.next(s.call);
        wait(m.done + told.at, told.parity ^ 1);
        if (lane == 0) {
            m.segments[told.at] = g;
            arrive(m.told + told.at);
        }
        told.next();
#pragma unroll 1
        for (int i = 0; i < g.tiles; i += 32) {
            const int blocks = later;
            later = i + 32 < g.tiles ? look_up(g, i + 32) : look_up(next, 0);
#pragma unroll 1
            for (int j = 0; j < min(32, g.tiles - i); j++, at.next()) {
                const int block = __shfl_sync(~0u, blocks, j);
                if (asked == AHEAD) wait(m.full + landing.at, landing.parity), landing.next();
                else asked++;
                wait(m.empty + at.at, at.parity ^ 1);
                if (lane == 0) copy_block(m.keys[at.at], m.values[at.at], s.keys, s.values, m.full + at.at, kv_head, block);
                __syncwarp();
            }
        }
        g = next;
    }
    wait(m.done + told.at, told.parity ^ 1);
    if (lane == 0) {
        m.segments[told.at].tiles = 0;
        arrive(m.told + told.at);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Decode s) {
    Shared &m = shared_memory<Shared>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) init<1>(m.full + i), init<4>(m.empty + i);
        for (int i = 0; i < SEGMENTS; i++) init<1>(m.told + i), init<PREPARERS>(m.prepared + i), init<CONSUMERS / 32>(m.done + i);
        show_barriers();
    }
    __syncthreads();
    let_later_kernels_start();
    const int kv_head = blockIdx.x % s.call.kv_heads;
    const bool asking = threadIdx.x / 32 == CONSUMERS / 32;
    if (!asking || !s.call.k) wait_for_earlier_kernels();
    if (asking) ask(s, m, kv_head);
    else if (threadIdx.x >= CONSUMERS) prepare(s, m, kv_head);
    else consume(s, m, kv_head);
}
