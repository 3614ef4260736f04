/* Blocks of an FP8 cache [blocks, ...]: keys [64, kv_heads, 128], values [kv_heads, 128, 64]; PER_TOKEN_HEAD: then keys' scales,
   FP32 [kv_heads, 64], and values'. cache_blocks.py has the tensor maps. */

constexpr int DIM = 128, BLOCK = 64;
constexpr int BLOCK_ROWS = 2 * BLOCK + 4 * PER_TOKEN_HEAD; /* rows of 128 bytes that a block has for each head */
constexpr float LARGEST_CODE = 448.0f, LEAST_SCALE = 1.0f / (448 * 512); /* as reference.SCALE_FLOOR */

/* Scales of consecutive tokens of a head. */
template <int TOKENS> struct __align__(16) TokenScales { float keys[TOKENS], values[TOKENS]; };

/* Where a token's key is in the cache; its value's first dimension; its scale, from the scales of block 0 on. */
INLINE i64 key_place(i64 slot, int kv_heads, int head) { return ((slot / BLOCK * BLOCK_ROWS + slot % BLOCK) * kv_heads + head) * DIM; }
INLINE i64 value_place(i64 slot, int kv_heads, int head) { return ((slot / BLOCK * BLOCK_ROWS + BLOCK) * kv_heads + head * BLOCK) * DIM + slot % BLOCK; }
INLINE i64 scale_place(i64 slot, int kv_heads, int head) { return slot / BLOCK * kv_heads * (BLOCK_ROWS * DIM / 4) + head * BLOCK + slot % BLOCK; }
/* The scale that maps a head's amax to the largest code. */
INLINE float scale_of(float most) { return fmaxf(most / LARGEST_CODE, LEAST_SCALE); }

/* Of a value's scale; 0 for memory that no token was written to, whose probability is 0. */
INLINE float log2_of(float scale) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(scale));
    return scale > 0 ? y : 0;
}
INLINE float inverse_of(float scale) { return scale > 0 ? __fdividef(1, scale) : 0; }

/* By one thread: bulk copies of a block's scales of a head, 512 bytes in all. */
INLINE void copy_scales(float *keys, float *values, const float *k_scale, const float *v_scale, int block, int kv_heads, int head, const u64 *full) {
    const i64 place = scale_place((i64)block * BLOCK, kv_heads, head);
    copy(address(keys), k_scale + place, 4 * BLOCK, address(full));
    copy(address(values), v_scale + place, 4 * BLOCK, address(full));
}
