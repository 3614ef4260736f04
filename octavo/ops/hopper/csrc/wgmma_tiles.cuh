/* WGMMA products of 64 rows of a weight by COLUMNS of codes. Included by layer_megakernel.cu. */
#include "wgmma.cuh"

#define MATRICES(a, b) "{.reg .pred p; .reg .b64 a, b; mov.b64 a, {" a ", 0x40000040}; mov.b64 b, {" b ", 0x40000040};\n"

/* m64 x n=COLUMNS x k32; without `add`, the previous contents of `x` are ignored. */
INLINE void multiply(float (&x)[VALUES], u32 a, u32 b, int add) {
#if COLUMNS == 8
    asm volatile(MATRICES("%4", "%5") "setp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, a, b, p, 1, 1;}"
                 : OUT4(x, 0) : "r"(a), "r"(b), "r"(add));
#elif COLUMNS == 16
    asm volatile(MATRICES("%8", "%9") "setp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, p, 1, 1;}"
                 : OUT4(x, 0), OUT4(x, 4) : "r"(a), "r"(b), "r"(add));
#elif COLUMNS == 32
    asm volatile(MATRICES("%16", "%17") "setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "a, b, p, 1, 1;}"
                 : OUT16(x, 0) : "r"(a), "r"(b), "r"(add));
#else
    asm volatile(MATRICES("%32", "%33") "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TEN(1) TEN(2) "%30, %31}, a, b, p, 1, 1;}"
                 : OUT16(x, 0), OUT16(x, 16) : "r"(a), "r"(b), "r"(add));
#endif
}
/* Issue the WGMMAs of one K step. */
INLINE void begin(float (&part)[VALUES], u32 rows, u32 columns) {
    const u32 a = descriptor(rows), b = descriptor(columns);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(part, a + 2 * k, b + 2 * k, k);
}
/* A thread's values of a tile: value 4 * j + 2 * i + c is at row thread_row() + 8 * i and column threadIdx.x % 4 * 2 + 8 * j + c.
   With TWO_CODES, columns c = 0 and 1 are a token's. */
INLINE int thread_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; } /* of the two warpgroups' 128 rows */
INLINE int thread_token() { return threadIdx.x % 4 * EACH; }

/* Wait until at most `pending` later steps, 1 or 0, are in flight, then accumulate this step in FP32, if it counts; with
   BLOCKS times the scale of the weight's tile, which is 0 if the step does not count, and the tokens' scales [TOKENS]. */
INLINE void end(int pending, float (&sum)[VALUES], float (&part)[VALUES], bool counts, float by_tile, const float *by_token) {
    float by[VALUES / 2]; /* found before the wait, which would delay it */
#pragma unroll
    for (int i = 0; i < VALUES / 2 * BLOCKS; i++) by[i] = by_tile * by_token[thread_token() + i / 2 * 8 + i % 2];
    if (pending) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        asm volatile("" : "+f"(part[v])::"memory");
        if (BLOCKS) sum[v] += part[v] * by[v / 4 * 2 + v % 2];
        else sum[v] += counts ? part[v] : 0;
    }
}

/* Load a warp's scales of tiles along K, whose 16 rows lie in one tile, before inputs are there. */
INLINE void load_scales(float *to, const float *from, int steps) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < steps; i += 32) to[i] = __ldg(from + i);
}

struct Consumer {
    Boxes at;
    PipelineState<BOXES> behind; /* the oldest box not yet released */
    PipelineState<INPUTS> input, input_behind;

    /* Mainloop over a unit's rows. In each round a warpgroup issues its product of 64 rows by a K step and then completes
       the one of the round before, so that the tensor core does not wait. */
    template <int P> INLINE void multiply_unit(const Between &s, int unit, int group, u8 *ring, u8 *inputs, SmemState &smem, float (&total)[2][SUMS]) {
        using Z = Shape<P>;
        constexpr int TILES_PER_ROUND = Z::SPLIT_ROWS ? 1 : 2; /* tiles per round of both warpgroups */
        const int first = unit % Z::SPLITS * Z::SHARE, tiles = (min(first + Z::SHARE, Z::STEPS) - first) * Z::HALVES, rounds = up(tiles, TILES_PER_ROUND);
        const bool leads = threadIdx.x % 32 == 0;
        float part[2][VALUES], sum[2][VALUES];
        float *by_tile = smem.tile_scale[threadIdx.x / 32]; /* [HALVES, SHARE] */
        if (BLOCKS) {
            __syncwarp();
            const int row = min(unit / Z::SPLITS * Z::ROWS + thread_row() / 16 * 16 % (Z::SPLIT_ROWS ? 128 : 64), Z::N - 1);
#pragma unroll
            for (int h = 0; h < Z::HALVES; h++)
                load_scales(by_tile + h * Z::SHARE, s.scales[P] + (i64)((h * INTER + row) / Z::TILE) * Z::STEPS + first, tiles / Z::HALVES);
            __syncwarp();
        }
#pragma unroll
        for (int v = 0; v < VALUES; v++) sum[0][v] = sum[1][v] = part[0][v] = part[1][v] = 0;
        auto issue = [&](int round, float(&into)[VALUES]) {
            const int tile = round * TILES_PER_ROUND, group_tile = Z::SPLIT_ROWS ? tile : tile + group;
            const int from = at.next(Z::PACKED * Z::ROWS * STEP);
            if (tile % Z::PACKED == 0) wait(smem.full + at.box.at, at.box.parity);
            if (tile % (FETCHED * Z::HALVES) == 0) wait(smem.input_full + input.at, input.parity);
            if (Z::SPLIT_ROWS ? group * 64 < Z::ROWS : group_tile < tiles)
                begin(into, address(ring) + from + (Z::SPLIT_ROWS ? group * 64 : group_tile % Z::PACKED * Z::ROWS) * STEP,
                      address(inputs) + (input.at * FETCHED + group_tile / Z::HALVES % FETCHED) * INPUT);
            warpgroup_commit_batch(); /* the batch may be empty */
            if ((tile + TILES_PER_ROUND) % Z::PACKED == 0 || round + 1 == rounds) at.box.next(), at.behind = from + Z::PACKED * Z::ROWS * STEP;
            if ((tile + TILES_PER_ROUND) % (FETCHED * Z::HALVES) == 0 || round + 1 == rounds) input.next();
        };
        auto release = [&](int round) {
            const int tile = round * TILES_PER_ROUND;
            if ((tile + TILES_PER_ROUND) % Z::PACKED == 0 || round + 1 == rounds) {
                if (leads) arrive(smem.empty + behind.at);
                behind.next();
            }
            if ((tile + TILES_PER_ROUND) % (FETCHED * Z::HALVES) == 0 || round + 1 == rounds) {
                if (leads) arrive(smem.input_empty + input_behind.at);
                input_behind.next();
            }
        };
        constexpr int UP = Z::HALVES - 1;
        const bool all_count = Z::SPLIT_ROWS || !group || tiles % 2 == 0; /* the last round may have one step only */
        auto complete = [&](int pending, int odd, int round, bool counts = true) {
            const int step = (round * TILES_PER_ROUND + (!Z::SPLIT_ROWS && counts ? group : 0)) / Z::HALVES;
            const float scale = BLOCKS && counts ? by_tile[(odd ? UP : 0) * Z::SHARE + step] : 0;
            end(pending, sum[odd ? UP : 0], part[odd], counts, scale, smem.input_scale[BLOCKS ? input_behind.at : 0][BLOCKS ? step % FETCHED : 0]);
            release(round);
        };
        for (int round = 0; round < rounds; round += 2) {
            issue(round, part[0]);
            if (round) complete(1, 1, round - 1);
            if (round + 1 < rounds) issue(round + 1, part[1]), complete(1, 0, round);
            else complete(0, 0, round, all_count);
        }
        if (rounds % 2 == 0) complete(0, 1, rounds - 1, all_count);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int v = 0; v < SUMS; v++) total[h][v] = TWO_CODES ? sum[h][2 * v] + sum[h][2 * v + 1] * OF_REST : sum[h][v];
        if constexpr (!Z::SPLIT_ROWS) { /* reduce over the two warpgroups */
            if (group) {
#pragma unroll
                for (int v = 0; v < SUMS; v++) smem.other[v][threadIdx.x % 128] = total[0][v];
            }
            consumers_sync();
            if (!group) {
#pragma unroll
                for (int v = 0; v < SUMS; v++) total[0][v] += smem.other[v][threadIdx.x];
            }
            consumers_sync();
        }
    }
};

/* Epilogue: finish(round, at, split, inside, row, token, y) gets the scaled results of each unit, EACH adjacent tokens of a row
   at a time. */
template <int P, class Finish>
INLINE void product(const Between &s, Consumer &consumer, u8 *ring, u8 *inputs, SmemState &smem, Finish finish) {
    using Z = Shape<P>;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), within = Z::SPLIT_ROWS ? thread_row() : thread_row() % 64;
#pragma unroll P == GATE_UP ? CTA_UNITS : 1
    for (int round = 0; round < up(Z::UNITS, CTAS); round++) {
        const int unit = blockIdx.x + round * CTAS, first_row = unit / Z::SPLITS * Z::ROWS + within;
        if (unit >= Z::UNITS) break;
        float sum[2][SUMS], by_row[Z::HALVES][2];
#pragma unroll
        for (int h = 0; h < Z::HALVES; h++)
#pragma unroll
            for (int i = 0; i < 2; i++) by_row[h][i] = !BLOCKS && first_row + 8 * i < Z::N ? __ldg(s.scales[P] + h * INTER + first_row + 8 * i) : 0;
        consumer.multiply_unit<P>(s, unit, group, ring, inputs, smem, sum);
        const float *by_token = (P == DOWN ? smem.scale : smem.input_scale[0][0]) + thread_token();
#pragma unroll
        for (int v = 0; v < VALUES / 2; v++) {
            const int row = first_row + v % 2 * 8;
            float y[Z::HALVES][EACH];
#pragma unroll
            for (int h = 0; h < Z::HALVES; h++)
#pragma unroll
                for (int c = 0; c < EACH; c++)
                    y[h][c] = BLOCKS ? sum[h][EACH * v + c] : sum[h][EACH * v + c] * by_row[h][v % 2] * by_token[v / 2 * 4 * EACH + c];
            const bool inside = (Z::SPLIT_ROWS || !group) && within + v % 2 * 8 < Z::ROWS && row < Z::N;
            finish(round, v, unit % Z::SPLITS, inside, row, thread_token() + v / 2 * 4 * EACH, y);
        }
    }
}
