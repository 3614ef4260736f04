/* The attention phase of decoder_megakernel.cu, from the QKV product to attention's output.

   A CTA takes one token, one KV head with its query heads (GQA), and a part of the context (split-KV). Each CTA rotates the
   queries that it needs; the CTA whose part ends with the new token also stores its key and value. The last part of a head
   to finish merges the parts, in a fixed order. PER_TOKEN_HEAD: keys' scales multiply scores, values' scales weights. */
constexpr int SIZE = KV_FP8 ? 1 : 2, EACH = 16 / SIZE; /* bytes of a cached value; values per 16-byte load */
constexpr int SCALES_EACH = PER_TOKEN_HEAD ? (SPLIT_TOKENS + CONSUMERS - 1) / CONSUMERS : 0; /* of keys that a thread loads */
constexpr int PAIRS = (DIM / 4 + 31) / 32, PER_TOKEN = DIM / EACH, AT_ONCE = 32 / PER_TOKEN; /* threads per token's key, tokens per warp */

struct Part {
    int token, head, split, splits; /* splits: the number of nonempty parts */
    int begin, end, low, length;    /* its tokens; `low` is the first visible one */
};

/* This CTA's part; false if there are more CTAs than parts. An empty context has one empty part. */
INLINE bool part_of(const Step &s, Part &p) {
    const int number = blockIdx.x;
    p.head = number % KV_HEADS, p.token = number / KV_HEADS % TOKENS, p.split = number / (KV_HEADS * TOKENS);
    p.length = __ldg(s.lengths + p.token);
    p.low = WINDOW && p.length > WINDOW ? p.length - WINDOW : 0;
    const int from = p.low / 16 * 16, count = max(p.length - from, 1), each = ((count + SPLITS - 1) / SPLITS + 31) / 32 * 32;
    p.splits = (count + each - 1) / each;
    p.begin = from + p.split * each, p.end = min(p.begin + each, p.length);
    return p.split < min(p.splits, SPLITS);
}

INLINE const u8 *block_of(const Step &s, const Part &p, const u8 *cache, int at) {
    return cache + __ldg(s.tables + p.token * s.table_stride + at / BLOCK_SIZE) * s.block_stride * SIZE;
}
INLINE const u8 *key_of(const Step &s, const Part &p, const Layer &w, int at) {
    return block_of(s, p, w.k, at) + (at % BLOCK_SIZE * s.k_token_stride + p.head * DIM) * SIZE;
}
INLINE const u8 *value_of(const Step &s, const Part &p, const Layer &w, int at, int d) {
    return block_of(s, p, w.v, at) + (at % BLOCK_SIZE * s.v_token_stride + p.head * s.v_head_stride + d * s.v_dim_stride) * SIZE;
}

INLINE i64 scale_place(const Step &s, const Part &p, i64 block, int offset) {
    return block * s.scale_block_stride + offset * s.scale_token_stride + p.head * s.scale_head_stride;
}
INLINE i64 scale_of(const Step &s, const Part &p, int at) {
    return scale_place(s, p, __ldg(s.tables + p.token * s.table_stride + at / BLOCK_SIZE), at % BLOCK_SIZE);
}

/* Prefetch the keys and values of long parts to L2 while the previous product runs. */
INLINE void expect_context(const Step &s, const Layer &w) {
    Part p;
    if (!part_of(s, p) || p.end - p.begin <= WARPS * AT_ONCE) return;
    constexpr int LINES = DIM * SIZE / 32;
    for (int i = threadIdx.x; i < (p.end - p.begin) * LINES; i += CONSUMERS) {
        const int at = p.begin + i / LINES, line = i % LINES;
        prefetch(key_of(s, p, w, at) + line * 32);
        if (!KV_FP8) prefetch(value_of(s, p, w, at, line * 16));
    }
    if (KV_FP8) /* 32 tokens of a dimension are contiguous */
        for (int i = threadIdx.x; i < (p.end - p.begin + 31) / 32 * DIM; i += CONSUMERS)
            prefetch(value_of(s, p, w, p.begin + i / DIM * 32, i % DIM));
    if (PER_TOKEN_HEAD)
        for (int i = p.begin + 8 * threadIdx.x; i < p.end; i += 8 * CONSUMERS) prefetch(w.k_scale + scale_of(s, p, i)), prefetch(w.v_scale + scale_of(s, p, i));
}

/* Each thread's first loads of keys and values, and its loads of scales, issued before the queries have arrived. */
struct Ahead {
    uint4 key, value;
    float k_scale, v_scale;
    float scales[2][SCALES_EACH + 1]; /* of keys, of values */
};
INLINE Ahead look_ahead(const Step &s, const Layer &w, const Part &p) {
    const int lane = threadIdx.x % 32, at = p.begin + threadIdx.x / 32 * AT_ONCE + lane / PER_TOKEN, d = threadIdx.x % DIM;
    const int share = p.begin + threadIdx.x / DIM * 16;
    Ahead first = {};
    if (at < p.end) first.key = shared_load((const void *)(key_of(s, p, w, at) + lane % PER_TOKEN * 16));
    if (KV_FP8 && share < p.end) first.value = shared_load((const void *)value_of(s, p, w, share, d));
    constexpr bool BY_LAYER = KV_FP8 && !PER_TOKEN_HEAD;
    first.k_scale = BY_LAYER ? shared_load(w.k_scale) : 1.0f, first.v_scale = BY_LAYER ? shared_load(w.v_scale) : 1.0f;
#pragma unroll
    for (int i = 0; i < SCALES_EACH; i++) {
        const int of = p.begin + threadIdx.x + i * CONSUMERS;
        if (of < p.end) first.scales[0][i] = shared_load(w.k_scale + scale_of(s, p, of)), first.scales[1][i] = shared_load(w.v_scale + scale_of(s, p, of));
    }
    return first;
}
/* `scales` [2, SPLIT_TOKENS]: of the part's keys and values, but for the new token. */
INLINE void keep_scales(const Part &p, const Ahead &ahead, float *scales) {
#pragma unroll
    for (int i = 0; i < SCALES_EACH; i++) {
        const int of = threadIdx.x + i * CONSUMERS;
        if (p.begin + of < min(p.end, p.length - 1)) scales[of] = ahead.scales[0][i], scales[SPLIT_TOKENS + of] = ahead.scales[1][i];
    }
}

/* Converted as stored in the cache, which holds finite values only. */
INLINE u32 stored(float x, float scale) {
    x = finite(x);
    return KV_FP8 ? codes_of(x / scale, 0) & 0xFF : narrow(x);
}
INLINE void store(u8 *to, u32 bits) {
    if (KV_FP8) *to = (u8)bits;
    else *(u16 *)to = (u16)bits;
}

/* Rotate the part's queries into `query` [GROUP, DIM], times the score's scale, and store the new key and value, also in
   `fresh` [2, DIM], and their scales in `scales` [2, SPLIT_TOKENS]. One warp per head; a thread has two dimensions of the
   head's first half and their rotary partners in the second. */
INLINE void rotate_and_store(const Step &s, const Layer &w, const Part &p, const Ahead &ahead, u32 number, float *query, u8 *fresh, float *scales) {
    const int lane = threadIdx.x % 32, heads = p.end == p.length ? GROUP + 2 : GROUP;
    const u64 *from = s.qkv + p.token * QKV / 2;
    const float *cosines = s.cos_sin + __ldg(s.rotary_rows + p.token) * DIM;
    for (int h = threadIdx.x / 32; h < heads; h += WARPS) {
        const bool is_query = h < GROUP, is_value = h == GROUP + 1;
        const u64 *head = from + (is_query ? p.head * GROUP + h : HEADS + p.head + (is_value ? KV_HEADS : 0)) * DIM / 2;
        float x[PAIRS][2], y[PAIRS][2], squares = 0;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int i = lane + 32 * j;
            u32 both[2] = {};
            if (i < DIM / 4) {
                u64 first = look(head + i), second = look(head + DIM / 4 + i);
                while (!is_there(first, number)) first = look(head + i);
                while (!is_there(second, number)) second = look(head + DIM / 4 + i);
                both[0] = (u32)first, both[1] = (u32)second;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                x[j][e] = e ? high_of(both[0]) : low_of(both[0]), y[j][e] = e ? high_of(both[1]) : low_of(both[1]);
                squares += x[j][e] * x[j][e] + y[j][e] * y[j][e];
            }
        }
        const u16 *gain = is_query ? w.q_norm : w.k_norm;
        if (HEAD_NORMS)
#pragma unroll
            for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
        const float factor = rsqrtf(squares / DIM + s.eps);
        const i64 slot = __ldg(s.slots + p.token), block = slot / BLOCK_SIZE * s.block_stride, offset = slot % BLOCK_SIZE;
        const i64 apart = (is_value ? s.v_dim_stride : 1) * SIZE;
        u8 *to = is_value ? w.v + (block + offset * s.v_token_stride + p.head * s.v_head_stride) * SIZE
                          : w.k + (block + offset * s.k_token_stride + p.head * DIM) * SIZE;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            if (lane + 32 * j >= DIM / 4) continue;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = 2 * (lane + 32 * j) + e, k = i + DIM / 2;
                float &a = x[j][e], &b = y[j][e];
                if (HEAD_NORMS && !is_value) {
                    a = rounded(rounded(a * factor) * wide(__ldg(gain + i)));
                    b = rounded(rounded(b * factor) * wide(__ldg(gain + k)));
                }
                if (!is_value) {
                    const float cosine = __ldg(cosines + i), sine = __ldg(cosines + k), old = a;
                    a = rounded(a * cosine - b * sine), b = rounded(b * cosine + old * sine);
                }
            }
        }
        float scale = is_value ? ahead.v_scale : ahead.k_scale;
        if (PER_TOKEN_HEAD && !is_query) {
            float most = 0;
#pragma unroll
            for (int j = 0; j < PAIRS; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) most = fmaxf(most, fmaxf(fabsf(finite(x[j][e])), fabsf(finite(y[j][e]))));
#pragma unroll
            for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
            scale = fmaxf(most / LIMIT, CACHE_FLOOR);
            if (lane == 0) {
                (is_value ? w.v_scale : w.k_scale)[scale_place(s, p, slot / BLOCK_SIZE, offset)] = scale;
                scales[is_value * SPLIT_TOKENS + p.length - 1 - p.begin] = scale;
            }
        }
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            if (lane + 32 * j >= DIM / 4) continue;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = 2 * (lane + 32 * j) + e, k = i + DIM / 2;
                if (is_query) {
                    const float by = s.softmax_scale * ahead.k_scale;
                    query[h * DIM + i] = x[j][e] * by, query[h * DIM + k] = y[j][e] * by;
                    continue;
                }
                const u32 first = stored(x[j][e], scale), second = stored(y[j][e], scale);
                store(to + i * apart, first), store(to + k * apart, second);
                store(fresh + (is_value * DIM + i) * SIZE, first), store(fresh + (is_value * DIM + k) * SIZE, second);
            }
        }
    }
}

/* Four bytes of values at `word`, of an FP8 or BF16 cache. */
INLINE void widen(u32 word, float *out) {
    if (KV_FP8) values_of(word, *(float (*)[4])out);
    else out[0] = low_of(word), out[1] = high_of(word);
}

INLINE void score(const Step &s, const Layer &w, const Part &p, const Ahead &ahead, const float *query, const u8 *fresh, const float *scales, float *scores) {
    const int lane = threadIdx.x % 32, place = lane % PER_TOKEN;
    float q[GROUP][EACH];
#pragma unroll
    for (int i = 0; i < GROUP * EACH; i++) q[i / EACH][i % EACH] = query[i / EACH * DIM + place * EACH + i % EACH];
    for (int first = p.begin + threadIdx.x / 32 * AT_ONCE; first < p.end; first += WARPS * AT_ONCE) {
        const int at = first + lane / PER_TOKEN;
        uint4 raw = ahead.key;
        if (first >= p.begin + WARPS * AT_ONCE && at < p.end) raw = shared_load((const void *)(key_of(s, p, w, at) + place * 16));
        if (at == p.length - 1) raw = *(const uint4 *)(fresh + place * 16);
        float key[EACH], sum[GROUP] = {};
        widen(raw.x, key), widen(raw.y, key + EACH / 4), widen(raw.z, key + EACH / 2), widen(raw.w, key + EACH / 4 * 3);
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
#pragma unroll
            for (int i = 0; i < EACH; i++) sum[h] += q[h][i] * key[i];
#pragma unroll
            for (int i = PER_TOKEN / 2; i; i /= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], i);
            if (place == 0 && at < p.end) scores[h * SPLIT_TOKENS + at - p.begin] = at < p.low ? -1e30f : PER_TOKEN_HEAD ? sum[h] * scales[at - p.begin] : sum[h];
        }
    }
}

/* Softmax: scores become weights, zero-padded to a multiple of 16; `stats` [GROUP, 2]: maximum score and sum of weights.
   PER_TOKEN_HEAD: then weights are multiplied by the values' scales. */
INLINE void weigh(const Part &p, const float *scales, float *scores, float *stats) {
    const int lane = threadIdx.x % 32, count = p.end - p.begin;
    for (int h = threadIdx.x / 32; h < GROUP; h += WARPS) {
        float *row = scores + h * SPLIT_TOKENS, most = -1e30f, total = 0;
        for (int i = lane; i < count; i += 32) most = fmaxf(most, row[i]);
#pragma unroll
        for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
        for (int i = lane; i < (count + 15) / 16 * 16; i += 32) {
            const float weight = i < count && row[i] > -1e30f ? exp2f(row[i] - most) : 0;
            row[i] = PER_TOKEN_HEAD && i < count ? weight * scales[SPLIT_TOKENS + i] : weight, total += weight;
        }
#pragma unroll
        for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
        if (lane == 0) stats[h * 2] = most, stats[h * 2 + 1] = total;
    }
}

/* `sums` [PER_DIM, GROUP, DIM]: weighted values, over every PER_DIM-th token. */
INLINE void sum_values(const Step &s, const Layer &w, const Part &p, const Ahead &ahead, const float *scores, const u8 *fresh, float *sums) {
    const int d = threadIdx.x % DIM, share = threadIdx.x / DIM, count = p.end - p.begin;
    float sum[GROUP] = {};
    if (KV_FP8) {
        for (int at = share * 16; at < count; at += PER_DIM * 16) {
            uint4 raw = ahead.value;
            if (at >= PER_DIM * 16) raw = shared_load((const void *)value_of(s, p, w, p.begin + at, d));
            const int newest = p.length - 1 - p.begin - at, shift = newest % 4 * 8;
            auto patched = [&](u32 word, int i) { return newest / 4 == i ? (word & ~(0xFFu << shift)) | (u32)fresh[DIM + d] << shift : word; };
            if (newest >= 0 && newest < 16) raw = {patched(raw.x, 0), patched(raw.y, 1), patched(raw.z, 2), patched(raw.w, 3)};
            float value[16];
            widen(raw.x, value), widen(raw.y, value + 4), widen(raw.z, value + 8), widen(raw.w, value + 12);
#pragma unroll
            for (int h = 0; h < GROUP; h++)
#pragma unroll
                for (int i = 0; i < 16; i++) sum[h] += scores[h * SPLIT_TOKENS + at + i] * value[i];
        }
    } else {
#pragma unroll 4
        for (int at = share; at < count; at += PER_DIM) {
            u32 value_bits = shared_load((const u16 *)value_of(s, p, w, p.begin + at, d));
            if (p.begin + at == p.length - 1) value_bits = ((const u16 *)fresh)[DIM + d];
            const float value = wide(value_bits);
#pragma unroll
            for (int h = 0; h < GROUP; h++) sum[h] += scores[h * SPLIT_TOKENS + at] * value;
        }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) sums[(share * GROUP + h) * DIM + d] = sum[h];
}

INLINE void attend(const Step &s, const Layer &w, u32 number, float *scratch, SmemState &smem) {
    Part p;
    if (!part_of(s, p)) return;
    constexpr int VALUES = GROUP * DIM, ALL = VALUES + 2 * GROUP;
    u64 *out = s.attended + (p.token * WIDE + p.head * VALUES) / 2;
    if (p.length == 0) {
        for (int i = threadIdx.x; i < VALUES / 2; i += CONSUMERS) send(out + i, 0, number);
        return;
    }
    const Ahead ahead = look_ahead(s, w, p);
    float *scores = scratch, *query = scores + GROUP * SPLIT_TOKENS, *sums = query + VALUES;
    u8 *fresh = (u8 *)(sums + PER_DIM * VALUES);
    float *stats = (float *)(fresh + 2 * DIM * SIZE), *scales = stats + 2 * GROUP;
    rotate_and_store(s, w, p, ahead, number, query, fresh, scales);
    keep_scales(p, ahead, scales);
    consumers_sync();
    score(s, w, p, ahead, query, fresh, scales, scores);
    consumers_sync();
    weigh(p, scales, scores, stats);
    consumers_sync();
    sum_values(s, w, p, ahead, scores, fresh, sums);
    consumers_sync();
    const int pair = p.token * KV_HEADS + p.head;
    float *parts = s.parts + (i64)pair * SPLITS * ALL, *my_part = parts + p.split * ALL;
    const float v_scale = ahead.v_scale;
    auto found = [&](int i) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < PER_DIM; j++) sum += sums[j * VALUES + i];
        return sum;
    };
    if (p.splits == 1) {
        for (int i = 2 * threadIdx.x; i < VALUES; i += 2 * CONSUMERS) {
            const float by = v_scale / stats[i / DIM * 2 + 1];
            send(out + i / 2, narrow_two(found(i) * by, found(i + 1) * by), number);
        }
        return;
    }
    for (int i = threadIdx.x; i < ALL; i += CONSUMERS) my_part[i] = i < VALUES ? found(i) : stats[i - VALUES];
    consumers_sync();
    if (threadIdx.x == 0) {
        u32 done; /* wraps to zero after the last part */
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(done) : "l"(s.counters + 2 + pair), "r"(p.splits - 1) : "memory");
        smem.last = done == (u32)p.splits - 1;
    }
    consumers_sync();
    if (!smem.last) return;
    constexpr int AT_A_TIME = 8; /* parts loaded before the first is used */
    for (int i = 2 * threadIdx.x; i < VALUES; i += 2 * CONSUMERS) {
        float peak = -1e30f, total = 0, sum[2] = {};
        for (int first = 0; first < p.splits; first += AT_A_TIME) {
            float2 value[AT_A_TIME], stat[AT_A_TIME];
#pragma unroll
            for (int j = 0; j < AT_A_TIME; j++) {
                const float *part_at = parts + min(first + j, p.splits - 1) * ALL;
                value[j] = shared_load((const float2 *)(part_at + i)), stat[j] = shared_load((const float2 *)(part_at + VALUES + i / DIM * 2));
            }
#pragma unroll
            for (int j = 0; j < AT_A_TIME; j++) {
                if (first + j >= p.splits) break;
                const float higher = fmaxf(peak, stat[j].x), old_weight = exp2f(peak - higher), part_weight = exp2f(stat[j].x - higher);
                total = total * old_weight + stat[j].y * part_weight, peak = higher;
                sum[0] = sum[0] * old_weight + value[j].x * part_weight, sum[1] = sum[1] * old_weight + value[j].y * part_weight;
            }
        }
        send(out + i / 2, narrow_two(sum[0] * (v_scale / total), sum[1] * (v_scale / total)), number);
    }
}
