/* Structs that Python fills in, read by the functions of every instruction set. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { F32, BF16, INT4, E4M3, E4M3FNUZ, E5M2 }; /* element types of arrays */
enum { NOT_QUANTIZED, PER_TOKEN, PER_GROUP }; /* quantization of activations */
#define GROUP 128 /* values of a row that share a scale */
#define LANES 16  /* tokens, or queries, of a panel */
#define ROUNDED_COLUMNS 128 /* most columns of octavo_round_columns */
#define DESCENT_ROWS 64 /* rows of a weight in a task of octavo_descend, a multiple of LANES */
#define MOST_STEPS 16   /* of octavo_scale_errors */
#define GROUP_ROWS 64   /* rows of a tiled weight that are stored together, */
#define TILED_BYTES 64  /* so many bytes of each at a time; */
#define TILED_K 64      /* a multiple of so many values */
#define GRAM_TOKENS 512 /* tokens whose columns have a scale each */
#define GRAM_STRIP 64 /* rows of the result that a task has, a multiple of LANES */
#define TASK_QUERIES 64 /* most query rows of a task of attention, a multiple of LANES */

/* An FP8 format for rounding: mantissa bits, exponent of the smallest normal number, bias, largest magnitude. */
typedef struct { int mantissa, smallest, bias; float limit; } Format;
static const Format FORMATS[] = {[E4M3] = {3, -6, 7, 448}, [E4M3FNUZ] = {3, -7, 8, 224}, [E5M2] = {2, -14, 15, 57344}};
#define SCALE_FLOOR (1.0f / (448 * 512))
#define PEAK_FLOOR 1e-4f /* smallest amax of values with a power-of-two scale */
static const float NARROWED[] = {[E4M3] = 256, [E4M3FNUZ] = 128, [E5M2] = 1}; /* a value over its widened code */

/* A weight [n, k] with a row stride in values. scale: FP32, times the power of two that widening leaves out. scale_columns:
   0 for one scale per row, else the width of a grid of scales for tiles of scale_rows rows and 128 columns. INT4 uses
   group_scale instead, of type group_kind: one scale per `group` values of a row; group is a multiple of 8.

   tiled: whether FP8 codes or BF16 values are stored as tiles.h reads them, [n / GROUP_ROWS][bytes of a row / TILED_BYTES]
   [GROUP_ROWS][TILED_BYTES] with zeros behind n and k; `stride` has no meaning then. */
typedef struct {
    const void *weight;
    const float *scale;
    const void *group_scale;
    int64_t n, k, stride, scale_rows, scale_columns, group;
    int32_t kind, activation, group_kind, tiled;
} Linear;

/* KV cache of a layer; strides in bytes of a block, a token and a head. k_scale and v_scale: one FP32 per token and head, or
   NULL; strides likewise. k_layer and v_layer: scales used where those are NULL, one per layer (stride 0) or per head; NULL
   for a cache of unquantized values. They are read at each call. */
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
    const int32_t *tables, *starts, *lengths; /* block tables; per request: first token, context length */
    int64_t table_stride, requests, heads, window;
    float k_factor, v_factor; /* softmax scale and powers of two, without the cache's scales */
    int32_t kind;
} Attention;

/* A product as a job of the pool: the arguments, and the values derived for all of its tasks. The i-th of m tokens is row i
   of x, or, with a dispatch order, the row of pair order[i], where each row has `each` pairs. */
typedef struct {
    const Linear *w;
    const void *x;
    void *y;
    const int32_t *order;
    float *panel, *scale; /* x in FP32, quantized: rows, or panels of LANES tokens (BF16 for `pairs`); scales of tokens */
    int64_t m, each, x_stride, k_padded, row_tasks, token_tasks, task_rows, parts; /* parts: tasks that prepare a panel */
    int32_t kind, y_kind, is_panel, pairs, tiles; /* tiles: panels of pairs are multiplied by matrix tiles */
    int32_t grouped; /* pairs hold codes, and each GROUP's sum is scaled: `scale` is per token and group, see x_scale_at() */
} LinearJob;

typedef struct {
    const Attention *a;
    const Cache *cache;
    const int64_t *first; /* [requests + 1] first block of queries of each request; a block has rows_of_task() rows */
    int32_t tiles;
} AttentionJob;

/* Query rows of a task, of so many that a request has: few are shared out among more tasks. */
static inline int64_t rows_of_task(int64_t rows, int tiles) { return tiles || rows >= 4 * TASK_QUERIES ? TASK_QUERIES : LANES; }

/* Rows [rows, width] of an elementwise op; row r is at (r / inner) * outer + (r % inner) * inside, in values. */
typedef struct {
    const void *x, *residual, *weight;
    void *y, *sum;
    const float *cos_sin;
    const int64_t *rotary_rows; /* of cos_sin */
    int64_t rows, width, inner, outer, inside, rotated, per_task;
    float eps;
    int32_t kind;
} Rows;

/* Logits [rows, width], which are overwritten. Per row: temperature, a uniform u in [0, 1), and the filters top_k, top_p and
   min_p, or NULL without them. */
typedef struct {
    float *logits;
    int64_t *out;
    const float *temperature;
    const double *u;
    const int32_t *top_k;
    const float *top_p, *min_p;
    int64_t width;
} Sample;

/* Routing of tokens: logits [tokens, count], which become scores; order [tokens, count], the selection keys (scores plus
   bias); best [tokens, groups]. live: the number of tokens that are not padding; lengths: 0 for a token that pads a graph;
   both NULL without padding. */
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

/* out [tokens, width]: each token's sum of rows `place` of y times their weights [tokens, top_k], over experts that are not
   negative. */
typedef struct {
    const void *y;
    void *out;
    const int32_t *experts, *place;
    const float *weights;
    int64_t tokens, top_k, width, per_task;
    int32_t kind;
} Combine;

/* Queries, keys and values [tokens, heads, dim] between the QKV projection and attention; strides in values. q_norm: NULL
   without norms. q: NULL to write the cache only; then cos_sin is NULL too. */
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

/* A paged cache whose rows all heads share: latents, or an indexer's keys. A row has `width` values and, for a latent,
   rope_width values of the rope key. Strides in bytes of a block and a token. scale: a power of two for each GROUP of codes;
   NULL for values. */
typedef struct {
    void *values, *rope;
    float *scale;
    int64_t block, token, rope_block, rope_token, scale_block, scale_token;
    int32_t kind, rope_kind, block_size, width, rope_width;
} Shared;

/* Columns of a weight [rows, columns], a column adjacent in memory; see octavo_round_columns. */
typedef struct {
    float *values, *offset, *moved;
    const float *influence, *scale;
    int64_t columns, rows, influence_stride, scale_stride;
} RoundedColumns;

/* Codes of a weight [rows, width] as values, of which `offset` says where each would be best; see octavo_descend. */
typedef struct {
    float *values, *offset;
    const float *influence, *scale;
    int64_t rows, width, scale_row, scale_column, sweeps;
} Descent;

/* A weight [rows, width] whose scales are for `group` columns each; see octavo_scale_errors. */
typedef struct {
    const float *values, *scale, *step, *weight;
    float *errors;
    int64_t rows, width, groups, group, steps, per_task;
} ScaleErrors;

/* Keys k [tokens, heads, dim], strides in values, to be rounded to out, contiguous, as values of the FP8 format `to_kind`; see
   octavo_round_keys. influence [heads, dim, dim], order [heads, dim], scale [1 or heads], with a stride. */
typedef struct {
    const void *k;
    void *out;
    const float *influence, *scale;
    const int32_t *order;
    int64_t tokens, heads, dim, token, head, scale_head;
    int32_t kind, to_kind;
} RoundedKeys;

/* x [tokens, width], rows `stride` values apart, as integer codes, some of them in 32 bits, and total [width, width], whose upper
   half grows by x^T x. A panel is LANES columns; scale, and sums of codes: one for each column of GRAM_TOKENS tokens. */
typedef struct {
    const void *x;
    float *total, *scale;
    int32_t *codes, *sums;
    int64_t tokens, width, stride, panels;
    int32_t kind;
} Gram;

/* Rows [tokens, width + rope_width], `stride` values apart, to be stored at `slots` of a cache: normed (LayerNorm for an
   indexer), with `rotated` of their values rotated; interleaved: rotary pairs are adjacent values. */
typedef struct {
    const void *x, *weight, *bias; /* bias may be NULL */
    const float *cos_sin;
    const int64_t *rotary_rows, *slots;
    const Shared *cache;
    int64_t tokens, stride, rotated, per_task;
    float eps;
    int32_t interleaved, kind;
} Store;

/* Per-head products of x [tokens, heads, k] by w [heads, k, n], one of whose strides w_k and w_n is 1: y [tokens, heads, n];
   strides in values. With cos_sin, x has `rotated` more values, which are rotated and stored behind those of y. */
typedef struct {
    const void *x, *w;
    void *y;
    const float *cos_sin;
    const int64_t *rotary_rows;
    int64_t x_token, x_head, w_head, w_k, w_n, y_token, y_head, tokens, heads, k, n, rotated;
    int64_t rows, columns; /* tokens and columns of a task */
    int32_t interleaved, kind, w_kind;
} Heads;

/* Attention over latents. Per request: its first panel of LANES query rows, its first task, the number of parts of `step`
   positions into which a panel's context is split, and the first of its partial sums if it is split. */
typedef struct {
    const Attention *a;
    const Shared *cache;
    const int32_t *chosen; /* [tokens, top_k] ascending, padded with -1; NULL: all positions up to a token's own */
    int64_t top_k, split;  /* number of panels whose context is split */
    const int64_t *panel, *task, *parts, *step, *sum;
    float *sums;
} LatentJob;

/* An indexer's selection for `count` tokens from `first` on. panels: queries as scored, [count, panels of LANES heads, dim,
   LANES], each panel followed by its heads' weights. scores: [count, longest] as ordered integers. */
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

/* The last of `count` owners whose first task is at or before this task. */
static inline int64_t owner_of(const int64_t *first, int64_t count, int64_t task) {
    int64_t low = 0;
    while (count - low > 1) {
        const int64_t middle = (low + count) / 2;
        if (first[middle] <= task) low = middle;
        else count = middle;
    }
    return low;
}

/* Per-layer or per-head scale of keys, and of values; 1 where each token has scales. */
static inline float k_scale_of(const Cache *c, int64_t head) { return c->k_layer ? c->k_layer[head * c->k_layer_head] : 1; }
static inline float v_scale_of(const Cache *c, int64_t head) { return c->v_layer ? c->v_layer[head * c->v_layer_head] : 1; }

/* 2^exponent, a normal number. */
static inline float power_of_two(int exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

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

/* Scales of a token that is a row, or of the LANES tokens of a panel, for the group of values that begins at k. */
static inline float *x_scale_at(const LinearJob *job, int64_t row, int64_t k) {
    const int64_t each = job->is_panel ? LANES : 1;
    return job->scale + (job->grouped ? row * job->w->scale_columns + k / GROUP : row) * each;
}

/* Bytes of a group of rows of a tiled weight, and where it has row `row` from position k on, which begins TILED_BYTES. */
static inline int64_t group_bytes(const Linear *w) { return (w->k + TILED_K - 1) / TILED_K * TILED_K * size_of(w->kind) * GROUP_ROWS; }
static inline const char *tiled_at(const Linear *w, int64_t row, int64_t k) {
    const int64_t line = k * size_of(w->kind) / TILED_BYTES * GROUP_ROWS + row % GROUP_ROWS;
    return (const char *)w->weight + row / GROUP_ROWS * group_bytes(w) + line * TILED_BYTES;
}
