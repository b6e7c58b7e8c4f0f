// A gradient as signed levels of PLANES bits, packed along its rows and along its columns; see
// cupybnn/backends/levels_gradient.py, which defines the numbers.
//
// `most` computes the greatest magnitude of each row and column, as the bits of a float: integers order
// them alike, and a NaN is above infinity. A block takes 256 rows of 256 columns.
//
// `quantize` rounds each element twice, by the scale of its row and that of its column, with one random
// number for both, and packs tiles of 128 x 128 (planes.cuh). Sixteen bits of a Philox word decide: eight
// elements of a column share a block of four words. In a part of a batch the eight may begin before a
// thread's rows: OFFSET says by how many, and the rest is taken from the next block.
//
// What bounds them: reading the gradient; in `quantize` also some thirty instructions for an element.
//
// The translation unit sets REAL (elements.cuh), PLANES and OFFSET, from 0 to 7.

#include "elements.cuh"
#include "philox.cuh"
#include "planes.cuh"

// Filled by cupybnn/backends/cuda/planes.py, field by field in this order.
struct Gradient {
  const real_t* g;  // (rows, cols)
  i64 rows, cols;
  u32* row_most;    // zeros when `most` starts
  u32* col_most;
  float* row_scale; // greatest magnitude / (2**PLANES - 1)
  float* col_scale;
  PlaneLines by_row, by_col;
  u64 seed;
  i64 draw;         // added to *step, if that is not null
  const i64* step;
  i64 first;        // of blocks of Philox, in rows of eight rows; OFFSET rows more come before g
};

constexpr float GREATEST = (float)((1 << PLANES) - 1), HALF = 0.5f * GREATEST;
constexpr int MOST_ROWS = 256, MOST_COLS = 256;

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ u32 greatest_of_warp(u32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int step = 16; step; step >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
#endif
}

// Two neighbors at a time if a row is a whole number of pairs; of bfloat16 with their bits in one word.
template <typename T> struct Pair;
template <> struct Pair<float> {
  u32 first, second;
  __device__ __forceinline__ explicit Pair(const float* from) {
    const uint2 v = __ldg((const uint2*)from);
    first = v.x & 0x7fffffffu, second = v.y & 0x7fffffffu;
  }
};
template <> struct Pair<bfloat16_bits> {
  u32 first, second;
  __device__ __forceinline__ explicit Pair(const bfloat16_bits* from) {
    const u32 v = __ldg((const u32*)from);
    first = v << 16 & 0x7fffffffu, second = v & 0x7fff0000u;
  }
};

extern "C" __global__ void __launch_bounds__(256) most(const __grid_constant__ Gradient p) {
  __shared__ u32 of_column[MOST_COLS];
  const u32 across = (u32)((p.cols + MOST_COLS - 1) / MOST_COLS);
  const i64 row = (i64)(blockIdx.x / across) * MOST_ROWS, col = (i64)(blockIdx.x % across) * MOST_COLS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  of_column[threadIdx.x] = 0;
  __syncthreads();
  constexpr int EACH = MOST_COLS / 64;
  u32 own[EACH][2] = {};
  const i64 end = min(p.rows, row + (warp + 1) * 32);
  const bool pairs = p.cols % 2 == 0;
#pragma unroll 4
  for (i64 r = row + warp * 32; r < end; r++) {
    u32 all = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const i64 c = col + 64 * i + 2 * lane;
      const real_t* from = p.g + r * p.cols + c;
      u32 x = 0, y = 0;
      if (pairs) {
        if (c < p.cols) {
          const Pair<real_t> both(from);
          x = both.first, y = both.second;
        }
      } else {
        if (c < p.cols) x = magnitude(to_float(from[0]));
        if (c + 1 < p.cols) y = magnitude(to_float(from[1]));
      }
      own[i][0] = max(own[i][0], x), own[i][1] = max(own[i][1], y);
      all = max(all, max(x, y));
    }
    all = greatest_of_warp(all);
    if (lane == 0) atomicMax(p.row_most + r, all);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) atomicMax(of_column + 64 * i + 2 * lane + j, own[i][j]);
  __syncthreads();
  if (col + threadIdx.x < p.cols) atomicMax(p.col_most + col + threadIdx.x, of_column[threadIdx.x]);
}

// What an element is multiplied by, from the greatest magnitude.
__device__ __forceinline__ float inverse_of(u32 greatest) {
  const float inverse = __fdiv_rn(HALF, __uint_as_float(greatest));
  return magnitude(inverse) < 0x7f800000u ? inverse : 0.0f;
}
// The number of a level, increased by MORE; `random` is HALF plus a number in [0, 1).
constexpr u32 MORE = 0x4b000000u;  // the bits of 2**23
__device__ __forceinline__ u32 number_of(float g, float inverse, float random) {
  const float v = __fadd_rn(__fmul_rn(g, inverse), random);
  // To the integer below, at the lowest bits of a float. A NaN becomes 0.
  return __float_as_uint(__fadd_rd(fminf(fmaxf(v, 0.0f), GREATEST), 8388608.0f));
}

// Round 32 elements of column c, from row r on; all of them exist if WHOLE. `row_inverse` are those of the rows.
template <bool WHOLE>
__device__ __forceinline__ void quantize_some(const Gradient& p, i64 r, i64 c, u64 draw,
                                              const float* row_inverse, float by_col,
                                              Planes<PLANES>& of_row, Planes<PLANES>& of_col) {
  const auto exists = [&](int row) { return WHOLE || (r + row < p.rows && c < p.cols); };
  const real_t* from = p.g + r * p.cols + c;
  u64 block = (u64)((p.first + r / 8) * p.cols + c);
#if OFFSET
  uint4 following = philox(p.seed, draw, block);
#endif
#pragma unroll
  for (int eight = 0; eight < 4; eight++, block += (u64)p.cols) {
    float g[8];
#pragma unroll
    for (int k = 0; k < 8; k++, from += p.cols) g[k] = exists(8 * eight + k) ? to_float(*from) : 0.0f;
#if OFFSET
    const uint4 four = following;
    following = philox(p.seed, draw, block + (u64)p.cols);
    const u32 random[8] = {four.x,      four.y,      four.z,      four.w,
                           following.x, following.y, following.z, following.w};
#else
    const uint4 four = philox(p.seed, draw, block);
    const u32 random[4] = {four.x, four.y, four.z, four.w};
#endif
    float drawn[8];  // HALF + random number; what does not exist becomes 0
#pragma unroll
    for (int k = 0; k < 8; k++) {
      // 1 + sixteen bits / 2**16, exactly, and so is the sum.
      const int at = OFFSET + k;
      const u32 placed = at & 1 ? random[at / 2] >> 9 : random[at / 2] << 7;
      drawn[k] = __uint_as_float(0x3f800000u | (placed & 0x007fff80u)) + (HALF - 1.0f);
      if (!exists(8 * eight + k)) drawn[k] = -1.0f;
    }
    of_row.take_more(eight, MORE,
                     [&](int k) { return number_of(g[k], row_inverse[8 * eight + k], drawn[k]); });
    of_col.take_more(eight, MORE, [&](int k) { return number_of(g[k], by_col, drawn[k]); });
  }
}

extern "C" __global__ void __launch_bounds__(PLANE_THREADS) quantize(const __grid_constant__ Gradient p) {
  __shared__ __align__(16) PlaneWords<PLANES> row_words, col_words;
  __shared__ float row_inverse[PLANE_TILE], col_inverse[PLANE_TILE];
  const u32 across = (u32)((p.cols + PLANE_TILE - 1) / PLANE_TILE);
  const i64 row = (i64)(blockIdx.x / across) * PLANE_TILE, col = (i64)(blockIdx.x % across) * PLANE_TILE;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, index = threadIdx.x & (PLANE_TILE - 1);
  if (threadIdx.x < PLANE_TILE) {
    const bool exists = row + index < p.rows;
    const u32 greatest = exists ? p.row_most[row + index] : 0;
    row_inverse[index] = inverse_of(greatest);
    if (exists && col == 0) p.row_scale[row + index] = __fdiv_rn(__uint_as_float(greatest), GREATEST);
  } else {
    const bool exists = col + index < p.cols;
    const u32 greatest = exists ? p.col_most[col + index] : 0;
    col_inverse[index] = inverse_of(greatest);
    if (exists && row == 0) p.col_scale[col + index] = __fdiv_rn(__uint_as_float(greatest), GREATEST);
  }
  __syncthreads();
  const u64 draw = (u64)(p.draw + (p.step ? *p.step : 0));
  const bool whole = row + PLANE_TILE <= p.rows && col + PLANE_TILE <= p.cols;
#pragma unroll 1
  for (int part = warp; part < PLANE_PARTS * PLANE_PARTS; part += PLANE_THREADS / 32) {
    const int i = part / PLANE_PARTS, j = part % PLANE_PARTS;
    const i64 r = row + 32 * i, c = col + 32 * j + lane;
    const float by_col = col_inverse[32 * j + lane];
    Planes<PLANES> of_row, of_col;
    if (whole)
      quantize_some<true>(p, r, c, draw, row_inverse + 32 * i, by_col, of_row, of_col);
    else
      quantize_some<false>(p, r, c, draw, row_inverse + 32 * i, by_col, of_row, of_col);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      row_words.at[plane][32 * i + lane][j] = turned(of_row.word(plane));
      col_words.at[plane][32 * j + lane][i] = of_col.word(plane);
    }
  }
  __syncthreads();
  if (threadIdx.x < PLANE_TILE) store_piece(p.by_row, row_words, 0, row + index, index, col);
  else store_piece(p.by_col, col_words, 0, col + index, index, row);
}
