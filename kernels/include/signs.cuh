// sign(x) of every accepted type as one bit: 1 for x >= 0, so for 0.0 and -0.0, and 0 for the rest,
// so for NaN. bool has no sign of its own: true is +1.
#pragma once

struct float16_bits { unsigned short bits; };
struct bfloat16_bits { unsigned short bits; };

template <typename T> __device__ __forceinline__ bool nonnegative(T x) { return x >= T(0); }
// By its bits, for CuPy compiles with -ftz=true, under which the least negative numbers compare as 0:
// ordered up to +infinity; above it come NaNs, then the negatives, of which only -0.0 counts as +1.
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

// What stands for an element that does not exist: padding is 0 bits, so something negative.
template <typename T> __device__ __forceinline__ T missing() { return T(-1); }
template <> __device__ __forceinline__ bool missing<bool>() { return false; }
template <> __device__ __forceinline__ float16_bits missing<float16_bits>() { return {0xbc00u}; }
template <> __device__ __forceinline__ bfloat16_bits missing<bfloat16_bits>() { return {0xbf80u}; }

// The signs of a register's worth of small elements at a time: in the top bit of each, and 0 in
// the other bits. Comparisons would take an instruction or two for each of them.
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
// Half precision, of which INFINITY_BITS and what is below them, and -0.0, are not negative. Sums
// with what is left of an element without its sign reach the top bit and go no further.
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
