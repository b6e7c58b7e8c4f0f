// The update of weights with a tile of their gradient in shared memory, rounded to bfloat16; for several
// warps of a block.
//
// The translation unit sets the macros of adam.cuh.
#pragma once

#include "adam.cuh"

constexpr int TOGETHER = 2;  // rows of a group, which a warp updates at a time
// Offsets of elements are of 32 bits: a parameter has fewer than 2**31, and 64 bits take three times as many
// instructions.

// Four columns per lane, in some rows of the weights and of the optimizer's means.
struct Rows {
  float weight[TOGETHER][4], mean[TOGETHER][4], square[TOGETHER][4];
  // Fetch into the L2 cache what `load_from` will load: a lane's sector of 32 bytes of each array.
  static __device__ __forceinline__ void fetch(const Parameter& p, int row, int first_col) {
    constexpr int SECTORS = 128 * 4 / 32;  // of a row's 128 columns
    static_assert(SECTORS * TOGETHER == 32, "a sector for each lane");
    const int lane = threadIdx.x & 31, col = first_col + lane % SECTORS * 8;
    if (col >= (int)p.cols) return;
    const int at = min(row + lane / SECTORS, (int)p.rows - 1) * (int)p.cols + col;
    prefetch(p.weight + at);
    prefetch(p.mean + at);
    prefetch(p.square + at);
  }
  static __device__ __forceinline__ void prefetch(const float* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
  // The last row, in place of rows beyond it.
  __device__ __forceinline__ void load_from(const Parameter& p, int row, int col) {
    if (col >= (int)p.cols) return;
#pragma unroll
    for (int r = 0; r < TOGETHER; r++) {
      const int at = min(row + r, (int)p.rows - 1) * (int)p.cols + col;
      load<4>(p.weight + at, weight[r]);
      load<4>(p.mean + at, mean[r]);
      load<4>(p.square + at, square[r]);
    }
  }
};

// Update weights from row m and column n on; return this warp's part of the penalty. For WARPS warps, of
// which this is `warp`. Each takes a group of rows, 128 columns, at a time, while the next AHEAD groups are
// on their way to registers, and FETCHED more to the L2 cache: so few warps do not have enough registers to
// hide the memory's latency. `wait` waits for the gradients; after `release` they are no longer read.
// `signs_after` is scratch space for the signs, one byte per group and column.
template <int WARPS, int TILE_M, int PITCH, int GROUPS, int TILE_N, typename Wait, typename Release>
__device__ __forceinline__ float update_tile(const Parameter& p, const Adam& move,
                                             const bfloat16_bits (&gradients)[TILE_M][PITCH],
                                             unsigned char (&signs_after)[GROUPS][TILE_N], int m, int n,
                                             int warp, const Wait& wait, const Release& release) {
  static_assert(GROUPS * TOGETHER == TILE_M, "a byte a group");
  constexpr int PARTS = TILE_N / 128, COUNT = GROUPS * PARTS, AHEAD = 3, FETCHED = 5;
  const int lane = threadIdx.x & 31;
  const auto row_of = [&](int i) { return m + i / PARTS * TOGETHER; };
  const auto part_of = [&](int i) { return n + i % PARTS * 128; };
  const auto col_of = [&](int i) { return part_of(i) + lane * 4; };
  float sum = 0;
  Rows rows[AHEAD];
  // All this before the gradients are there.
#pragma unroll
  for (int j = 0; j < AHEAD; j++)
    rows[j].load_from(p, row_of(warp + j * WARPS), col_of(warp + j * WARPS));
#pragma unroll 1
  for (int j = AHEAD; j < AHEAD + FETCHED; j++)
    Rows::fetch(p, row_of(warp + j * WARPS), part_of(warp + j * WARPS));
  wait();
#pragma unroll 1
  for (int first = warp; first < COUNT; first += AHEAD * WARPS) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = first + j * WARPS;
      if (i >= COUNT) break;
      __syncwarp();  // one after the other: together they take too many registers
      const int row = row_of(i), col = col_of(i);
      Rows& now = rows[j];
      u32 signs[4] = {};
#pragma unroll
      for (int r = 0; r < TOGETHER; r++) {
        const bool exists = row + r < (int)p.rows & col < (int)p.cols;
        float gradient[4];
        load<4>(&gradients[row - m + r][col - n], gradient);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          move(now.weight[r][e], gradient[e], now.mean[r][e], now.square[r][e], exists, sum);
          // The result of arithmetic that flushes to zero: of the special cases of `nonnegative`, only
          // NaN remains.
          signs[e] |= now.weight[r][e] >= 0 & exists ? 1u << r : 0;
        }
        if (exists) {
          const int at = (row + r) * (int)p.cols + col;
          store<4>(p.weight + at, now.weight[r]);
          store<4>(p.mean + at, now.mean[r]);
          store<4>(p.square + at, now.square[r]);
#if WRITE_GRADIENT
          store<4>(p.kept_grad + at, gradient);
#endif
        }
      }
      const int fetched = i + (AHEAD + FETCHED) * WARPS, later = i + AHEAD * WARPS;
      if (fetched < COUNT) Rows::fetch(p, row_of(fetched), part_of(fetched));
      if (later < COUNT) now.load_from(p, row_of(later), col_of(later));
      *(u32*)&signs_after[i / PARTS][col - n] =
          signs[0] | signs[1] << 8 | signs[2] << 16 | signs[3] << 24;
    }
  }
  release();
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); };
  meet();
  constexpr int WORDS = TILE_M / 32 * TILE_N, EACH = 4;  // a lane's words, loaded together
#pragma unroll 1
  for (int first = warp * 32 + lane; first < WORDS; first += EACH * WARPS * 32) {
    u32 before[EACH], *to[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int index = first + i * WARPS * 32, at = n + index % TILE_N, word = m / 32 + index / TILE_N;
      const bool exists = index < WORDS & word * 32 < (int)p.rows & at < (int)p.cols;
      to[i] = exists ? packed_signs(p, at, word) : nullptr;
      before[i] = exists ? *to[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (to[i] == nullptr) continue;
      const int index = first + i * WARPS * 32, at = index % TILE_N, word = index / TILE_N;
      u32 after = 0;
#pragma unroll
      for (int group = 0; group < 32 / TOGETHER; group++)
        after |= (u32)signs_after[word * (32 / TOGETHER) + group][at] << (TOGETHER * group);
      pack_signs(p, n + at, to[i], after, before[i]);
    }
  }
  meet();  // before signs of the next tile are written
  return sum;
}
