/* Replay of recorded kernel calls without returning to Python between them: a call through ctypes takes one or two
   microseconds, and a decode step of a small model has sixty calls that take ten each. Included by kernels.c. */
#define WORDS 24

/* A kernel, by its index in library.py's REPLAYED, and its arguments; a float is stored as its bits. */
typedef struct { int64_t kernel, word[WORDS]; } Call;

static inline float float_of(int64_t word) {
    const uint32_t bits = (uint32_t)word;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#define P(i) ((void *)(intptr_t)w[i])
#define I(i) ((int32_t)w[i])
#define F(i) float_of(w[i])

/* Returns 0, or the status of the first call that failed. */
int32_t octavo_replay(const Call *calls, int64_t count) {
    int32_t status = 0;
    for (int64_t i = 0; i < count && !status; i++) {
        const int64_t *w = calls[i].word;
        switch (calls[i].kernel) {
        case 0: status = octavo_linear(P(0), P(1), w[2], w[3], P(4), I(5), I(6)); break;
        case 1: octavo_look_up(P(0), P(1), P(2), w[3], I(4), I(5)); break;
        case 2:
            status = octavo_attention(P(0), P(1), P(2), P(3), P(4), P(5), w[6], w[7], w[8], w[9], w[10], w[11], F(12), F(13), I(14), I(15));
            break;
        case 3: octavo_rms_norm(P(0), P(1), P(2), P(3), P(4), w[5], w[6], w[7], w[8], w[9], F(10), I(11), I(12)); break;
        case 4: octavo_silu_mul(P(0), P(1), w[2], w[3], w[4], I(5), I(6)); break;
        case 5: octavo_argmax(P(0), P(1), w[2], w[3], w[4], I(5), I(6)); break;
        case 6: octavo_rotate(P(0), P(1), P(2), P(3), w[4], w[5], w[6], w[7], w[8], w[9], I(10), I(11)); break;
        case 7:
            octavo_rope_write_kv(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), P(9), w[10], w[11], w[12], w[13], w[14], w[15],
                                 w[16], w[17], w[18], F(19), I(20), I(21));
            break;
        case 8:
            status = octavo_experts(P(0), w[1], w[2], P(3), w[4], P(5), P(6), w[7], w[8], P(9), I(10), I(11));
            break;
        case 9:
            status = octavo_route(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15],
                                  F(16), I(17), I(18), I(19), I(20), I(21));
            break;
        case 10: octavo_dispatch(P(0), P(1), P(2), P(3), w[4], w[5]); break;
        case 11: octavo_combine(P(0), P(1), P(2), P(3), P(4), w[5], w[6], w[7], I(8), I(9)); break;
        case 12: octavo_write_latent(P(0), P(1), P(2), P(3), P(4), P(5), w[6], w[7], w[8], F(9), I(10), I(11), I(12)); break;
        case 13: octavo_write_index_keys(P(0), P(1), P(2), P(3), P(4), P(5), P(6), w[7], w[8], w[9], F(10), I(11), I(12), I(13)); break;
        case 14:
            octavo_head_linear(P(0), P(1), P(2), P(3), P(4), w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w[16],
                               I(17), I(18), I(19), I(20));
            break;
        case 15:
            status = octavo_latent_attention(P(0), P(1), P(2), P(3), P(4), P(5), P(6), w[7], w[8], w[9], w[10], w[11], w[12], F(13), I(14),
                                             I(15));
            break;
        case 16:
            status = octavo_select_keys(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), P(8), w[9], w[10], w[11], w[12], w[13], w[14],
                                        w[15], w[16], w[17], I(18), I(19), I(20));
            break;
        case 17: octavo_round_keys(P(0), P(1), P(2), P(3), P(4), w[5], w[6], w[7], w[8], w[9], w[10], I(11), I(12), I(13)); break;
        default: return -1;
        }
    }
    return status;
}

#undef P
#undef I
#undef F
