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
