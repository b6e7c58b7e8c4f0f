/* Bits of a word that are set. Define NET_POPCOUNT before this header to use another. */
#ifndef NET_POPCOUNT
#if defined(__POPCNT__) || defined(__aarch64__) || defined(__riscv_zbb) || defined(__wasm__)
#define NET_POPCOUNT(x) ((int32_t)__builtin_popcountl((unsigned long)(x)))
#else
#define NET_POPCOUNT(x) net_popcount(x)
#endif
#endif

static inline int32_t net_popcount(uint32_t x)
{
    x -= (x >> 1) & UINT32_C(0x55555555);
    x = (x & UINT32_C(0x33333333)) + ((x >> 2) & UINT32_C(0x33333333));
    x = (x + (x >> 4)) & UINT32_C(0x0F0F0F0F);
    return (int32_t)((x * UINT32_C(0x01010101)) >> 24);
}

/* Product of signs: each pair of equal signs adds 1, each pair of different signs subtracts 1. The
   bits beyond the end of a vector are 0, in both. */
static inline int32_t net_signs_product(const uint32_t *x, const uint32_t *w, int32_t inputs)
{
    int32_t different = 0;
    for (int32_t i = 0; i < (inputs + 31) / 32; ++i) {
        different += NET_POPCOUNT(x[i] ^ w[i]);
    }
    return inputs - 2 * different;
}

/* Sort the bits of pixels by their place: word 8*i + b has bit b of pixels 32*i to 32*i + 31.
   Returns the sum of all pixels. */
static inline int32_t net_bit_planes(const uint8_t *pixels, int32_t inputs, uint32_t *planes)
{
    int32_t sum = 0;
    for (int32_t i = 0; i < (inputs + 31) / 32 * 8; ++i) {
        planes[i] = 0;
    }
    for (int32_t i = 0; i < inputs; ++i) {
        const uint32_t pixel = pixels[i];
        sum += (int32_t)pixel;
        for (int32_t b = 0; b < 8; ++b) {
            planes[i / 32 * 8 + b] |= ((pixel >> b) & 1) << (i % 32);
        }
    }
    return sum;
}

/* Product of pixels and signs: twice the sum of the pixels whose sign is +1, less that of all. */
static inline int32_t net_pixels_product(const uint32_t *planes, int32_t sum, const uint32_t *w,
                                         int32_t inputs)
{
    int32_t plus = 0;
    for (int32_t i = 0; i < (inputs + 31) / 32; ++i) {
        for (int32_t b = 0; b < 8; ++b) {
            plus += NET_POPCOUNT(planes[8 * i + b] & w[i]) * (1 << b);
        }
    }
    return 2 * plus - sum;
}

/* Whether sign i of a vector is +1. */
static inline int net_is_plus(const uint32_t *x, int32_t i)
{
    return (int)((x[i / 32] >> (i % 32)) & 1);
}

static inline void net_clear(uint32_t *x, int32_t count)
{
    for (int32_t i = 0; i < (count + 31) / 32; ++i) {
        x[i] = 0;
    }
}

static inline void net_put(uint32_t *x, int32_t i, int plus)
{
    x[i / 32] |= (uint32_t)plus << (i % 32);
}
