/* The top-k, top-p and min-p filters over weights in [0, 1], and sampling from the weights kept. The bits of nonnegative
   floats are ordered like the floats. */
#define DIGIT 10 /* bits per radix-select pass; 1.0 has 30 */
#define BUCKETS (1 << DIGIT)
#define MAX_BLOCKS 1024

/* A row's weights in blocks of `size`: each block's maximum, and the sum of its weights that min_p keeps. */
typedef struct {
    int64_t size, count;
    double sum[MAX_BLOCKS];
    float most[MAX_BLOCKS];
} Blocks;

/* The weights that are kept: those whose bits exceed `bits`, and the first `equal` of those with these bits; `total` is
   their sum. */
typedef struct {
    uint32_t bits;
    int64_t equal;
    double total;
} Kept;

static inline uint32_t bits_of(float w) {
    uint32_t bits;
    memcpy(&bits, &w, 4);
    return bits;
}

/* Keep the largest weights whose bits are at least `floor`: a weight is kept while fewer than `fewer` weights with a sum
   less than `less` precede it in descending order. Radix select: in each pass all buckets but one are kept or dropped as a
   whole. */
static Kept keep(const float *w, int64_t width, const Blocks *blocks, uint32_t floor, int64_t fewer, double less) {
    int64_t count[BUCKETS], before = 0;
    double sum[BUCKETS], total = 0;
    uint32_t prefix = 0;
    int at;
    for (int shift = 2 * DIGIT; shift >= 0; shift -= DIGIT) {
        memset(count, 0, sizeof count);
        memset(sum, 0, sizeof sum);
        for (int64_t block = 0; block < blocks->count; block++) {
            if (bits_of(blocks->most[block]) < floor) continue;
            int64_t end = least((block + 1) * blocks->size, width);
            for (int64_t i = block * blocks->size; i < end; i++) {
                uint32_t bits = bits_of(w[i]);
                if (bits < floor || bits >> (shift + DIGIT) != prefix) continue;
                count[bits >> shift & (BUCKETS - 1)]++;
                sum[bits >> shift & (BUCKETS - 1)] += w[i];
            }
        }
        int lowest = 0;
        while (lowest < BUCKETS - 1 && !count[lowest]) lowest++;
        for (at = BUCKETS - 1; at > lowest; at--) {
            if (count[at] && (before + count[at] >= fewer || total + sum[at] >= less)) break;
            before += count[at], total += sum[at];
        }
        prefix = prefix << DIGIT | (uint32_t)at;
    }
    float weight;
    memcpy(&weight, &prefix, 4);
    int64_t equal = least(count[at], fewer - before);
    if (weight > 0 && (less - total) / weight < (double)equal) equal = (int64_t)ceil((less - total) / weight);
    if (equal < 1) equal = 1;
    return (Kept){prefix, equal, total + (double)equal * weight};
}

/* The first index at which the cumulative sum of the kept weights exceeds u times their total. */
static int64_t sampled(const float *w, const Blocks *blocks, const Sample *d, int64_t row) {
    int64_t width = d->width, fewer = d->top_k && d->top_k[row] < width ? d->top_k[row] : width + 1;
    float least_part = d->min_p ? d->min_p[row] : 0, share = d->top_p ? d->top_p[row] : 1;
    uint32_t floor = least_part > 0 ? bits_of(least_part) : 1;
    Kept kept = {floor - 1, 0, 0};
    for (int64_t i = 0; i < blocks->count; i++) kept.total += blocks->sum[i];
    if (fewer <= width) {
        const Blocks largest = {.size = blocks->count, .count = 1, .most = {1}};
        uint32_t bits = keep(blocks->most, blocks->count, &largest, 1, fewer, INFINITY).bits;
        int64_t as_large = 0;
        for (int64_t i = 0; i < blocks->count; i++) as_large += bits_of(blocks->most[i]) >= bits;
        if (as_large < fewer) bits = 0; /* otherwise no smaller weight is kept, and few weights are visited */
        kept = keep(w, width, blocks, floor > bits ? floor : bits, fewer, INFINITY);
        floor = kept.bits;
    }
    if (share < 1) { /* weights below this sum to less than the share that is dropped */
        uint32_t bits = bits_of((float)((1 - (double)share) * kept.total / (double)(2 * width)));
        kept = keep(w, width, blocks, floor > bits ? floor : bits, fewer, share * kept.total);
    }
    const int all = floor == 1 && !kept.bits;
    double sum = 0, target = d->u[row] * kept.total;
    if (target >= kept.total) target = nextafter(kept.total, 0);
    int64_t found = 0, equal = 0;
    for (int64_t block = 0; block < blocks->count; block++) {
        if (all && sum + blocks->sum[block] <= target) {
            sum += blocks->sum[block];
            continue;
        }
        if (bits_of(blocks->most[block]) < kept.bits) continue;
        int64_t end = least((block + 1) * blocks->size, width);
        for (int64_t i = block * blocks->size; i < end; i++) {
            uint32_t bits = bits_of(w[i]);
            if (bits < kept.bits || !bits || (bits == kept.bits && equal++ >= kept.equal)) continue;
            found = i, sum += w[i];
            if (sum > target) return found;
        }
    }
    return found;
}
