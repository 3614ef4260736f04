/* A persistent megakernel: one decode step of a few tokens through all layers of a dense decoder, in one launch.

   Between kernels the memory system idles: the last CTAs drain, the next ones start, issue loads of weights and wait a
   microsecond. With one request this is a third of the time. Here one persistent CTA runs on each SM for the whole step.
   Producer warps issue loads of the weights that the CTA will multiply by, layer after layer, as far ahead as shared memory
   allows; consumer warps compute behind them. So weights stream in while norms and attention run. Loads in flight are
   limited to what keeps memory busy: longer queues would delay everything else.

   Data that all CTAs read from all CTAs is exchanged in flagged packets, values with the step's number (as in NCCL's LL
   protocol): a reader polls until the number arrives, and no barrier is needed. Only `down` has a grid barrier before it,
   since its input is long.

   A CTA multiplies whole rows: tiles of 16 rows are dealt round-robin to all CTAs, across matrices and layers, so that each
   reads the same number of bytes. Products of FP8 codes are accumulated over 128 values in the tensor core and then in FP32.

   With TWO_CODES, activations are not rounded to FP8: each is a code and the code of its remainder, two columns of one product.

   Compile-time constants, the sizes of model and device: TOKENS, TWO_CODES, HIDDEN, INTER, HEADS, KV_HEADS, DIM, BLOCK_SIZE (of the
   cache), KV_FP8, PER_TOKEN_HEAD (whether its codes have a scale a token and head), WINDOW (0: none), HEAD_NORMS, QKV_BIAS, LONGEST (context), CTAS (the number of SMs), SHARED (bytes of
   shared memory per CTA). */

#include "types.cuh"

struct Layer {
    const u8 *qkv, *o, *gate_up, *down; /* codes [rows, K], K contiguous */
    const float *qkv_scale, *o_scale, *gate_up_scale, *down_scale; /* one per row */
    const u16 *input_norm, *post_norm, *q_norm, *k_norm, *qkv_bias;
    u8 *k, *v; /* the layer's cache */
    float *k_scale, *v_scale; /* of the cache: per layer, or PER_TOKEN_HEAD those of block 0 */
};

struct Step {
    const Layer *layers;
    const u16 *x;      /* [TOKENS, HIDDEN] embeddings */
    u16 *residual;     /* [TOKENS, HIDDEN] the last layer's output */
    u64 *qkv, *attended, *between, *after; /* [TOKENS, width / 2] flagged packets; the residual after o and after down */
    u16 *act;          /* [TOKENS, INTER] */
    u32 *amax;         /* [4, MAX_TOKENS] bits of act's amax, in rotation over layers */
    float *parts;      /* [TOKENS, KV_HEADS, SPLITS, GROUP * (DIM + 2)] */
    u32 *counters;     /* [2 + TOKENS * KV_HEADS] initially zeros: launches, grid barrier, finished parts */
    const i64 *rotary_rows, *slots;
    const int *lengths; /* of contexts with the new token; 0: the token pads a batch, and attention gives zeros */
    const int *tables;
    const float *cos_sin; /* [rows, DIM], cosines first */
    i64 table_stride, block_stride, k_token_stride, v_token_stride, v_head_stride, v_dim_stride; /* in values */
    i64 scale_block_stride, scale_token_stride, scale_head_stride;
    int num_layers;
    float eps, softmax_scale; /* softmax_scale includes log2(e) */
};

constexpr int WARPS = 8, CONSUMERS = WARPS * 32, GROUP = HEADS / KV_HEADS, WIDE = HEADS * DIM, QKV = (HEADS + 2 * KV_HEADS) * DIM;
constexpr int ROWS = 16, CHUNK = 1024, PITCH = CHUNK + 64; /* padded by 16 banks: reads of two rows have no bank conflict */
constexpr int STAGE = ROWS * PITCH, SLICE = CHUNK / WARPS;
constexpr int MAX_K = HIDDEN > INTER ? (HIDDEN > WIDE ? HIDDEN : WIDE) : (INTER > WIDE ? INTER : WIDE);
constexpr int X_PITCH = (MAX_K + 127) / 128 * 128 + 64;
constexpr int PER_DIM = CONSUMERS / DIM; /* threads that share a value's dimension */
constexpr int SPLITS = CTAS / (TOKENS * KV_HEADS); /* maximum parts of a context */
constexpr int SPLIT_TOKENS = ((LONGEST + 16 + SPLITS - 1) / SPLITS + 31) / 32 * 32;
constexpr int SCRATCH = 4 * GROUP * (SPLIT_TOKENS + DIM + 2 + PER_DIM * DIM) + 4 * DIM + PER_TOKEN_HEAD * 8 * SPLIT_TOKENS, COLUMNS = TOKENS << TWO_CODES, CODES = COLUMNS * X_PITCH;
constexpr int OPERAND = ((SCRATCH > CODES ? SCRATCH : CODES) + 127) / 128 * 128;
constexpr int MAX_TOKENS = 4, IN_FLIGHT = 2, PRODUCER_WARPS = 4, THREADS = CONSUMERS + 32 * PRODUCER_WARPS; /* producer warps */
constexpr float LIMIT = 448.0f, CACHE_FLOOR = 1.0f / (448 * 512), FLOOR = TWO_CODES ? 1e-30f : CACHE_FLOOR; /* of scales: of the cache, of activations */

constexpr int OTHER_SMEM = 4 * 2 * WARPS * TOKENS * ROWS + 4 * (2 * WARPS + 1) * TOKENS + 2 * (int)sizeof(Layer) + 64;
constexpr int STAGES = (SHARED - OPERAND - OTHER_SMEM) / (STAGE + 16);

struct SmemState {
    u64 full[STAGES], empty[STAGES];
    float sums[2][WARPS][TOKENS][ROWS]; /* a tile's partial sums per warp; double-buffered, so that one barrier a tile suffices */
    int last;
    Layer layer[2]; /* the current one and the next */
    float first[WARPS][TOKENS], second[WARPS][TOKENS], scale[TOKENS];
};

extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int shared_bytes = STAGES * STAGE + OPERAND + (int)sizeof(SmemState);
static_assert(STAGES > 1 && STAGES * STAGE + OPERAND + sizeof(SmemState) <= SHARED, "shared memory");

#include "ptx.cuh"

/* Grid barrier; `target` is the total number of arrivals. What each CTA wrote before it is visible to all after it. */
INLINE void grid_sync(u32 *counter, u32 target) {
    consumers_sync();
    if (threadIdx.x == 0) {
        signal(counter);
        while ((int)(arrived(counter) - target) < 0) {}
    }
    consumers_sync();
}

/* The position in the ring of stages, and in the round-robin of tiles over CTAs. */
struct Stage : PipelineState<STAGES> {
    int dealt = 0; /* tiles dealt so far, modulo the number of CTAs */
    INLINE int first_tile(int tiles) {
        int first = (int)blockIdx.x - dealt;
        dealt = (dealt + tiles) % CTAS;
        return first < 0 ? first + CTAS : first;
    }
};

/* A layer's four products in order. A tile of gate_up is 8 rows of gate and the matching 8 rows of up. */
enum { QKV_PRODUCT, O_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT };
INLINE int rows_of(int kind) { return kind == QKV_PRODUCT ? QKV : kind == GATE_UP_PRODUCT ? 2 * INTER : HIDDEN; }
INLINE int depth_of(int kind) { return kind == O_PRODUCT ? WIDE : kind == DOWN_PRODUCT ? INTER : HIDDEN; }
INLINE int row_of(int kind, int tile, int i) {
    return kind == GATE_UP_PRODUCT ? tile * 8 + (i & 7) + (i & 8 ? INTER : 0) : tile * ROWS + i;
}

/* A producer warp's loop: of each unit (a tile's CHUNK of K) it loads some rows, and with a tile's first unit its rows'
   scales, which fit between the unit's first two rows. One thread issues all loads: a bulk copy is a warp-level instruction,
   which several threads would issue one after another. */
INLINE void produce(const Step &s, u8 *stages, SmemState &smem) {
    constexpr int PRODUCED_ROWS = ROWS / PRODUCER_WARPS;
    const int first = (threadIdx.x / 32 - WARPS) * PRODUCED_ROWS;
    Stage at, behind;
    int ahead = 0;
    for (int step = 0; step < 4 * s.num_layers; step++) {
        const Layer &w = s.layers[step / 4];
        const int kind = step % 4, tiles = rows_of(kind) / ROWS, depth = depth_of(kind);
        const int with_scales = kind == GATE_UP_PRODUCT ? 8 : ROWS; /* rows with contiguous scales */
        const u8 *weight = (&w.qkv)[kind];
        const float *scales = (&w.qkv_scale)[kind];
        for (int tile = at.first_tile(tiles); tile < tiles; tile += CTAS) {
            const int row = row_of(kind, tile, first);
            const u8 *from = weight + (i64)row * depth;
            for (int k = 0; k < depth; k += CHUNK, at.next()) {
                const u32 bytes = min(depth - k, CHUNK), more = k == 0 && first % with_scales == 0 ? 4 * with_scales : 0;
                const u32 to = address(stages + at.at * STAGE), full = address(smem.full + at.at);
                if (ahead == IN_FLIGHT) wait(smem.full + behind.at, behind.parity), behind.next();
                else ahead++;
                wait(smem.empty + at.at, at.parity ^ 1); /* the preceding phase of a new barrier counts as complete */
                expect(smem.full + at.at, PRODUCED_ROWS * bytes + more);
                if (more) copy(to + CHUNK + 4 * first, scales + row, more, full);
#pragma unroll
                for (int i = 0; i < PRODUCED_ROWS; i++) copy(to + (first + i) * PITCH, from + (i64)i * depth + k, bytes, full);
            }
        }
    }
}

INLINE void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A warp's share of a stage (16 rows by SLICE of K) and of the operand. Any assignment of K values to the instruction's K
   index is valid if both factors use it, so each thread reads 16 contiguous ones. */
struct Share {
    static constexpr int PARTS = SLICE / 64;
    uint4 upper[PARTS], lower[PARTS], x[PARTS];
    INLINE void load(const u8 *stage, const u8 *operand, bool has_column) {
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            upper[i] = *(const uint4 *)(stage + i * 64), lower[i] = *(const uint4 *)(stage + i * 64 + 8 * PITCH);
            x[i] = has_column ? *(const uint4 *)(operand + i * 64) : uint4{};
        }
    }
    INLINE void multiply_into(float (&sum)[4], int valid) const {
        float part[2 * PARTS][4] = {}; /* independent accumulators, to hide latency */
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (i * 64 >= valid) break;
            multiply(part[2 * i], upper[i].x, lower[i].x, upper[i].y, lower[i].y, x[i].x, x[i].y);
            multiply(part[2 * i + 1], upper[i].z, lower[i].z, upper[i].w, lower[i].w, x[i].z, x[i].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < PARTS; j++) sum[i] += part[2 * j][i] + part[2 * j + 1][i];
    }
};

/* The product of the codes in `operand`. Epilogue: finish(row, token, y, extra) gets each scaled result in its own thread,
   16 rows of a tile by TOKENS; prepare(row, token) loads `extra` before the sums are complete. */
template <class Prepare, class Finish>
INLINE void product(int kind, Stage &at, const u8 *stages, const u8 *operand, SmemState &smem, Prepare prepare, Finish finish) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4, part = lane % 4;
    const int my_row = thread % ROWS, token = thread / ROWS, tiles = rows_of(kind) / ROWS, depth = depth_of(kind);
    const bool has_result = thread < ROWS * TOKENS;
    const u8 *my_stage = stages + row * PITCH + warp * SLICE + part * 16;
    const u8 *my_operand = operand + row * X_PITCH + warp * SLICE + part * 16;
    Share share;
    float scale = 0;
    auto take = [&](int k) { /* load the next stage to registers and release it */
        wait(smem.full + at.at, at.parity);
        if (k == 0 && has_result) scale = ((const float *)(stages + at.at * STAGE + CHUNK))[my_row];
        share.load(my_stage + at.at * STAGE, my_operand + k, row < COLUMNS);
        __syncwarp();
        if (lane == 0) arrive(smem.empty + at.at);
        at.next();
    };
    int buffer = 0;
    for (int tile = at.first_tile(tiles); tile < tiles; tile += CTAS, buffer ^= 1) {
        const int result = row_of(kind, tile, my_row);
        const float extra = has_result ? prepare(result, token) : 0;
        float sum[4] = {};
        take(0);
#pragma unroll 2
        for (int k = 0; k < depth; k += CHUNK) {
            const Share now = share;
            if (k + CHUNK < depth) take(k + CHUNK);
            now.multiply_into(sum, depth - k - warp * SLICE);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (TWO_CODES ? part < TOKENS && i % 2 == 0 : 2 * part + i % 2 < TOKENS)
                smem.sums[buffer][warp][TWO_CODES ? part : 2 * part + i % 2][row + i / 2 * 8] = TWO_CODES ? sum[i] + sum[i | 1] * OF_REST : sum[i];
        consumers_sync();
        if (has_result) {
            float y = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) y += smem.sums[buffer][w][token][my_row];
            finish(result, token, rounded(y * scale * smem.scale[token]), extra);
        }
    }
}

/* All-reduce of a value per token over all consumer threads: the sum, or the maximum. `room` must not be reused before
   another barrier. */
template <bool MOST> INLINE void over_threads(float (&x)[TOKENS], float (&room)[WARPS][TOKENS]) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int i = 16; i; i /= 2) {
            float other = __shfl_xor_sync(~0u, x[t], i);
            x[t] = MOST ? fmaxf(x[t], other) : x[t] + other;
        }
        if (threadIdx.x % 32 == 0) room[threadIdx.x / 32][t] = x[t];
    }
    consumers_sync();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        x[t] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[t] = MOST ? fmaxf(x[t], room[w][t]) : x[t] + room[w][t];
    }
}

/* A row [K] of each token, eight values per thread at a time. */
template <int K> struct Row {
    static constexpr int PARTS = (K / 8 + CONSUMERS - 1) / CONSUMERS;
    uint4 part[PARTS];
    template <bool COHERENT> INLINE void load(const u16 *from) {
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int at = threadIdx.x + i * CONSUMERS;
            part[i] = {};
            if (at < K / 8) part[i] = COHERENT ? shared_load((const void *)(from + at * 8)) : __ldg((const uint4 *)from + at);
        }
    }
    /* Poll for packets flagged with `number`. */
    INLINE void receive(const u64 *from, u32 number) {
        ulonglong2 sent[PARTS][2];
#pragma unroll
        for (int i = 0; i < PARTS * 2; i++) {
            int at = threadIdx.x + i / 2 * CONSUMERS;
            if (at < K / 8) sent[i / 2][i % 2] = look_at_two(from + at * 4 + i % 2 * 2);
        }
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int at = threadIdx.x + i * CONSUMERS;
            part[i] = {};
            if (at >= K / 8) continue;
            ulonglong2 &a = sent[i][0], &b = sent[i][1];
            while (!(is_there(a.x, number) && is_there(a.y, number))) a = look_at_two(from + at * 4);
            while (!(is_there(b.x, number) && is_there(b.y, number))) b = look_at_two(from + at * 4 + 2);
            part[i] = uint4{(u32)a.x, (u32)a.y, (u32)b.x, (u32)b.y};
        }
    }
    INLINE float get(int i) const {
        const u32 *words = (const u32 *)part;
        return i % 2 ? high_of(words[i / 2]) : low_of(words[i / 2]);
    }
    INLINE float amax() const {
        const u32 *words = (const u32 *)part;
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) most = larger(most, words[i] & 0x7FFF7FFF);
        return fmaxf(low_of(most), high_of(most));
    }
    /* Times `factor`, rounded, times `gain`, rounded. */
    INLINE void scale(float factor, const Row &gain) {
        u32 *words = (u32 *)part;
        const u32 *by = (const u32 *)gain.part;
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) words[i] = times(narrow_two(get(2 * i) * factor, get(2 * i + 1) * factor), by[i]);
    }
    /* Quantize the row, with amax `most`; returns its scale. */
    INLINE void quantize(float most, int token, u8 *operand, SmemState &smem) const {
        const float scale = fmaxf(most / LIMIT, FLOOR), by = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int at = threadIdx.x + i * CONSUMERS;
            u32 c[4], rest[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float low = get(i * 8 + 2 * j) * by, high = get(i * 8 + 2 * j + 1) * by;
                c[j] = codes_of(low, high), rest[j] = TWO_CODES ? rests_of(c[j], low, high) : 0;
            }
            if (at >= K / 8) continue;
            u8 *to = operand + (token << TWO_CODES) * X_PITCH + at * 8;
            *(uint2 *)to = uint2{c[0] | c[1] << 16, c[2] | c[3] << 16};
            if (TWO_CODES) *(uint2 *)(to + X_PITCH) = uint2{rest[0] | rest[1] << 16, rest[2] | rest[3] << 16};
        }
        if (threadIdx.x == 0) smem.scale[token] = scale;
    }
};

INLINE void norm_and_quantize(Row<HIDDEN> (&rows)[TOKENS], const Row<HIDDEN> &gain, float eps, u8 *operand, SmemState &smem) {
    float value[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        value[t] = 0;
#pragma unroll
        for (int i = 0; i < Row<HIDDEN>::PARTS * 8; i++) value[t] += rows[t].get(i) * rows[t].get(i);
    }
    over_threads<false>(value, smem.first);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float factor = rsqrtf(value[t] / HIDDEN + eps);
        rows[t].scale(factor, gain);
        value[t] = rows[t].amax();
    }
    over_threads<true>(value, smem.second);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) rows[t].quantize(value[t], t, operand, smem);
    consumers_sync();
}

INLINE void quantize_attended(const u64 *x, u32 number, u8 *operand, SmemState &smem) {
    Row<WIDE> rows[TOKENS];
    float value[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        rows[t].receive(x + t * WIDE / 2, number);
        value[t] = rows[t].amax();
    }
    over_threads<true>(value, smem.first);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) rows[t].quantize(value[t], t, operand, smem);
    consumers_sync();
}

INLINE void quantize_act(const u16 *x, const u32 *amax, u8 *operand, SmemState &smem) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        Row<INTER> row;
        row.load<true>(x + t * INTER);
        row.quantize(shared_load((const float *)amax + t), t, operand, smem);
    }
    consumers_sync();
}

#include "decoder_attention.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const Step s) {
    extern __shared__ __align__(128) u8 memory[];
    u8 *stages = memory, *operand = memory + STAGES * STAGE;
    SmemState &smem = *(SmemState *)(operand + OPERAND);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init<PRODUCER_WARPS>(smem.full + i);
            init<WARPS>(smem.empty + i);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x % 32 == 0) produce(s, stages, smem);
        return;
    }
    const u32 before = __ldcg(s.counters) * s.num_layers; /* layers of earlier launches; flags continue from there */
    auto fetch_layer = [&](int l) {
        constexpr int WORDS = sizeof(Layer) / 8;
        if (threadIdx.x < WORDS && l < s.num_layers) ((u64 *)&smem.layer[l % 2])[threadIdx.x] = __ldg((const u64 *)(s.layers + l) + threadIdx.x);
    };
    fetch_layer(0);
    consumers_sync();
    Stage at;
    Row<HIDDEN> gain;
    gain.load<false>(smem.layer[0].input_norm);
    for (int step = 0; step < 4 * s.num_layers; step++) {
        const int l = step / 4, kind = step % 4;
        const Layer &w = smem.layer[l % 2];
        const u32 number = before + l + 1;
        u32 *amax = s.amax + number % 4 * MAX_TOKENS;
        if (kind == QKV_PRODUCT || kind == GATE_UP_PRODUCT) {
            Row<HIDDEN> rows[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (step == 0) rows[t].load<false>(s.x + t * HIDDEN);
                else rows[t].receive((kind == QKV_PRODUCT ? s.after : s.between) + t * HIDDEN / 2, kind == QKV_PRODUCT ? number - 1 : number);
            norm_and_quantize(rows, gain, s.eps, operand, smem);
        } else if (kind == O_PRODUCT) {
            attend(s, w, number, (float *)operand, smem);
            fetch_layer(l + 1);
            gain.load<false>(w.post_norm);
            quantize_attended(s.attended, number, operand, smem);
        } else {
            if (blockIdx.x == 0 && threadIdx.x < MAX_TOKENS) s.amax[(number + 1) % 4 * MAX_TOKENS + threadIdx.x] = 0; /* for the next layer */
            if (l + 1 < s.num_layers) {
                expect_context(s, smem.layer[(l + 1) % 2]);
                gain.load<false>(smem.layer[(l + 1) % 2].input_norm);
            }
            grid_sync(s.counters + 1, number * CTAS);
            quantize_act(s.act, amax, operand, smem);
        }
        u64 *to = kind == QKV_PRODUCT ? s.qkv : kind == O_PRODUCT ? s.between : s.after;
        const int width = kind == QKV_PRODUCT ? QKV : HIDDEN;
        float most = 0;
        auto prepare = [&](int row, int token) { /* the addend of a result */
            if (kind == GATE_UP_PRODUCT || (kind == QKV_PRODUCT && !QKV_BIAS)) return 0.0f;
            const u64 *sent = (kind == O_PRODUCT ? s.after : s.between) + (token * HIDDEN + row) / 2;
            const u16 *from = kind == QKV_PRODUCT ? w.qkv_bias + row : step == O_PRODUCT ? s.x + token * HIDDEN + row : (const u16 *)sent + row % 2;
            return wide(shared_load(from));
        };
        auto finish = [&](int row, int token, float y, float extra) {
            constexpr u32 ALL = ~0u >> (TOKENS == 1 ? 16 : 0);
            if (kind == GATE_UP_PRODUCT) {
                const float up = __shfl_down_sync(ALL, y, 8);
                if (row >= INTER) return;
                const u32 act = narrow(rounded(y / (1.0f + __expf(-y))) * up);
                s.act[token * INTER + row] = act;
                most = fmaxf(most, fabsf(wide(act)));
                return;
            }
            const u32 bits = narrow(y + extra), next = __shfl_down_sync(ALL, bits, 1);
            if (row % 2 == 0) send(to + (token * width + row) / 2, bits | next << 16, number);
            if (step == 4 * s.num_layers - 1) s.residual[token * HIDDEN + row] = bits;
        };
        product(kind, at, stages, operand, smem, prepare, finish);
        if (kind == GATE_UP_PRODUCT) {
#pragma unroll
            for (int i = 4; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
            if (threadIdx.x < ROWS * TOKENS && threadIdx.x % ROWS == 0) /* nonnegative floats are ordered like their bits */
                atomicMax(amax + threadIdx.x / ROWS, __float_as_uint(most));
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) s.counters[0]++; /* all CTAs have read it: there was a barrier since */
}
