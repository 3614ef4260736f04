/* Types that all kernels use. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct __align__(64) Map { u8 opaque[128]; }; /* a TMA tensor map (CUtensorMap) */
