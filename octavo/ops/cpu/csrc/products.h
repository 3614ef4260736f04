/* Products by one weight, and the work around a library's AMX product. Included by kernels.c. */

/* The plan of a product y [m, n] = x [m, k] W^T, without memory; x has type `kind`, y has y_kind, and `threads` threads
   compute it. */
static LinearJob job_of(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t y_kind,
                        int64_t threads) {
    const int64_t panels = (m + LANES - 1) / LANES;
    const int is_panel = m > ROWS_MODE;
    const int exact = w->activation == PER_TOKEN || (w->activation == NOT_QUANTIZED && kind == BF16); /* x is exact in BF16 */
    const int pairs = (is_panel ? panels_of_pairs : chosen->pairs_pay != NULL) && exact && w->kind != F32 && !w->scale_columns;
    const int64_t chunk = w->kind == INT4 ? GROUP : is_panel || !pairs ? CHUNK : ROW_CHUNK;
    LinearJob job = {.w = w, .x = x, .y = y, .m = m, .x_stride = x_stride, .k_padded = (w->k + chunk - 1) / chunk * chunk,
                     .token_tasks = 1, .kind = kind, .y_kind = y_kind, .is_panel = is_panel, .pairs = pairs};
    job.parts = least((w->k + GROUP - 1) / GROUP, (threads + panels - 1) / panels);
    if (is_panel) {
        job.task_rows = pairs ? (panels > 1 ? TASK_OF_PAIRS : LANES) : TASK_ROWS;
        job.row_tasks = (w->n + job.task_rows - 1) / job.task_rows;
        while (job.row_tasks * job.token_tasks < 2 * threads && job.token_tasks * 2 <= panels) job.token_tasks *= 2;
    } else {
        job.row_tasks = least((w->n + 15) / 16, 8 * threads);
    }
    return job;
}

/* Rows of a job's memory for m tokens. */
static int64_t rows_held(int64_t m) { return m > ROWS_MODE ? (m + LANES - 1) / LANES * LANES : m; }

/* FP32 values of a job's memory: scales, then x as it is multiplied. */
static size_t scales_held(const LinearJob *job) { return (size_t)(job->m + LANES - 1) / LANES * LANES; }
static size_t floats_held(const LinearJob *job) { return scales_held(job) + (size_t)rows_held(job->m) * (size_t)job->k_padded; }
static void place(LinearJob *job, float *memory) { job->scale = memory, job->panel = memory + scales_held(job); }

static int64_t tasks_to_prepare(const LinearJob *job) { return job->is_panel ? (job->m + LANES - 1) / LANES * job->parts : 1; }
static int64_t tasks_to_multiply(const LinearJob *job) { return job->row_tasks * job->token_tasks; }

/* octavo_linear for a caller that holds pool.call; y has type y_kind. */
static int32_t multiply(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t y_kind,
                        int32_t threads) {
    for (int64_t done = 0; done < m; done += CHUNK_TOKENS) {
        LinearJob job = job_of(w, (const char *)x + done * x_stride * size_of(kind), least(CHUNK_TOKENS, m - done), x_stride,
                               (char *)y + done * w->n * size_of(y_kind), kind, y_kind, threads);
        float *memory = scratch(floats_held(&job) * 4);
        if (!memory) return -1;
        place(&job, memory);
        parallel(chosen->prepare, &job, tasks_to_prepare(&job), threads);
        parallel(chosen->multiply, &job, tasks_to_multiply(&job), threads);
    }
    return 0;
}

/* y [m, n] = x [m, k] times the transposed weight, x and y of `kind`; rows of x are x_stride values apart. Returns 0, or -1
   without memory. */
int32_t octavo_linear(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t threads) {
    pthread_mutex_lock(&pool.call);
    int32_t status = multiply(w, x, m, x_stride, y, kind, kind, threads);
    pthread_mutex_unlock(&pool.call);
    return status;
}

/* Embedding lookup: y [m, k] of `kind` = rows `ids` [m] of w, dequantized; 0 <= id < n. */
void octavo_look_up(const Linear *w, const int64_t *ids, void *y, int64_t m, int32_t kind, int32_t threads) {
    LinearJob job = {.w = w, .x = ids, .y = y, .m = m, .kind = kind};
    each_of(chosen->look_up, &job, m, threads);
}

/* Widen FP8 codes, whose rows are `stride` apart, to BF16 [rows, k], smaller by the power of two that widening leaves out,
   in the order of octavo_round's output; k is a multiple of CHUNK. */
void octavo_widen(const void *codes, uint16_t *to, int64_t rows, int64_t k, int64_t stride, int32_t kind, int32_t threads) {
    TilesJob job = {.from = codes, .to = to, .width = k, .from_stride = stride, .to_stride = k, .kind = kind};
    each_of(chosen->widen, &job, rows, threads);
}

/* Quantize x [m, k] in BF16 for a product by w: codes as BF16 [m, k], and each token's scale. */
void octavo_round(const Linear *w, const void *x, int64_t m, int64_t x_stride, uint16_t *codes, float *scale, int32_t threads) {
    LinearJob job = {.w = w, .x = x, .panel = (float *)codes, .scale = scale, .m = m, .x_stride = x_stride, .k_padded = w->k,
                     .kind = BF16, .pairs = 1};
    each_of(chosen->round, &job, m, threads);
}

/* to [m, width], rows `stride` values apart, = from [m, width] * by_row [m] * by_column [width]; both BF16. */
void octavo_rescale(const uint16_t *from, uint16_t *to, int64_t m, int64_t width, int64_t stride, const float *by_row,
                    const float *by_column, int32_t threads) {
    TilesJob job = {.from = from, .to = to, .by_row = by_row, .by_column = by_column, .width = width, .from_stride = width,
                    .to_stride = stride};
    each_of(chosen->rescale, &job, m, threads);
}
