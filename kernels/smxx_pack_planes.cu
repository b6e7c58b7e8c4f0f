// Packs numbers of PLANES bits, bytes, to bit planes: along the rows of a matrix or along its columns.
//
// A block takes a tile of 128 x 128 numbers (planes.cuh). What bounds it: reading the bytes.
//
// The translation unit sets PLANES.

#include "planes.cuh"

// Filled by cupybnn/backends/cuda/planes.py, field by field in this order.
struct Numbers {
  const unsigned char* numbers;  // (batch, rows, cols)
  i64 batch, rows, cols, along_columns;
  PlaneLines to;
};

extern "C" __global__ void __launch_bounds__(PLANE_THREADS) pack_planes(const __grid_constant__ Numbers p) {
  __shared__ __align__(16) PlaneWords<PLANES> words;
  const u32 across = (u32)((p.cols + PLANE_TILE - 1) / PLANE_TILE);
  const u32 down = (u32)((p.rows + PLANE_TILE - 1) / PLANE_TILE);
  const u32 item = blockIdx.x / (down * across), tile = blockIdx.x - item * down * across;
  const i64 row = (i64)(tile / across) * PLANE_TILE, col = (i64)(tile % across) * PLANE_TILE;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int part = warp; part < PLANE_PARTS * PLANE_PARTS; part += PLANE_THREADS / 32) {
    const int i = part / PLANE_PARTS, j = part % PLANE_PARTS;
    const i64 r = row + 32 * i, c = col + 32 * j + lane;
    const unsigned char* from = p.numbers + (item * p.rows + r) * p.cols + c;
    u32 n[32];
#pragma unroll
    for (int k = 0; k < 32; k++) n[k] = r + k < p.rows && c < p.cols ? from[k * p.cols] : 0;
    auto number = [&](int k) { return n[k]; };
    if (p.along_columns) part_by_columns(words, i, j, number);
    else part_by_rows(words, i, j, number);
  }
  __syncthreads();
  if (threadIdx.x >= PLANE_TILE) return;
  const int index = threadIdx.x;
  if (p.along_columns) store_piece(p.to, words, item, col + index, index, row);
  else store_piece(p.to, words, item, row + index, index, col);
}
