/* Products of 64 rows of a weight by TOKENS inputs in the matrix unit. Included by layer_megakernel.cu. */
#include "wgmma.cuh"

#define MATRICES(a, b) "{.reg .pred p; .reg .b64 a, b; mov.b64 a, {" a ", 0x40000040}; mov.b64 b, {" b ", 0x40000040};\n"

/* 64 rows by TOKENS, of 32 values of K; not `add`: what was in `x` does not count. */
INLINE void multiply(float (&x)[VALUES], u32 a, u32 b, int add) {
#if TOKENS == 8
    asm volatile(MATRICES("%4", "%5") "setp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, a, b, p, 1, 1;}"
                 : OUT4(x, 0) : "r"(a), "r"(b), "r"(add));
#elif TOKENS == 16
    asm volatile(MATRICES("%8", "%9") "setp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, p, 1, 1;}"
                 : OUT4(x, 0), OUT4(x, 4) : "r"(a), "r"(b), "r"(add));
#else
    asm volatile(MATRICES("%16", "%17") "setp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "a, b, p, 1, 1;}"
                 : OUT16(x, 0) : "r"(a), "r"(b), "r"(add));
#endif
}
/* The same of a step, begun. */
INLINE void begin(float (&part)[VALUES], u32 rows, u32 tokens) {
    const u32 a = descriptor(rows), b = descriptor(tokens);
    begin_matrices();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(part, a + 2 * k, b + 2 * k, k);
}
/* All but the last PENDING steps that were begun are done, this one among them: it is added in FP32, if it counts. */
template <int PENDING> INLINE void end(float (&sum)[VALUES], float (&part)[VALUES], bool counts = true) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        asm volatile("" : "+f"(part[v])::"memory");
        sum[v] += counts ? part[v] : 0;
    }
}

/* Where a thread's values of a tile are: value 4 * j + 2 * i + c is that of own_row() + 8 * i and own_token() + 8 * j + c. */
INLINE int own_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; } /* of the two groups' 128 */
INLINE int own_token() { return threadIdx.x % 4 * 2; }

struct Consumer {
    Boxes at;
    Place<BOXES> behind; /* the oldest not given back */
    Place<INPUTS> input, input_behind;

    /* The sums of a unit's rows. In a turn a group begins its product of 64 rows by a
       step and then ends the one of the turn before, so that the matrix unit need not wait. */
    template <int P> INLINE void multiply_unit(int unit, int group, u8 *ring, u8 *inputs, Small &small, float (&sum)[2][VALUES]) {
        using Z = Shape<P>;
        constexpr int TAKEN = Z::APART ? 1 : 2; /* tiles of a turn */
        const int first = unit % Z::SPLITS * Z::SHARE, tiles = (min(first + Z::SHARE, Z::STEPS) - first) * Z::HALVES, turns = up(tiles, TAKEN);
        const bool leads = threadIdx.x % 32 == 0;
        float part[2][VALUES];
#pragma unroll
        for (int v = 0; v < VALUES; v++) sum[0][v] = sum[1][v] = part[0][v] = part[1][v] = 0;
        auto enter = [&](int turn, float(&into)[VALUES]) {
            const int tile = turn * TAKEN, own = Z::APART ? tile : tile + group;
            const int from = at.next(Z::PACKED * Z::ROWS * STEP);
            if (tile % Z::PACKED == 0) wait(small.full + at.box.at, at.box.parity);
            if (tile % (FETCHED * Z::HALVES) == 0) wait(small.input_full + input.at, input.parity);
            if (Z::APART ? group * 64 < Z::ROWS : own < tiles)
                begin(into, address(ring) + from + (Z::APART ? group * 64 : own % Z::PACKED * Z::ROWS) * STEP,
                      address(inputs) + (input.at * FETCHED + own / Z::HALVES % FETCHED) * INPUT);
            end_matrices(); /* of nothing, maybe */
            if ((tile + TAKEN) % Z::PACKED == 0 || turn + 1 == turns) at.box.next(), at.behind = from + Z::PACKED * Z::ROWS * STEP;
            if ((tile + TAKEN) % (FETCHED * Z::HALVES) == 0 || turn + 1 == turns) input.next();
        };
        auto leave = [&](int turn) {
            const int tile = turn * TAKEN;
            if ((tile + TAKEN) % Z::PACKED == 0 || turn + 1 == turns) {
                if (leads) arrive(small.empty + behind.at);
                behind.next();
            }
            if ((tile + TAKEN) % (FETCHED * Z::HALVES) == 0 || turn + 1 == turns) {
                if (leads) arrive(small.input_empty + input_behind.at);
                input_behind.next();
            }
        };
        constexpr int UP = Z::HALVES - 1;
        const bool counts = Z::APART || !group || tiles % 2 == 0; /* in the last turn one step may be left */
        for (int turn = 0; turn < turns; turn += 2) {
            enter(turn, part[0]);
            if (turn) end<1>(sum[UP], part[1]), leave(turn - 1);
            if (turn + 1 < turns) enter(turn + 1, part[1]), end<1>(sum[0], part[0]);
            else end<0>(sum[0], part[0], counts);
            leave(turn);
        }
        if (turns % 2 == 0) end<0>(sum[UP], part[1], counts), leave(turns - 1);
        if constexpr (!Z::APART) { /* one group's sums of these rows, and the other's */
            if (group) {
#pragma unroll
                for (int v = 0; v < VALUES; v++) small.other[v][threadIdx.x % 128] = sum[0][v];
            }
            meet();
            if (!group) {
#pragma unroll
                for (int v = 0; v < VALUES; v++) sum[0][v] += small.other[v][threadIdx.x];
            }
            meet();
        }
    }
};

/* finish(turn, pair, split, is it inside, row, token, y) gets the scaled results of each unit, a pair of tokens of a row at a time. */
template <int P, class Finish>
INLINE void product(const Between &s, Consumer &consumer, u8 *ring, u8 *inputs, Small &small, Finish finish) {
    using Z = Shape<P>;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), within = Z::APART ? own_row() : own_row() % 64;
#pragma unroll P == GATE_UP ? TURNS : 1
    for (int turn = 0; turn < up(Z::UNITS, PROGRAMS); turn++) {
        const int unit = blockIdx.x + turn * PROGRAMS, first_row = unit / Z::SPLITS * Z::ROWS + within;
        if (unit >= Z::UNITS) break;
        float sum[2][VALUES], by_row[Z::HALVES][2];
#pragma unroll
        for (int h = 0; h < Z::HALVES; h++)
#pragma unroll
            for (int i = 0; i < 2; i++) by_row[h][i] = first_row + 8 * i < Z::N ? __ldg(s.scales[P] + h * INTER + first_row + 8 * i) : 0;
        consumer.multiply_unit<P>(unit, group, ring, inputs, small, sum);
        const float *by_token = (P == DOWN ? small.scale : small.input_scale) + own_token();
#pragma unroll
        for (int v = 0; v < VALUES / 2; v++) {
            const int row = first_row + v % 2 * 8;
            float y[Z::HALVES][2];
#pragma unroll
            for (int h = 0; h < Z::HALVES; h++)
#pragma unroll
                for (int c = 0; c < 2; c++) y[h][c] = sum[h][2 * v + c] * by_row[h][v % 2] * by_token[v / 2 * 8 + c];
            const bool inside = (Z::APART || !group) && within + v % 2 * 8 < Z::ROWS && row < Z::N;
            finish(turn, v, unit % Z::SPLITS, inside, row, own_token() + v / 2 * 8, y);
        }
    }
}
