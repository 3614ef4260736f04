/* Rounding that calibration does, and rounding of keys by the queries, for one instruction set: included after elementwise.h. */

/* x rounded to the nearest E4M3FN number, ties to even, and clamped: x plus 1.5 * 2^(20 + e), e being its exponent, keeps the 3
   bits after its leading one; subnormal codes are as far apart as the smallest normal ones. NaN stays NaN. */
INLINE vf NAME(to_e4m3)(vf x) {
    const vf most = NAME(splat)(448.0f);
    x = SELECT(x > most, most, x), x = SELECT(x < -most, -most, x);
    vf size = (vf)((vi)x & 0x7F800000);
    size = SELECT(size < NAME(splat)(0x1p-6f), NAME(splat)(0x1p-6f), size) * 0x1.8p20f;
    return x + size - size;
}

/* LANES rows of a weight, one a lane, through all columns. */
static void NAME(round_columns)(void *argument, int64_t task) {
    const RoundedColumns *c = argument;
    const int64_t first = task * LANES, count = least(LANES, c->rows - first);
    float own[ROUNDED_COLUMNS][LANES] = {{0}}, value[LANES] = {0}, factor[LANES], result[LANES], by[LANES];
    for (int i = 0; i < LANES; i++) factor[i] = 1;
    for (int64_t k = 0; k < c->columns; k++) memcpy(own[k], c->offset + k * c->rows + first, (size_t)count * 4);
    for (int64_t k = 0; k < c->columns; k++) {
        memcpy(value, c->values + k * c->rows + first, (size_t)count * 4);
        memcpy(factor, c->scale + k * c->scale_stride + first, (size_t)count * 4);
        vf moved[PARTS];
        for (int i = 0; i < PARTS; i++) {
            const vf before = NAME(load)(value + i * VL), by_scale = NAME(load)(factor + i * VL);
            const vf rounded = NAME(to_e4m3)((before - NAME(load)(own[k] + i * VL)) / by_scale) * by_scale;
            moved[i] = rounded - before;
            NAME(store)(result + i * VL, rounded);
            NAME(store)(by + i * VL, moved[i]);
        }
        memcpy(c->values + k * c->rows + first, result, (size_t)count * 4);
        memcpy(c->moved + k * c->rows + first, by, (size_t)count * 4);
        const float *influence = c->influence + k * c->influence_stride;
        for (int64_t j = 0; j < c->columns; j++)
            for (int i = 0; i < PARTS; i++) NAME(store)(own[j] + i * VL, NAME(load)(own[j] + i * VL) + influence[j] * moved[i]);
    }
    for (int64_t k = 0; k < c->columns; k++) memcpy(c->offset + k * c->rows + first, own[k], (size_t)count * 4);
}

/* Bit i says whether lane i of one vector is not zero; NaN is not. */
INLINE uint32_t NAME(not_zero)(vf v) {
#if ISA >= 3
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif ISA == 2
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#else
    uint32_t found = 0;
    for (int i = 0; i < VL; i++) found |= (uint32_t)(v[i] != 0) << i;
    return found;
#endif
}

/* offset [width] += the sum of by[i] times influence[i], of `count` columns. */
INLINE void NAME(add_influence)(float *offset, const float *const *influence, const float *by, int count, int64_t width) {
    int64_t j = 0;
    for (; j + VL <= width; j += VL) {
        vf sum = NAME(load)(offset + j);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) sum += by[i] * NAME(load)(influence[i] + j);
        NAME(store)(offset + j, sum);
    }
    for (; j < width; j++)
        for (int i = 0; i < count; i++) offset[j] += by[i] * influence[i][j];
}

/* The same for the columns from `at` on whose `moved` is not zero: most codes stay. */
static void NAME(add_influences)(const Descent *d, float *offset, int64_t at, const float moved[LANES]) {
    const float *influence[LANES];
    float by[LANES];
    int count = 0, i = 0;
    uint32_t changed = 0;
    for (int p = 0; p < PARTS; p++) changed |= NAME(not_zero)(NAME(load)(moved + p * VL)) << p * VL;
    for (; changed; changed &= changed - 1, count++) {
        const int column = __builtin_ctz(changed);
        influence[count] = d->influence + (at + column) * d->width, by[count] = moved[column];
    }
    for (; i + 4 <= count; i += 4) NAME(add_influence)(offset, influence + i, by + i, 4, d->width);
    if (count - i == 3) NAME(add_influence)(offset, influence + i, by + i, 3, d->width);
    else if (count - i == 2) NAME(add_influence)(offset, influence + i, by + i, 2, d->width);
    else if (count - i == 1) NAME(add_influence)(offset, influence + i, by + i, 1, d->width);
}

/* lines [LANES][LANES] = `rows` rows of `columns` values each, `stride` apart, turned; zeros where there are none. */
INLINE void NAME(turned_block)(const float *from, int64_t stride, int64_t rows, int64_t columns, float *lines) {
    float block[LANES * LANES] = {0};
    for (int64_t r = 0; r < rows; r++) memcpy(block + r * LANES, from + r * stride, (size_t)columns * 4);
    NAME(transpose)(block, LANES, lines);
}

/* Coordinate descent over the block of LANES rows and LANES columns, or as many as there are, whose first is `row`, `at`: a row is a
   lane. Offsets within the block change at once, and all of a row's behind it. */
static void NAME(descend_block)(const Descent *d, int64_t row, int64_t at) {
    const int64_t width = d->width, rows = least(LANES, d->rows - row), columns = least(LANES, width - at);
    float *values = d->values + row * width + at, *offset = d->offset + row * width;
    const float *scale = d->scale + row * d->scale_row;
    float value[LANES * LANES], own[LANES * LANES], factor[LANES * LANES], moved[LANES * LANES] = {0}, turned[LANES * LANES];
    NAME(turned_block)(values, width, rows, columns, value);
    NAME(turned_block)(offset + at, width, rows, columns, own);
    for (int64_t r = 0; !d->scale_column && r < LANES; r++) factor[r] = r < rows ? scale[r * d->scale_row] : 1;
    if (d->scale_column) NAME(turned_block)(scale + at, d->scale_row, rows, columns, factor);
    for (int64_t k = 0; k < columns; k++) {
        const float *influence = d->influence + (at + k) * width + at;
        for (int i = 0; i < LANES; i += VL) {
            const vf before = NAME(load)(value + k * LANES + i), by_scale = NAME(load)(factor + k * d->scale_column * LANES + i);
            const vf rounded = NAME(to_e4m3)((before - NAME(load)(own + k * LANES + i)) / by_scale) * by_scale, by = rounded - before;
            NAME(store)(value + k * LANES + i, rounded);
            NAME(store)(moved + k * LANES + i, by);
            for (int64_t j = k + 1; j < columns; j++) NAME(store)(own + j * LANES + i, NAME(load)(own + j * LANES + i) + influence[j] * by);
        }
    }
    NAME(transpose)(value, LANES, turned);
    for (int64_t r = 0; r < rows; r++) memcpy(values + r * width, turned + r * LANES, (size_t)columns * 4);
    NAME(transpose)(moved, LANES, turned);
    for (int64_t r = 0; r < rows; r++) NAME(add_influences)(d, offset + r * width, at, turned + r * LANES);
}

/* Task: DESCENT_ROWS rows of a weight. They go through the columns together, for whose influences to be in the cache. */
static void NAME(descend)(void *argument, int64_t task) {
    const Descent *d = argument;
    const int64_t first = task * DESCENT_ROWS, last = least(first + DESCENT_ROWS, d->rows);
    for (int64_t sweep = 0; sweep < d->sweeps; sweep++)
        for (int64_t at = 0; at < d->width; at += LANES)
            for (int64_t row = first; row < last; row += LANES) NAME(descend_block)(d, row, at);
}

/* Task: some rows of a weight, with each of the factors of their scales. */
static void NAME(scale_errors)(void *argument, int64_t task) {
    const ScaleErrors *e = argument;
    const int64_t first = task * e->per_task, last = least(first + e->per_task, e->rows);
    float values[GROUP], weights[GROUP];
    for (int64_t row = first; row < last; row++) {
        for (int64_t group = 0; group < e->groups; group++) {
            const int64_t start = group * e->group, end = least(start + e->group, e->width), scaled = row * e->groups + group;
            float sums[MOST_STEPS][VL] = {{0}};
            for (int64_t at = start; at < end; at += GROUP) {
                const int64_t count = least(GROUP, end - at);
                NAME(widen_row)(values, e->values + row * e->width + at, F32, count);
                NAME(widen_row)(weights, e->weight + at, F32, count);
                for (int64_t step = 0; step < e->steps; step++) {
                    const vf scale = NAME(splat)(e->scale[scaled] * e->step[step]);
                    vf sum = NAME(load)(sums[step]);
                    for (int64_t i = 0; i < count; i += VL) {
                        const vf v = NAME(load)(values + i), lost = NAME(to_e4m3)(v / scale) * scale - v;
                        sum += lost * lost * NAME(load)(weights + i);
                    }
                    NAME(store)(sums[step], sum);
                }
            }
            for (int64_t step = 0; step < e->steps; step++)
                e->errors[step * e->rows * e->groups + scaled] = NAME(sum)(NAME(load)(sums[step]));
        }
    }
}

/* LANES keys of one head, one a lane, through all dimensions. */
static void NAME(round_keys)(void *argument, int64_t task) {
    const RoundedKeys *r = argument;
    const int64_t groups = (r->tokens + LANES - 1) / LANES, head = task / groups, first = task % groups * LANES, dim = r->dim;
    const int64_t count = least(LANES, r->tokens - first), size = size_of(r->kind);
    const int32_t *order = r->order + head * dim;
    const float scale = r->scale[head * r->scale_head];
    float values[MAX_DIM][LANES] = {{0}}, offset[MAX_DIM][LANES] = {{0}}, row[GROUP] = {0};
    for (int64_t t = 0; t < count; t++) {
        const char *k = (const char *)r->k + ((first + t) * r->token + head * r->head) * size;
        for (int64_t at = 0; at < dim; at += GROUP) {
            const int64_t some = least(GROUP, dim - at);
            NAME(widen_row)(row, k + at * size, r->kind, some);
            NAME(keep_finite)(row, some);
            for (int64_t d = 0; d < some; d++) values[at + d][t] = row[d];
        }
    }
    for (int64_t step = 0; step < dim; step++) {
        float *own = values[order[step]];
        const float *influence = r->influence + (head * dim + step) * dim, *before = offset[order[step]];
        vf moved[PARTS];
        for (int i = 0; i < PARTS; i++) {
            const vf exact = NAME(load)(own + i * VL);
            const vf rounded = NAME(round_to)(exact - NAME(load)(before + i * VL), scale, FORMATS[r->to_kind]) * scale;
            moved[i] = rounded - exact;
            NAME(store)(own + i * VL, rounded);
        }
        for (int64_t next = step + 1; next < dim; next++) { /* the others are rounded, and their influence is 0 */
            float *to = offset[order[next]];
            const float by = influence[order[next]];
            if (count <= VL) NAME(store)(to, NAME(load)(to) + by * moved[0]);
            else for (int i = 0; i < PARTS; i++) NAME(store)(to + i * VL, NAME(load)(to + i * VL) + by * moved[i]);
        }
    }
    for (int64_t t = 0; t < count; t++) {
        char *out = (char *)r->out + ((first + t) * r->heads + head) * dim * size;
        for (int64_t at = 0; at < dim; at += GROUP) {
            const int64_t some = least(GROUP, dim - at);
            for (int64_t d = 0; d < some; d++) row[d] = values[at + d][t];
            NAME(narrow_row)(out, r->kind, at, row, some);
        }
    }
}
