/* The TMA pipelines of layer_megakernel.cu: two producer threads of a CTA bring weights and inputs into rings in shared
   memory. */

/* Boxes of weights are allocated consecutively in a ring; none wraps around its end. */
struct Boxes {
    PipelineState<BOXES> box;
    int behind = 0; /* end of the newest box */
    INLINE int next(int bytes) const { return behind + bytes > RING ? 0 : behind; }
};

/* TMA load of a box of a matrix that is read once (evict first). */
INLINE void copy_box(u32 to, const Map &map, int k, int row, const u64 *barrier) {
    asm volatile("{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], once;}"
                 ::"r"(to), "l"(&map), "r"(k), "r"(row), "r"(address(barrier)) : "memory");
}
/* Offset of a column's code k: 128 codes of all columns are contiguous, in WGMMA's swizzled layout. */
INLINE int place_of(int column, int k) { return (k / STEP * COLUMNS + column) * STEP + ((k / 16 ^ column) & 7) * 16 + k % 16; }

/* Grid barriers of the launch, two for each product: inputs ready, results done. What a CTA wrote before its arrival is
   visible to the waiting CTAs. */
constexpr int LINE = 32, GRID_BARRIERS = 8 * LINE; /* a cache line each */
INLINE int ready(int product) { return 2 * product * LINE; }
INLINE int done(int product) { return (2 * product + 1) * LINE; }
INLINE void wait_for(const u32 *grid_barrier, u32 arrivals) {
    while (arrived(grid_barrier) < arrivals) {}
}

/* One producer thread issues loads of weights, and one loads of inputs. Their loops are not unrolled: unrolled code would
   have to be fetched first. */
struct WeightProducer {
    Boxes at;
    PipelineState<BOXES> oldest, landing;
    int in_use = 0, ahead = 0; /* boxes not yet released by consumers; loads in flight */
    /* Wait for free space for a box and allocate it. */
    INLINE int room(int bytes, SmemState &smem) {
        const int to = at.next(bytes);
        while (in_use) {
            const int from = smem.begin[oldest.at]; /* the boxes in use are from there to at.behind */
            if (in_use < BOXES && (at.behind > from ? to || bytes <= from : to == at.behind && to + bytes <= from)) break;
            wait(smem.empty + oldest.at, oldest.parity);
            oldest.next(), in_use--;
        }
        smem.begin[at.box.at] = to;
        at.behind = to + bytes;
        in_use++;
        return to;
    }
    template <int P> INLINE void produce(const Between &s, u8 *ring, SmemState &smem) {
        using Z = Shape<P>;
#pragma unroll 1
        for (int unit = blockIdx.x; unit < Z::UNITS; unit += CTAS) {
            const int row = unit / Z::SPLITS * Z::ROWS, first = unit % Z::SPLITS * Z::SHARE, stop = min(first + Z::SHARE, Z::STEPS);
#pragma unroll 1
            for (int step = first; step < stop; step += Z::PACKED)
#pragma unroll 1
                for (int half = 0; half < Z::HALVES; half++, at.box.next()) {
                    const int most = P != NEXT_QKV && (step - first) * Z::HALVES * Z::ROWS * STEP < RING ? FEW : MANY; /* few loads in flight while tokens are prepared */
                    for (; ahead >= most; ahead--, landing.next()) wait(smem.full + landing.at, landing.parity);
                    ahead++;
                    const int to = room(Z::PACKED * Z::ROWS * STEP, smem), steps = min(Z::PACKED, stop - step);
                    expect(smem.full + at.box.at, steps * Z::ROWS * STEP);
#pragma unroll 1
                    for (int i = 0; i < steps; i++)
                        copy_box(address(ring + to) + i * Z::ROWS * STEP, s.weights[P], (step + i) * STEP, row + half * INTER, smem.full + at.box.at);
                }
        }
    }
};

/* Load inputs and their scales once they are ready. */
struct InputProducer {
    PipelineState<INPUTS> at;
    template <int P> INLINE void fetch(const Between &s, u8 *inputs, SmemState &smem) {
        using Z = Shape<P>;
        constexpr int FROM = P == NEXT_QKV ? GATE_UP : P;
        wait_for(s.grid_barriers + ready(P), P == DOWN ? CTAS : s.tokens);
        asm volatile("fence.proxy.async;" ::: "memory"); /* make other CTAs' plain stores visible to TMA (the async proxy) */
#pragma unroll 1
        for (int unit = blockIdx.x; unit < Z::UNITS; unit += CTAS) {
            const int first = unit % Z::SPLITS * Z::SHARE, stop = min(first + Z::SHARE, Z::STEPS);
#pragma unroll 1
            for (int step = first; step < stop; step += FETCHED, at.next()) {
                const int steps = min(FETCHED, stop - step), bytes = steps * INPUT;
                const int more = BLOCKS ? steps * TOKENS * 4 : P != DOWN && step == first ? TOKENS * 4 : 0;
                wait(smem.input_empty + at.at, at.parity ^ 1);
                expect(smem.input_full + at.at, bytes + more);
                if (more) copy(address(smem.input_scale[BLOCKS ? at.at : 0]), s.input_scales[FROM] + (BLOCKS ? step * TOKENS : 0), more, address(smem.input_full + at.at));
                copy(address(inputs + at.at * FETCHED * INPUT), s.codes[FROM] + step * INPUT, bytes, address(smem.input_full + at.at));
            }
        }
    }
};
