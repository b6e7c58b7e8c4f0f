// Packing a tile of 128 x 128 numbers of a few bits to bit planes, along its rows, its columns, or
// both.
//
// A warp takes 32 x 32 numbers, a lane a column. A ballot makes a word of a row and a plane; a lane adds
// up the words of its column bit by bit. In shared memory four such words make 16 bytes, one piece of a
// line (layout.cuh), which one thread stores.
#pragma once

#include "layout.cuh"

constexpr int PLANE_TILE = 128, PLANE_THREADS = 256;
constexpr int PLANE_PARTS = PLANE_TILE / 32;  // of a warp's size, each way

// Lines of one direction: those of a whole matrix in memory, ...
struct PlaneLines {
  u32* words;  // zeros past the elements of a line, when the kernel starts; null: not wanted
  int* sums;   // of the numbers of each line, added to; zeros when the kernel starts
  i64 lines, chunks;  // chunks of a plane
};

// ... and those of a tile in shared memory.
template <int COUNT> struct PlaneWords { u32 at[COUNT][PLANE_TILE][PLANE_PARTS]; };

// Pack the numbers of a warp's part (down, across) of the tile; `number(i)` is that of row i, for the
// lane's column. Bits from COUNT on are ignored.
template <int COUNT, typename Number>
__device__ __forceinline__ void part_by_rows(PlaneWords<COUNT>& words, int down, int across,
                                             const Number& number) {
  const int lane = threadIdx.x & 31;
  u32 mine[COUNT];
#pragma unroll
  for (int row = 0; row < 32; row++) {
    const u32 n = number(row);
#pragma unroll
    for (int plane = 0; plane < COUNT; plane++) {
      const u32 word = __ballot_sync(0xffffffffu, n >> (COUNT - 1 - plane) & 1);
      if (row == lane) mine[plane] = word;
    }
  }
#pragma unroll
  for (int plane = 0; plane < COUNT; plane++) words.at[plane][32 * down + lane][across] = mine[plane];
}
template <int COUNT, typename Number>
__device__ __forceinline__ void part_by_columns(PlaneWords<COUNT>& words, int down, int across,
                                                const Number& number) {
  const int lane = threadIdx.x & 31;
  u32 mine[COUNT] = {};
#pragma unroll
  for (int row = 0; row < 32; row++) {
    const u32 n = number(row);
#pragma unroll
    for (int plane = 0; plane < COUNT; plane++) mine[plane] |= (n >> (COUNT - 1 - plane) & 1) << row;
  }
#pragma unroll
  for (int plane = 0; plane < COUNT; plane++) words.at[plane][32 * across + lane][down] = mine[plane];
}

// Store one line of a tile: all planes of the piece from element `first` on, of the line `line` of the
// matrix number `item`, which is number `index` of the tile.
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
