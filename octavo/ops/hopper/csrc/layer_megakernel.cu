/* A persistent megakernel of everything between one layer's attention and the next one's, for up to TOKENS tokens: quantize,
   o, add and norm, gate_up, SiLU, down, add and norm, the next layer's qkv.

   One persistent CTA runs on each SM. A producer thread issues TMA loads of the weights that the CTA will multiply by, product
   after product, as far ahead as shared memory allows; the first of them before attention is done. Weights stream in while the results of one product become the next one's inputs.

   A unit is some rows of a weight by a share of K (split-K). Its rows are the M side of WGMMA and the tokens the narrow N
   side. TMA lays out both factors in shared memory, 128 values of K at a time; these are accumulated in the tensor core and
   then in FP32. Results are deterministic: the reader adds up split-K shares in a fixed order.

   Scales are of tokens and rows, applied to a unit's sums; or, with BLOCKS, of 128 of a token's values and of tiles of the
   weight, applied to each partial sum over 128 values of K. With TWO_CODES, activations are not rounded to FP8: each is a code and
   the code of its remainder, in two adjacent columns of the N side, whose sums are added when they leave the tensor core.

   ALONE is for steps of one token. There is no CTA that prepares inputs for all: each makes the codes that its unit of the next
   product takes, in shared memory itself, so that an exchange between products is one grid barrier and not two. What all
   products write is small then. Shorter exchanges bear more loads in flight.

   Compile-time constants: TOKENS (8, 16 or 32; with TWO_CODES 4 to 32), ALONE, TWO_CODES, HIDDEN, INTER, WIDE (heads * dimensions), QKV (rows of that weight),
   QKV_BIAS, CTAS, SHARED, the rows and split-K of each product's units: O_ROWS, O_SPLITS, GATE_UP_ROWS (of gate and as
   many of up), DOWN_ROWS, DOWN_SPLITS, QKV_ROWS; BLOCKS, and with it the height of a tile, 128 or 1, of each weight: O_TILE,
   GATE_UP_TILE, DOWN_TILE, QKV_TILE. */

#define COLUMNS (TOKENS << TWO_CODES) /* of codes */
#include "types.cuh"

enum { O, GATE_UP, DOWN, NEXT_QKV };

struct Between {
    Map weights[4]; /* boxes of 128 bytes of K by a unit's rows */
    const float *scales[4]; /* one per row; BLOCKS: [rows / tile height, K steps] */
    const u16 *attended; /* [tokens, WIDE] */
    u16 *residual, *qkv; /* [tokens, HIDDEN], updated; [tokens, QKV] */
    const u16 *post_norm, *next_norm, *qkv_bias; /* next_norm is null in the last layer */
    u8 *codes[3]; /* of attended, normed and act in columns, laid out by place_of(), initially zeros; ALONE: nothing, and BF16
                     [HIDDEN] of the residual behind o, [INTER] of act */
    float *input_scales[3]; /* of the codes: [TOKENS], but act's are in SmemState; BLOCKS: [K steps, TOKENS] */
    float *parts; /* [SPLITS, TOKENS, HIDDEN] */
    u32 *grid_barriers; /* zeros: [GRID_BARRIERS] arrivals, then bits of the amax of act: [CTAS, TOKENS]; BLOCKS: [units, 2, TOKENS]; ALONE: [CTAS] */
    int tokens;
    float eps;
};

constexpr int STEP = 128; /* K step, and length of a group of values with a common scale */
__device__ constexpr int up(int a, int b) { return (a + b - 1) / b; }
template <int P> struct Shape {
    static constexpr int ROWS = P == O ? O_ROWS : P == GATE_UP ? GATE_UP_ROWS : P == DOWN ? DOWN_ROWS : QKV_ROWS;
    static constexpr int SPLITS = P == O ? O_SPLITS : P == DOWN ? DOWN_SPLITS : 1, HALVES = P == GATE_UP ? 2 : 1;
    static constexpr int N = P == GATE_UP ? INTER : P == NEXT_QKV ? QKV : HIDDEN, K = P == O ? WIDE : P == DOWN ? INTER : HIDDEN;
    static constexpr int UNITS = up(N, ROWS) * SPLITS, STEPS = up(K, STEP), SHARE = up(STEPS, SPLITS); /* K steps, in all and per unit */
    static constexpr int TILE = P == O ? O_TILE : P == GATE_UP ? GATE_UP_TILE : P == DOWN ? DOWN_TILE : QKV_TILE; /* height */
    static constexpr bool SPLIT_ROWS = HALVES == 2 || ROWS > 64; /* the warpgroups split the rows; otherwise they alternate K steps */
    static constexpr int PACKED = SPLIT_ROWS ? 1 : 64 / ROWS * 2; /* K steps per box */
    static_assert(ROWS % 8 == 0 && ROWS <= 128 && SHARE * (SPLITS - 1) < STEPS, "a unit's rows and share");
};

/* Inputs are loaded FETCHED K steps at a time, an even number. */
constexpr int WARPS = 8, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 64;
constexpr int VALUES = COLUMNS / 2, SUMS = TOKENS / 2, EACH = TWO_CODES ? 1 : 2; /* of a tile, per thread: its values, their sums by token, and tokens in adjacent columns */
constexpr int INPUT = COLUMNS * STEP, FETCHED = COLUMNS < 32 ? 4 : 2, CTA_UNITS = up(Shape<GATE_UP>::UNITS, CTAS), BOXES = 24;
constexpr int SPLITS = O_SPLITS > DOWN_SPLITS ? O_SPLITS : DOWN_SPLITS, WIDEST = HIDDEN > WIDE ? HIDDEN : WIDE, PARTS = up(WIDEST / 8, CONSUMERS);
__device__ constexpr int larger_of(int a, int b) { return a > b ? a : b; }
constexpr int MOST_STEPS = larger_of(larger_of(Shape<O>::SHARE, Shape<GATE_UP>::SHARE), larger_of(Shape<DOWN>::SHARE, Shape<NEXT_QKV>::SHARE)); /* of a unit */
constexpr int INPUTS = ALONE ? up(MOST_STEPS, FETCHED) : COLUMNS == 16 || COLUMNS == 64 ? 3 : 4;
constexpr int MOST_SCALES = larger_of(larger_of(Shape<O>::SHARE, 2 * Shape<GATE_UP>::SHARE), larger_of(Shape<DOWN>::SHARE, Shape<NEXT_QKV>::SHARE));
constexpr int AMAXES = BLOCKS ? 2 * CTA_UNITS : 1; /* of act: a unit has values of at most two groups */
constexpr int FEW = ALONE ? 4 : 2, MANY = ALONE ? 8 : 6; /* boxes in flight: longer memory queues would delay the loads that others wait for */
constexpr float LIMIT = 448.0f, FLOOR = TWO_CODES ? 1e-30f : 1.0f / (448 * 512);
constexpr u32 IS_THERE = 1u << 31; /* in the sign of an amax */

struct SmemState {
    u64 full[BOXES], empty[BOXES], input_full[INPUTS], input_empty[INPUTS];
    int begin[BOXES];
    u32 cta_amax[AMAXES][TOKENS], amax[AMAXES][TOKENS];
    __align__(16) float input_scale[BLOCKS ? INPUTS : 1][BLOCKS ? FETCHED : 1][TOKENS]; /* of a product's inputs, except PTPC's down */
    float tile_scale[WARPS][BLOCKS ? MOST_SCALES : 1]; /* of a warp's rows, in a unit's steps */
    float scale[TOKENS], inverse[AMAXES][TOKENS], first[WARPS], second[WARPS]; /* scale and inverse: of act, BLOCKS: the inverse alone */
    union __align__(16) {
        float other[SUMS][128]; /* the other warpgroup's sums */
        u16 act[CTA_UNITS][TOKENS][128 + 8]; /* padded by four banks */
    };
};
constexpr int RING = (SHARED - 1024 - INPUTS * FETCHED * INPUT - (int)sizeof(SmemState)) / 1024 * 1024;

extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = 1024 + RING + INPUTS * FETCHED * INPUT + (int)sizeof(SmemState);
static_assert(!(TWO_CODES && BLOCKS), "blocks of pairs");
static_assert(!ALONE || (Shape<O>::UNITS <= CTAS && Shape<GATE_UP>::UNITS <= CTAS && Shape<DOWN>::UNITS <= CTAS && Shape<NEXT_QKV>::UNITS <= CTAS &&
                         Shape<DOWN>::SHARE * STEP <= PARTS * CONSUMERS * 8 && CTAS <= CONSUMERS), "a unit of each product, rows, a thread for each amax");
static_assert(RING >= 4 * 128 * STEP && GATE_UP_ROWS % 16 == 0 && INTER % 16 == 0, "shared memory, pieces");

#include "ptx.cuh"
#include "tma_pipeline.cuh"
#include "wgmma_tiles.cuh"

/* All-reduce over the consumer threads: sum, or maximum. */
template <bool MOST> INLINE float over_threads(float x, float (&room)[WARPS]) {
#pragma unroll
    for (int i = 16; i; i /= 2) {
        const float other = __shfl_xor_sync(~0u, x, i);
        x = MOST ? fmaxf(x, other) : x + other;
    }
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    consumers_sync();
    x = room[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) x = MOST ? fmaxf(x, room[w]) : x + room[w];
    return x;
}

INLINE void unpack(uint4 w, float (&value)[8]) {
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; j++) value[2 * j] = low_of(words[j]), value[2 * j + 1] = high_of(words[j]);
}

/* A token's row of at most WIDEST values: eight contiguous values per thread, repeated every CONSUMERS * 8. */
struct Row {
    uint4 words[PARTS];
    INLINE static int place(int i) { return (threadIdx.x + i * CONSUMERS) * 8; }
    INLINE void load(const u16 *from, int width) {
#pragma unroll
        for (int i = 0; i < PARTS; i++) words[i] = place(i) < width ? shared_load((const void *)(from + place(i))) : uint4{};
    }
    INLINE float amax(int part) const {
        const uint4 w = words[part];
        const u32 most = larger(larger(w.x & 0x7FFF7FFF, w.y & 0x7FFF7FFF), larger(w.z & 0x7FFF7FFF, w.w & 0x7FFF7FFF));
        return fmaxf(low_of(most), high_of(most));
    }
    /* Quantize the row to `codes`, laid out by place_of(), and its scales. */
    INLINE void quantize(u8 *codes, float *scales, int token, int width, SmemState &smem) const {
        float scale, by, most = 0;
        if (!BLOCKS) {
#pragma unroll
            for (int i = 0; i < PARTS; i++) most = fmaxf(most, amax(i));
            scale = fmaxf(over_threads<true>(most, smem.second) / LIMIT, FLOOR), by = 1.0f / scale;
            if (threadIdx.x == 0) scales[token] = scale;
        }
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (BLOCKS) {
                most = amax(i);
#pragma unroll
                for (int lane = STEP / 8 / 2; lane; lane /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
                scale = fmaxf(most / LIMIT, FLOOR), by = 1.0f / scale;
                if (place(i) % STEP == 0 && place(i) < width) scales[place(i) / STEP * TOKENS + token] = scale;
            }
            float x[8];
            unpack(words[i], x);
            u32 c[4], rest[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                c[j] = codes_of(x[2 * j] * by, x[2 * j + 1] * by);
                rest[j] = TWO_CODES ? rests_of(c[j], x[2 * j] * by, x[2 * j + 1] * by) : 0;
            }
            if (place(i) >= width) continue;
            *(uint2 *)(codes + place_of(token << TWO_CODES, place(i))) = uint2{c[0] | c[1] << 16, c[2] | c[3] << 16};
            if (TWO_CODES) *(uint2 *)(codes + place_of(token << 1 | 1, place(i))) = uint2{rest[0] | rest[1] << 16, rest[2] | rest[3] << 16};
        }
    }
    /* Add a product's split-K shares to the residual; returns this thread's sum of squares. */
    INLINE float add(const float *parts, int splits, u16 *residual, bool writes = true) {
        float4 part[PARTS][SPLITS][2];
#pragma unroll
        for (int i = 0; i < PARTS; i++)
#pragma unroll
            for (int c = 0; c < SPLITS; c++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    part[i][c][j] = place(i) < HIDDEN && c < splits ? __ldcg((const float4 *)(parts + c * TOKENS * HIDDEN + place(i)) + j) : float4{};
        float squares = 0;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            float y[8] = {}, old[8];
            unpack(words[i], old);
#pragma unroll
            for (int c = 0; c < SPLITS; c++)
#pragma unroll
                for (int j = 0; j < 8; j++) y[j] += ((const float *)part[i][c])[j];
            u32 sum[4];
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] = narrow_two(rounded(y[2 * j]) + old[2 * j], rounded(y[2 * j + 1]) + old[2 * j + 1]);
            words[i] = uint4{sum[0], sum[1], sum[2], sum[3]};
            if (writes && place(i) < HIDDEN) *(uint4 *)(residual + place(i)) = words[i];
            unpack(words[i], y);
#pragma unroll
            for (int j = 0; j < 8; j++) squares += y[j] * y[j];
        }
        return squares;
    }
    /* Times `factor`, rounded, times `gain`, rounded. */
    INLINE void scale(float factor, const Row &gain) {
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) {
            u32 &two = ((u32 *)words)[i];
            two = times(narrow_two(low_of(two) * factor, high_of(two) * factor), ((const u32 *)gain.words)[i]);
        }
    }
};

/* Quantize this CTA's token as a product's input: attention's output, or the norm of the residual plus the previous
   product's split-K shares. Without a norm there is no next product. Not inlined: one copy of the code for all products,
   since instruction fetches take time. */
__device__ __noinline__ void prepare(const Between &s, int product, SmemState &smem) {
    const int token = blockIdx.x, width = product == O ? WIDE : HIDDEN, before = product == GATE_UP ? O : DOWN;
    const u16 *norm = product == GATE_UP ? s.post_norm : s.next_norm;
    Row row, gain;
    row.load((product == O ? s.attended : s.residual) + (i64)token * width, width);
    if (product != O) {
        if (norm) gain.load(norm, HIDDEN);
        if (threadIdx.x == 0) wait_for(s.grid_barriers + done(before), CTAS);
        consumers_sync();
        const float squares = row.add(s.parts + token * HIDDEN, before == O ? O_SPLITS : DOWN_SPLITS, s.residual + (i64)token * HIDDEN);
        if (!norm) return;
        row.scale(rsqrtf(over_threads<false>(squares, smem.first) / HIDDEN + s.eps), gain);
    }
    const int to = product == O ? O : GATE_UP;
    row.quantize(s.codes[to], s.input_scales[to], token, width, smem);
    consumers_sync();
    if (threadIdx.x == 0) signal(s.grid_barriers + ready(product));
}

#include "own_inputs.cuh"

/* Show an amax of act to other CTAs. */
INLINE void publish(u32 *to, u32 amax) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(amax | IS_THERE) : "memory"); }

/* 16 contiguous values of a token's act, among those that this CTA computed. */
struct Piece {
    static constexpr int OF_TOKEN = GATE_UP_ROWS / 16, ALL = CTA_UNITS * TOKENS * OF_TOKEN;
    int round, token, row; /* row within the unit */
    INLINE Piece(int i) : round(i / (TOKENS * OF_TOKEN)), token(i / OF_TOKEN % TOKENS), row(i % OF_TOKEN * 16) {}
    INLINE int unit() const { return blockIdx.x + round * CTAS; }
    INLINE int at() const { return unit() * GATE_UP_ROWS + row; }
    INLINE int amax() const { return BLOCKS ? 2 * round + at() / STEP - unit() * GATE_UP_ROWS / STEP : 0; } /* which one it is part of */
    INLINE bool is_there(int tokens) const { return token < tokens && unit() < Shape<GATE_UP>::UNITS && at() < INTER; }
};
/* Call use(piece, its values in pairs) for each piece, each in its own thread. */
template <class Use> INLINE void for_pieces(const Between &s, const SmemState &smem, Use use) {
    for (int i = threadIdx.x; i < Piece::ALL; i += CONSUMERS) {
        const Piece piece(i);
        if (!piece.is_there(s.tokens)) continue;
        const u16 *act = smem.act[piece.round][piece.token] + piece.row;
        const uint4 words[2] = {*(const uint4 *)act, *(const uint4 *)(act + 8)};
        use(piece, (const u32 *)words);
    }
}

/* Scales of each token's act: an amax over the grid. */
INLINE void scale_tokens(u32 *sent, SmemState &smem) {
    if (threadIdx.x < TOKENS) publish(sent + blockIdx.x * TOKENS + threadIdx.x, smem.cta_amax[0][threadIdx.x]);
    constexpr int QUADS = TOKENS / 4, AT_A_TIME = CONSUMERS / QUADS;
    const int quad = threadIdx.x % QUADS, cta = threadIdx.x / QUADS;
    uint4 others[up(CTAS, AT_A_TIME)], all = {};
    do {
        all.x = all.y = all.z = all.w = IS_THERE;
#pragma unroll
        for (int i = 0; i < up(CTAS, AT_A_TIME); i++)
            if (cta + i * AT_A_TIME < CTAS) others[i] = look_at_four(sent + (cta + i * AT_A_TIME) * TOKENS + quad * 4);
#pragma unroll
        for (int i = 0; i < up(CTAS, AT_A_TIME); i++)
            if (cta + i * AT_A_TIME < CTAS) all.x &= others[i].x, all.y &= others[i].y, all.z &= others[i].z, all.w &= others[i].w;
    } while (!((all.x & all.y & all.z & all.w) >> 31));
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < up(CTAS, AT_A_TIME); i++)
            if (cta + i * AT_A_TIME < CTAS) largest = max(largest, ((const u32 *)&others[i])[j] & ~IS_THERE);
#pragma unroll
        for (int i = QUADS; i < 32; i *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, i));
        if (threadIdx.x % 32 < QUADS) atomicMax(smem.amax[0] + quad * 4 + j, largest);
    }
    consumers_sync();
    if (threadIdx.x < TOKENS) {
        const float scale = fmaxf(__uint_as_float(smem.amax[0][threadIdx.x]) / LIMIT, FLOOR);
        smem.scale[threadIdx.x] = scale, smem.inverse[0][threadIdx.x] = 1.0f / scale;
    }
}

/* A token's group of act, of which this CTA's unit has values. */
struct Group {
    static constexpr int ROWS = GATE_UP_ROWS, ALL = AMAXES * TOKENS, SHARING = (ROWS + STEP - 17) / ROWS + 1; /* units that have values of it */
    int which, token, unit, group;
    INLINE Group(int i) : which(i / TOKENS), token(i % TOKENS), unit(blockIdx.x + which / 2 * CTAS), group(unit * ROWS / STEP + which % 2) {}
    INLINE bool is_there(int tokens) const { return token < tokens && unit * ROWS < INTER && group * STEP < min((unit + 1) * ROWS, INTER); }
    INLINE int first() const { return group * STEP / ROWS; } /* unit */
    INLINE int sharing(int i) const { return min(first() + i, (min(group * STEP + STEP, INTER) - 1) / ROWS); }
    INLINE int place(int other) const { return (2 * other + group - other * ROWS / STEP) * TOKENS + token; }
};
/* Scales of each group of act in this CTA's units: an amax over the few units that have values of the group. The first of
   them writes the scale. */
INLINE void scale_groups(const Between &s, u32 *sent, SmemState &smem) {
    for (int i = threadIdx.x; i < Group::ALL; i += CONSUMERS)
        if (const Group g(i); g.is_there(s.tokens)) publish(sent + g.place(g.unit), smem.cta_amax[g.which][g.token]);
    for (int i = threadIdx.x; i < Group::ALL; i += CONSUMERS) {
        const Group g(i);
        if (!g.is_there(s.tokens)) continue;
        u32 most, all;
        do {
            most = 0, all = IS_THERE;
#pragma unroll
            for (int j = 0; j < Group::SHARING; j++) {
                const u32 seen = look(sent + g.place(g.sharing(j)));
                most = max(most, seen & ~IS_THERE), all &= seen;
            }
        } while (!all);
        const float scale = fmaxf(__uint_as_float(most) / LIMIT, FLOOR);
        smem.inverse[g.which][g.token] = 1.0f / scale;
        if (g.unit == g.first()) s.input_scales[DOWN][g.group * TOKENS + g.token] = scale;
    }
}

/* Exchange amaxes, then quantize this CTA's part of act. */
INLINE void quantize_act(const Between &s, SmemState &smem) {
    consumers_sync();
    for_pieces(s, smem, [&](const Piece &piece, const u32 *pairs) {
        u32 most = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) most = larger(most, pairs[j] & 0x7FFF7FFF);
        atomicMax(smem.cta_amax[piece.amax()] + piece.token, __float_as_uint(fmaxf(low_of(most), high_of(most)))); /* nonnegative floats are ordered like their bits */
    });
    consumers_sync();
    if (BLOCKS) scale_groups(s, s.grid_barriers + GRID_BARRIERS, smem);
    else scale_tokens(s.grid_barriers + GRID_BARRIERS, smem);
    consumers_sync();
    for_pieces(s, smem, [&](const Piece &piece, const u32 *pairs) {
        const float by = smem.inverse[piece.amax()][piece.token];
        u32 c[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 a = pairs[2 * j], b = pairs[2 * j + 1];
            c[j] = codes_of(low_of(a) * by, high_of(a) * by, low_of(b) * by, high_of(b) * by);
            rest[j] = TWO_CODES ? rests_of(c[j], low_of(a) * by, high_of(a) * by) | rests_of(c[j] >> 16, low_of(b) * by, high_of(b) * by) << 16 : 0;
        }
        *(uint4 *)(s.codes[DOWN] + place_of(piece.token << TWO_CODES, piece.at())) = uint4{c[0], c[1], c[2], c[3]};
        if (TWO_CODES) *(uint4 *)(s.codes[DOWN] + place_of(piece.token << 1 | 1, piece.at())) = uint4{rest[0], rest[1], rest[2], rest[3]};
    });
    consumers_sync();
    if (threadIdx.x == 0) signal(s.grid_barriers + ready(DOWN));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) between_attentions(const __grid_constant__ Between s) {
    extern __shared__ u8 memory[];
    u8 *ring = memory + (-address(memory) & 1023), *inputs = ring + RING;
    SmemState &smem = *(SmemState *)(inputs + INPUTS * FETCHED * INPUT);
    if (threadIdx.x == 0) {
        for (int i = 0; i < BOXES + INPUTS; i++) {
            const u64 *full = i < BOXES ? smem.full + i : smem.input_full + i - BOXES;
            const u64 *empty = i < BOXES ? smem.empty + i : smem.input_empty + i - BOXES;
            init<1>(full);
            init<WARPS>(empty);
        }
        fence_barrier_init();
    }
    for (int i = threadIdx.x; i < AMAXES * TOKENS; i += THREADS) smem.cta_amax[0][i] = smem.amax[0][i] = 0;
    __syncthreads();
    if (threadIdx.x == CONSUMERS) {
        WeightProducer weight_producer;
        weight_producer.produce<O>(s, ring, smem);
        weight_producer.produce<GATE_UP>(s, ring, smem);
        weight_producer.produce<DOWN>(s, ring, smem);
        if (s.next_norm) weight_producer.produce<NEXT_QKV>(s, ring, smem);
    } else if (!ALONE && threadIdx.x == CONSUMERS + 32) {
        wait_on_dependent_grids();
        InputProducer input_producer;
        input_producer.fetch<O>(s, inputs, smem);
        input_producer.fetch<GATE_UP>(s, inputs, smem);
        input_producer.fetch<DOWN>(s, inputs, smem);
        if (s.next_norm) input_producer.fetch<NEXT_QKV>(s, inputs, smem);
    }
    if (threadIdx.x >= CONSUMERS) return;
    wait_on_dependent_grids();
    Consumer consumer;
    const bool has_token = blockIdx.x < s.tokens;
    auto keep_share = [&](int, int, int split, bool inside, int row, int token, float (&y)[1][EACH]) {
#pragma unroll
        for (int c = 0; c < EACH; c++)
            if (inside && token + c < s.tokens) s.parts[((i64)split * TOKENS + token + c) * HIDDEN + row] = y[0][c];
    };
    auto share_done = [&](int product) {
        consumers_sync();
        if (threadIdx.x == 0) signal(s.grid_barriers + done(product));
    };
    if (ALONE) own_attended(s, inputs, consumer.input.at, smem);
    else if (has_token) prepare(s, O, smem);
    product<O>(s, consumer, ring, inputs, smem, keep_share);
    share_done(O);
    if (ALONE) own_norm<GATE_UP>(s, inputs, consumer.input.at, smem);
    else if (has_token) prepare(s, GATE_UP, smem);
    product<GATE_UP>(s, consumer, ring, inputs, smem, [&](int round, int v, int, bool inside, int, int token, float (&y)[2][EACH]) {
#pragma unroll
        for (int c = 0; c < EACH; c++) {
            const float gate = rounded(y[0][c]);
            const u32 act = narrow(rounded(__fdividef(gate, 1.0f + __expf(-gate))) * rounded(y[1][c]));
            if (inside) smem.act[round][token + c][thread_row() + v % 2 * 8] = act;
        }
    });
    if (ALONE) own_act(s, inputs, consumer.input.at, smem);
    else quantize_act(s, smem);
    product<DOWN>(s, consumer, ring, inputs, smem, keep_share);
    share_done(DOWN);
    if (ALONE) own_norm<NEXT_QKV>(s, inputs, consumer.input.at, smem);
    else if (has_token) prepare(s, NEXT_QKV, smem);
    if (!s.next_norm) return;
    product<NEXT_QKV>(s, consumer, ring, inputs, smem, [&](int, int, int, bool inside, int row, int token, float (&y)[1][EACH]) {
        const float bias = QKV_BIAS && inside ? wide(__ldg(s.qkv_bias + row)) : 0;
#pragma unroll
        for (int c = 0; c < EACH; c++)
            if (inside && token + c < s.tokens) s.qkv[(i64)(token + c) * QKV + row] = narrow(QKV_BIAS ? rounded(y[0][c]) + bias : y[0][c]);
    });
}
