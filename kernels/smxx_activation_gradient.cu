// A hidden layer's way back: from the gradient of its activation to that of its product.
//
// First the gate (STE or ReLU, one bit an element), then batch norm. With n rows, sums over them,
// dy what comes through the gate, and normal = (z - mean) / deviation:
//     beta' = sum(dy),  gamma' = sum(dy * normal),
//     z' = gamma / deviation * (dy - (beta' + normal * gamma') / n)
//
// gradient_sums: the two sums; gradient: z', in place of the gradient that came. Both go by columns
// (training.cuh). Without batch norm only the second is needed, for the gate.
//
// What bounds both: reading gradients and products once each.
//
// The translation unit sets what training.cuh wants, and GATE, one of GATE_*.

#define GATE_NONE 0
#define GATE_MASK 1
#define GATE_CLIP 2  // limited to [-1, 1]

#include "training.cuh"

constexpr int BATCH = 4;  // rows whose loads are in flight

// What comes through the gate of V neighbouring columns.
template <int V>
__device__ __forceinline__ void load_gradient(const Layer& p, const real_t* grad, const u32* gate, i64 row,
                                              i64 col, float (&dy)[V]) {
  load<V>(grad + row * p.cols + col, dy);
#if GATE == GATE_MASK
  const u32 passes = mask_bits(gate, row, col, p.cols);
#endif
#pragma unroll
  for (int i = 0; i < V; i++) {
#if GATE == GATE_MASK
    dy[i] = passes >> i & 1 ? dy[i] : 0.0f;
#elif GATE == GATE_CLIP
    dy[i] = dy[i] > 1 ? 1.0f : dy[i] < -1 ? -1.0f : dy[i];
#endif
#if DROP == DROP_ACTIVATION
    dy[i] *= (float)p.keep_scale;  // the gate is shut where something was dropped
#endif
  }
}

#if NORM
extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_sums(const __grid_constant__ Layer p, const real_t* __restrict__ grad,
                  const u32* __restrict__ gate, float* partials, u32* tickets, float* grad_gamma,
                  float* grad_beta) {
  __shared__ double total[2][32 * VECTOR];
  const ByColumns at;
  float sums[2][VECTOR] = {};
  if (at.col < p.cols) {
    const Normal<VECTOR> norm(p, at.col);
    for (i64 first = at.first_row; first < p.rows; first += BATCH * at.step) {
      float z[BATCH][VECTOR], dy[BATCH][VECTOR];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const i64 row = first + b * at.step;
        if (row < p.rows) {
          load_product<VECTOR>(p, row, at.col, z[b]);
          load_gradient<VECTOR>(p, grad, gate, row, at.col, dy[b]);
        } else {
#pragma unroll
          for (int i = 0; i < VECTOR; i++) z[b][i] = dy[b][i] = 0.0f;
        }
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          sums[0][i] += dy[b][i];
          sums[1][i] += dy[b][i] * norm.normal(i, z[b][i]);
        }
    }
  }
  if (!sum_over_rows<2, VECTOR>(sums, partials, tickets, p.cols, total)) return;
  const i64 col = (i64)blockIdx.x * 32 * VECTOR + threadIdx.x;
  if (threadIdx.x >= 32 * VECTOR || col >= p.cols) return;
  grad_beta[col] = (float)total[0][threadIdx.x];
  grad_gamma[col] = (float)total[1][threadIdx.x];
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient(const __grid_constant__ Layer p, real_t* grad, const u32* gate, const float* grad_gamma,
             const float* grad_beta) {
  const ByColumns at;
  if (at.col >= p.cols) return;
#if NORM
  const Normal<VECTOR> norm(p, at.col);
  float factor[VECTOR], of_gamma[VECTOR], of_beta[VECTOR];
  load<VECTOR>(grad_gamma + at.col, of_gamma);
  load<VECTOR>(grad_beta + at.col, of_beta);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    factor[i] = norm.gamma[i] * norm.inverse[i];
    of_gamma[i] *= (float)p.share;
    of_beta[i] *= (float)p.share;
  }
#endif
  for (i64 first = at.first_row; first < p.rows; first += BATCH * at.step) {
    float dy[BATCH][VECTOR];
#if NORM
    float z[BATCH][VECTOR];
#endif
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const i64 row = first + b * at.step;
      if (row < p.rows) {
        load_gradient<VECTOR>(p, grad, gate, row, at.col, dy[b]);
#if NORM
        load_product<VECTOR>(p, row, at.col, z[b]);
#endif
      }
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const i64 row = first + b * at.step;
      if (row >= p.rows) continue;
#if DROP == DROP_PRODUCT
      const u32 kept = mask_bits(p.kept, row, at.col, p.cols);
#endif
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
#if NORM
        dy[b][i] = (dy[b][i] - of_beta[i] - norm.normal(i, z[b][i]) * of_gamma[i]) * factor[i];
#endif
#if DROP == DROP_PRODUCT
        dy[b][i] = kept >> i & 1 ? dy[b][i] * (float)p.keep_scale : 0.0f;
#endif
      }
      store<VECTOR>(grad + row * p.cols + at.col, dy[b]);
    }
  }
}
