// What every product kernel is given, and what becomes of its integers on their way out.
//
// A kernel computes acc[row][col] = popcount(a_row & b_col), from which the product of the signs is
//     K - 2 popcount(a_row) - 2 popcount(b_col) + 4 acc.
// Arithmetic is modulo 2**32, so that the result is right whenever it fits an int32, as it does
// for every K below 2**31, even where 4 acc does not.
//
// The translation unit sets
//     OUTPUT   one of OUTPUT_*: the type of the result, or its signs, packed
//     SCALED   1: the result is ((product * row scale) * column scale) + bias, each step rounded in
//              float32; a null pointer leaves its step out. 0: the integer itself
//     XOR_ACC  1: acc counts a_row ^ b_col instead, and the product is K - 2 acc
#pragma once

#include "layout.cuh"

#define OUTPUT_INT32 0
#define OUTPUT_FLOAT32 1
#define OUTPUT_FLOAT16 2
#define OUTPUT_BFLOAT16 3
#define OUTPUT_PACKED 4

#ifndef OUTPUT
#define OUTPUT OUTPUT_INT32
#endif
#ifndef SCALED
#define SCALED 0
#endif
#ifndef XOR_ACC
#define XOR_ACC 0
#endif

// Filled by cupybnn/backends/cuda/product.py, field by field in this order.
struct Product {
  const uint4* a;
  const uint4* b;
  const int* pop_a;
  const int* pop_b;
  void* out;                  // OUTPUT_PACKED: words, in the layout of layout.cuh
  int* out_pop;               // OUTPUT_PACKED: popcount of each row; zeros when the kernel starts
  const float* row_scale;
  const float* col_scale;
  const float* bias;          // a column, or a row where `swapped`
  const int* threshold;       // OUTPUT_PACKED: a column; bit = (product >= threshold) ^ flip
  const unsigned char* flip;
  i64 m, n, k;
  i64 chunks;                 // of a line of a and of b
  i64 batch;
  i64 a_step, b_step;         // 1, or 0 where the operand is the same for the whole batch
  i64 out_row, out_col, out_batch;  // strides of the result, in elements
  i64 row_scale_batch, col_scale_batch, bias_batch;  // likewise, 0 where the same for all
  i64 swapped;                // a and b have changed places: rows here are the caller's columns
  i64 group;                  // tiles of m that are walked together, to keep the L2 cache warm
};

#if OUTPUT == OUTPUT_FLOAT32
typedef float out_t;
#elif OUTPUT == OUTPUT_FLOAT16 || OUTPUT == OUTPUT_BFLOAT16
typedef unsigned short out_t;
#else
typedef int out_t;
#endif

template <typename T> struct alignas(2 * sizeof(T)) Pair { T x, y; };

// Loads and stores of an epilogue keep their order: a compiler that is free to move them loads the
// terms of a whole tile first, and spills accumulators to make room for them.
__device__ __forceinline__ int load_in_turn(const int* from) {
  int value;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ u32 load_in_turn(const unsigned char* from) {
  u32 value;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_in_turn(int* to, int v) {
  asm volatile("st.global.s32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void store_in_turn(float* to, float v) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory");
}
__device__ __forceinline__ void store_in_turn(unsigned short* to, unsigned short v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory");
}

#if OUTPUT != OUTPUT_INT32 && OUTPUT != OUTPUT_PACKED
__device__ __forceinline__ out_t round_to_output(float v) {
#if OUTPUT == OUTPUT_FLOAT32
  return v;
#elif OUTPUT == OUTPUT_FLOAT16
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#else
  // Round to nearest even by hand: sm_75 has no conversion to bfloat16.
  const u32 bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
#endif

// Results of one batch item, with the pointers moved to it.
struct Results {
  const Product& p;
  const int* pop_a;
  const int* pop_b;
  out_t* out;
  const float* row_scale;
  const float* col_scale;
  const float* bias;
  i64 item;

  __device__ __forceinline__ Results(const Product& product, i64 batch_item)
      : p(product), item(batch_item) {
    pop_a = p.pop_a + item * p.a_step * p.m;
    pop_b = p.pop_b + item * p.b_step * p.n;
    out = (out_t*)p.out + item * p.out_batch;
#if SCALED
    row_scale = p.row_scale ? p.row_scale + item * p.row_scale_batch : nullptr;
    col_scale = p.col_scale ? p.col_scale + item * p.col_scale_batch : nullptr;
    bias = p.bias ? p.bias + item * p.bias_batch : nullptr;
#endif
  }

  // The part of the product that depends on the row alone; 0 outside the matrix.
  __device__ __forceinline__ int row_term(i64 row) const {
#if XOR_ACC
    return (int)p.k;
#else
    return row < p.m ? (int)p.k - 2 * __ldg(pop_a + row) : 0;
#endif
  }
  // The part that depends on the column alone.
  __device__ __forceinline__ int col_term(i64 col) const {
#if XOR_ACC
    return 0;
#else
    return col < p.n ? -2 * load_in_turn(pop_b + col) : 0;
#endif
  }
  static __device__ __forceinline__ int product(int row_term, int col_term, int acc) {
#if XOR_ACC
    return (int)((u32)row_term - 2u * (u32)acc);
#else
    return (int)((u32)row_term + (u32)col_term + 4u * (u32)acc);
#endif
  }

#if OUTPUT != OUTPUT_PACKED
  __device__ __forceinline__ out_t value(i64 row, i64 col, int product) const {
#if OUTPUT == OUTPUT_INT32
    return product;
#else
    float v = __int2float_rn(product);
#if SCALED
    // The caller's rows come first, whichever side they are on here: rounding depends on order.
    const float r = row_scale ? row_scale[row] : 1.0f, c = col_scale ? col_scale[col] : 1.0f;
    v = __fmul_rn(__fmul_rn(v, p.swapped ? c : r), p.swapped ? r : c);
    if (bias) v = __fadd_rn(v, bias[p.swapped ? row : col]);
#endif
    return round_to_output(v);
#endif
  }

  __device__ __forceinline__ void store(i64 row, i64 col, int product) const {
    if (row < p.m && col < p.n)
      out[row * p.out_row + col * p.out_col] = value(row, col, product);
  }

  // Two neighbours of one row in one store. Results are written once and not read here: they should
  // not push the operands out of the L2 cache.
  static __device__ __forceinline__ void store_pair(out_t* to, out_t x, out_t y) {
    const Pair<out_t> both = {x, y};
    if constexpr (sizeof(out_t) == 4)
      asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(*(const u32*)&both.x),
                   "r"(*(const u32*)&both.y) : "memory");
    else
      asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(to), "r"(*(const u32*)&both) : "memory");
  }

  // Whether all of a warp's fragments lie in the matrix and neighbours can be stored together.
  __device__ __forceinline__ bool whole(i64 row, i64 col, int rows, int columns) const {
    return row + rows <= p.m && col + columns <= p.n && p.out_col == 1 && (p.out_row & 1) == 0 &&
           ((u64)out & (2 * sizeof(out_t) - 1)) == 0;
  }
#else
  // A column's threshold and whether its bit is flipped; outside the matrix anything that is safe
  // to load, since columns_left clears those bits.
  __device__ __forceinline__ int threshold(i64 col) const {
    return p.threshold && col < p.n ? load_in_turn(p.threshold + col) : 0;
  }
  __device__ __forceinline__ u32 flips(i64 col) const {
    return p.flip && col < p.n ? load_in_turn(p.flip + col) : 0;
  }
  // Mask of the word whose first column is `col`: a bit for each column of the matrix.
  __device__ __forceinline__ u32 columns_left(i64 col) const {
    const i64 left = p.n - col;
    return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
  }

  // Store word w (32 columns) of a row; the caller stores each word once.
  __device__ __forceinline__ void store_word(i64 row, i64 w, u32 bits) const {
    const i64 chunks = (p.n + CHUNK_BITS - 1) / CHUNK_BITS;
    if (row >= p.m || w >= chunks * CHUNK_WORDS) return;
    u32* to = (u32*)p.out +
              line_chunk(item, chunks, w / CHUNK_WORDS, round_up_to_eight(p.m), row);
    to[swizzled_word(row, (int)(w % CHUNK_WORDS))] = bits;
  }
  __device__ __forceinline__ void count(i64 row, int ones) const {
    if (row < p.m && ones) atomicAdd(p.out_pop + item * p.m + row, ones);
  }
#endif

  // Store a warp's accumulators: FRAGMENTS of the tensor cores side by side, for BLOCKS times 16
  // rows that lie `block_rows` apart. Of 16 rows a lane holds lane / 4 and lane / 4 + 8, and of
  // eight columns 2 (lane % 4) and the next (PTX ISA, matrix fragments of mma.m16n8k256). A few
  // fragments at a time: a group's loads are in flight together, and nothing is kept for the next.
  template <int BLOCKS, int FRAGMENTS>
  __device__ __forceinline__ void store_fragments(i64 row, int block_rows, i64 col,
                                                  const int (&acc)[BLOCKS][4 * FRAGMENTS]) const {
    constexpr int ROWS = 2 * BLOCKS;
    const int lane = threadIdx.x & 31, quad = lane & 3;
    const i64 first = row + (lane >> 2), c0 = col + 2 * quad;
    int t[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) t[r] = row_term(first + r / 2 * block_rows + r % 2 * 8);
#if OUTPUT != OUTPUT_PACKED
    constexpr int GROUP = FRAGMENTS < 2 ? 1 : 2;
    out_t* to = out + first * p.out_row + c0 * p.out_col;
    const bool all = whole(row, col, (BLOCKS - 1) * block_rows + 16, 8 * FRAGMENTS);
#pragma unroll
    for (int g = 0; g < FRAGMENTS; g += GROUP) {
      int u[2 * GROUP];
#pragma unroll
      for (int i = 0; i < 2 * GROUP; i++) u[i] = col_term(c0 + 8 * (g + i / 2) + i % 2);
      if (all) {
#pragma unroll
        for (int i = 0; i < GROUP; i++)
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            const i64 at = first + r / 2 * block_rows + r % 2 * 8, c = c0 + 8 * (g + i);
            const int* d = acc[r / 2] + 4 * (g + i) + r % 2 * 2;
            store_pair(to + (r / 2 * block_rows + r % 2 * 8) * p.out_row + 8 * i, value(at, c, product(t[r], u[2 * i], d[0])),
                       value(at, c + 1, product(t[r], u[2 * i + 1], d[1])));
          }
        to += 8 * GROUP;
      } else {
#pragma unroll
        for (int i = 0; i < 2 * GROUP; i++)
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            const int down = r / 2 * block_rows + r % 2 * 8;
            const i64 c = c0 + 8 * (g + i / 2) + i % 2;
            if (first + down < p.m && c < p.n)
              store_in_turn(to + down * p.out_row + (8 * (i / 2) + i % 2) * p.out_col,
                            value(first + down, c,
                                  product(t[r], u[i], acc[r / 2][4 * (g + i / 2) + r % 2 * 2 + i % 2])));
          }
        to += 8 * GROUP * p.out_col;
      }
    }
#else
    constexpr int GROUP = 4;
    static_assert(FRAGMENTS % GROUP == 0, "a word is 32 columns, four fragments");
    int ones[BLOCKS] = {};
#pragma unroll
    for (int g = 0; g < FRAGMENTS; g += GROUP) {
      u32 word[ROWS] = {};
#pragma unroll
      for (int i = 0; i < 2 * GROUP; i++) {
        const int at = 8 * (i / 2) + i % 2;  // of this column's bit, before the lane's shift
        const i64 c = c0 + 8 * g + at;
        const int u = col_term(c), least = threshold(c);
        const u32 flip = flips(c);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
          word[r] |= ((u32)(product(t[r], u, acc[r / 2][4 * (g + i / 2) + r % 2 * 2 + i % 2]) >=
                            least) ^ flip) << at;
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        // Four lanes hold parts of both rows' words: even lanes gather the first, odd the second.
        const u32 w0 = word[2 * block] << 2 * quad, w1 = word[2 * block + 1] << 2 * quad;
        const u32 got = __shfl_xor_sync(0xffffffffu, quad & 1 ? w0 : w1, 1);
        u32 mine = (quad & 1 ? w1 : w0) | got;
        mine |= __shfl_xor_sync(0xffffffffu, mine, 2);
        mine &= columns_left(col + 8 * g);
        if (quad < 2) store_word(first + block * block_rows + quad * 8, (col + 8 * g) / 32, mine);
        ones[block] += __popc(mine);
      }
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
      if (quad < 2) count(first + block * block_rows + quad * 8, ones[block]);
#endif
  }
};

// The tile of the result that is `index`-th in an order that walks `group` tiles of m together.
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
