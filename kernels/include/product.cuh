// Arguments of every product kernel, and its epilogue from integers to results.
//
// A kernel computes acc[row][col] = popcount(a_row & b_col), from which the product of the signs is
//     K - 2 popcount(a_row) - 2 popcount(b_col) + 4 acc.
// Arithmetic is modulo 2**32, so the result is right whenever it fits an int32, as it does for every K
// below 2**31, even if 4 acc does not.
//
// One operand may have levels of several bits instead: its chunks are those of all bit planes, the
// highest first, and the other's are read again for each. A kernel doubles acc before each plane but the
// first, so that acc is the sum of the levels' numbers where the other operand's bits are 1. With
// popcounts that are sums of numbers, and top = 2**PLANES - 1, the product is
//     top K - 2 popcount(a_row) - 2 top popcount(b_col) + 4 acc   if a's are the signed levels,
//     -popcount(a_row) + 2 acc                                    if they are unsigned, numbers themselves
// (with row and column exchanged if b's are).
//
// The translation unit sets
//     OUTPUT   one of OUTPUT_*: the type of the result, or its signs, packed
//     SCALED   1: the result is ((product * row scale) * column scale) + bias, each step rounded in
//              float32; a null pointer leaves its step out. 0: the integer itself
//     XOR_ACC  1: acc counts a_row ^ b_col instead, and the product is top K - 2 acc or, of unsigned
//              levels, top popcount(b_col) - acc
//     PLANES, PLANES_OF_B, UNSIGNED  bit planes of one operand, whether it is b, and whether its levels
//              are unsigned; by default 1, 0 and 0, for two operands of signs
//     HALVES   1: acc are numbers of 16 bits, two in a register (Halves of results.cuh); by default 0. For
//              signs, results that are not packed, and K below 2**16
//     DIGITS   0; n > 0: a's lines are unsigned bytes, 128 to a chunk, and b's are n digits each to
//              the base 256, signed bytes; b's chunks are those of the lowest digit first. acc is the
//              product divided by 256**(n - 1) and rounded down, and the threshold one for that
#pragma once

#include "layout.cuh"

#define OUTPUT_INT32 0
#define OUTPUT_FLOAT32 1
#define OUTPUT_FLOAT16 2
#define OUTPUT_BFLOAT16 3
#define OUTPUT_PACKED 4
#define OUTPUT_INT16 5     // the integer modulo 2**16: exact for K below 2**15

#ifndef OUTPUT
#define OUTPUT OUTPUT_INT32
#endif
#ifndef SCALED
#define SCALED 0
#endif
#ifndef XOR_ACC
#define XOR_ACC 0
#endif
#ifndef DIGITS
#define DIGITS 0
#endif
#ifndef PLANES
#define PLANES 1
#endif
#ifndef PLANES_OF_B
#define PLANES_OF_B 0
#endif
#ifndef UNSIGNED
#define UNSIGNED 0
#endif
#ifndef HALVES
#define HALVES 0
#endif

// Filled by cupybnn/backends/cuda/product_launch.py, field by field in this order.
struct Product {
  const uint4* a;
  const uint4* b;
  const int* pop_a;
  const int* pop_b;
  void* out;                  // OUTPUT_PACKED: words, in the layout of layout.cuh
  int* out_pop;               // OUTPUT_PACKED: popcount of each row; zeros when the kernel starts
  const float* row_scale;
  const float* col_scale;
  const float* bias;          // per column, or per row if `swapped`
  const int* threshold;       // OUTPUT_PACKED: per column; bit = (product >= threshold) ^ flip
  const unsigned char* flip;
  int* sums;                  // parts > 1: zeros when the kernel starts, see sm90_xnor_gemm.cu
  i64 m, n, k;
  i64 chunks;                 // of a line of a and of b, in one plane
  i64 batch;
  i64 a_step, b_step;         // 1, or 0 if the operand is the same for the whole batch
  i64 out_row, out_col, out_batch;  // strides of the result, in elements
  i64 row_scale_batch, col_scale_batch, bias_batch;  // likewise, 0 if the same for all
  i64 swapped;                // a and b are swapped: rows here are the caller's columns
  i64 group;                  // tiles of m that are visited together, to keep the L2 cache warm
  i64 parts;                  // clusters that share a tile's K (sm90_xnor_gemm.cu)
};

// The product is TOP K (no K, if unsigned) + A_TERM popcount(a_row) + B_TERM popcount(b_col) + ACC_TERM acc.
constexpr int TOP = (1 << PLANES) - 1;
constexpr int LEVEL_TERM = XOR_ACC ? 0 : UNSIGNED ? -1 : -2;                    // of the operand of levels
constexpr int SIGN_TERM = UNSIGNED ? (XOR_ACC ? TOP : 0) : XOR_ACC ? 0 : -2 * TOP;  // of the other
constexpr int A_TERM = PLANES_OF_B ? SIGN_TERM : LEVEL_TERM, B_TERM = PLANES_OF_B ? LEVEL_TERM : SIGN_TERM;
constexpr int K_TERM = UNSIGNED ? 0 : TOP;
constexpr int ACC_TERM = DIGITS ? 1 : UNSIGNED ? (XOR_ACC ? -1 : 2) : XOR_ACC ? -2 : 4;
constexpr int A_PLANES = PLANES_OF_B ? 1 : PLANES, B_PLANES = PLANES_OF_B ? PLANES : 1;

#if OUTPUT == OUTPUT_FLOAT32
typedef float out_t;
#elif OUTPUT == OUTPUT_FLOAT16 || OUTPUT == OUTPUT_BFLOAT16 || OUTPUT == OUTPUT_INT16
typedef unsigned short out_t;
#else
typedef int out_t;
#endif

#if OUTPUT == OUTPUT_INT16 && SCALED
#error "a scaled result is not an integer"
#endif
#if DIGITS && (OUTPUT != OUTPUT_PACKED || XOR_ACC)
#error "products of bytes have packed results"
#endif
#if HALVES && (OUTPUT == OUTPUT_PACKED || XOR_ACC || PLANES > 1 || DIGITS)
#error "numbers of 16 bits are for products of signs"
#endif

#if OUTPUT == OUTPUT_INT32 || OUTPUT == OUTPUT_INT16 || OUTPUT == OUTPUT_PACKED
typedef int number_t;  // what a result is before it is stored
#else
typedef float number_t;
#endif

__device__ __forceinline__ out_t round_to_output(number_t v) {
#if OUTPUT == OUTPUT_FLOAT16
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#elif OUTPUT == OUTPUT_BFLOAT16
#if __CUDA_ARCH__ >= 800
  unsigned short b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(v));
  return b;
#else
  // Round to nearest even by hand: sm_75 has no conversion to bfloat16.
  const u32 bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
#else
  return (out_t)v;
#endif
}

#if HALVES
// Two results of 16 bits in a register.
__device__ __forceinline__ u32 two_rounded(number_t first, number_t second) {
  u32 both;
#if OUTPUT == OUTPUT_FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#elif OUTPUT == OUTPUT_BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
  both = __byte_perm((u32)first, (u32)second, 0x5410);
#endif
  return both;
}
#endif

// The terms of a tile's rows and columns, in shared memory: what an epilogue adds to accumulators.
template <int HEIGHT, int WIDTH> struct Terms {
#if HALVES
  u32 row[HEIGHT];                 // popcount(a_row), in both halves
  alignas(16) u32 col[WIDTH / 2];  // popcount(b_col) of a column and of the one 16 further on
#else
  int row[HEIGHT];  // of signs: K - 2 popcount(a_row)
  alignas(16) int col[WIDTH];  // of signs: -2 popcount(b_col); OUTPUT_PACKED: minus the threshold
#endif
#if OUTPUT == OUTPUT_PACKED
  u32 flip[(WIDTH + 31) / 32];
#elif SCALED
  // Missing scales are 1 and a missing bias is -0: neither changes anything.
  float row_scale[HEIGHT], col_scale[WIDTH], row_bias[HEIGHT], col_bias[WIDTH];
#endif

  // Filled by whole warps, `threads` threads in all, from the tile's first row and column.
  __device__ __forceinline__ void fill(const Product& p, i64 item, i64 m, i64 n, int thread,
                                       int threads) {
    fill_rows(p, item, m, thread, threads);
    fill_columns(p, item, n, thread, threads);
  }
  __device__ __forceinline__ void fill_rows(const Product& p, i64 item, i64 m, int thread, int threads) {
#if DIGITS
    for (int i = thread; i < HEIGHT; i += threads) row[i] = 0;
#else
    const int* pop_a = p.pop_a + item * p.a_step * p.m + m;
    const int rows_left = (int)min(p.m - m, (i64)HEIGHT);
    for (int i = thread; i < HEIGHT; i += threads) {
#if HALVES
      row[i] = i < rows_left ? 0x10001u * (u32)__ldg(pop_a + i) : 0;
#else
      row[i] = K_TERM * (int)p.k + (A_TERM && i < rows_left ? A_TERM * __ldg(pop_a + i) : 0);
#endif
    }
#if OUTPUT != OUTPUT_PACKED && SCALED
    const float* rows = p.row_scale ? p.row_scale + item * p.row_scale_batch : nullptr;
    const float* bias = p.bias && p.swapped ? p.bias + item * p.bias_batch : nullptr;
    for (int i = thread; i < HEIGHT; i += threads) {
      row_scale[i] = rows && i < rows_left ? rows[m + i] : 1.0f;
      row_bias[i] = bias && i < rows_left ? bias[m + i] : -0.0f;
    }
#endif
#endif
  }
  __device__ __forceinline__ void fill_columns(const Product& p, i64 item, i64 n, int thread, int threads) {
#if DIGITS
    const int exist = (int)min(p.n - n, (i64)WIDTH);
    for (int i = thread; i < (WIDTH + 31) / 32 * 32; i += threads) {
      if (i < WIDTH) col[i] = i < exist ? -__ldg(p.threshold + n + i) : 0;
      const u32 flips = __ballot_sync(0xffffffffu, i < exist && __ldg(p.flip + n + i));
      if ((i & 31) == 0) flip[i / 32] = flips;
    }
#else
    const int cols_left = (int)min(p.n - n, (i64)WIDTH);
    const int* pop_b = p.pop_b + item * p.b_step * p.n + n;
#if HALVES
#pragma unroll 1  // for a thread with few registers
    for (int i = thread; i < WIDTH / 2; i += threads) {
      const int at = 2 * (i & ~15) + (i & 15);
      col[i] = (at < cols_left ? (u32)__ldg(pop_b + at) : 0) |
               (at + 16 < cols_left ? (u32)__ldg(pop_b + at + 16) << 16 : 0);
    }
#else
    for (int i = thread; i < (WIDTH + 31) / 32 * 32; i += threads) {
      const bool exists = i < cols_left;
      int term = B_TERM && exists ? B_TERM * __ldg(pop_b + i) : 0;
#if OUTPUT == OUTPUT_PACKED
      // No product exceeds TOP K: with the threshold clamped to [-TOP K, TOP K + 1] their difference fits
      // an int32 for every TOP K below 2**30.
      const int most = TOP * (int)p.k;
      if (p.threshold && exists) term -= max(-most, min(most + 1, __ldg(p.threshold + n + i)));
      const u32 flips = __ballot_sync(0xffffffffu, p.flip && exists && __ldg(p.flip + n + i));
      if ((i & 31) == 0) flip[i / 32] = flips;
#endif
      if (i < WIDTH) col[i] = term;
    }
#endif
#if OUTPUT != OUTPUT_PACKED && SCALED
    const float* cols = p.col_scale ? p.col_scale + item * p.col_scale_batch : nullptr;
    const float* bias = p.bias && !p.swapped ? p.bias + item * p.bias_batch : nullptr;
    for (int i = thread; i < WIDTH; i += threads) {
      col_scale[i] = cols && i < cols_left ? cols[n + i] : 1.0f;
      col_bias[i] = bias && i < cols_left ? bias[n + i] : -0.0f;
    }
#endif
#endif
  }
};

// Double accumulators where a plane other than the first begins.
template <int COUNT>
__device__ __forceinline__ void double_at_plane(const Product& p, i64 chunk, int (&acc)[COUNT]) {
  if (PLANES == 1 || chunk == 0 || chunk % p.chunks) return;
#pragma unroll
  for (int i = 0; i < COUNT; i++) acc[i] += acc[i];
}

// The `index`-th tile of the result, in an order that visits `group` tiles of m together.
struct Tile {
  int item, m, n;
  __device__ __forceinline__ Tile(u32 index, u32 tiles_m, u32 tiles_n, u32 group) {
    item = index / (tiles_m * tiles_n);
    const u32 t = index - item * tiles_m * tiles_n;
    const u32 first = t / (group * tiles_n) * group;
    const u32 height = min(group, tiles_m - first);
    const u32 within = t - first * tiles_n;
    m = first + within % height;
    n = within / height;
  }
};

// Start of a block that computes one tile of HEIGHT x WIDTH results: its batch item, first row and
// column, and the operands' words and numbers of lines, including padding.
template <int HEIGHT, int WIDTH> struct BlockTile {
  i64 item, m, n, a_lines, b_lines;
  const uint4 *a, *b;
  __device__ __forceinline__ explicit BlockTile(const Product& p) {
    const Tile tile(blockIdx.x, (u32)((p.m + HEIGHT - 1) / HEIGHT), (u32)((p.n + WIDTH - 1) / WIDTH),
                    (u32)p.group);
    item = tile.item;
    m = (i64)tile.m * HEIGHT;
    n = (i64)tile.n * WIDTH;
    a_lines = padded_lines(p.m);
    b_lines = padded_lines(p.n);
    a = p.a + item * p.a_step * p.chunks * A_PLANES * a_lines * CHUNK_PIECES;
    b = p.b + item * p.b_step * p.chunks * B_PLANES * b_lines * CHUNK_PIECES;
  }
  // Words of a chunk, counted through all planes.
  __device__ __forceinline__ const uint4* a_chunk(const Product& p, i64 chunk) const {
    return a + (A_PLANES == PLANES ? chunk : chunk % p.chunks) * a_lines * CHUNK_PIECES;
  }
  __device__ __forceinline__ const uint4* b_chunk(const Product& p, i64 chunk) const {
    return b + (B_PLANES == PLANES ? chunk : chunk % p.chunks) * b_lines * CHUNK_PIECES;
  }
};
