/* Mixture of experts: routing, grouped products by an expert stack, and the weighted sums. Included by kernels.c.

   An expert's product consists of the same tasks as a single product of linear.h. The tasks of all experts in use are run as
   one job, since one token's product by one expert is too short for that. Weights of experts that are not in use are not
   read. */

/* Products that are prepared, then computed, as one job; guarded by pool.call. */
typedef struct {
    Linear weight[CHUNK_TOKENS];
    LinearJob job[CHUNK_TOKENS];
    int64_t prepare[CHUNK_TOKENS], multiply[CHUNK_TOKENS]; /* first task of each */
    int64_t count;
} Products;

static void prepare_one(void *argument, int64_t task) {
    Products *all = argument;
    const int64_t i = owner_of(all->prepare, all->count, task);
    chosen->prepare(&all->job[i], task - all->prepare[i]);
}

static void multiply_one(void *argument, int64_t task) {
    Products *all = argument;
    const int64_t i = owner_of(all->multiply, all->count, task);
    chosen->multiply(&all->job[i], task - all->multiply[i]);
}

static int32_t multiply_all(Products *all, int32_t threads) {
    int64_t prepares = 0, multiplies = 0;
    size_t floats = 0;
    for (int64_t i = 0; i < all->count; i++) floats += floats_held(&all->job[i]);
    float *memory = scratch(floats * 4);
    if (!memory) return -1;
    for (int64_t i = 0; i < all->count; i++) {
        LinearJob *job = &all->job[i];
        place(job, memory);
        memory += floats_held(job);
        all->prepare[i] = prepares, all->multiply[i] = multiplies;
        prepares += tasks_to_prepare(job), multiplies += tasks_to_multiply(job);
    }
    parallel(prepare_one, all, prepares, threads);
    parallel_on(multiply_one, all, multiplies, threads, uses_tiles);
    return 0;
}

/* Grouped product y [pairs, n], sorted by expert: each pair's row of x times the transposed weight of its expert. `first` is
   the first of `experts` weights; consecutive weights are weight_bytes apart and their scales scale_bytes. Rows of expert e
   are starts[e] to starts[e + 1]. The row of x is the sorted position itself or, with an order, order[position] / each.
   Returns what octavo_linear does. */
int32_t octavo_experts(const Linear *first, int64_t weight_bytes, int64_t scale_bytes, const void *x, int64_t x_stride,
                       const int32_t *order, const int32_t *starts, int64_t experts, int64_t each, void *y, int32_t kind,
                       int32_t threads) {
    static Products all;
    const int64_t size = size_of(kind);
    int64_t in_use = 0;
    int32_t status = first->tiled && !uses_tiles ? TILED_FOR_ANOTHER : 0;
    for (int64_t e = 0; e < experts; e++) in_use += starts[e + 1] > starts[e];
    const int64_t own_threads = in_use ? (threads + in_use - 1) / in_use : 1;
    pthread_mutex_lock(&pool.call);
    for (int64_t e = 0, row = 0; row < starts[experts] && !status;) {
        int64_t held = 0;
        for (all.count = 0; row < starts[experts] && all.count < CHUNK_TOKENS;) {
            while (row == starts[e + 1]) e++;
            const int64_t m = least(starts[e + 1] - row, CHUNK_TOKENS);
            Linear *w = &all.weight[all.count];
            *w = *first;
            w->weight = (const char *)first->weight + e * weight_bytes;
            if (first->scale) w->scale = (const float *)((const char *)first->scale + e * scale_bytes);
            if (first->group_scale) w->group_scale = (const char *)first->group_scale + e * scale_bytes;
            LinearJob *job = &all.job[all.count];
            *job = job_of(w, (const char *)x + (order ? 0 : row * x_stride * size), m, x_stride, (char *)y + row * w->n * size, kind,
                          kind, own_threads);
            if (order) job->order = order + row, job->each = each;
            if (held + rows_held(job) > CHUNK_TOKENS) break;
            held += rows_held(job), row += m, all.count++;
        }
        status = multiply_all(&all, threads);
    }
    pthread_mutex_unlock(&pool.call);
    return status;
}

/* Sort pairs by expert, those without one last: order and place [pairs], starts [count + 1]; see Dispatch in
   ops/contract.py. */
void octavo_dispatch(const int32_t *experts, int32_t *order, int32_t *place, int32_t *starts, int64_t pairs, int64_t count) {
    int32_t behind = 0;
    memset(starts, 0, (size_t)(count + 1) * sizeof *starts);
    for (int64_t p = 0; p < pairs; p++)
        if (experts[p] >= 0) starts[experts[p] + 1]++, behind++;
    for (int64_t e = 0; e < count; e++) starts[e + 1] += starts[e];
    for (int64_t p = 0; p < pairs; p++) {
        place[p] = experts[p] >= 0 ? starts[experts[p]]++ : behind++;
        order[place[p]] = (int32_t)p;
    }
    /* each start has advanced to the next expert's start */
    if (count) memmove(starts + 1, starts, (size_t)(count - 1) * sizeof *starts), starts[0] = 0;
}

/* Choose the experts of a token that is not padding, and their weights. NaN ranks last; ties go to the smaller id. */
static void choose(const Route *r, int64_t t) {
    float *scores = r->scores + t * r->count, *order = r->order + t * r->count, *best = r->best + t * r->groups;
    float most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < r->count; e++) most = scores[e] > most ? scores[e] : most;
    for (int64_t e = 0; e < r->count; e++) {
        scores[e] = r->is_sigmoid ? 1 / (1 + expf(-scores[e])) : expf(scores[e] - most);
        sum += scores[e];
    }
    for (int64_t e = 0; e < r->count; e++) {
        if (!r->is_sigmoid) scores[e] /= sum;
        order[e] = scores[e] + (r->bias ? r->bias[e] : 0);
        if (order[e] != order[e]) order[e] = -INFINITY;
    }
    const int64_t size = r->count / r->groups;
    for (int64_t g = 0; r->groups > 1 && g < r->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            if (order[e] > first) second = first, first = order[e];
            else if (order[e] > second) second = order[e];
        }
        best[g] = size > 1 ? first + second : first;
    }
    for (int64_t g = 0; r->groups > 1 && g < r->groups; g++) {
        int64_t before = 0;
        for (int64_t h = 0; h < r->groups; h++) before += best[h] > best[g] || (best[h] == best[g] && h < g);
        for (int64_t e = g * size; before >= r->top_groups && e < (g + 1) * size; e++) order[e] = -INFINITY;
    }
    int32_t *experts = r->experts + t * r->top_k;
    float *weights = r->weights + t * r->top_k, total = 1e-20f;
    for (int64_t i = 0; i < r->top_k; i++) {
        int64_t found = -1;
        for (int64_t e = 0; e < r->count; e++) /* only NaN was found before */
            if (order[e] == order[e] && (found < 0 || order[e] > order[found])) found = e;
        order[found] = NAN;
        experts[i] = (int32_t)found, weights[i] = scores[found], total += scores[found];
    }
    for (int64_t i = 0; i < r->top_k; i++) weights[i] = (r->normalize ? weights[i] / total : weights[i]) * r->scale;
}

static void route(void *argument, int64_t task) {
    const Route *r = argument;
    for (int64_t t = task * r->per_task; t < least((task + 1) * r->per_task, r->tokens); t++) {
        if (r->live ? t < *r->live : !r->lengths || r->lengths[t]) {
            choose(r, t);
            continue;
        }
        for (int64_t i = t * r->top_k; i < (t + 1) * r->top_k; i++) r->experts[i] = -1, r->weights[i] = 0;
    }
}

/* Routing: experts and weights [tokens, top_k] of x [tokens, width] by a router's weight [count, width]; see Route, and
   Router in ops/contract.py. scores: FP32 scratch [tokens, 2 count + groups]. Returns 0, or -1 without memory. */
int32_t octavo_route(const void *x, const void *weight, const float *bias, float *scores, int32_t *experts, float *weights,
                     const int32_t *live, const int32_t *lengths, int64_t tokens, int64_t width, int64_t x_stride,
                     int64_t weight_stride, int64_t count, int64_t top_k, int64_t groups, int64_t top_groups, float scale,
                     int32_t is_sigmoid, int32_t normalize, int32_t kind, int32_t weight_kind, int32_t threads) {
    const Linear w = {.weight = weight, .n = count, .k = width, .stride = weight_stride, .kind = weight_kind};
    Route r = {scores, scores + tokens * count, scores + 2 * tokens * count, bias, experts, weights, live, lengths, tokens, count,
               top_k, groups, top_groups, 1 + TASK_VALUES / (count * (top_k + 4)), scale, is_sigmoid, normalize};
    pthread_mutex_lock(&pool.call);
    int32_t status = multiply(&w, x, tokens, x_stride, scores, kind, F32, threads);
    if (!status) parallel(route, &r, (tokens + r.per_task - 1) / r.per_task, threads);
    pthread_mutex_unlock(&pool.call);
    return status;
}

/* out [tokens, width], both of `kind`: each token's weighted sum of its rows of y; see Combine. */
void octavo_combine(const void *y, void *out, const int32_t *experts, const float *weights, const int32_t *place, int64_t tokens,
                    int64_t top_k, int64_t width, int32_t kind, int32_t threads) {
    Combine c = {y, out, experts, place, weights, tokens, top_k, width, 1 + TASK_VALUES / (top_k * width + 1), kind};
    each_of(chosen->combine, &c, (tokens + c.per_task - 1) / c.per_task, threads);
}
