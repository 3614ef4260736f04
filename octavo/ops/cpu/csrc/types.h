/* What Python fills in and every instruction set's functions read. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { F32, BF16, INT4, E4M3, E4M3FNUZ, E5M2 }; /* what an array holds */
enum { NOT_QUANTIZED, PER_TOKEN, PER_GROUP }; /* how activations are quantized */
#define GROUP 128 /* values of a row that share a scale */
#define LANES 16  /* tokens, or queries, of a panel */

/* An FP8 format's rounding: mantissa bits, exponent of its smallest normal number, largest magnitude, bias. */
typedef struct { int mantissa, smallest, bias; float limit; } Format;
static const Format FORMATS[] = {[E4M3] = {3, -6, 7, 448}, [E4M3FNUZ] = {3, -7, 8, 224}, [E5M2] = {2, -14, 15, 57344}};
#define SCALE_FLOOR (1.0f / (448 * 512))
#define PEAK_FLOOR 1e-4f /* of values whose scale is a power of two */
static const float NARROWED[] = {[E4M3] = 256, [E4M3FNUZ] = 128, [E5M2] = 1}; /* what widening makes codes smaller by */

/* A weight [n, k] whose rows are `stride` values apart. scale: FP32, times the power of two that widening leaves out;
   scale_columns is 0 for one a row, or the width of a grid whose every value is for scale_rows rows and 128 columns.
   INT4 has no such scale, but group_scale, of group_kind: one for each `group` values of a row, a multiple of 8. */
typedef struct {
    const void *weight;
    const float *scale;
    const void *group_scale;
    int64_t n, k, stride, scale_rows, scale_columns, group;
    int32_t kind, activation, group_kind;
} Linear;

/* Keys and values of a layer; strides in bytes of a block, a token and a head. k_scale and v_scale: one FP32 a token and head,
   or NULL; strides likewise. k_layer and v_layer: what codes are multiplied by where those are NULL, one a layer (its stride in
   values is 0) or a head; NULL for a cache that holds values. They are read at each call. */
typedef struct {
    void *k, *v;
    float *k_scale, *v_scale;
    const float *k_layer, *v_layer;
    int64_t block, token, head, scale_block, scale_token, k_layer_head, v_layer_head;
    int32_t kind, block_size, kv_heads, dim;
} Cache;

typedef struct {
    const void *q; /* [tokens, heads, dim]; strides in values */
    void *out;     /* [tokens, heads, dim], contiguous */
    int64_t q_token, q_head;
    const int32_t *tables, *starts, *lengths; /* block tables, first token of each request, context of each request */
    int64_t table_stride, requests, heads, window;
    float k_factor, v_factor; /* softmax scale and powers of two, without the cache's scales */
    int32_t kind;
} Attention;

/* A job as the pool runs it: what is wanted, and what was worked out for all of its tasks. The i-th of m tokens is x's
   row i or, where there is an order of pairs of which every row has `each`, that of pair order[i]. */
typedef struct {
    const Linear *w;
    const void *x;
    void *y;
    const int32_t *order;
    float *panel, *scale; /* x as FP32, quantized: rows, or panels of LANES tokens (for `pairs` BF16); a token's scale */
    int64_t m, each, x_stride, k_padded, row_tasks, token_tasks, task_rows, parts; /* parts: tasks that prepare a panel */
    int32_t kind, y_kind, is_panel, pairs;
} LinearJob;

/* What comes before and after a product that a library does by the CPU's matrix tiles: rows `from` one type `to` BF16. */
typedef struct {
    const void *from;
    uint16_t *to;
    const float *by_row, *by_column;
    int64_t width, from_stride, to_stride;
    int32_t kind;
} TilesJob;

typedef struct {
    const Attention *a;
    const Cache *cache;
    const int64_t *first; /* [requests + 1] first block of queries of each request */
} AttentionJob;

/* Rows [rows, width] of anything; a row is at (row / inner) * outer + (row % inner) * inside, in values. */
typedef struct {
    const void *x, *residual, *weight;
    void *y, *sum;
    const float *cos_sin;
    const int64_t *rotary_rows; /* of cos_sin */
    int64_t rows, width, inner, outer, inside, rotated, per_task;
    float eps;
    int32_t kind;
} Rows;

/* Rows [rows, width] of logits, which are overwritten; of each its temperature, a number u in [0, 1) and, or NULL, how many
   tokens, what share of their sum, and how large a part of the largest are kept. */
typedef struct {
    float *logits;
    int64_t *out;
    const float *temperature;
    const double *u;
    const int32_t *top_k;
    const float *top_p, *min_p;
    int64_t width;
} Sample;

/* What routes a token: logits [tokens, count], which become scores; order [tokens, count], what is chosen by; best [tokens, groups].
   live: how many tokens there are, or lengths: 0 for a token that only pads a graph; NULL where none does. */
typedef struct {
    float *scores, *order, *best;
    const float *bias;
    int32_t *experts;
    float *weights;
    const int32_t *live, *lengths;
    int64_t tokens, count, top_k, groups, top_groups, per_task;
    float scale;
    int32_t is_sigmoid, normalize;
} Route;

/* out [tokens, width]: sums of y's rows `place` times their weights, [tokens, top_k]; of those whose expert is not negative. */
typedef struct {
    const void *y;
    void *out;
    const int32_t *experts, *place;
    const float *weights;
    int64_t tokens, top_k, width, per_task;
    int32_t kind;
} Combine;

/* Queries, keys and values [tokens, heads, dim] on their way to attention; strides in values. q_norm: NULL without norms;
   q: NULL to write only, cos_sin then too. */
typedef struct {
    const void *q, *k, *v, *q_norm, *k_norm;
    void *out;
    const float *cos_sin;
    const int64_t *rotary_rows, *slots;
    const Cache *cache;
    int64_t tokens, heads, q_token, q_head, k_token, k_head, v_token, v_head, rotated, per_task;
    float eps;
    int32_t kind;
} Rope;

/* Rows of a paged cache that all heads share, latents or an indexer's keys: `width` values and, of a latent, `rope_width` of
   the key behind them; strides in bytes of a block and a token. scale: what each GROUP of codes is multiplied by, powers of
   two; NULL: the values are no codes. */
typedef struct {
    void *values, *rope;
    float *scale;
    int64_t block, token, rope_block, rope_token, scale_block, scale_token;
    int32_t kind, rope_kind, block_size, width, rope_width;
} Shared;

/* Rows [tokens, width + rope_width], `stride` values apart, on their way to `slots` of a cache: normed, by LayerNorm for an
   indexer, and `rotated` of their values turned, those of a pair beside each other if it is interleaved. */
typedef struct {
    const void *x, *weight, *bias; /* bias: or NULL */
    const float *cos_sin;
    const int64_t *rotary_rows, *slots;
    const Shared *cache;
    int64_t tokens, stride, rotated, per_task;
    float eps;
    int32_t interleaved, kind;
} Store;

/* Each head's product of x [tokens, heads, k] by w [heads, k, n], of whose strides w_k or w_n is 1: y [tokens, heads, n]; strides
   in values. With cos_sin, x has `rotated` values more, which are turned and put behind those of y. */
typedef struct {
    const void *x, *w;
    void *y;
    const float *cos_sin;
    const int64_t *rotary_rows;
    int64_t x_token, x_head, w_head, w_k, w_n, y_token, y_head, tokens, heads, k, n, rotated;
    int64_t rows, columns; /* tokens and columns of a task */
    int32_t interleaved, kind, w_kind;
} Heads;

/* Attention over latents. Of each request: the first of its panels of LANES query rows, the first of their tasks, in how many
   parts of `step` places a panel's context is computed, and the first of their sums where those are several. */
typedef struct {
    const Attention *a;
    const Shared *cache;
    const int32_t *chosen; /* [tokens, top_k] ascending, -1 behind them, or NULL: all up to a token's own */
    int64_t top_k, split;  /* requests' panels that are computed in parts */
    const int64_t *panel, *task, *parts, *step, *sum;
    float *sums;
} LatentJob;

/* An indexer's choice, of `count` tokens from `first` on at a time. panels: their queries as they are scored, [count, panels of
   LANES heads, dim, LANES], and behind each panel its heads' weights; scores: [count, longest], in an integer's order. */
typedef struct {
    const void *q, *weights;
    const float *cos_sin;
    const int64_t *rotary_rows;
    const Shared *cache;
    const int32_t *tables, *starts, *lengths;
    int32_t *out; /* [tokens, top_k] */
    int64_t q_token, q_head, weights_token, table_stride, requests, heads, rotated, top_k, first, count, longest, parts;
    float *panels;
    uint32_t *scores;
    int32_t interleaved, kind;
} Select;

/* The last of `count` owners whose first task is not behind this one. */
static inline int64_t owner_of(const int64_t *first, int64_t count, int64_t task) {
    int64_t low = 0;
    while (count - low > 1) {
        const int64_t middle = (low + count) / 2;
        if (first[middle] <= task) low = middle;
        else count = middle;
    }
    return low;
}

/* What the codes of a head's keys, or values, are multiplied by, but for what each token has. */
static inline float k_scale_of(const Cache *c, int64_t head) { return c->k_layer ? c->k_layer[head * c->k_layer_head] : 1; }
static inline float v_scale_of(const Cache *c, int64_t head) { return c->v_layer ? c->v_layer[head * c->v_layer_head] : 1; }

static inline float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float value_at(const void *x, int kind, int64_t i) {
    return kind == F32 ? ((const float *)x)[i] : bf16_to_float(((const uint16_t *)x)[i]);
}

static inline void put(void *y, int kind, int64_t i, float value) {
    if (kind == F32) ((float *)y)[i] = value;
    else ((uint16_t *)y)[i] = float_to_bf16(value);
}

static inline int64_t size_of(int kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }
static inline int64_t groups_of(const Linear *w) { return (w->k + w->group - 1) / w->group; } /* scales of a row of INT4 */
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
