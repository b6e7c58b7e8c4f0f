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
#define OUTPUT_INT16 5     // the integer modulo 2**16: itself for K below 2**15

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
#elif OUTPUT == OUTPUT_FLOAT16 || OUTPUT == OUTPUT_BFLOAT16 || OUTPUT == OUTPUT_INT16
typedef unsigned short out_t;
#else
typedef int out_t;
#endif

#if OUTPUT == OUTPUT_INT16 && SCALED
#error "a scaled result is not an integer"
#endif

#if OUTPUT == OUTPUT_FLOAT32 || OUTPUT == OUTPUT_FLOAT16 || OUTPUT == OUTPUT_BFLOAT16
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

// The terms of a tile's rows and columns, in shared memory: what an epilogue adds to accumulators.
template <int HEIGHT, int WIDTH> struct Terms {
  int row[HEIGHT];  // K - 2 popcount(a_row)
  alignas(16) int col[WIDTH];  // -2 popcount(b_col); OUTPUT_PACKED: minus the threshold
#if OUTPUT == OUTPUT_PACKED
  u32 flip[(WIDTH + 31) / 32];
#elif SCALED
  // What is left out is 1 to multiply with and -0 to add: both change nothing.
  float row_scale[HEIGHT], col_scale[WIDTH], row_bias[HEIGHT], col_bias[WIDTH];
#endif

  // Filled by whole warps, `threads` threads in all, from the tile's first row and column.
  __device__ __forceinline__ void fill(const Product& p, i64 item, i64 m, i64 n, int thread,
                                       int threads) {
    const int* pop_a = p.pop_a + item * p.a_step * p.m + m;
    const int rows_left = (int)min(p.m - m, (i64)HEIGHT), cols_left = (int)min(p.n - n, (i64)WIDTH);
    for (int i = thread; i < HEIGHT; i += threads)
      row[i] = (int)p.k - (!XOR_ACC && i < rows_left ? 2 * __ldg(pop_a + i) : 0);
    const int* pop_b = p.pop_b + item * p.b_step * p.n + n;
    for (int i = thread; i < (WIDTH + 31) / 32 * 32; i += threads) {
      const bool exists = i < cols_left;
      int term = !XOR_ACC && exists ? -2 * __ldg(pop_b + i) : 0;
#if OUTPUT == OUTPUT_PACKED
      // No product exceeds K: with the threshold held to [-K, K + 1] their difference fits an int32
      // for every K below 2**30.
      if (p.threshold && exists)
        term -= max(-(int)p.k, min((int)p.k + 1, __ldg(p.threshold + n + i)));
      const u32 flips = __ballot_sync(0xffffffffu, p.flip && exists && __ldg(p.flip + n + i));
      if ((i & 31) == 0) flip[i / 32] = flips;
#endif
      if (i < WIDTH) col[i] = term;
    }
#if OUTPUT != OUTPUT_PACKED && SCALED
    const float* rows = p.row_scale ? p.row_scale + item * p.row_scale_batch : nullptr;
    const float* cols = p.col_scale ? p.col_scale + item * p.col_scale_batch : nullptr;
    const float* bias = p.bias ? p.bias + item * p.bias_batch : nullptr;
    for (int i = thread; i < HEIGHT; i += threads) {
      row_scale[i] = rows && i < rows_left ? rows[m + i] : 1.0f;
      row_bias[i] = bias && p.swapped && i < rows_left ? bias[m + i] : -0.0f;
    }
    for (int i = thread; i < WIDTH; i += threads) {
      col_scale[i] = cols && i < cols_left ? cols[n + i] : 1.0f;
      col_bias[i] = bias && !p.swapped && i < cols_left ? bias[n + i] : -0.0f;
    }
#endif
  }
};

// Loads and stores of an epilogue keep their order: a compiler that is free to move them loads the
// terms of a whole tile first, and spills accumulators to make room for them.
__device__ __forceinline__ int4 load_in_turn(const int* from) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
  return v;
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

// The results of one tile: from accumulators to the caller's memory.
template <int HEIGHT, int WIDTH> struct Results {
  const Product& p;
  const Terms<HEIGHT, WIDTH>& terms;
  const i64 item, m, n;  // of the batch, and the tile's first row and column
  out_t* const out;      // the tile's first result

  __device__ __forceinline__ Results(const Product& product, const Terms<HEIGHT, WIDTH>& tile_terms,
                                     i64 batch_item, i64 first_row, i64 first_col)
      : p(product), terms(tile_terms), item(batch_item), m(first_row), n(first_col),
        out((out_t*)product.out + batch_item * product.out_batch + first_row * product.out_row +
            first_col * product.out_col) {}

  // The product, or OUTPUT_PACKED: the product minus its threshold.
  static __device__ __forceinline__ int product(int row_term, int col_term, int acc) {
#if XOR_ACC
    return (int)((u32)row_term + (u32)col_term - 2u * (u32)acc);
#else
    return (int)((u32)row_term + (u32)col_term + 4u * (u32)acc);
#endif
  }

#if OUTPUT != OUTPUT_PACKED
  // The result of a product; rows and columns count from the tile's first.
  __device__ __forceinline__ out_t value(int row, int col, int product) const {
#if OUTPUT == OUTPUT_INT32 || OUTPUT == OUTPUT_INT16
    return (out_t)product;
#else
    float v = __int2float_rn(product);
#if SCALED
    // The caller's rows come first, whichever side they are on here: rounding depends on order.
    const float r = terms.row_scale[row], c = terms.col_scale[col];
    v = __fmul_rn(__fmul_rn(v, p.swapped ? c : r), p.swapped ? r : c);
    v = __fadd_rn(__fadd_rn(v, terms.row_bias[row]), terms.col_bias[col]);
#endif
    return round_to_output(v);
#endif
  }

  __device__ __forceinline__ void store(int row, int col, int acc) const {
    if (m + row < p.m && n + col < p.n)
      out[row * p.out_row + col * p.out_col] =
          value(row, col, product(terms.row[row], terms.col[col], acc));
  }

  // Four neighbours of one row in one store. Results are written once and not read here: they
  // should not push the operands out of the L2 cache.
  static __device__ __forceinline__ void store_four(out_t* to, const out_t (&v)[4]) {
    const u32* w = (const u32*)v;
    if constexpr (sizeof(out_t) == 4)
      asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]),
                   "r"(w[2]), "r"(w[3]) : "memory");
    else
      asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"((u32)v[0] | (u32)v[1] << 16),
                   "r"((u32)v[2] | (u32)v[3] << 16) : "memory");
  }
#else
  // Store word w (32 columns) of a row of the tile; the caller stores each word once.
  __device__ __forceinline__ void store_word(int row, int w, u32 bits) const {
    const u32 chunks = (u32)((p.n + CHUNK_BITS - 1) / CHUNK_BITS), word = (u32)(n / 32) + w;
    if (m + row >= p.m || word >= chunks * CHUNK_WORDS) return;
    const u32 position = position_of((u32)(m + row));
    u32* to = (u32*)p.out + line_chunk(item, chunks, word / CHUNK_WORDS, p.m, position);
    to[swizzled_word(position, word % CHUNK_WORDS)] = bits;
  }
  __device__ __forceinline__ void count(int row, int ones) const {
    if (m + row < p.m && ones) atomicAdd(p.out_pop + item * p.m + m + row, ones);
  }
  // The bits of word w of the tile from the signs of (product - threshold): 1 for a negative one.
  __device__ __forceinline__ u32 word_of_signs(int w, u32 negative) const {
    const i64 left = p.n - n - 32 * w;
    const u32 exist = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
    return (~negative ^ terms.flip[w]) & exist;
  }
#endif

  // Store COUNT of a warp's fragments from the FIRST, of the tensor cores' fragments side by side, for
  // BLOCKS times 16 positions that lie `block_rows` apart. Of 16 positions of rows a lane holds
  // lane / 4 and lane / 4 + 8, and of eight of columns 2 (lane % 4) and the next (PTX ISA, matrix
  // fragments of mma.m16n8k256): rows two apart, and of two fragments four neighbouring columns
  // (layout.cuh). acc(block, i) is accumulator i of a lane, four to a fragment. OUTPUT_PACKED:
  // `ones` counts the bits of the lane's rows, for count_fragments.
  template <int FIRST, int COUNT, int BLOCKS, typename Acc>
  __device__ __forceinline__ void store_fragments(int row, int block_rows, int col, const Acc& acc,
                                                  int (&ones)[BLOCKS]) const {
    constexpr int ROWS = 2 * BLOCKS;
    static_assert(FIRST % 2 == 0 && COUNT % 2 == 0, "two fragments make four neighbours");
    const int lane = threadIdx.x & 31, quad = lane & 3;
    const int r0 = row + line_at(lane >> 2), c0 = col + 4 * quad;
    int t[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) t[r] = terms.row[r0 + r / 2 * block_rows + r % 2 * 2];
#if OUTPUT != OUTPUT_PACKED
    out_t* to = out + r0 * p.out_row + (c0 + 8 * FIRST) * p.out_col;
    // Whether these results lie in the matrix, and neighbours can be stored together.
    const bool whole = m + row + (BLOCKS - 1) * block_rows + 16 <= p.m &&
                       n + col + 8 * (FIRST + COUNT) <= p.n && p.out_col == 1 &&
                       (p.out_row & 3) == 0 && ((u64)to & (4 * sizeof(out_t) - 1)) == 0;
#pragma unroll
    for (int j = FIRST; j < FIRST + COUNT; j += 2) {
      const int4 four = load_in_turn(terms.col + c0 + 8 * j);
      const int u[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int down = r / 2 * block_rows + r % 2 * 2;
        out_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          v[i] = value(r0 + down, c0 + 8 * j + i,
                       product(t[r], u[i], acc(r / 2, 4 * (j + i / 2) + r % 2 * 2 + i % 2)));
        if (whole) {
          store_four(to + down * p.out_row, v);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (m + r0 + down < p.m && n + c0 + 8 * j + i < p.n)
              store_in_turn(to + down * p.out_row + i * p.out_col, v[i]);
        }
      }
      to += 16 * p.out_col;
    }
#else
    static_assert(FIRST % 4 == 0 && COUNT % 4 == 0, "a word is 32 columns, four fragments");
#pragma unroll
    for (int w = FIRST / 4; w < (FIRST + COUNT) / 4; w++) {
      // Signs are shifted in from the last column to the first: four of 16 are this lane's.
      u32 signs[ROWS] = {};
#pragma unroll
      for (int j = 4 * w + 2; j >= 4 * w; j -= 2) {
        const int4 four = load_in_turn(terms.col + c0 + 8 * j);
        const int u[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          if (j % 4 == 0) signs[r] <<= 12;
#pragma unroll
          for (int i = 3; i >= 0; i--)
            signs[r] = __funnelshift_l(
                (u32)product(t[r], u[i], acc(r / 2, 4 * (j + i / 2) + r % 2 * 2 + i % 2)), signs[r],
                1);
        }
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        // Four lanes hold parts of both rows' words: even lanes gather the first, odd the second.
        const u32 w0 = signs[2 * block] << 4 * quad, w1 = signs[2 * block + 1] << 4 * quad;
        u32 mine = (quad & 1 ? w1 : w0) | __shfl_xor_sync(0xffffffffu, quad & 1 ? w0 : w1, 1);
        mine |= __shfl_xor_sync(0xffffffffu, mine, 2);
        mine = word_of_signs(col / 32 + w, mine);
        if (quad < 2) store_word(r0 + block * block_rows + quad * 2, col / 32 + w, mine);
        ones[block] += __popc(mine);
      }
    }
#endif
  }

  // Add what store_fragments has counted to the popcounts of the result's rows.
  template <int BLOCKS>
  __device__ __forceinline__ void count_fragments(int row, int block_rows,
                                                  const int (&ones)[BLOCKS]) const {
#if OUTPUT == OUTPUT_PACKED
    const int lane = threadIdx.x & 31, quad = lane & 3;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
      if (quad < 2) count(row + line_at(lane >> 2) + block * block_rows + quad * 2, ones[block]);
#endif
  }

  // Store all of a warp's fragments.
  template <int BLOCKS, int ACC>
  __device__ __forceinline__ void store_all(int row, int block_rows, int col,
                                            const int (&acc)[BLOCKS][ACC]) const {
    int ones[BLOCKS] = {};
    store_fragments<0, ACC / 4>(
        row, block_rows, col, [&](int block, int i) { return acc[block][i]; }, ones);
    count_fragments(row, block_rows, ones);
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

// What a block that computes one tile of HEIGHT x WIDTH results starts from: which of the batch and
// its first row and column, and the operands' words and number of lines, padding included.
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
    a = p.a + item * p.a_step * p.chunks * a_lines * CHUNK_PIECES;
    b = p.b + item * p.b_step * p.chunks * b_lines * CHUNK_PIECES;
  }
};
