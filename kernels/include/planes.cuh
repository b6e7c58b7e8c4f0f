// Packing a tile of 128 x 128 numbers of a few bits to bit planes, along its rows or its columns.
//
// A warp takes 32 x 32 numbers, a lane a column, and makes a word of each plane. Along the rows, the lanes
// turn these words. In shared memory four words make 16 bytes, one piece of a line (layout.cuh), which one
// thread stores.
#pragma once

#include "layout.cuh"

constexpr int PLANE_TILE = 128, PLANE_THREADS = 256;
constexpr int PLANE_PARTS = PLANE_TILE / 32;  // of a warp's size, each way

// Lines of one direction: those of a whole matrix in memory, ...
struct PlaneLines {
  u32* words;  // zeros past the elements of a line, when the kernel starts
  int* sums;   // of the numbers of each line, added to; zeros when the kernel starts
  i64 lines, chunks;  // chunks of a plane
};

// ... and those of a tile in shared memory.
template <int COUNT> struct PlaneWords { u32 at[COUNT][PLANE_TILE][PLANE_PARTS]; };

// A lane's 32 numbers of COUNT bits, collected eight at a time.
//
// Eight numbers of four bits fill a word, in an order from which two exchanges make a byte of each bit:
// of a place's index in the word, bits 4 and 1 change sides, and 3 and 0.
template <int COUNT> struct Planes {
  static constexpr int FOURS = (COUNT + 3) / 4;
  u32 eights[FOURS][4];

  // Numbers 8 e to 8 e + 7; `number(i)` is one of them, whose higher bits are ignored.
  template <typename Number> __device__ __forceinline__ void take(int e, const Number& number) {
    u32 each[8];
#pragma unroll
    for (int i = 0; i < 8; i++) each[i] = number(i);
#pragma unroll
    for (int part = 0; part < FOURS; part++) {
      u32 x = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) x |= (each[i] >> 4 * part & 15u) << place_of(i);
      eights[part][e] = exchanged(x);
    }
  }
  // The same of numbers that all have been increased by `more`, and are below 16 without it.
  template <typename Number>
  __device__ __forceinline__ void take_more(int e, u32 more, const Number& number) {
    if constexpr (COUNT > 4) {
      take(e, [&](int i) { return number(i) - more; });
    } else {
      u32 x = 0u - more * 0x11111111u;
#pragma unroll
      for (int i = 0; i < 8; i++) x += number(i) << place_of(i);
      eights[0][e] = exchanged(x);
    }
  }
  static __device__ __forceinline__ int place_of(int i) { return 4 * ((i & 3) << 1 | i >> 2); }
  static __device__ __forceinline__ u32 exchanged(u32 x) {
    u32 t = (x >> 14 ^ x) & 0x0000ccccu;
    x ^= t ^ t << 14;
    t = (x >> 7 ^ x) & 0x00aa00aau;
    return x ^ t ^ t << 7;
  }
  // The word of a plane, of which 0 is the highest: bit i of number i.
  __device__ __forceinline__ u32 word(int plane) const {
    const int bit = COUNT - 1 - plane;
    const u32(&x)[4] = eights[bit / 4];
    const u32 bytes = 0x0040 + 0x0011 * (bit % 4);
    return __byte_perm(__byte_perm(x[0], x[1], bytes), __byte_perm(x[2], x[3], bytes), 0x5410);
  }
};

// Turn 32 x 32 bits, a word in each lane: bit i of lane j becomes bit j of lane i.
__device__ __forceinline__ u32 turned(u32 x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) {
    u32 low = 0;  // the places whose number does not have the bit `apart`
#pragma unroll
    for (int bit = 0; bit < 32; bit++)
      if (!(bit & apart)) low |= 1u << bit;
    const u32 other = __shfl_xor_sync(0xffffffffu, x, apart);
    x = lane & apart ? (x & ~low) | (other >> apart & low) : (x & low) | (other & low) << apart;
  }
  return x;
}

// Store one line of a tile: all planes of the piece from element `first` on, of line `line` of matrix
// `item`, which is number `index` of the tile.
template <int COUNT>
__device__ __forceinline__ void store_piece(const PlaneLines& p, const PlaneWords<COUNT>& words, i64 item,
                                            i64 line, int index, i64 first) {
  if (line >= padded_lines(p.lines)) return;
  const u32 position = position_of((u32)line);
  const int piece = swizzled_piece(position, (int)(first % CHUNK_BITS / PLANE_TILE));
  int sum = 0;
#pragma unroll
  for (int plane = 0; plane < COUNT; plane++) {
    const uint4 bits = *(const uint4*)words.at[plane][index];
    const i64 chunk = plane * p.chunks + first / CHUNK_BITS;
    u32* to = p.words + line_chunk(item, COUNT * p.chunks, chunk, p.lines, position);
    ((uint4*)to)[piece] = bits;
    sum = 2 * sum + __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
  }
  if (sum && line < p.lines) atomicAdd(p.sums + item * p.lines + line, sum);
}
