/* The inputs of layer_megakernel.cu's products where it computes one token (ALONE): each CTA makes the codes that its unit
   takes, in shared memory, by its consumer threads. `slot`: of `inputs`, where the unit's first K step goes. */

/* Codes of those of a row's values that are in this CTA's unit of P. The row begins with K step `begin`; `most`: amax. */
template <int P> INLINE void keep_codes(const Row &row, float most, int begin, u8 *inputs, int slot, SmemState &smem) {
    using Z = Shape<P>;
    const int first = blockIdx.x % Z::SPLITS * Z::SHARE, stop = min(first + Z::SHARE, Z::STEPS);
    float scale = fmaxf(most / LIMIT, FLOOR), by = 1.0f / scale;
    if (!BLOCKS && threadIdx.x == 0) *(P == DOWN ? smem.scale : smem.input_scale[0][0]) = scale;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int at = Row::place(i) + begin * STEP, step = at / STEP - first;
        const bool mine = step >= 0 && step < stop - first;
        if (BLOCKS) {
            most = row.amax(i);
#pragma unroll
            for (int lane = STEP / 8 / 2; lane; lane /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
            scale = fmaxf(most / LIMIT, FLOOR), by = 1.0f / scale;
            if (mine && at % STEP == 0) smem.input_scale[(slot + step / FETCHED) % INPUTS][step % FETCHED][0] = scale;
        }
        float x[8];
        unpack(row.words[i], x);
        u32 c[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            c[j] = codes_of(x[2 * j] * by, x[2 * j + 1] * by);
            rest[j] = TWO_CODES ? rests_of(c[j], x[2 * j] * by, x[2 * j + 1] * by) : 0;
        }
        if (!mine) continue;
        u8 *to = inputs + ((slot + step / FETCHED) % INPUTS * FETCHED + step % FETCHED - (first + step)) * INPUT;
        *(uint2 *)(to + place_of(0, at)) = uint2{c[0] | c[1] << 16, c[2] | c[3] << 16};
        if (TWO_CODES) *(uint2 *)(to + place_of(1, at)) = uint2{rest[0] | rest[1] << 16, rest[2] | rest[3] << 16};
    }
    fence_view_async_shared();
    consumers_sync();
    if (threadIdx.x < up(stop - first, FETCHED)) arrive(smem.input_full + (slot + threadIdx.x) % INPUTS);
}
/* Of a row, over the consumer threads; unused if its groups have scales. */
INLINE float amax_of(const Row &row, float (&room)[WARPS]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < PARTS; i++) most = fmaxf(most, row.amax(i));
    return BLOCKS ? 0 : over_threads<true>(most, room);
}
INLINE void wait_for_all(const u32 *grid_barrier) {
    if (threadIdx.x == 0) wait_for(grid_barrier, CTAS);
    consumers_sync();
}
INLINE void own_attended(const Between &s, u8 *inputs, int slot, SmemState &smem) {
    Row row;
    row.load(s.attended, WIDE);
    const float most = amax_of(row, smem.second);
    if (blockIdx.x < Shape<O>::UNITS) keep_codes<O>(row, most, 0, inputs, slot, smem);
}
/* The norm of a residual plus the shares of the product before. Residuals are in two places in turn, since all CTAs read one
   while the first CTA writes the other. */
template <int P> INLINE void own_norm(const Between &s, u8 *inputs, int slot, SmemState &smem) {
    constexpr int BEFORE = P == GATE_UP ? O : DOWN;
    const u16 *norm = P == GATE_UP ? s.post_norm : s.next_norm;
    u16 *middle = (u16 *)s.codes[GATE_UP], *from = P == GATE_UP ? s.residual : middle, *to = P == GATE_UP ? middle : s.residual;
    Row row, gain;
    row.load(from, HIDDEN);
    if (norm) gain.load(norm, HIDDEN);
    wait_for_all(s.grid_barriers + done(BEFORE));
    if (!norm && blockIdx.x) return; /* behind the last layer only the sum is wanted */
    const float squares = row.add(s.parts, Shape<BEFORE>::SPLITS, to, blockIdx.x == 0);
    if (!norm) return;
    row.scale(rsqrtf(over_threads<false>(squares, smem.first) / HIDDEN + s.eps), gain);
    const float most = amax_of(row, smem.second);
    if (blockIdx.x < Shape<P>::UNITS) keep_codes<P>(row, most, 0, inputs, slot, smem);
}
/* Act of this CTA's unit of gate_up and its amax, for all; then what this CTA's unit of down takes. */
INLINE void own_act(const Between &s, u8 *inputs, int slot, SmemState &smem) {
    u16 *act = (u16 *)s.codes[DOWN];
    float *amaxes = (float *)(s.grid_barriers + GRID_BARRIERS);
    consumers_sync();
    if (threadIdx.x < 32) {
        const int row = threadIdx.x * 8, at = blockIdx.x * GATE_UP_ROWS + row;
        uint4 words = {};
        if (blockIdx.x < Shape<GATE_UP>::UNITS && row < GATE_UP_ROWS && at < INTER) {
            words = *(const uint4 *)(smem.act[0][0] + row);
            *(uint4 *)(act + at) = words;
        }
        u32 most = larger(larger(words.x & 0x7FFF7FFF, words.y & 0x7FFF7FFF), larger(words.z & 0x7FFF7FFF, words.w & 0x7FFF7FFF));
#pragma unroll
        for (int i = 16; i; i /= 2) most = larger(most, __shfl_xor_sync(~0u, most, i));
        if (threadIdx.x == 0) amaxes[blockIdx.x] = fmaxf(low_of(most), high_of(most));
        __syncwarp();
        if (threadIdx.x == 0) signal(s.grid_barriers + done(GATE_UP));
    }
    wait_for_all(s.grid_barriers + done(GATE_UP));
    const int first = blockIdx.x % Shape<DOWN>::SPLITS * Shape<DOWN>::SHARE, stop = min(first + Shape<DOWN>::SHARE, Shape<DOWN>::STEPS);
    Row row;
    row.load(act + first * STEP, min(stop * STEP, INTER) - first * STEP);
    const float most = BLOCKS ? 0 : over_threads<true>(threadIdx.x < CTAS ? shared_load(amaxes + threadIdx.x) : 0, smem.second);
    if (blockIdx.x < Shape<DOWN>::UNITS) keep_codes<DOWN>(row, most, first, inputs, slot, smem);
}
