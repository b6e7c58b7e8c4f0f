// The update of parameters, several in one launch: Adam or AdamW, the penalty and its gradient, clipping
// of latent weights, and the copies of the weights that the next step's products read.
//
// A block updates 32 rows x 128 columns of one parameter, a warp four of the rows, a lane four
// neighbors of each. For binary weights it writes the signs, dense for the backward products and
// packed along the rows (a product's right operand, layout.cuh): 32 rows are one word of a column.
// A column's popcount changes by the flips. For a rank's share of a weight, it writes the words as
// they are sent to the other ranks instead. Other parameters are treated as flat, with 128 elements
// per row.
//
// A step may have several launches; the last block of the final one sums the first `counted` parts
// of the penalty and increments the step. `earlier` is the number of parts from earlier launches.
// The learning rate and Adam's bias corrections come from a table on the device, indexed by the
// step.
//
// Parameters are passed as arguments, not in memory, so that a block can load its arrays without
// first loading their addresses.
//
// What bounds it: reading four arrays and writing three.
//
// The translation unit sets REAL, PENALTY and WRITE_GRADIENT (adam.cuh). If it also sets RANKS, the
// kernel is `adam_of_ranks`, in which a gradient is the sum of RANKS arrays, each in the memory of
// a GPU of this host. They must be complete on all ranks before the launch, and stay unchanged
// until all ranks' launches have ended. The connection and this device's memory are then busy at
// the same time, and the sum need not be stored.

#include "adam.cuh"

#ifndef RANKS
#define RANKS 0
#endif

constexpr int TILE_ROWS = 32, TILE_COLS = 128, EACH = TILE_ROWS / WARPS;

constexpr int MOST = 8;  // in a launch
struct Parameters {
  Parameter at[MOST];
  i64 count;
};

#if RANKS
#include "ranks.cuh"

// By rank: what to add to the address of a gradient to get that rank's. Filled by
// cupybnn/backends/cuda/fused_update.py.
struct Distances {
  i64 of[MOST_RANKS];
};
#endif

template <typename E>
__device__ __forceinline__ void load_some(const E* from, int count, float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = i < count ? to_float(from[i]) : 0.0f;
}
// Elements of four arrays in EACH rows. In one branch, so that all loads are in flight together.
template <typename G>
__device__ __forceinline__ void load_rows(const Parameter& p, const int (&at)[EACH], bool whole,
                                          const int (&exist)[EACH], float (&w)[EACH][4],
                                          float (&g)[EACH][4], float (&m)[EACH][4],
                                          float (&s)[EACH][4]) {
  const G* grad = (const G*)p.grad;
  if (whole) {
#pragma unroll
    for (int r = 0; r < EACH; r++) {
      load<4>(p.weight + at[r], w[r]);
      load<4>(grad + at[r], g[r]);
      load<4>(p.mean + at[r], m[r]);
      load<4>(p.square + at[r], s[r]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < EACH; r++) {
      load_some(p.weight + at[r], exist[r], w[r]);
      load_some(grad + at[r], exist[r], g[r]);
      load_some(p.mean + at[r], exist[r], m[r]);
      load_some(p.square + at[r], exist[r], s[r]);
    }
  }
}
#if RANKS
// Elements of one rank's gradient in EACH rows.
template <typename G, bool WHOLE>
__device__ __forceinline__ void load_rank(const Parameter& p, i64 away, const int (&at)[EACH],
                                          const int (&exist)[EACH], Vector<G, 4> (&rows)[EACH]) {
  const G* grad = (const G*)((const char*)p.grad + away);
#pragma unroll
  for (int r = 0; r < EACH; r++) {
    if constexpr (WHOLE) {
      rows[r] = *(const Vector<G, 4>*)(grad + at[r]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) rows[r].at[i] = i < exist[r] ? grad[at[r] + i] : G{};
    }
  }
}
// As `load_rows`. Gradients are loaded first, because those of other GPUs take longest. With many
// ranks, they need too many registers to be all in flight together.
template <typename G, bool WHOLE>
__device__ __forceinline__ void load_rows_of_ranks(const Parameter& p, const Distances& away,
                                                   const int (&at)[EACH], const int (&exist)[EACH],
                                                   float (&w)[EACH][4], float (&g)[EACH][4],
                                                   float (&m)[EACH][4], float (&s)[EACH][4]) {
  constexpr int TOGETHER = RANKS < 4 ? RANKS : 4;
  Vector<G, 4> rows[TOGETHER][EACH];
#pragma unroll
  for (int rank = 0; rank < TOGETHER; rank++) load_rank<G, WHOLE>(p, away.of[rank], at, exist, rows[rank]);
#pragma unroll
  for (int r = 0; r < EACH; r++) {
    if constexpr (WHOLE) {
      load<4>(p.weight + at[r], w[r]);
      load<4>(p.mean + at[r], m[r]);
      load<4>(p.square + at[r], s[r]);
    } else {
      load_some(p.weight + at[r], exist[r], w[r]);
      load_some(p.mean + at[r], exist[r], m[r]);
      load_some(p.square + at[r], exist[r], s[r]);
    }
  }
#pragma unroll
  for (int rank = 0; rank < TOGETHER; rank++)
#pragma unroll
    for (int r = 0; r < EACH; r++) add_rank<4>(rank == 0, rows[rank][r], g[r]);
#pragma unroll 1
  for (int rank = TOGETHER; rank < RANKS; rank++) {
    load_rank<G, WHOLE>(p, away.of[rank], at, exist, rows[0]);
#pragma unroll
    for (int r = 0; r < EACH; r++) add_rank<4>(false, rows[0][r], g[r]);
  }
#pragma unroll
  for (int r = 0; r < EACH; r++) to_floats<4>(rounded<G>(g[r]), g[r]);
}
#endif
template <typename E>
__device__ __forceinline__ void store_some(E* to, int count, bool whole, const float (&v)[4]) {
  if (whole) {
    store<4>(to, v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) from_float(v[i], to[i]);
  }
}

#if RANKS
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    adam_of_ranks(const __grid_constant__ Parameters parameters, const Rates* __restrict__ rates,
                  i64 ring, i64* step, float gain_mean, float gain_square, const float* mean_loss,
                  float* loss, float* partials, i64 earlier, i64 counted, int final, u32* ticket,
                  const __grid_constant__ Distances away) {
#else
extern "C" __global__ void __launch_bounds__(THREADS)
    adam(const __grid_constant__ Parameters parameters, const Rates* __restrict__ rates, i64 ring,
         i64* step, float gain_mean, float gain_square, const float* mean_loss, float* loss,
         float* partials, i64 earlier, i64 counted, int final, u32* ticket) {
#endif
  __shared__ unsigned char nibbles[WARPS][TILE_COLS];  // signs of four rows: after, and before
  __shared__ float sums[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int number = 0;
#pragma unroll
  for (int i = 1; i < MOST; i++)
    number += i < parameters.count && blockIdx.x >= parameters.at[i].first_block;
  const Parameter& p = parameters.at[number];
  // 32 bits are enough: a parameter has fewer than 2**31 elements, and offsets are used for those alone.
  const int cols = (int)p.cols;
  const int tiles = (cols + TILE_COLS - 1) / TILE_COLS, tile = blockIdx.x - (int)p.first_block;
  const int row0 = tile / tiles * TILE_ROWS, row = row0 + warp * EACH;
  const int col = tile % tiles * TILE_COLS + lane * 4;

  float w[EACH][4], g[EACH][4], m[EACH][4], s[EACH][4];
  int at[EACH], exist[EACH];
#pragma unroll
  for (int r = 0; r < EACH; r++) {
    at[r] = (row + r) * cols + col;
    exist[r] = row + r < (int)p.rows ? max(0, min(4, min(cols - col, (int)p.count - at[r]))) : 0;
  }
  const bool whole = p.flags & ALIGNED && exist[EACH - 1] == 4;
#if RANKS  // of dense products alone
  if (whole)
    load_rows_of_ranks<real_t, true>(p, away, at, exist, w, g, m, s);
  else
    load_rows_of_ranks<real_t, false>(p, away, at, exist, w, g, m, s);
#else
  if (sizeof(real_t) != 4 && p.flags & ROUNDED)
    load_rows<real_t>(p, at, whole, exist, w, g, m, s);
  else
    load_rows<float>(p, at, whole, exist, w, g, m, s);
#endif
  // Read here, so that no other load waits for these two, which depend on each other.
  const Rates rate = rates[*step % ring];
  const Adam move(p, rate, gain_mean, gain_square);
  float sum = 0;
  u32 signs[4] = {};
#pragma unroll
  for (int r = 0; r < EACH; r++) {
    float copy[4];
    bool stale = !(p.flags & BINARY);  // signs are written only where one has changed
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool before = i < exist[r] && nonnegative(w[r][i]);
      move(w[r][i], g[r][i], m[r][i], s[r][i], i < exist[r], sum);
      const bool after = i < exist[r] && nonnegative(w[r][i]);
      signs[i] |= (u32)after << r | (u32)before << (4 + r);
      copy[i] = p.flags & BINARY ? (after ? 1.0f : -1.0f) : w[r][i];
      stale |= after != before;
    }
    if (exist[r] == 0) continue;
    store_some(p.weight + at[r], exist[r], whole, w[r]);
    store_some(p.mean + at[r], exist[r], whole, m[r]);
    store_some(p.square + at[r], exist[r], whole, s[r]);
#if WRITE_GRADIENT
    store_some(p.kept_grad + at[r], exist[r], whole, g[r]);
#endif
    if (p.copy && stale) store_some(p.copy + at[r], exist[r], whole, copy);
  }

  if (p.words) {  // the same for the whole block
#pragma unroll
    for (int i = 0; i < 4; i++) nibbles[warp][lane * 4 + i] = (unsigned char)signs[i];
    __syncthreads();
    const int line = tile % tiles * TILE_COLS + threadIdx.x;
    if (threadIdx.x < TILE_COLS && line < cols) {
      u32 after = 0, before = 0;
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const u32 both = nibbles[i][threadIdx.x];
        after |= (both & 15) << (4 * i);
        before |= (both >> 4) << (4 * i);
      }
      if (p.flags & SENT)
        p.words[row0 / 32 * p.cols + line] = after;
      else
        pack_signs(p, line, packed_signs(p, line, row0 / 32), after, before);
    }
  }

#if PENALTY != PENALTY_NONE
  sum = sum_of_warp(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < WARPS; i++) sum += sums[i];
    partials[earlier + blockIdx.x] = sum;
  }
#endif
  if (!final || !is_last_block(ticket, gridDim.x, PENALTY != PENALTY_NONE)) return;
  double total = 0;
#if PENALTY != PENALTY_NONE
  total = sum_of_partials(partials, counted);
#endif
  if (threadIdx.x == 0) {
    *loss = *mean_loss + (float)total;
    ++*step;
  }
}
