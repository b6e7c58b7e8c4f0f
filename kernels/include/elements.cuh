// Element types of a training step, vector loads and stores, and masks with one bit per element.
//
// The translation unit sets REAL, the type of dense operands and gradients: float or bfloat16_bits.
#pragma once

#include "layout.cuh"
#include "signs.cuh"

typedef REAL real_t;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(short x) { return (float)x; }
__device__ __forceinline__ float to_float(bfloat16_bits x) {
  return __uint_as_float((u32)x.bits << 16);
}
__device__ __forceinline__ float to_float(float16_bits x) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(x.bits));
  return v;
}

__device__ __forceinline__ void from_float(float v, float& to) { to = v; }
__device__ __forceinline__ void from_float(float v, bfloat16_bits& to) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const u32 bits = __float_as_uint(v);  // to nearest even; NaN stays NaN
  to.bits = (bits & 0x7fffffffu) > 0x7f800000u
                ? (unsigned short)((bits >> 16) | 0x40u)
                : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

template <typename E, int V> struct alignas(sizeof(E) * V) Vector { E at[V]; };

template <int V, typename E> __device__ __forceinline__ void load(const E* from, float (&v)[V]) {
  const Vector<E, V> x = *(const Vector<E, V>*)from;
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = to_float(x.at[i]);
}
template <int V, typename E> __device__ __forceinline__ void store(E* to, const float (&v)[V]) {
  Vector<E, V> x;
#pragma unroll
  for (int i = 0; i < V; i++) from_float(v[i], x.at[i]);
  *(Vector<E, V>*)to = x;
}

// Masks with one bit per element, row-major; a row is a whole number of words.
__device__ __forceinline__ i64 mask_words(i64 cols) { return (cols + 31) >> 5; }
// The bits of a lane's columns, from the lowest bit on.
__device__ __forceinline__ u32 mask_bits(const u32* mask, i64 row, i64 col, i64 cols) {
  return mask[row * mask_words(cols) + (col >> 5)] >> (col & 31);
}

// Combine the V bits of each of 32 / V lanes into a word of 32 columns, returned in all these lanes.
template <int V> __device__ __forceinline__ u32 join_bits(u32 bits, int lane) {
  if constexpr (V == 1) return __ballot_sync(0xffffffffu, bits);
  bits <<= lane % (32 / V) * V;
#pragma unroll
  for (int apart = 1; apart < 32 / V; apart <<= 1) bits |= __shfl_xor_sync(0xffffffffu, bits, apart);
  return bits;
}
