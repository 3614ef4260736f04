/* Entry points for latent.h and select.h. Included by kernels.c. */

/* Store latents of x [tokens, width + rope_width], rows `stride` values apart; see Store. */
void octavo_write_latent(const void *x, const void *weight, const float *cos_sin, const int64_t *rotary_rows, const int64_t *slots,
                         const Shared *cache, int64_t tokens, int64_t stride, int64_t rotated, float eps, int32_t interleaved,
                         int32_t kind, int32_t threads) {
    Store s = {x, weight, NULL, cos_sin, rotary_rows, slots, cache, tokens, stride, rotated, 1 + TASK_VALUES / (cache->width + 1),
               eps, interleaved, kind};
    each_of(chosen->write_latent, &s, (tokens + s.per_task - 1) / s.per_task, threads);
}

/* Store an indexer's keys of x [tokens, width]; bias may be NULL. */
void octavo_write_index_keys(const void *x, const void *weight, const void *bias, const float *cos_sin, const int64_t *rotary_rows,
                             const int64_t *slots, const Shared *cache, int64_t tokens, int64_t stride, int64_t rotated, float eps,
                             int32_t interleaved, int32_t kind, int32_t threads) {
    Store s = {x, weight, bias, cos_sin, rotary_rows, slots, cache, tokens, stride, rotated, 1 + TASK_VALUES / (cache->width + 1),
               eps, interleaved, kind};
    each_of(chosen->write_index_keys, &s, (tokens + s.per_task - 1) / s.per_task, threads);
}

/* y [tokens, heads, n] = per-head products of x [tokens, heads, k] by w [heads, k, n]; see Heads. */
void octavo_head_linear(const void *x, const void *w, void *y, const float *cos_sin, const int64_t *rotary_rows, int64_t x_token,
                        int64_t x_head, int64_t w_head, int64_t w_k, int64_t w_n, int64_t y_token, int64_t y_head, int64_t tokens,
                        int64_t heads, int64_t k, int64_t n, int64_t rotated, int32_t interleaved, int32_t kind, int32_t w_kind,
                        int32_t threads) {
    const int few = tokens <= ROWS_MODE && (w_n == 1 ? n % (2 * LANES) == 0 : k % LANES == 0 && n % LANES == 0);
    Heads h = {x, w, y, cos_sin, rotary_rows, x_token, x_head, w_head, w_k, w_n, y_token, y_head, tokens, heads, k, n, rotated,
               few ? ROWS_MODE : LANES, few ? 4 * LANES : SOME, interleaved, kind, w_kind};
    each_of(chosen->heads, &h, (tokens + h.rows - 1) / h.rows * heads * ((n + h.columns - 1) / h.columns), threads);
}

static int64_t panels_of(const Attention *a, const int32_t *chosen_places, int64_t request) {
    const int64_t tokens = a->starts[request + 1] - a->starts[request];
    return chosen_places ? tokens * ((a->heads + LANES - 1) / LANES) : (tokens * a->heads + LANES - 1) / LANES;
}

/* Causal attention of q [tokens, heads, dim] over latents: out [tokens, heads, rank], contiguous. `places`: as LatentJob's
   chosen. The split of contexts depends on the lengths and their number only, not on threads, so results do not depend on
   threads either. Returns 0, or -1 without memory. */
int32_t octavo_latent_attention(const void *q, void *out, const Shared *cache, const int32_t *tables, const int32_t *starts,
                                const int32_t *lengths, const int32_t *places, int64_t table_stride, int64_t requests, int64_t heads,
                                int64_t q_token, int64_t q_head, int64_t top_k, float scale, int32_t kind, int32_t threads) {
    Attention a = {.q = q, .out = out, .q_token = q_token, .q_head = q_head, .tables = tables, .starts = starts, .lengths = lengths,
                   .table_stride = table_stride, .requests = requests, .heads = heads, .k_factor = scale, .kind = kind};
    LatentJob job = {.a = &a, .cache = cache, .chosen = places, .top_k = top_k};
    const int64_t held = (2 + (cache->width + LANES - 1) / LANES * LANES) * LANES;
    int64_t panels = 0, tasks = 0, sums = 0, *numbers = NULL;
    pthread_mutex_lock(&pool.call);
    for (int64_t r = 0; r < requests; r++) panels += panels_of(&a, places, r);
    for (int fill = 0; fill < 2; fill++) { /* first pass: size of the memory; second pass: its contents */
        int64_t *panel = numbers, *task = panel + requests + 1, *parts = task + requests + 1, *step = parts + requests, *sum = step + requests;
        int64_t before = tasks = sums = 0;
        for (int64_t r = 0; r < requests; r++) {
            const int64_t count = panels_of(&a, places, r), seen = places ? least(top_k, lengths[r]) : lengths[r];
            int64_t in = least((seen + PART - 1) / PART, MAX_PARTS / (panels ? panels : 1));
            if (in < 1) in = 1;
            if (fill) {
                panel[r] = before, task[r] = tasks, parts[r] = in, sum[r] = sums;
                step[r] = ((seen + in - 1) / in + SOME - 1) / SOME * SOME;
            }
            before += count, tasks += count * in;
            if (in > 1) sums += count * in;
        }
        if (fill) {
            panel[requests] = before, task[requests] = tasks;
            job.panel = panel, job.task = task, job.parts = parts, job.step = step, job.sum = sum;
            break;
        }
        const size_t floats = (size_t)(sums * held) * sizeof(float);
        job.sums = scratch(floats + (size_t)(5 * requests + 2) * sizeof *numbers);
        if (!job.sums) break;
        numbers = (int64_t *)((char *)job.sums + floats);
    }
    if (job.sums) parallel(chosen->latent_attend, &job, tasks, threads);
    if (job.sums && sums) parallel(chosen->latent_join, &job, panels * JOINS, threads);
    pthread_mutex_unlock(&pool.call);
    return job.sums ? 0 : -1;
}

/* Task: the positions of a token's top_k scores, ascending. The smallest of these scores is found by radix select. */
static void pick(void *argument, int64_t index) {
    const Select *s = argument;
    const int64_t token = s->first + index, top_k = s->top_k;
    const uint32_t *scores = s->scores + index * s->longest;
    int32_t *out = s->out + token * top_k;
    int64_t request = 0;
    while (s->starts[request + 1] <= token) request++;
    const int64_t seen = s->lengths[request] - s->starts[request + 1] + token + 1;
    if (seen <= top_k) {
        for (int64_t i = 0; i < top_k; i++) out[i] = i < seen ? (int32_t)i : -1;
        return;
    }
    static const struct { int shift, bits; } digits[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t last = 0; /* prefix of the smallest selected score */
    int64_t wanted = top_k; /* number of selected scores among those with this prefix */
    for (int d = 0; d < 3; d++) {
        const int shift = digits[d].shift, bits = digits[d].bits;
        int32_t count[1 << 11] = {0};
        for (int64_t i = 0; i < seen; i++)
            if (!d || scores[i] >> (shift + bits) == last) count[scores[i] >> shift & ((1u << bits) - 1)]++;
        uint32_t at = (1u << bits) - 1;
        for (; count[at] < wanted; at--) wanted -= count[at];
        last = last << bits | at;
    }
    for (int64_t i = 0, found = 0; found < top_k; i++) {
        const int equal = scores[i] == last && wanted > 0;
        out[found] = (int32_t)i;
        found += scores[i] > last || equal, wanted -= equal;
    }
}

#define SCORES (1 << 22)  /* scores held at a time, */
#define QUERIES 128       /* and tokens whose queries are held */

/* out [tokens, top_k]: the positions with the highest scores for an indexer's queries q [tokens, heads, dim]; see Select.
   Returns 0, or -1 without memory. */
int32_t octavo_select_keys(const void *q, const void *weights, const float *cos_sin, const int64_t *rotary_rows, const Shared *cache,
                           const int32_t *tables, const int32_t *starts, const int32_t *lengths, int32_t *out, int64_t q_token,
                           int64_t q_head, int64_t weights_token, int64_t table_stride, int64_t tokens, int64_t requests, int64_t heads,
                           int64_t rotated, int64_t top_k, int32_t interleaved, int32_t kind, int32_t threads) {
    Select s = {q, weights, cos_sin, rotary_rows, cache, tables, starts, lengths, out, q_token, q_head, weights_token, table_stride,
                requests, heads, rotated, top_k, .longest = 1, .interleaved = interleaved, .kind = kind};
    const int64_t panels = (heads + LANES - 1) / LANES, depth = (cache->width + LANES - 1) / LANES * LANES;
    const int64_t held = panels * (depth + 1) * LANES;
    int32_t status = 0;
    pthread_mutex_lock(&pool.call);
    for (int64_t r = 0; r < requests; r++) s.longest = lengths[r] > s.longest ? lengths[r] : s.longest;
    s.parts = (s.longest + SCORED - 1) / SCORED;
    const int64_t most = least(tokens, least(QUERIES, 1 + SCORES / s.longest));
    s.panels = scratch((size_t)(most * (held + s.longest)) * 4);
    if (!s.panels) status = -1;
    s.scores = (uint32_t *)(s.panels + most * held);
    for (; !status && s.first < tokens; s.first += s.count) {
        s.count = least(most, tokens - s.first);
        if (s.longest > top_k) {
            parallel(chosen->select_prepare, &s, s.count * panels, threads);
            parallel(chosen->select_score, &s, s.count * s.parts, threads);
        }
        parallel(pick, &s, s.count, threads);
    }
    pthread_mutex_unlock(&pool.call);
    return status;
}
