// Turns a matrix of signs that is packed along its columns into one packed along its rows, or the other
// way round: line i of the result has element i of every line.
//
// A block takes 128 elements of 128 lines: one piece of each (layout.cuh). A warp turns 32 x 32 bits.
// What bounds it: reading and writing pieces of 16 bytes.

#include "planes.cuh"

struct Turn {
  const u32* words;
  i64 lines, k, chunks;  // of what is turned
  PlaneLines to;
};

extern "C" __global__ void __launch_bounds__(PLANE_THREADS) turn(const __grid_constant__ Turn p) {
  __shared__ __align__(16) u32 from[PLANE_TILE][PLANE_PARTS];
  __shared__ __align__(16) PlaneWords<1> words;
  const u32 across = (u32)((p.k + PLANE_TILE - 1) / PLANE_TILE);
  const i64 line = (i64)(blockIdx.x / across) * PLANE_TILE, first = (i64)(blockIdx.x % across) * PLANE_TILE;
  if (threadIdx.x < PLANE_TILE) {
    const i64 own = line + threadIdx.x;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (own < p.lines) {
      const u32 position = position_of((u32)own);
      const int piece = swizzled_piece(position, (int)(first % CHUNK_BITS / PLANE_TILE));
      bits = ((const uint4*)(p.words + line_chunk(0, p.chunks, first / CHUNK_BITS, p.lines, position)))[piece];
    }
    *(uint4*)from[threadIdx.x] = bits;
  }
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int part = warp; part < PLANE_PARTS * PLANE_PARTS; part += PLANE_THREADS / 32) {
    const int i = part / PLANE_PARTS, j = part % PLANE_PARTS;
    words.at[0][32 * j + lane][i] = turned(from[32 * i + lane][j]);
  }
  __syncthreads();
  if (threadIdx.x < PLANE_TILE)
    store_piece(p.to, words, 0, first + threadIdx.x, (int)threadIdx.x, line);
}
