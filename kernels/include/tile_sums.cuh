// The sums of batch norm's backward pass, of a tile of the gradient of its activations in shared memory,
// rounded to bfloat16; for several warps of a block. Formulas: smxx_activation_gradient.cu, of whose two
// launches this takes the place of the first.
//
// The translation unit sets REAL, the macros of layer.cuh with NORM 1 and DROP 0, and GATE, one of GATE_*.
#pragma once

#include "block.cuh"
#include "layer.cuh"

#define GATE_NONE 0
#define GATE_MASK 1
#define GATE_CLIP 2  // limited to [-1, 1]

constexpr int SUMMED_COLS = 128;  // of a strip: four for each lane

// Filled by cupybnn/backends/cuda/sign_gemm.py, field by field in this order.
struct NormSums {
  const u32* gate;
  float* partials;    // (tiles of rows, 2, columns)
  u32* tickets;       // one for each strip of 128 columns: 0 between launches
  float* grad_gamma;
  float* grad_beta;
};

// What a lane needs of a layer for COUNT of its rows, which are WARPS apart, from row `first` of a tile on.
template <int WARPS, int COUNT> struct RowsOfLayer {
  Vector<product_t, 4> z[COUNT];
  u32 gate[COUNT];
  // Of the last row, in place of rows beyond it.
  __device__ __forceinline__ void load_from(const Layer& p, const u32* gates, int first, int last, int col) {
    const int words = ((int)p.cols + 31) >> 5;
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
      const int row = min(first + b * WARPS, last);
      z[b] = *(const Vector<product_t, 4>*)(p.z + row * (int)p.cols + col);
      gate[b] = GATE == GATE_MASK ? gates[row * words + (col >> 5)] >> (col & 31) : 0;
    }
  }
};

// Store a tile of ROWS rows x 128 columns, from row `row0` and column `col0` on, in `grad`, and add it up; the
// warps that finish the last tile of a strip finish its sums. Each warp takes every WARPS-th row. `shared` is
// scratch space; `wait` and `release` are those of `update_tile`. Offsets of elements are of 32 bits.
template <int WARPS, int ROWS, int PITCH, typename Wait, typename Release>
__device__ __forceinline__ void sum_tile(const Layer& p, const NormSums& to, real_t* grad,
                                         const real_t (&results)[ROWS][PITCH],
                                         float (&shared)[WARPS][2 * SUMMED_COLS], u32& is_last, int row0,
                                         int col0, int warp, const Wait& wait, const Release& release) {
  constexpr int COUNT = 8;
  const int lane = threadIdx.x & 31, cols = (int)p.cols, last = (int)p.rows - 1;
  const bool has_cols = col0 + lane * 4 < cols;
  const int col = has_cols ? col0 + lane * 4 : 0;
  const Normal<4> norm(p, col);
  RowsOfLayer<WARPS, COUNT> now, next;
  now.load_from(p, to.gate, row0 + warp, last, col);
  float sums[2][4] = {};
  wait();
#pragma unroll 1
  for (int first = warp; first < ROWS; first += COUNT * WARPS) {
    next.load_from(p, to.gate, row0 + first + COUNT * WARPS, last, col);
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
      const int own = first + b * WARPS;
      const bool exists = own < ROWS && row0 + own <= last && has_cols;
      Vector<real_t, 4> raw = *(const Vector<real_t, 4>*)&results[min(own, ROWS - 1)][lane * 4];
      if (exists) *(Vector<real_t, 4>*)(grad + (row0 + own) * cols + col) = raw;
      if (GATE == GATE_MASK) keep_only(raw, now.gate[b]);
      float dy[4], z[4];
      to_floats<4>(raw, dy);
      to_floats<4>(now.z[b], z);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (GATE == GATE_CLIP) dy[i] = dy[i] > 1 ? 1.0f : dy[i] < -1 ? -1.0f : dy[i];
        const float d = exists ? dy[i] : 0.0f;
        sums[0][i] += d;
        sums[1][i] += d * norm.normal(i, z[i]);
      }
    }
    now = next;
  }
  release();
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); };
#pragma unroll
  for (int n = 0; n < 2; n++) store<4>(&shared[warp][n * SUMMED_COLS + lane * 4], sums[n]);
  meet();
  // Sum n of column c is number n * 128 + c; each thread takes some.
  const int tile = row0 / ROWS, tiles = last / ROWS + 1;
  const auto place = [&](int of, int number) {
    return (of * 2 + number / SUMMED_COLS) * cols + col0 + number % SUMMED_COLS;
  };
  for (int number = warp * 32 + lane; number < 2 * SUMMED_COLS; number += WARPS * 32) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared[w][number];
    if (col0 + number % SUMMED_COLS < cols) to.partials[place(tile, number)] = sum;
  }
  __threadfence();
  meet();
  if (warp == 0 && lane == 0)
    is_last = atomicInc(to.tickets + col0 / SUMMED_COLS, (u32)tiles - 1) == (u32)tiles - 1;
  meet();
  if (!is_last) return;
  __threadfence();
  for (int number = warp * 32 + lane; number < 2 * SUMMED_COLS; number += WARPS * 32) {
    const int own = col0 + number % SUMMED_COLS;
    if (own >= cols) continue;
    double sum = 0;
#pragma unroll 16
    for (int i = 0; i < tiles; i++) sum += __ldcg(to.partials + place(i, number));
    (number < SUMMED_COLS ? to.grad_beta : to.grad_gamma)[own] = (float)sum;
  }
}
