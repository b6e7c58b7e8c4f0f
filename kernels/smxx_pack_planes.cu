// Packs the levels nearest to numbers to bit planes: along the rows of a matrix or along its columns.
// cupybnn/backends/levels.py defines the levels.
//
// A block takes a tile of 128 x 128 numbers (planes.cuh). What bounds it: reading them, if neighbors of a
// row are neighbors in memory; the caller turns the matrix if those of a column are.
//
// The translation unit sets TYPE, the type of the numbers, PLANES, and UNSIGNED.

#include "planes.cuh"
#include "signs.cuh"

// Filled by cupybnn/backends/cuda/planes.py, field by field in this order.
struct Numbers {
  const char* x;
  i64 batch, rows, cols, batch_stride, row_stride, col_stride;  // strides in bytes
  i64 along_columns;
  PlaneLines to;
};

constexpr int TOP = (1 << PLANES) - 1;
// Signed level number n is the nearest from 2 n - 2**PLANES on: half of the integer below.
constexpr int LEAST = UNSIGNED ? 0 : -TOP - 1;

__device__ __forceinline__ u32 number_of_whole(int whole) {
  return UNSIGNED ? whole : (whole >> 1) + (1 << (PLANES - 1));
}
template <typename T> __device__ __forceinline__ u32 number_of(T x) {
  const bool below = x < T(0) && (i64)x < LEAST;  // of an unsigned type, none is
  return number_of_whole(below ? LEAST : x > T(0) && (u64)x > (u64)TOP ? TOP : (int)x);
}
__device__ __forceinline__ u32 number_of(bool x) { return number_of_whole(UNSIGNED ? x : x ? 1 : -1); }
__device__ __forceinline__ u32 number_of(double x) {
  double whole = floor(x);
  if (UNSIGNED && x - whole >= 0.5) whole += 1;
  return number_of_whole((int)fmin(fmax(whole, (double)LEAST), (double)TOP));  // LEAST for NaN
}
__device__ __forceinline__ u32 number_of(float x) {
  float whole = floorf(x);
  if (UNSIGNED && x - whole >= 0.5f) whole += 1;
  // CuPy compiles with -ftz=true: a negative denormal counts as 0, but -1 is below it.
  const u32 bits = __float_as_uint(x);
  if (bits > 0x80000000u && bits < 0x80800000u) whole = -1;
  return number_of_whole((int)fminf(fmaxf(whole, (float)LEAST), (float)TOP));
}
__device__ __forceinline__ u32 number_of(bfloat16_bits x) {
  return number_of(__uint_as_float((u32)x.bits << 16));
}
__device__ __forceinline__ u32 number_of(float16_bits x) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(x.bits));
  return number_of(v);
}

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
    const char* from = p.x + item * p.batch_stride + r * p.row_stride + c * p.col_stride;
    Planes<PLANES> planes;
#pragma unroll
    for (int eight = 0; eight < 4; eight++)
      planes.take(eight, [&](int k) {
        const i64 at = 8 * eight + k;
        return r + at < p.rows && c < p.cols ? number_of(*(const TYPE*)(from + at * p.row_stride)) : 0;
      });
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const u32 word = planes.word(plane);
      if (p.along_columns) words.at[plane][32 * j + lane][i] = word;
      else words.at[plane][32 * i + lane][j] = turned(word);
    }
  }
  __syncthreads();
  if (threadIdx.x >= PLANE_TILE) return;
  const int index = threadIdx.x;
  if (p.along_columns) store_piece(p.to, words, item, col + index, index, row);
  else store_piece(p.to, words, item, row + index, index, col);
}
