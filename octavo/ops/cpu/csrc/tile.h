/* Matrix tiles (AMX): permission, configuration, and the instructions on tiles as macros. Included by kernels.c.

   All eight tiles are always 16 rows of 64 bytes. A thread configures them for the tasks of one job and releases them after
   it: other libraries in the process configure the same registers. With TEST_TILES, loops stand in for the instructions, so
   that the code around them runs on any CPU. */
#define TILE_VALUES 32 /* BF16 values in a row of a tile */
#define TILE_BYTES 1024

#if defined(TEST_TILES)
#define HAS_TILES 1
static _Thread_local struct { unsigned char row[8][16][64]; int configured; } tiles_of_thread;

static void begin_tiles(void) { tiles_of_thread.configured = 1; }
static void end_tiles(void) { memset(&tiles_of_thread, 0, sizeof tiles_of_thread); }

static inline void tile_load(int tile, const void *from, int64_t stride) {
    if (!tiles_of_thread.configured) abort();
    for (int i = 0; i < 16; i++) memcpy(tiles_of_thread.row[tile][i], (const char *)from + i * stride, 64);
}
static inline void tile_store(int tile, void *to, int64_t stride) {
    if (!tiles_of_thread.configured) abort();
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, tiles_of_thread.row[tile][i], 64);
}
static inline void tile_dot(int sum, int a, int b) { /* subnormal sums, which the instruction flushes to zero, are kept */
    if (!tiles_of_thread.configured) abort();
    for (int i = 0; i < 16; i++) {
        float row[16];
        uint16_t x[32], y[32];
        memcpy(row, tiles_of_thread.row[sum][i], 64);
        memcpy(x, tiles_of_thread.row[a][i], 64);
        for (int k = 0; k < 16; k++) {
            memcpy(y, tiles_of_thread.row[b][k], 64);
            for (int j = 0; j < 16; j++)
                for (int of = 0; of < 2; of++) row[j] += bf16_to_float(x[2 * k + of]) * bf16_to_float(y[2 * j + of]);
        }
        memcpy(tiles_of_thread.row[sum][i], row, 64);
    }
}
#define TILE_ZERO(tile) memset(tiles_of_thread.row[tile], 0, TILE_BYTES)
#define TILE_LOAD(tile, from, stride) tile_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) tile_store(tile, to, stride)
#define TILE_DOT(sum, a, b) tile_dot(sum, a, b)
#define TILE_FENCE()

#elif defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM of arch_prctl */
#define TILE_DATA 18              /* the number of the tiles' state */

/* Whether this CPU multiplies BF16 tiles and the system lets this process do so. Permission is for all threads. */
static int tiles_permitted(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & 1u << 27)) return 0;               /* OSXSAVE */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (1u << 22 | 1u << 24)) return 0;     /* AMX-BF16, AMX-TILE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 3u << 17) == 3u << 17 && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

static __attribute__((target("amx-tile"))) void begin_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
    __asm__ volatile("" : : "r"(&all) : "memory"); /* the intrinsic does not say that it reads */
    _tile_loadconfig(&all);
}
static __attribute__((target("amx-tile"))) void end_tiles(void) { _tile_release(); }

#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT(sum, a, b) _tile_dpbf16ps(sum, a, b)
/* Between accesses by tiles and others to the same memory: to the compiler the intrinsics access none. */
#define TILE_FENCE() __asm__ volatile("" : : : "memory")

#else
#define HAS_TILES 0
static int tiles_permitted(void) { return 0; }
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif
