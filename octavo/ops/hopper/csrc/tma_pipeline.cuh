/* How weights and inputs come into shared memory: by two threads of a program, in rings. Included by layer_megakernel.cu. */

/* Boxes of weights lie one behind the other in a ring, none of them across its end. */
struct Boxes {
    Place<BOXES> box;
    int behind = 0; /* the last */
    INLINE int next(int bytes) const { return behind + bytes > RING ? 0 : behind; }
};

/* A box of a matrix that is read once. */
INLINE void copy_box(u32 to, const Map &map, int k, int row, const u64 *barrier) {
    asm volatile("{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], once;}"
                 ::"r"(to), "l"(&map), "r"(k), "r"(row), "r"(address(barrier)) : "memory");
}
/* Where a token's code k is: 128 codes of all tokens are adjacent, in the order in which the matrix unit wants them. */
INLINE int place_of(int token, int k) { return (k / STEP * TOKENS + token) * STEP + ((k / 16 ^ token) & 7) * 16 + k % 16; }

/* Arrivals at the launch's meetings, two for each product: its inputs are ready; its results are there. What a program wrote
   before it came is there for whoever waits. */
constexpr int LINE = 32, MEETINGS = 8 * LINE; /* a line of the cache each */
INLINE int ready(int product) { return 2 * product * LINE; }
INLINE int done(int product) { return (2 * product + 1) * LINE; }
INLINE void wait_for(const u32 *meeting, u32 arrivals) {
    while (arrived(meeting) < arrivals) {}
}

/* One thread asks for weights, and one fetches inputs. Their loops are short code: what is unrolled must be read first. */
struct Asker {
    Boxes at;
    Place<BOXES> oldest, landing;
    int held = 0, ahead = 0; /* boxes not given back; not there yet */
    /* Where there is room for a box, once there is. */
    INLINE int room(int bytes, Small &small) {
        const int to = at.next(bytes);
        while (held) {
            const int from = small.begin[oldest.at]; /* what is held is from there to at.behind */
            if (held < BOXES && (at.behind > from ? to || bytes <= from : to == at.behind && to + bytes <= from)) break;
            wait(small.empty + oldest.at, oldest.parity);
            oldest.next(), held--;
        }
        small.begin[at.box.at] = to;
        at.behind = to + bytes;
        held++;
        return to;
    }
    template <int P> INLINE void ask(const Between &s, u8 *ring, Small &small) {
        using Z = Shape<P>;
#pragma unroll 1
        for (int unit = blockIdx.x; unit < Z::UNITS; unit += PROGRAMS) {
            const int row = unit / Z::SPLITS * Z::ROWS, first = unit % Z::SPLITS * Z::SHARE, stop = min(first + Z::SHARE, Z::STEPS);
#pragma unroll 1
            for (int step = first; step < stop; step += Z::PACKED)
#pragma unroll 1
                for (int half = 0; half < Z::HALVES; half++, at.box.next()) {
                    const int most = P != NEXT_QKV && (step - first) * Z::HALVES * Z::ROWS * STEP < RING ? FEW : MANY; /* while tokens become inputs, few */
                    for (; ahead >= most; ahead--, landing.next()) wait(small.full + landing.at, landing.parity);
                    ahead++;
                    const int to = room(Z::PACKED * Z::ROWS * STEP, small), steps = min(Z::PACKED, stop - step);
                    expect(small.full + at.box.at, steps * Z::ROWS * STEP);
#pragma unroll 1
                    for (int i = 0; i < steps; i++)
                        copy_box(address(ring + to) + i * Z::ROWS * STEP, s.weights[P], (step + i) * STEP, row + half * INTER, small.full + at.box.at);
                }
        }
    }
};

/* Inputs, once they are ready, and their scales. */
struct Fetcher {
    Place<INPUTS> at;
    template <int P> INLINE void fetch(const Between &s, u8 *inputs, Small &small) {
        using Z = Shape<P>;
        wait_for(s.meetings + ready(P), P == DOWN ? PROGRAMS : s.tokens);
        asm volatile("fence.proxy.async;" ::: "memory"); /* what plain stores wrote the copy engine reads */
#pragma unroll 1
        for (int unit = blockIdx.x; unit < Z::UNITS; unit += PROGRAMS) {
            const int first = unit % Z::SPLITS * Z::SHARE, stop = min(first + Z::SHARE, Z::STEPS);
#pragma unroll 1
            for (int step = first; step < stop; step += FETCHED, at.next()) {
                const int bytes = min(FETCHED, stop - step) * INPUT, more = P != DOWN && step == first ? TOKENS * 4 : 0;
                wait(small.input_empty + at.at, at.parity ^ 1);
                expect(small.input_full + at.at, bytes + more);
                if (more) copy(address(small.input_scale), s.input_scales + P * TOKENS, more, address(small.input_full + at.at));
                copy(address(inputs + at.at * FETCHED * INPUT), s.codes[P == NEXT_QKV ? GATE_UP : P] + step * INPUT, bytes, address(small.input_full + at.at));
            }
        }
    }
};
