/* A persistent megakernel of everything between the attention of two layers with a mixture of experts, for up to TOKENS tokens:
   quantize, o, add and norm, router, top-k, gate and up of the chosen experts, SiLU, down, weighted sum, add and norm, the next
   layer's qkv.

   One CTA runs on each SM: a thread that loads weights (those of o while attention still runs) and two warpgroups that multiply.
   The weights of an expert are read once, if any token chose it. Between phases are four grid barriers. What follows one every
   CTA computes for itself, since that is small for the few tokens that this kernel is launched for: the codes of its inputs, the
   norms, the choice of experts. All sums have a fixed order, so a result does not depend on timing.

   Compile-time constants: TOKENS (1, 2, 4 or 8), HIDDEN, INTER (of an expert), WIDE (heads *
   dimensions), QKV (rows of that weight), EXPERTS, TOP_K, NORMALIZE (expert weights sum to 1), BLOCKS (scales of 128x128 tiles
   and of 128 activations; otherwise of channels and tokens), CTAS, SHARED. */
#include "types.cuh"

struct Between {
    Map o, gate_up, down, qkv; /* of weights, as moe_pipeline.cuh loads them */
    const float *o_scale, *gate_up_scale, *down_scale, *qkv_scale;
    const u16 *attended; /* [tokens, WIDE] */
    u16 *residual, *middle, *out; /* [tokens, HIDDEN], updated; with o added; [tokens, QKV] */
    u16 *o_out, *down_out; /* [tokens, HIDDEN] */
    float *logits; /* [TOKENS, EXPERTS] */
    u16 *act; /* [EXPERTS in use, TOKENS, INTER] */
    const u16 *post_norm, *next_norm, *router; /* next_norm is null in the last layer */
    const int *lengths; /* of each token's context; 0: the row pads a graph */
    u32 *grid_barriers; /* [BARRIERS, LINE] zeros */
    int tokens;
    float eps, router_scale;
};

__device__ constexpr int up(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int larger_of(int a, int b) { return a > b ? a : b; }
__device__ constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
constexpr int STEP = 128, ROWS = 16, STAGE_STEPS = 8, STAGE = STAGE_STEPS * ROWS * STEP, MAX_STAGES = 16;
constexpr int WARPS = 8, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 32;
constexpr int GROUPS = up(TOKENS, 8), PADDED = GROUPS * 8; /* tokens go by eights */
constexpr int WARPS_OF_ROW = TOKENS < WARPS ? WARPS / TOKENS : 1, LANES = WARPS_OF_ROW * 32; /* that quantize or norm a token's row */
constexpr int PAIRS = up(TOKENS * TOP_K, 8) * 8; /* of token and expert, and rows that pad the last eight */
constexpr int DOWN_STEPS = up(INTER / STEP, STAGE_STEPS) * STAGE_STEPS;
constexpr int INPUTS = larger_of(larger_of(32768, PADDED * HIDDEN), PAIRS * DOWN_STEPS * STEP);
constexpr int O_PART = INPUTS / (PADDED * STEP) / STAGE_STEPS * STAGE_STEPS; /* K steps of o whose inputs fit */
constexpr int SCALES = BLOCKS ? larger_of(HIDDEN, WIDE) / STEP : 1, ACT_SCALES = BLOCKS ? INTER / STEP : 1; /* of a token */
constexpr int O_ROUNDS = up(HIDDEN / ROWS, CTAS), QKV_ROUNDS = up(QKV / ROWS, CTAS);
constexpr float LIMIT = 448.0f, FLOOR = 1.0f / (448 * 512);

struct SmemState {
    u64 full[MAX_STAGES], empty[MAX_STAGES], routed;
    u32 mask[EXPERTS]; /* the tokens that chose it */
    u8 list[EXPERTS];  /* experts in use */
    int active;        /* their number */
    float room[3][WARPS];
    float scale[PADDED][SCALES];           /* of a product's inputs, except down's */
    int first[EXPERTS + 1];                /* the first pair of an expert in use; pairs are sorted by expert, then token */
    u8 entry_of[PAIRS], token_of[PAIRS];   /* a pair's place in `list`, and its token */
    float act_scale[PAIRS][ACT_SCALES], by_pair[PAIRS]; /* scales of down's inputs, and what a pair counts */
    float weight[EXPERTS][TOKENS];         /* of an expert for a token that chose it */
    union __align__(16) {
        float4 sums[GROUPS][WARPS][32];
        float total[WARPS][TOKENS][ROWS];
    };
};
constexpr int STAGES = (SHARED - 1024 - INPUTS - (int)sizeof(SmemState)) / STAGE;
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + STAGES * STAGE + INPUTS + (int)sizeof(SmemState);
static_assert(STAGES >= 4 && STAGES <= MAX_STAGES && O_PART > 0 && EXPERTS <= CTAS, "shared memory, experts");
static_assert(HIDDEN % STEP == 0 && INTER % STEP == 0 && WIDE % STEP == 0 && QKV % ROWS == 0, "whole K steps");

#include "ptx.cuh"
#include "moe_pipeline.cuh"
#include "moe_rows.cuh"

/* A dense product of all tokens, PART K steps of inputs at a time; prepare(part) writes their codes. finish(row, token, BF16)
   gets the results. */
template <int ROUNDS, int STEPS, int PART, class Prepare, class Finish>
INLINE void dense(int &n, Reader reader, const u8 *inputs, SmemState &smem, int units, const float *scale, Prepare prepare, Finish finish) {
    constexpr int INPUT_STEPS = PART < STEPS ? PART : STEPS;
    float by_row[ROUNDS][2];
    const int group = group_of(), warp = warp_of(), lane = lane_of();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int unit = blockIdx.x + round * CTAS;
            by_row[round][i] = !BLOCKS && unit < units ? shared_load(scale + unit * ROWS + lane / 4 + 8 * i) : 1.0f;
        }
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int unit = blockIdx.x + round * CTAS, token = warp * 8 + lane % 4 * 2;
        float sum[GROUPS][4];
#pragma unroll
        for (int v = 0; v < GROUPS * 4; v++) sum[v / 4][v % 4] = 0;
        for (int begin = 0; begin < STEPS; begin += PART) {
            if (!round || PART < STEPS) {
                if (begin || round) consumers_sync();
                prepare(begin / PART);
                fence_view_async_shared();
                consumers_sync();
            }
            if (unit >= units) continue;
#pragma unroll 1
            for (int step = begin; step < min(begin + PART, STEPS); step += STAGE_STEPS, n++) {
                if (step / STAGE_STEPS % 2 != group) continue;
                float by[2] = {1.0f, 1.0f};
                const int first = step + warp % 4;
                if (BLOCKS)
#pragma unroll
                    for (int tile = 0; tile < 2; tile++)
                        if (first + tile * 4 < STEPS) by[tile] = __ldg(scale + unit * ROWS / STEP * STEPS + first + tile * 4);
                const u32 rows = reader.wait_for(n);
#pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    multiply_stage(sum[g], rows, address(inputs) + (g * INPUT_STEPS + step - begin) * 8 * STEP, STEPS - step,
                                   [&](int tile, int v) { return BLOCKS ? by[tile] * smem.scale[g * 8 + lane % 4 * 2 + v % 2][first + tile * 4] : 1.0f; });
                reader.release(n);
            }
        }
        if (unit >= units) continue;
        if (round) consumers_sync(); /* the sums of the round before have been read */
#pragma unroll
        for (int g = 0; g < GROUPS; g++) smem.sums[g][warp][lane] = float4{sum[g][0], sum[g][1], sum[g][2], sum[g][3]};
        consumers_sync();
        if (warp >= GROUPS) continue;
        float y[4] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float4 part = smem.sums[warp][w][lane];
            y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
        }
#pragma unroll
        for (int v = 0; v < 4; v++) {
            if (!BLOCKS) y[v] *= by_row[round][v / 2] * smem.scale[token + v % 2][0];
            finish(unit * ROWS + lane / 4 + v / 2 * 8, token + v % 2, narrow(y[v]));
        }
    }
}

/* Act of this CTA's units of gate and up. A stage has eight rows of gate, then the same of up, so that a thread holds both. */
INLINE void gate_up(const Between &s, int &n, Reader reader, const u8 *inputs, SmemState &smem) {
    constexpr int STEPS = HIDDEN / STEP, STAGES_OF_UNIT = up(STEPS, STAGE_STEPS);
    const int group = group_of(), warp = warp_of(), lane = lane_of();
    const Share share(smem.active);
    for (int i = group; i < share.count; i += 2) {
        const int unit = share.first + i, entry = unit / (INTER / 8), channel = unit % (INTER / 8) * 8, expert = smem.list[entry];
        const u32 chosen = smem.mask[expert];
        float sum[GROUPS][4], by_row[2] = {1.0f, 1.0f};
#pragma unroll
        for (int v = 0; v < GROUPS * 4; v++) sum[v / 4][v % 4] = 0;
        float of_gate[STAGES_OF_UNIT * 2] = {}, of_up[STAGES_OF_UNIT * 2] = {}; /* of this warp's K steps */
        if (BLOCKS) {
            const float *scales = s.gate_up_scale + expert * up(2 * INTER, STEP) * STEPS + warp % 4;
#pragma unroll
            for (int t = 0; t < STAGES_OF_UNIT * 2; t++)
                if (warp % 4 + t * 4 < STEPS) {
                    of_gate[t] = shared_load(scales + channel / STEP * STEPS + t * 4);
                    of_up[t] = shared_load(scales + (INTER + channel) / STEP * STEPS + t * 4);
                }
        } else {
            const float *scales = s.gate_up_scale + expert * 2 * INTER + channel + lane / 4;
            by_row[0] = shared_load(scales), by_row[1] = shared_load(scales + INTER);
        }
#pragma unroll
        for (int stage = 0; stage < STAGES_OF_UNIT; stage++) {
            const int at = n + i * STAGES_OF_UNIT + stage, first = stage * STAGE_STEPS + warp % 4;
            const u32 rows = reader.wait_for(at);
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                if (chosen >> 8 * g & 255)
                    multiply_stage(sum[g], rows, address(inputs) + (g * STEPS + stage * STAGE_STEPS) * 8 * STEP, STEPS - stage * STAGE_STEPS,
                                   [&](int tile, int v) {
                                       const float of_rows = v / 2 ? of_up[stage * 2 + tile] : of_gate[stage * 2 + tile];
                                       return BLOCKS ? of_rows * smem.scale[g * 8 + lane % 4 * 2 + v % 2][first + tile * 4] : 1.0f;
                                   });
            reader.release(at);
        }
        warpgroup_sync(group); /* the sums of the unit before have been read */
#pragma unroll
        for (int g = 0; g < GROUPS; g++) smem.sums[g][warp][lane] = float4{sum[g][0], sum[g][1], sum[g][2], sum[g][3]};
        warpgroup_sync(group);
        const int g = warp % 4;
        if (g >= GROUPS || !(chosen >> 8 * g & 255)) continue;
        float y[4] = {};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float4 part = smem.sums[g][group * 4 + w][lane];
            y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int token = g * 8 + lane % 4 * 2 + c;
            const float by_token = BLOCKS ? 1.0f : smem.scale[token][0];
            const float gate = rounded(y[c] * by_row[0] * by_token), other = rounded(y[2 + c] * by_row[1] * by_token);
            const u32 act = narrow(rounded(__fdividef(gate, 1.0f + __expf(-gate))) * other);
            if (chosen >> token & 1) s.act[((i64)entry * TOKENS + token) * INTER + channel + lane / 4] = act;
        }
    }
    n += share.count * STAGES_OF_UNIT;
}

/* Scales of this thread's two rows of down, or of BLOCKS, of its warp's K steps. */
struct DownScales {
    static constexpr int COUNT = BLOCKS ? DOWN_STEPS / 4 : 2;
    float of[COUNT];
    INLINE void load(const Between &s, int expert, int unit) {
        constexpr int STEPS = INTER / STEP;
        const float *from = s.down_scale + (BLOCKS ? (expert * up(HIDDEN, STEP) + unit * ROWS / STEP) * STEPS + warp_of() % 4 : expert * HIDDEN + unit * ROWS + lane_of() / 4);
#pragma unroll
        for (int i = 0; i < COUNT; i++) of[i] = !BLOCKS || warp_of() % 4 + 4 * i < STEPS ? shared_load(from + i * (BLOCKS ? 4 : 8)) : 0;
    }
};

/* Sixteen rows of down of every expert in use, added up by token with the experts' weights. Warpgroups take experts in turn; a
   warp keeps sums of its own, which are added in a fixed order. */
INLINE void down(const Between &s, int &n, Reader reader, u8 *inputs, SmemState &smem) {
    constexpr int STEPS = INTER / STEP, STAGES_OF_ENTRY = DOWN_STEPS / STAGE_STEPS;
    const int group = group_of(), warp = warp_of(), lane = lane_of(), active = smem.active;
    quantize_act(s, inputs, smem);
    fence_view_async_shared();
    for (int unit = blockIdx.x; unit < HIDDEN / ROWS; unit += CTAS) {
        for (int i = threadIdx.x; i < WARPS * TOKENS * ROWS; i += CONSUMERS) (&smem.total[0][0][0])[i] = 0;
        consumers_sync();
        DownScales next;
        if (group < active) next.load(s, smem.list[group], unit);
        for (int entry = group; entry < active; entry += 2) {
            const DownScales scales = next;
            if (entry + 2 < active) next.load(s, smem.list[entry + 2], unit);
            const int begin = smem.first[entry], end = smem.first[entry + 1], at = n + entry * STAGES_OF_ENTRY;
#pragma unroll 1
            for (int eight = begin / 8; eight * 8 < end; eight++) { /* its pairs need not begin with one */
                float sum[4] = {};
#pragma unroll
                for (int stage = 0; stage < STAGES_OF_ENTRY; stage++) {
                    const int step = stage * STAGE_STEPS + warp % 4;
                    const u32 rows = reader.wait_for(at + stage);
                    multiply_stage(sum, rows, address(inputs) + (eight * DOWN_STEPS + stage * STAGE_STEPS) * 8 * STEP, STEPS - stage * STAGE_STEPS, [&](int tile, int v) {
                        return BLOCKS ? scales.of[stage * 2 + tile] * smem.act_scale[eight * 8 + lane % 4 * 2 + v % 2][step + tile * 4] : 1.0f;
                    });
                    if (eight * 8 + 8 >= end) reader.release(at + stage);
                }
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    const int pair = eight * 8 + lane % 4 * 2 + v % 2;
                    if (pair >= begin && pair < end) smem.total[warp][smem.token_of[pair]][lane / 4 + v / 2 * 8] += sum[v] * (BLOCKS ? 1.0f : scales.of[v / 2]) * smem.by_pair[pair];
                }
            }
        }
        n += active * STAGES_OF_ENTRY;
        consumers_sync();
        for (int i = threadIdx.x; i < s.tokens * ROWS; i += CONSUMERS) {
            float y = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) y += smem.total[w][i / ROWS][i % ROWS];
            s.down_out[(i64)(i / ROWS) * HIDDEN + unit * ROWS + i % ROWS] = narrow(y);
        }
        consumers_sync();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) between_moe_attentions(const __grid_constant__ Between s) {
    extern __shared__ u8 memory[];
    u8 *ring = memory + (-address(memory) & 1023), *inputs = ring + STAGES * STAGE;
    SmemState &smem = *(SmemState *)(inputs + INPUTS);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) init<1>(smem.full + i), init<4>(smem.empty + i);
        init<1>(&smem.routed);
        fence_barrier_init();
    }
    for (int i = threadIdx.x; i < EXPERTS; i += THREADS) smem.mask[i] = 0;
    __syncthreads();
    launch_dependent_grids();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x > CONSUMERS) return;
        Producer producer{ring, smem};
        producer.dense(s.o, HIDDEN / ROWS, WIDE / STEP);
        wait(&smem.routed, 0);
        producer.gate_up(s.gate_up);
        producer.down(s.down);
        if (s.next_norm) producer.dense(s.qkv, QKV / ROWS, HIDDEN / STEP);
        return;
    }
    for (int i = threadIdx.x * 16; i < HIDDEN; i += CONSUMERS * 16) { /* small weights, before the queue for memory grows */
        if (blockIdx.x < EXPERTS) prefetch(s.router + (i64)blockIdx.x * HIDDEN + i);
        prefetch(s.post_norm + i);
        if (s.next_norm) prefetch(s.next_norm + i);
    }
    wait_on_dependent_grids();
    int n = 0; /* stages read */
    const Reader reader{ring, smem};
    dense<O_ROUNDS, WIDE / STEP, O_PART>(
        n, reader, inputs, smem, HIDDEN / ROWS, s.o_scale, [&](int part) { quantize_attended(s, inputs, smem, part); },
        [&](int row, int token, u32 y) {
            if (token < s.tokens) s.o_out[(i64)token * HIDDEN + row] = y;
        });
    grid_arrive(s, O_DONE);
    norm_rows<true>(s, inputs, smem);
    fence_view_async_shared();
    grid_arrive(s, LOGITS_DONE);
    route(s, smem);
    gate_up(s, n, reader, inputs, smem);
    grid_arrive(s, ACT_DONE);
    grid_wait(s, ACT_DONE);
    down(s, n, reader, inputs, smem);
    grid_arrive(s, DOWN_DONE);
    dense<QKV_ROUNDS, HIDDEN / STEP, HIDDEN / STEP>(
        n, reader, inputs, smem, s.next_norm ? QKV / ROWS : 0, s.qkv_scale, [&](int) { norm_rows<false>(s, inputs, smem); },
        [&](int row, int token, u32 y) {
            if (token < s.tokens) s.out[(i64)token * QKV + row] = y;
        });
}
