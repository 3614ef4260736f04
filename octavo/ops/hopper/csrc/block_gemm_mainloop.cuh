/* gemm_mainloop.cuh for block scales: a scale per 128 x 128 tile of the weight and per token and 128 codes of K. Included
   instead of it.

   Each product over a K step is scaled and added to the sums in FP32. A warpgroup multiplies 64 tokens by 128 rows at a time;
   while it adds, the tensor core has the other warpgroup's product, and IN_TURN (HALF is 32 or 64) its own next one. HALF is 32,
   64 or 128: two boxes of less than 128 rows are adjacent. BY_ROW: the weight has a scale per row and step instead, for matrices stacked
   at heights that are not multiples of 128; HALF is 64, and a tile's rows are adjacent. */

#include "gemm_mainloop.cuh"

#ifndef BY_ROW
#define BY_ROW 0
#endif
#ifndef IN_TURN
#define IN_TURN 0
#endif

struct BlockProduct : Product {
    const float *x_scale, *weight_scale; /* [tokens, steps]; [tiles, steps], or BY_ROW [steps, stride], stride a multiple of 128 */
    int last_tile, stride;
};

/* Issue part [64, 2 PART] = x [64, 128] weight [2 PART, 128]^T. */
constexpr int PART = HALF < 64 ? HALF : 64;
INLINE void multiply_step(float (&part)[PART], u32 x, u32 weight) {
    constexpr int add = 0;
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < 4; i++)
#if HALF < 64
        MULTIPLY("m64n64k32", NAMES32, 32, 33, 34, OUT16(part, 0), OUT16(part, 16));
#else
        MULTIPLY("m64n128k32", NAMES64, 64, 65, 66, OUT64(part));
#endif
    warpgroup_commit_batch();
}

/* Products of a token's and a tile's scale, for a thread's two rows and the weight's tiles that a tile has rows of: its boxes
   of 128 rows are one each, two smaller ones are part of one. A thread of a quad has those of every fourth step, and asks for
   the next ones four steps ahead. */
constexpr int SCALED = HALF / 64 + (HALF < 64);
struct Scales {
    const float *x[2], *weight[SCALED];
    float mine[2][SCALED], next_x[2], next_weight[SCALED];
    int last;

    INLINE Scales(const BlockProduct &s, const Share &share, int token, int row) : last(min(share.steps, s.steps - share.first) - 1) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; i++) x[i] = s.x_scale + (i64)min(token + lane / 4 + 8 * i, s.tokens - 1) * s.steps + share.first;
#pragma unroll
        for (int i = 0; i < SCALED; i++) weight[i] = s.weight_scale + (i64)min((row + i * s.second) / 128, s.last_tile) * s.steps + share.first;
        load(0), advance(0);
    }
    INLINE void load(int k) {
        k = min(k + (int)threadIdx.x % 4, last);
#pragma unroll
        for (int i = 0; i < 2; i++) next_x[i] = __ldg(x[i] + k);
#pragma unroll
        for (int i = 0; i < SCALED; i++) next_weight[i] = BY_ROW ? 1 : __ldg(weight[i] + k);
    }
    INLINE void advance(int k) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < SCALED; i++) mine[r][i] = next_x[r] * next_weight[i];
        load(k + 4);
    }
    INLINE void at(int k, float (&by)[2][SCALED]) {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < SCALED; i++) by[r][i] = __shfl_sync(~0u, mine[r][i], k % 4, 4);
        if (k % 4 == 3) advance(k + 1);
    }
};

/* A warpgroup's position in the ring, and its products of a stage. */
struct Consumer {
    Ring &m;
    PipelineState<STAGES> at;

    INLINE void multiply(float (&part)[PART], int i) {
        multiply_step(part, address(m.x[at.at]) + threadIdx.x / 128 * 64 * DEPTH, address(m.weight[at.at]) + i * 128 * DEPTH);
    }
    INLINE void release(int stage) {
        const int lane = threadIdx.x % 32;
        if (CLUSTER > 1 && lane < CLUSTER) arrive_at(m.empty + stage, lane);
        if (CLUSTER == 1 && lane == 0) arrive(m.empty + stage);
    }
};

/* A tile's sums with one set of partial sums. */
INLINE void sum_steps(const BlockProduct &s, const Share &share, Consumer &consumer, Scales &scales, int row, float (&sums)[HALF]) {
    const float *of_row = s.weight_scale + row + threadIdx.x % 4 * 2;
    PipelineState<STAGES> &at = consumer.at;
    static_assert(HALF >= 64 || IN_TURN, "two boxes of 32 rows are one part");
    static_assert(SPLIT == 1 || !BY_ROW, "scales of rows are of the whole of K");
#pragma unroll 1
    for (int k = 0; k < share.steps; k++, at.next()) {
        float part[PART], by[2][SCALED];
        float2 by_row[16];
        wait(consumer.m.full + at.at, at.parity);
#pragma unroll
        for (int i = 0; i < HALF / 64; i++) {
            consumer.multiply(part, i);
            if (i == 0) scales.at(k, by);
#pragma unroll
            for (int j = 0; j < 16 * BY_ROW; j++) by_row[j] = __ldg((const float2 *)(of_row + (i64)k * s.stride + 8 * j));
            warpgroup_wait(part);
            if (i + 1 == HALF / 64) consumer.release(at.at);
#pragma unroll
            for (int j = 0; j < PART; j++) {
                if (BY_ROW) part[j] *= j % 2 ? by_row[j / 4].y : by_row[j / 4].x;
                sums[64 * i + j] = fmaf(part[j], by[j / 2 % 2][i], sums[64 * i + j]);
            }
        }
    }
}

/* A tile's sums with two sets of partial sums: a step is added while the tensor core has the next one. Two steps are written
   out, since the compiler would wait for every product if its registers depended on k. */
INLINE void sum_steps_in_turn(const Share &share, Consumer &consumer, Scales &scales, float (&sums)[HALF]) {
    static_assert(HALF <= 64 || !IN_TURN, "registers for two sets are there with 128 rows");
    PipelineState<STAGES> &at = consumer.at;
    float part[2][PART], by[2][2][SCALED];
    int before = 0;
    auto issue = [&](int k, float (&into)[PART], float (&scale)[2][SCALED]) {
        wait(consumer.m.full + at.at, at.parity);
        consumer.multiply(into, 0);
        scales.at(k, scale);
    };
    auto add = [&](float (&from)[PART], const float (&scale)[2][SCALED]) {
#pragma unroll
        for (int j = 0; j < PART; j++) {
            asm volatile("" : "+f"(from[j])::"memory");
            sums[j] = fmaf(from[j], scale[j / 2 % 2][0], sums[j]);
        }
    };
    auto finish_before = [&](float (&from)[PART], const float (&scale)[2][SCALED]) { /* the step before the one just issued */
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        consumer.release(before), add(from, scale);
        before = at.at, at.next();
    };
    auto finish_last = [&](float (&from)[PART], const float (&scale)[2][SCALED]) {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        consumer.release(before), add(from, scale);
    };
    issue(0, part[0], by[0]);
    before = at.at, at.next();
    int k = 1;
#pragma unroll 1
    for (; k + 1 < share.steps; k += 2) {
        issue(k, part[1], by[1]), finish_before(part[0], by[0]);
        issue(k + 1, part[0], by[0]), finish_before(part[1], by[1]);
    }
    if (k < share.steps) {
        issue(k, part[1], by[1]), finish_before(part[0], by[0]);
        finish_last(part[1], by[1]);
    } else {
        finish_last(part[0], by[0]);
    }
}

template <class End> INLINE void multiply_tiles(const BlockProduct &s, Ring &m, Exchange &exchange, End &end) {
    const int warp = threadIdx.x / 32;
    Consumer consumer{m};
    Tiles tile(s);
    const Share share(s);
    while (tile.next(s)) {
        float sums[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) sums[i] = 0;
        if (SPLIT > 1) await_stores(), exchange.open();
        Scales scales(s, share, tile.token + warp * 16, tile.row);
        end.prepare(tile.token + warp * 16);
        if (IN_TURN) sum_steps_in_turn(share, consumer, scales, sums);
        else sum_steps(s, share, consumer, scales, tile.row, sums);
        if (exchange.reduce(sums)) end.finish(sums, tile.token + warp * 16, tile.row);
    }
}
