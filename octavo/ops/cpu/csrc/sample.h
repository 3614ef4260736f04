/* Sampling a token of each row, for one instruction set: included after vector.h. */

/* Softmax numerators in place: x [width] becomes e^((x - max) / temperature), or 0 where the exponent is under -87. Also
   computes each block's maximum, and the sum of its weights that are at least `least_part`. */
static void NAME(weigh)(float *x, int64_t width, float temperature, float least_part, Blocks *blocks) {
    vf top = NAME(splat)(-INFINITY), part;
    float most = -INFINITY, factor = 1 / temperature;
    int64_t whole = width / VL * VL;
    for (int64_t i = 0; i < whole; i += VL) {
        vf v = NAME(load)(x + i);
        top = SELECT(v > top, v, top);
    }
    for (int i = 0; i < VL; i++) most = top[i] > most ? top[i] : most;
    for (int64_t i = whole; i < width; i++) most = x[i] > most ? x[i] : most;
    blocks->size = (width + MAX_BLOCKS * LANES - 1) / (MAX_BLOCKS * LANES) * LANES;
    blocks->count = (width + blocks->size - 1) / blocks->size;
    for (int64_t block = 0; block < blocks->count; block++) {
        int64_t end = least((block + 1) * blocks->size, width);
        vf sum = {0};
        top = (vf){0};
        for (int64_t i = block * blocks->size; i < end; i += VL) {
            int64_t count = least(VL, end - i);
            if (count == VL) part = NAME(load)(x + i);
            else part = NAME(splat)(-INFINITY), memcpy(&part, x + i, (size_t)count * 4);
            vf v = (part - most) * factor;
            v = SELECT(v >= -87.0f, NAME(exp)(v), NAME(splat)(0));
            memcpy(x + i, &v, (size_t)count * 4);
            top = SELECT(v > top, v, top);
            sum += SELECT(v >= least_part, v, NAME(splat)(0));
        }
        blocks->sum[block] = NAME(sum)(sum);
        blocks->most[block] = NAME(largest)(top);
    }
}

static void NAME(sample)(void *argument, int64_t row) {
    const Sample *d = argument;
    Blocks blocks;
    float *w = d->logits + row * d->width;
    NAME(weigh)(w, d->width, d->temperature[row], d->min_p ? d->min_p[row] : 0, &blocks);
    d->out[row] = sampled(w, &blocks, d, row);
}
