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
} Draw;

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
