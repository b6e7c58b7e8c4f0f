// Storing a tile's results: from accumulators, through the epilogue of product.cuh, to the caller's
// memory.
#pragma once

#include "product.cuh"

// Loads and stores of an epilogue keep their order (asm volatile): a compiler free to move them loads
// the terms of a whole tile first, and spills accumulators to make room for them.
__device__ __forceinline__ int4 load_in_turn(const int* from) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
  return v;
}
// The same, but always loaded again rather than kept in registers.
__device__ __forceinline__ int4 load_again(const int* from) {
  int4 v;
  asm volatile("ld.volatile.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
  return v;
}
__device__ __forceinline__ int load_again_one(const int* from) {
  int v;
  asm volatile("ld.volatile.shared.s32 %0, [%1];"
               : "=r"(v) : "r"((u32)__cvta_generic_to_shared(from)) : "memory");
  return v;
}

#if OUTPUT == OUTPUT_PACKED
// Write zeros to what is left of the last chunk of a tile's lines after the tile's last column, if no
// other tile covers it. For whole warps, `threads` threads in all.
template <int HEIGHT, int WIDTH>
__device__ __forceinline__ void fill_chunk(const Product& p, i64 item, i64 m, i64 n, int thread,
                                           int threads) {
  if (n + WIDTH < p.n) return;
  const u32 chunks = (u32)((p.n + CHUNK_BITS - 1) / CHUNK_BITS), first = (u32)(n + WIDTH) / 32;
  if (first >= chunks * CHUNK_WORDS) return;
  const int word = first % CHUNK_WORDS, piece = thread % CHUNK_PIECES;
  if (piece < word / 4) return;
  const int rows = (int)min(padded_lines(p.m) - m, (i64)HEIGHT);
  u32* lines = (u32*)p.out + line_chunk(item, chunks, chunks - 1, p.m, (u32)m);
  for (int position = thread / CHUNK_PIECES; position < rows; position += threads / CHUNK_PIECES) {
    u32* to = lines + position * CHUNK_WORDS + 4 * swizzled_piece(position, piece);
    if (4 * piece >= word) {
      *(uint4*)to = make_uint4(0, 0, 0, 0);
    } else {
      for (int i = word % 4; i < 4; i++) to[i] = 0;
    }
  }
}
#endif

// A lane's accumulators of some rows of fragments (Results::store_fragments). `four(block, below, j, i)` is
// the register of neighbor i of four, in fragments j and j + 1, in the lane's first or second row.
template <int BLOCKS, int COUNT> struct Whole {
  static constexpr int SPAN = 1;  // pairs of fragments in a register
  const int (&of)[BLOCKS][COUNT];
  __device__ __forceinline__ int four(int block, int below, int j, int i) const {
    const int at = 4 * (j + i / 2) + i % 2;
    return below ? of[block][at + 2] : of[block][at];
  }
};
// The same as numbers of 16 bits: a register has that of fragments j and j + 1, and above it that of j + 2
// and j + 3, 16 columns further on. For `four`, j is a multiple of four.
template <int BLOCKS, int COUNT> struct Halves {
  static constexpr int SPAN = 2;
  u32 of[BLOCKS][COUNT / 2];
  __device__ __forceinline__ u32 four(int block, int below, int j, int i) const {
    const int at = 2 * j + 4 * (i / 2) + i % 2;
    return below ? of[block][at + 2] : of[block][at];
  }
  __device__ __forceinline__ void take(const int (&from)[BLOCKS][COUNT]) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int i = 0; i < COUNT / 2; i++) {
        const int first = i / 8 * 16 + i % 8;
        of[block][i] = __byte_perm(from[block][first], from[block][first + 8], 0x5410);
      }
  }
};

// What storing some of a tile's columns leaves for the next ones (store_ragged): the upper halves of four
// registers for each of a lane's two rows. For more blocks of rows there are no registers; theirs are
// computed again.
template <int BLOCKS> struct Leftover {
  u32 of[2][2];
  static constexpr bool KEPT = BLOCKS == 1 && !SCALED;
};

// The results of one tile: from accumulators to the caller's memory.
template <int HEIGHT, int WIDTH> struct Results {
  const Product& p;
  const Terms<HEIGHT, WIDTH>& terms;
  const i64 item;   // of the batch
  const u32 m, n;   // the tile's first row and column
  out_t* const out;      // the tile's first result

  __device__ __forceinline__ Results(const Product& product, const Terms<HEIGHT, WIDTH>& tile_terms,
                                     i64 batch_item, i64 first_row, i64 first_col)
      : p(product), terms(tile_terms), item(batch_item), m((u32)first_row), n((u32)first_col),
        out((out_t*)product.out + batch_item * product.out_batch + first_row * product.out_row +
            first_col * product.out_col) {}

  // The product, or OUTPUT_PACKED: the product minus its threshold.
  static __device__ __forceinline__ int product(int row_term, int col_term, int acc) {
    return (int)((u32)row_term + (u32)col_term + (u32)ACC_TERM * (u32)acc);
  }
  // The same with the lower or the upper half of an accumulator's register, by one instruction that
  // multiplies one of them by 4, the other by 0.
  static __device__ __forceinline__ int product_of_half(int row_term, int col_term, u32 acc, bool upper) {
    return (int)__dp2a_lo(acc, upper ? 0x400u : 4u, (u32)row_term + (u32)col_term);
  }

  static __device__ __forceinline__ number_t number(int product) { return (number_t)product; }

#if HALVES
  // The product from the number of bits that differ, in the lower or the upper half of a register: K less
  // twice that. A float comes from the bits of 1.5 * 2**23 plus the product, which takes no conversion.
  __device__ __forceinline__ number_t number_of_half(u32 differ, bool upper) const {
    constexpr bool INTEGER = OUTPUT == OUTPUT_INT32 || OUTPUT == OUTPUT_INT16;
    int sum;
    asm("dp2a.lo.u32.s32 %0, %1, %2, %3;"
        : "=r"(sum) : "r"(differ), "r"(upper ? 0xfe00 : 0xfe), "r"((int)p.k + (INTEGER ? 0 : 0x4b400000)));
    if constexpr (INTEGER)
      return sum;
    else
      return __fadd_rn(__int_as_float(sum), -12582912.0f);
  }
#endif

#if OUTPUT != OUTPUT_PACKED
  // A product with scale and bias; rows and columns are relative to the tile. AGAIN: terms are read each
  // time, so that they take no registers in between.
  template <bool AGAIN = false>
  __device__ __forceinline__ number_t scaled(int row, int col, number_t v) const {
#if SCALED
    // The caller's rows come first, on whichever side they are here: rounding depends on the order.
    auto term = [](const float& x) { return AGAIN ? *(const volatile float*)&x : x; };
    const float r = term(terms.row_scale[row]), c = term(terms.col_scale[col]);
    v = __fmul_rn(__fmul_rn(v, p.swapped ? c : r), p.swapped ? r : c);
    v = __fadd_rn(__fadd_rn(v, term(terms.row_bias[row])), term(terms.col_bias[col]));
#endif
    return v;
  }
  // The result.
  template <bool AGAIN = false>
  __device__ __forceinline__ out_t value(int row, int col, number_t v) const {
    return round_to_output(scaled<AGAIN>(row, col, v));
  }

  __device__ __forceinline__ void store(int row, int col, int acc) const {
    if (m + row < p.m && n + col < p.n)
      out[row * p.out_row + col * p.out_col] =
          value(row, col, number(product(terms.row[row], terms.col[col], acc)));
  }

  // The bits of a result in a register, which lanes exchange.
  static __device__ __forceinline__ u32 bits_of(out_t v) {
#if OUTPUT == OUTPUT_FLOAT32
    return __float_as_uint(v);
#else
    return (u32)v;
#endif
  }

  // Four neighbors of one row, in as many registers as they fill.
  static constexpr int WORDS = sizeof(out_t);
  static __device__ __forceinline__ void join_four(const u32 (&from)[4], u32 (&v)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) v[i] = WORDS == 4 ? from[i] : from[2 * i] | from[2 * i + 1] << 16;
  }
  static __device__ __forceinline__ u32 one_of(const u32 (&v)[WORDS], int i) {
    return WORDS == 4 ? v[i] : v[i / 2] >> 16 * (i % 2);
  }
  // Store them at once. Results are written once and not read here, so they should not evict the operands
  // from the L2 cache.
  static __device__ __forceinline__ void store_four(out_t* to, const u32 (&v)[WORDS]) {
    if constexpr (WORDS == 4)
      asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
                   "r"(v[WORDS - 2]), "r"(v[WORDS - 1]) : "memory");
    else
      asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v[0]), "r"(v[1]) : "memory");
  }
  static __device__ __forceinline__ void store_one(out_t* to, u32 v) {
    if constexpr (sizeof(out_t) == 4)
      asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
    else
      asm volatile("st.global.b16 [%0], %1;" ::"l"(to), "h"((unsigned short)v) : "memory");
  }
#else
  // Store word w (32 columns) of a row of the tile; the caller stores each word once, of padding rows
  // too, which are zeros.
  __device__ __forceinline__ void store_word(int row, int w, u32 bits) const {
    const u32 chunks = (u32)((p.n + CHUNK_BITS - 1) / CHUNK_BITS), word = (u32)(n / 32) + w;
    if (m + row >= padded_lines(p.m) || word >= chunks * CHUNK_WORDS) return;
    const u32 position = position_of((u32)(m + row));
    u32* to = (u32*)p.out + line_chunk(item, chunks, word / CHUNK_WORDS, p.m, position);
    to[swizzled_word(position, word % CHUNK_WORDS)] = m + row < p.m ? bits : 0;
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

  // Store eight neighbors of a row, the first at a multiple of eight. OUTPUT_PACKED: for a whole warp,
  // of which four neighboring lanes have a word.
  __device__ __forceinline__ void store_eight(int row, int col, const int (&acc)[8]) const {
#if OUTPUT == OUTPUT_PACKED
    u32 negative = 0;
#pragma unroll
    for (int i = 7; i >= 0; i--)
      negative = __funnelshift_l((u32)product(terms.row[row], terms.col[col + i], acc[i]), negative, 1);
    const int lane = threadIdx.x & 31;
    negative <<= 8 * (lane & 3);
    negative |= __shfl_xor_sync(0xffffffffu, negative, 1);
    negative |= __shfl_xor_sync(0xffffffffu, negative, 2);
    if (lane & 3) return;
    const u32 bits = word_of_signs(col / 32, negative);
    store_word(row, col / 32, bits);
    count(row, __popc(bits));
#else
    if (m + row >= p.m) return;
    u32 v[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
      v[i] = bits_of(value(row, col + i, number(product(terms.row[row], terms.col[col + i], acc[i]))));
    out_t* to = out + row * p.out_row + col * p.out_col;
    const i64 left = p.n - n - col;
    if (left >= 8 && p.out_col == 1 && ((u64)to & (4 * sizeof(out_t) - 1)) == 0) {
      u32 joined[WORDS];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        join_four({v[i], v[i + 1], v[i + 2], v[i + 3]}, joined);
        store_four(to + i, joined);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (i < left) store_one(to + i * p.out_col, v[i]);
    }
#endif
  }

#if OUTPUT != OUTPUT_PACKED
  // What a lane computes of four neighbors before they are exchanged, in fragments from j on, for column
  // `col` of the first: results, or with HALVES the numbers of bits that differ. These are at least 0, so
  // the halves of a register can be added together: popcount(a_row) + popcount(b_col) - 2 acc.
  template <typename Acc>
  __device__ __forceinline__ void four_sums(int block, int below, int row, int col, int j, int row_term,
                                            int4 col_terms, const Acc& acc, u32 (&v)[4]) const {
    const int u[4] = {col_terms.x, col_terms.y, col_terms.z, col_terms.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (Acc::SPAN == 2)
        v[i] = (u32)row_term + (u32)u[i] - 2 * acc.four(block, below, j, i);
      else
        v[i] = bits_of(value<true>(row, col + i, number(product(row_term, u[i], acc.four(block, below, j, i)))));
    }
  }
  // The results of four sums, or of their halves. Some of them may be of columns outside of the tile, which
  // are not stored.
  template <typename Acc>
  __device__ __forceinline__ void four_results(int row, int col, const u32 (&sums)[4], bool upper,
                                               u32 (&v)[WORDS]) const {
#if HALVES
    number_t n[4];
#pragma unroll
    for (int i = 0; i < 4; i++) n[i] = scaled<true>(row, col + i, number_of_half(sums[i], upper));
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#if OUTPUT == OUTPUT_INT32 || OUTPUT == OUTPUT_FLOAT32
      v[i] = bits_of(round_to_output(n[i]));
#else
      v[i] = two_rounded(n[2 * i], n[2 * i + 1]);
#endif
    }
#else
    join_four(sums, v);
#endif
  }
  // The terms of the columns of four sums.
  template <typename Acc> __device__ __forceinline__ const int* col_terms(int quad, int col) const {
    return (const int*)terms.col + 4 * quad + col / Acc::SPAN;
  }

  // store_fragments for unaligned rows and partial tiles.
  //
  // The L2 cache has sectors of 32 bytes, and writing part of one takes as long as a whole one, or
  // longer. So lanes exchange results until each has four aligned neighbors and a row's four lanes
  // have whole sectors: if a row's first result is `shift` after the start of a sector, lane `quad`
  // gets the results from column 4 quad - shift on. Results move up by shift % 4 within a lane's
  // four, then by shift / 4 lanes, or by one more if the first move took them past the four; past the
  // last lane they go to the first lanes' part of the next two fragments. The remaining results at
  // either end of a row, fewer than four, are stored one by each lane. With HALVES two results move at a
  // time: those in the upper half of a register are of the next two fragments.
  template <int FIRST, int COUNT, int TOTAL, int BLOCKS, typename Acc>
  __device__ __forceinline__ void store_ragged(int row, int block_rows, int rows, int col, int cols,
                                               int lane, const Acc& acc, Leftover<BLOCKS>& leftover) const {
    constexpr int SECTOR = 32 / sizeof(out_t), SPAN = Acc::SPAN, STEP = 2 * SPAN;
    constexpr u32 ALL = 0xffffffffu;
    const int quad = lane & 3;
    const int exist = min(cols - col, 8 * TOTAL);  // of the warp's columns
    // Whether all results exist: a branch of all lanes alike, where that saves instructions and no registers.
    const bool whole = SPAN == 2 && !SCALED && __all_sync(ALL, exist == 8 * TOTAL);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll(SCALED ? 1 : 2)
      for (int below = 0; below < 2; below++) {
        int r = row + line_at(lane >> 2) + block * block_rows + below * 2;
        asm volatile("" : "+r"(r));  // or all rows' addresses are computed in advance and spilled
        const int term = load_again_one((const int*)terms.row + r), end = r < rows ? exist : 0;
        out_t* to = out + r * p.out_row + col;
        const int shift = (int)((u64)to / sizeof(out_t)) & (SECTOR - 1), within = shift & 3;
        const int c = 4 * quad - shift;  // this lane's first column, and its address
        to += c;
        asm volatile("" : "+l"(to));  // or the compiler keeps an index and computes the address at each store
        u32 last[4] = {}, now[4];  // of the fragments before and of these, shifted by shift % 4
        auto take = [&](int j) {
          u32 v[4];
          four_sums(block, below, r, col + 4 * quad + 8 * j, j, term,
                    load_again(col_terms<Acc>(quad, col + 8 * j)), acc, v);
          const u32 w[4] = {within & 1 ? v[3] : v[0], within & 1 ? v[0] : v[1],
                            within & 1 ? v[1] : v[2], within & 1 ? v[2] : v[3]};
#pragma unroll
          for (int i = 0; i < 4; i++) now[i] = within & 2 ? w[i ^ 2] : w[i];
        };
        if constexpr (FIRST > 0) {
          if (!Leftover<BLOCKS>::KEPT) take(FIRST - STEP);
#pragma unroll
          for (int i = 0; i < 4; i++)
            last[i] = Leftover<BLOCKS>::KEPT ? leftover.of[below][i / 2] << (i % 2 ? 0 : 16) : now[i];
        }
        constexpr int STOP = FIRST + COUNT + (FIRST + COUNT == TOTAL ? STEP : 0);
#pragma unroll
        for (int j = FIRST; j < STOP; j += STEP) {
          if (j < TOTAL) take(j);
          // Result i comes from ceil((shift - i) / 4) lanes below, modulo four.
          u32 moved[4];
          int start = c;
          if (SCALED) asm volatile("" : "+r"(start));  // computed again, to keep no derived values
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const bool stays = 4 * quad + shift < 13 + i;  // among the lanes of these fragments
            const u32 before = SPAN == 1 ? last[i] : __byte_perm(last[i], now[i], 0x5432);
            moved[i] = __shfl_sync(ALL, stays ? now[i] : before, (start + i) >> 2, 4);
            last[i] = now[i];
          }
#pragma unroll(SCALED ? 1 : 2)
          for (int part = 0; part < (j < TOTAL ? SPAN : 1); part++) {
            const int at = 8 * j + 16 * part, first = c + at;
            u32 mine[WORDS];
            four_results<Acc>(r, col + first, moved, part, mine);
            const int left = at > 0 || first >= 0 ? end - first : 0;
            if (left >= 4) store_four(to + at, mine);
            if (!whole && j < TOTAL) {  // the end of a narrow tile's row: one to three are left
#pragma unroll
              for (int i = 0; i < 3; i++)
                if (i < left && left < 4) store_one(to + at + i, one_of(mine, i));
            }
            // The start, or the end of a whole tile's row: one lane has it, each stores one result.
            if (at == 0 || j == TOTAL) {
              const int from = (at == 0 ? shift : end + shift) / 4 & 3;
              const int away = 4 * (from - quad) + quad;
              u32 given[WORDS], one = 0;
#pragma unroll
              for (int i = 0; i < WORDS; i++) given[i] = __shfl_sync(ALL, mine[i], from, 4);
#pragma unroll
              for (int i = 0; i < 4; i++)
                if (quad == i) one = one_of(given, i);
              if (first + away < end && (at > 0 || (within && first + away >= 0)))
                store_one(to + at + away, one);
            }
          }
        }
        if (Leftover<BLOCKS>::KEPT && STOP < TOTAL) {
#pragma unroll
          for (int i = 0; i < 2; i++)
            leftover.of[below][i] = __byte_perm(last[2 * i], last[2 * i + 1], 0x7632);
        }
      }
  }

  // store_fragments if neighbors in a row are not adjacent in memory.
  template <int FIRST, int COUNT, int BLOCKS, typename Acc>
  __device__ __forceinline__ void store_scattered(int row, int block_rows, int rows, int col,
                                                  int cols, int lane, const Acc& acc) const {
    const int quad = lane & 3, c = col + 4 * quad;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll 1
      for (int below = 0; below < 2; below++) {
        int r = row + line_at(lane >> 2) + block * block_rows + below * 2;
        asm volatile("" : "+r"(r));  // or all rows' addresses are computed in advance and spilled
        const int term = load_again_one((const int*)terms.row + r), left = (r < rows ? cols : 0) - c;
        out_t* to = out + r * p.out_row + (c + 8 * FIRST) * p.out_col;
#pragma unroll
        for (int j = FIRST; j < FIRST + COUNT; j += 2 * Acc::SPAN) {
          u32 sums[4];
          four_sums(block, below, r, c + 8 * j, j, term, load_again(col_terms<Acc>(quad, col + 8 * j)), acc, sums);
#pragma unroll
          for (int part = 0; part < Acc::SPAN; part++) {
            u32 v[WORDS];
            four_results<Acc>(r, c + 8 * j + 16 * part, sums, part, v);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              if (8 * j + 16 * part + i < left) store_one(to, one_of(v, i));
              to += i < 3 ? p.out_col : 13 * p.out_col;
            }
          }
        }
      }
  }
#endif

  // Store COUNT of a warp's TOTAL adjacent tensor-core fragments, starting at FIRST, for BLOCKS times
  // 16 positions that are `block_rows` apart. Of 16 row positions a lane holds lane / 4 and
  // lane / 4 + 8, and of eight column positions 2 (lane % 4) and the next (PTX ISA, matrix fragments
  // of mma.m16n8k256): rows two apart, and in two fragments four neighboring columns (layout.cuh).
  // `acc` are the lane's accumulators, Whole or Halves.
  // OUTPUT_PACKED: `ones` counts the bits of the lane's rows, for count_fragments. Fragments are stored in
  // order, from 0 to TOTAL, with the same `leftover`.
  template <int FIRST, int COUNT, int TOTAL, int BLOCKS, typename Acc>
  __device__ __forceinline__ void store_fragments(int row, int block_rows, int col, const Acc& acc,
                                                  int (&ones)[BLOCKS], Leftover<BLOCKS>& leftover) const {
    constexpr int ROWS = 2 * BLOCKS, STEP = 2 * Acc::SPAN;
    static_assert(FIRST % STEP == 0 && COUNT % STEP == 0, "whole registers of four neighbors");
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // read again, to keep no derived values
    const int quad = lane & 3;
    const int r0 = row + line_at(lane >> 2), c0 = col + 4 * quad;
#if OUTPUT != OUTPUT_PACKED
    // The part of the tile that exists.
    const int rows = (int)min(p.m - m, (i64)HEIGHT), cols = (int)min(p.n - n, (i64)WIDTH);
    // Whether the warp's results are inside the matrix, and neighbors can be stored together: the same
    // for all fragments. All lanes agree; telling the compiler saves a second copy of every exchange, for
    // diverged lanes.
    out_t* to = out + r0 * p.out_row + (c0 + 8 * FIRST) * p.out_col;
    const bool whole = __all_sync(
        0xffffffffu, row + (BLOCKS - 1) * block_rows + 16 <= rows &&
                         col + 8 * TOTAL <= cols && p.out_col == 1 &&
                         (p.out_row & 3) == 0 && ((u64)to & (4 * sizeof(out_t) - 1)) == 0);
    if (!whole) {
      if (p.out_col == 1)
        store_ragged<FIRST, COUNT, TOTAL, BLOCKS>(row, block_rows, rows, col, cols, lane, acc, leftover);
      else
        store_scattered<FIRST, COUNT, BLOCKS>(row, block_rows, rows, col, cols, lane, acc);
      return;
    }
#endif
    int t[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) t[r] = (int)terms.row[r0 + r / 2 * block_rows + r % 2 * 2];
#if OUTPUT != OUTPUT_PACKED
#pragma unroll
    for (int j = FIRST; j < FIRST + COUNT; j += STEP) {
      const int4 four = load_in_turn(col_terms<Acc>(quad, col + 8 * j));
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int down = r / 2 * block_rows + r % 2 * 2;
        u32 sums[4], v[WORDS];
        four_sums(r / 2, r % 2, r0 + down, c0 + 8 * j, j, t[r], four, acc, sums);
#pragma unroll
        for (int part = 0; part < Acc::SPAN; part++) {
          four_results<Acc>(r0 + down, c0 + 8 * j + 16 * part, sums, part, v);
          store_four(to + 16 * part + down * p.out_row, v);
        }
      }
      to += 8 * STEP;
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
          for (int i = 3; i >= 0; i--) {
            int sum;
            if constexpr (Acc::SPAN == 2)
              sum = product_of_half(t[r], u[i], acc.four(r / 2, r % 2, 4 * w, i), j % 4);
            else
              sum = product(t[r], u[i], acc.four(r / 2, r % 2, j, i));
            signs[r] = __funnelshift_l((u32)sum, signs[r], 1);
          }
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

  // Add the counts of store_fragments to the popcounts of the result's rows.
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
    Leftover<BLOCKS> none;
    store_fragments<0, ACC / 4, ACC / 4>(row, block_rows, col, Whole<BLOCKS, ACC>{acc}, ones, none);
    count_fragments(row, block_rows, ones);
  }
};
