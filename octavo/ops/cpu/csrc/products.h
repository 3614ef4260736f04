/* Products by one weight. Included by kernels.c. */

/* How a product is computed: in FP32, in pairs of BF16 by the dot product, or by matrix tiles. */
enum { IN_FP32, IN_PAIRS, IN_TILES, WAYS };
static const int64_t MEASURED[] = {1, 2, 3, 4, 8, 16, 32, 64}; /* tokens for which the ways are compared */
#define SIZES ((int)(sizeof MEASURED / sizeof *MEASURED))
static int ways[2][SIZES]; /* by whether the weight is FP8, and up to so many tokens; with matrix tiles alone */

/* The way for rows of a weight and m tokens whose values are exact in BF16. */
static int way_of(const Linear *w, int64_t m) {
    const int takes_tiles = w->kind == INT4 ? m > ROWS_MODE && w->group % TILE_VALUES == 0 : !w->scale_columns;
    if (!uses_tiles || !takes_tiles) return (m > ROWS_MODE ? panels_of_pairs : chosen->pairs_pay != NULL) ? IN_PAIRS : IN_FP32;
    if (w->kind == INT4) return IN_TILES;
    int size = 0;
    while (size < SIZES - 1 && MEASURED[size] < m) size++;
    return ways[w->kind >= E4M3][size];
}

/* The plan of a product y [m, n] = x [m, k] W^T computed in `way`, without memory; x has type `kind`, y has y_kind, and
   `threads` threads compute it. */
static LinearJob job_in(int way, const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t y_kind,
                        int64_t threads) {
    const int64_t panels = (m + LANES - 1) / LANES;
    const int tiles = way == IN_TILES, pairs = way != IN_FP32, is_panel = tiles || m > ROWS_MODE || (w->tiled && !pairs);
    const int64_t chunk = w->kind == INT4 ? GROUP : is_panel || !pairs ? CHUNK : ROW_CHUNK;
    LinearJob job = {.w = w, .x = x, .y = y, .m = m, .x_stride = x_stride, .k_padded = (w->k + chunk - 1) / chunk * chunk,
                     .token_tasks = 1, .kind = kind, .y_kind = y_kind, .is_panel = is_panel, .pairs = pairs, .tiles = tiles};
    job.grouped = pairs && w->scale_columns;
    job.parts = least((w->k + GROUP - 1) / GROUP, (threads + panels - 1) / panels);
    if (is_panel) {
        job.task_rows = tiles ? (panels > 1 ? BLOCK_OF_TILES : TASK_OF_TILES) : !pairs ? TASK_ROWS : panels > 1 ? TASK_OF_PAIRS : LANES;
        while (tiles && job.task_rows > (w->tiled ? GROUP_ROWS : 2 * LANES) && (w->n + job.task_rows - 1) / job.task_rows < 3 * threads) job.task_rows /= 2;
        job.row_tasks = (w->n + job.task_rows - 1) / job.task_rows;
        while (job.row_tasks * job.token_tasks < 2 * threads && job.token_tasks * 2 <= panels) job.token_tasks *= 2;
    } else {
        job.row_tasks = least((w->n + (w->tiled ? GROUP_ROWS : LANES) - 1) / (w->tiled ? GROUP_ROWS : LANES), 8 * threads);
    }
    return job;
}

/* job_in() the way that is best for the weight and the number of tokens. */
static LinearJob job_of(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t y_kind,
                        int64_t threads) {
    const int exact = w->activation != NOT_QUANTIZED || kind == BF16; /* x, or its codes, are exact in BF16 */
    const int way = !exact || w->kind == F32 ? IN_FP32 : !w->tiled ? way_of(w, m) : m > 1 ? IN_TILES : IN_PAIRS;
    return job_in(way, w, x, m, x_stride, y, kind, y_kind, threads);
}

/* Rows of a job's memory. */
static int64_t rows_held(const LinearJob *job) { return job->is_panel ? (job->m + LANES - 1) / LANES * LANES : job->m; }

/* FP32 values of a job's memory: scales, then x as it is multiplied. */
static size_t scales_held(const LinearJob *job) { return (size_t)((job->m + LANES - 1) / LANES * LANES * (job->grouped ? job->w->scale_columns : 1)); }
static size_t floats_held(const LinearJob *job) { return scales_held(job) + (size_t)rows_held(job) * (size_t)job->k_padded; }
static void place(LinearJob *job, float *memory) { job->scale = memory, job->panel = memory + scales_held(job); }

static int64_t tasks_to_prepare(const LinearJob *job) { return job->is_panel ? (job->m + LANES - 1) / LANES * job->parts : 1; }
static int64_t tasks_to_multiply(const LinearJob *job) { return job->row_tasks * job->token_tasks; }

#define TILED_FOR_ANOTHER -2 /* status: the weight's layout is another instruction set's */

/* octavo_linear for a caller that holds pool.call; y has type y_kind. */
static int32_t multiply(const Linear *w, const void *x, int64_t m, int64_t x_stride, void *y, int32_t kind, int32_t y_kind,
                        int32_t threads) {
    if (w->tiled && !uses_tiles) return TILED_FOR_ANOTHER;
    for (int64_t done = 0; done < m; done += CHUNK_TOKENS) {
        LinearJob job = job_of(w, (const char *)x + done * x_stride * size_of(kind), least(CHUNK_TOKENS, m - done), x_stride,
                               (char *)y + done * w->n * size_of(y_kind), kind, y_kind, threads);
        float *memory = scratch(floats_held(&job) * 4);
        if (!memory) return -1;
        place(&job, memory);
        parallel(chosen->prepare, &job, tasks_to_prepare(&job), threads);
        parallel_on(chosen->multiply, &job, tasks_to_multiply(&job), threads, job.tiles);
    }
    return 0;
}

/* y [m, n] = x [m, k] times the transposed weight, x and y of `kind`; rows of x are x_stride values apart. Returns 0, or -1
   without memory, TILED_FOR_ANOTHER without matrix tiles for a tiled weight. */
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

/* The way in which a weight of `kind`, BF16 or FP8 with a scale a row, is multiplied by m tokens that are exact in BF16. */
int32_t octavo_way(int32_t kind, int64_t m) {
    const Linear w = {.kind = kind};
    return way_of(&w, m);
}

#define TRIED_N 128
#define TRIED_K 1024
#define TRIES 5
/* Fill `ways` on a CPU with matrix tiles, with nothing else if they are forced. Otherwise time each way with one thread and a weight in its cache, since where memory is the
   limit all ways take as long. What is not measured is the memory's share of it; takes some milliseconds. */
static void choose_ways(int forced) {
    static const int kinds[] = {BF16, E4M3};
    const size_t bytes = TRIED_N * TRIED_K * 2;
    LinearJob job;
    uint8_t *weight = malloc(bytes);
    uint16_t *x = malloc(64 * TRIED_K * 2), *y = malloc(64 * TRIED_N * 2);
    float *memory = aligned_alloc(64, (64 + 64 * TRIED_K) * 4), scale[TRIED_N];
    for (size_t i = 0; weight && i < bytes; i++) weight[i] = 0x3C; /* 1.5 in FP8; in BF16 a normal number too */
    for (int i = 0; x && i < 64 * TRIED_K; i++) x[i] = (uint16_t)(0x3F80 + i % 64);
    for (int i = 0; i < TRIED_N; i++) scale[i] = 1;
    for (int of = 0; of < 2; of++) {
        const Linear w = {.weight = weight, .scale = of ? scale : NULL, .n = TRIED_N, .k = TRIED_K, .stride = TRIED_K,
                          .scale_rows = 1, .kind = kinds[of], .activation = of ? PER_TOKEN : NOT_QUANTIZED};
        for (int size = 0; size < SIZES; size++) {
            int64_t best = INT64_MAX;
            ways[of][size] = IN_TILES;
            for (int i = 0; !forced && i < TRIES * WAYS && weight && x && y && memory; i++) {
                job = job_in(i % WAYS, &w, x, MEASURED[size], TRIED_K, y, BF16, BF16, 1);
                place(&job, memory);
                const int64_t before = now();
                for (int64_t task = 0; task < tasks_to_prepare(&job); task++) chosen->prepare(&job, task);
                if (job.tiles) begin_tiles();
                for (int64_t task = 0; task < tasks_to_multiply(&job); task++) chosen->multiply(&job, task);
                if (job.tiles) end_tiles();
                const int64_t took = now() - before;
                if (took < best) best = took, ways[of][size] = i % WAYS;
            }
        }
    }
    free(weight), free(x), free(y), free(memory);
}
