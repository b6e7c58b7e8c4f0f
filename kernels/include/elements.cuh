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

template <int V, typename E>
__device__ __forceinline__ void to_floats(const Vector<E, V>& x, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = to_float(x.at[i]);
}
// Two at a time. Conversion instructions have a quarter of the usual rate: the bits of z + 2**15 are
// those of the float 2**23 + 2**15 + z instead.
template <int V> __device__ __forceinline__ void to_floats(const Vector<short, V>& x, float (&v)[V]) {
  if constexpr (V % 2) {
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = to_float(x.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const u32 two = *(const u32*)&x.at[i] ^ 0x80008000u;
      v[i] = __fadd_rn(__uint_as_float(__byte_perm(two, 0x4b000000u, 0x7410)), -8421376.0f);
      v[i + 1] = __fadd_rn(__uint_as_float(__byte_perm(two, 0x4b000000u, 0x7432)), -8421376.0f);
    }
  }
}
template <int V>
__device__ __forceinline__ void to_floats(const Vector<bfloat16_bits, V>& x, float (&v)[V]) {
  if constexpr (V % 2) {
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = to_float(x.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const u32 two = *(const u32*)&x.at[i];
      v[i] = __uint_as_float(two << 16);
      v[i + 1] = __uint_as_float(two & 0xffff0000u);
    }
  }
}

template <int V, typename E> __device__ __forceinline__ void load(const E* from, float (&v)[V]) {
  const Vector<E, V> x = *(const Vector<E, V>*)from;  // one load
  to_floats<V>(x, v);
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

// Set elements to 0 where their bit is 0.
template <typename E, int V>
__device__ __forceinline__ void keep_only(Vector<E, V>& x, u32 bits) {
  if constexpr (sizeof(E) == 2 && V == 4) {
    // Each of the four bits at the top of a byte, then as a mask of 16 bits (prmt replicates it).
    const u32 spread = (bits & 15) * 0x10204080u;
    u32 low, high, *pairs = (u32*)&x;
    asm("prmt.b32 %0, %1, 0, 0x9988;" : "=r"(low) : "r"(spread));
    asm("prmt.b32 %0, %1, 0, 0xbbaa;" : "=r"(high) : "r"(spread));
    pairs[0] &= low;
    pairs[1] &= high;
  } else {
#pragma unroll
    for (int i = 0; i < V; i++)
      if (!(bits >> i & 1)) x.at[i] = E{};
  }
}

// Combine the V bits of each of 32 / V lanes into a word of 32 columns, returned in all these lanes.
template <int V> __device__ __forceinline__ u32 join_bits(u32 bits, int lane) {
  if constexpr (V == 1) return __ballot_sync(0xffffffffu, bits);
  bits <<= lane % (32 / V) * V;
#pragma unroll
  for (int apart = 1; apart < 32 / V; apart <<= 1) bits |= __shfl_xor_sync(0xffffffffu, bits, apart);
  return bits;
}

// The same for COUNT words at a time: bit V * r + i of a lane is that of its column i in word r. Lane r of a
// group of 32 / V gets word r, and the lanes from COUNT on get no word.
template <int V, int COUNT> __device__ __forceinline__ u32 join_rows(u32 bits, int lane) {
  static_assert(COUNT <= 32 / V && COUNT * V <= 32, "a lane for each word");
  if constexpr (V == 4) {
    // A matrix of 8 x 8 nibbles, a row per lane, is transposed: lanes exchange halves, bytes, nibbles.
    bits = __byte_perm(bits, __shfl_xor_sync(0xffffffffu, bits, 4), lane & 4 ? 0x3276 : 0x5410);
    bits = __byte_perm(bits, __shfl_xor_sync(0xffffffffu, bits, 2), lane & 2 ? 0x3715 : 0x6240);
    const u32 other = __shfl_xor_sync(0xffffffffu, bits, 1);
    const u32 keep = lane & 1 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
    return bits & keep | __funnelshift_l(other, other, lane & 1 ? 28 : 4) & ~keep;
  } else {
    u32 word = 0;
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      const u32 joined = join_bits<V>(bits >> V * r & ((1u << V) - 1), lane);
      if (lane % (32 / V) == r) word = joined;
    }
    return word;
  }
}
