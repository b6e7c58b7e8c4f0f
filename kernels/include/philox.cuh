// Philox-4x32-10, as cupybnn/backends/random.py defines it: the seed is the key, the high half of the
// counter is the index of the draw, and the low half that of the block of four words within it.
#pragma once

#include "layout.cuh"

__device__ __forceinline__ uint4 philox(u64 seed, u64 draw, u64 block) {
  u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = (u32)draw, c3 = (u32)(draw >> 32);
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
    c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
    c1 = (u32)p1;
    c3 = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// The word of an element.
__device__ __forceinline__ u32 random_word(u64 seed, u64 draw, u64 at) {
  const uint4 w = philox(seed, draw, at >> 2);
  const int i = (int)at & 3;
  return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}

// The whole number of cupybnn.backends.random.bell: the sum of a word's four bytes, less 510.
__device__ __forceinline__ int bell(u64 seed, u64 draw, u64 at) {
  const u32 word = random_word(seed, draw, at);
  const u32 pairs = (word & 0xff00ffu) + (word >> 8 & 0xff00ffu);
  return (int)((pairs & 0xffffu) + (pairs >> 16)) - 510;
}

// One dropout: the element at a position is kept if its word is at most `last`.
struct Draw {
  u64 seed, number;
  u32 last;
  // Bits of `count` <= 32 elements from a position on.
  __device__ __forceinline__ u32 kept(u64 first, int count) const {
    u32 bits = 0;
    uint4 words = philox(seed, number, first >> 2);
    for (int i = 0; i < count; i++) {
      const int at = (int)(first + i) & 3;
      if (i && at == 0) words = philox(seed, number, (first + i) >> 2);
      const u32 word = at == 0 ? words.x : at == 1 ? words.y : at == 2 ? words.z : words.w;
      bits |= (u32)(word <= last) << i;
    }
    return bits;
  }
};
