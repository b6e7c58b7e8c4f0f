// sign(x) of every accepted type as one bit: 1 for x >= 0, including 0.0 and -0.0, and 0 otherwise,
// including NaN. For bool, true is +1.
#pragma once

struct float16_bits { unsigned short bits; };
struct bfloat16_bits { unsigned short bits; };

template <typename T> __device__ __forceinline__ bool nonnegative(T x) { return x >= T(0); }
// From its bits, because CuPy compiles with -ftz=true, which makes negative denormals compare as 0.
// As integers, values are ordered up to +infinity; above it come NaNs, then the negatives, of which
// only -0.0 counts as +1.
__device__ __forceinline__ bool nonnegative(float x) {
  const unsigned int bits = __float_as_uint(x);
  return bits <= 0x7f800000u || bits == 0x80000000u;
}
__device__ __forceinline__ bool nonnegative(bool x) { return x; }
__device__ __forceinline__ bool nonnegative(float16_bits x) {
  return x.bits <= 0x7c00u || x.bits == 0x8000u;
}
__device__ __forceinline__ bool nonnegative(bfloat16_bits x) {
  return x.bits <= 0x7f80u || x.bits == 0x8000u;
}

// Stands for an element that does not exist: padding bits are 0, so a negative value.
template <typename T> __device__ __forceinline__ T missing() { return T(-1); }
template <> __device__ __forceinline__ bool missing<bool>() { return false; }
template <> __device__ __forceinline__ float16_bits missing<float16_bits>() { return {0xbc00u}; }
template <> __device__ __forceinline__ bfloat16_bits missing<bfloat16_bits>() { return {0xbf80u}; }

// The signs of a whole register of small elements: in the top bit of each, with 0 in the other bits.
// Comparisons would take an instruction or two per element.
template <typename T> __device__ __forceinline__ unsigned nonnegative_each(unsigned x);
template <> __device__ __forceinline__ unsigned nonnegative_each<signed char>(unsigned x) {
  return ~x & 0x80808080u;
}
template <> __device__ __forceinline__ unsigned nonnegative_each<bool>(unsigned x) {
  return ((x & 0x7f7f7f7fu) + 0x7f7f7f7fu | x) & 0x80808080u;
}
template <> __device__ __forceinline__ unsigned nonnegative_each<short>(unsigned x) {
  return ~x & 0x80008000u;
}
// Half precision: bit patterns up to INFINITY_BITS, and -0.0, are not negative. Sums with the bits of
// an element without its sign reach the top bit and carry no further.
template <unsigned INFINITY_BITS>
__device__ __forceinline__ unsigned nonnegative_halves(unsigned x) {
  const unsigned size = x & 0x7fff7fffu;
  const unsigned nan = size + (0x7fffu - INFINITY_BITS) * 0x00010001u, nonzero = size + 0x7fff7fffu;
  return ~(x & nonzero | nan) & 0x80008000u;
}
template <> __device__ __forceinline__ unsigned nonnegative_each<float16_bits>(unsigned x) {
  return nonnegative_halves<0x7c00u>(x);
}
template <> __device__ __forceinline__ unsigned nonnegative_each<bfloat16_bits>(unsigned x) {
  return nonnegative_halves<0x7f80u>(x);
}
