// A hidden layer's way back: from the gradient of its activation to that of its product.
//
// First the gate (STE or ReLU, one bit an element), then batch norm. With n rows, sums over them,
// dy what comes through the gate, and normal = (z - mean) / deviation:
//     beta' = sum(dy),  gamma' = sum(dy * normal),
//     z' = gamma / deviation * (dy - (beta' + normal * gamma') / n)
//
// gradient_sums: the two sums, by strips (training.cuh); in clusters it goes on to z'. gradient: z', in
// place of the gradient that came. Without batch norm only the second is needed, for the gate.
//
// What bounds both: reading gradients and products, once where they stay in the cache between the
// passes.
//
// The translation unit sets what training.cuh wants, and GATE, one of GATE_*.

#define GATE_NONE 0
#define GATE_MASK 1
#define GATE_CLIP 2  // limited to [-1, 1]

#include "training.cuh"

constexpr int BATCH = 4;  // rows whose loads are in flight

// What comes through the gate of a thread's columns.
__device__ __forceinline__ void load_gradient(const Layer& p, const real_t* grad, const u32* gate, i64 row,
                                              i64 col, float (&dy)[VECTOR]) {
  load<VECTOR>(grad + row * p.cols + col, dy);
#if GATE == GATE_MASK
  const u32 passes = mask_bits(gate, row, col, p.cols);
#endif
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
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

// Load gradients and products of the BATCH rows from `first` on; 0 where there is no such row.
__device__ __forceinline__ void load_rows(const Layer& p, const Strip& at, const real_t* grad,
                                          const u32* gate, i64 first, float (&z)[BATCH][VECTOR],
                                          float (&dy)[BATCH][VECTOR]) {
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const i64 row = first + b * at.step + at.skip;
    if (row < p.rows && at.col < p.cols) {
      if (HAS_NORM) load_product<VECTOR>(p, row, at.col, z[b]);
      load_gradient(p, grad, gate, row, at.col, dy[b]);
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; i++) z[b][i] = dy[b][i] = 0.0f;
    }
  }
}

// `of_gamma` and `of_beta` are those of the thread's columns.
__device__ __forceinline__ void write_gradients(const Layer& p, const Strip& at, real_t* grad,
                                                const u32* gate, const float* of_gamma,
                                                const float* of_beta) {
  if (at.col >= p.cols) return;
#if NORM
  const Normal<VECTOR> norm(p, at.col);
  float factor[VECTOR], gammas[VECTOR], betas[VECTOR];
  load<VECTOR>(of_gamma, gammas);
  load<VECTOR>(of_beta, betas);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    factor[i] = norm.gamma[i] * norm.inverse[i];
    gammas[i] *= (float)p.share;
    betas[i] *= (float)p.share;
  }
#endif
  for (i64 first = at.first_row; first < p.rows; first += BATCH * at.step) {
    float z[BATCH][VECTOR], dy[BATCH][VECTOR];
    load_rows(p, at, grad, gate, first, z, dy);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const i64 row = first + b * at.step + at.skip;
      if (row >= p.rows) continue;
#if DROP == DROP_PRODUCT
      const u32 kept = mask_bits(p.kept, row, at.col, p.cols);
#endif
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
#if NORM
        dy[b][i] = (dy[b][i] - betas[i] - norm.normal(i, z[b][i]) * gammas[i]) * factor[i];
#endif
#if DROP == DROP_PRODUCT
        dy[b][i] = kept >> i & 1 ? dy[b][i] * (float)p.keep_scale : 0.0f;
#endif
      }
      store<VECTOR>(grad + row * p.cols + at.col, dy[b]);
    }
  }
}

#if NORM
extern "C" __global__ void __launch_bounds__(THREADS) IN_CLUSTERS
    gradient_sums(const __grid_constant__ Layer p, real_t* grad, const u32* gate, float* partials,
                  u32* tickets, float* grad_gamma, float* grad_beta) {
  __shared__ double total[2][COLS];
  __shared__ __align__(16) float gammas[COLS], betas[COLS];
  const Strip at;
  float sums[2][VECTOR] = {};
  const Normal<VECTOR> norm(p, at.col < p.cols ? at.col : 0);
  for (i64 first = at.first_row; first < p.rows; first += BATCH * at.step) {
    float z[BATCH][VECTOR], dy[BATCH][VECTOR];
    load_rows(p, at, grad, gate, first, z, dy);
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        sums[0][i] += dy[b][i];
        sums[1][i] += dy[b][i] * norm.normal(i, z[b][i]);
      }
  }
  if (!sum_over_rows<2>(sums, partials, tickets, p.cols, total)) return;
  const i64 col = at.first_col + threadIdx.x;
  if (threadIdx.x < COLS) {
    betas[threadIdx.x] = (float)total[0][threadIdx.x];
    gammas[threadIdx.x] = (float)total[1][threadIdx.x];
    if (writes_sums() && col < p.cols) {
      grad_beta[col] = betas[threadIdx.x];
      grad_gamma[col] = gammas[threadIdx.x];
    }
  }
#if CLUSTER > 1
  __syncthreads();
  write_gradients(p, at, grad, gate, gammas + at.lane * VECTOR, betas + at.lane * VECTOR);
  __syncwarp();
#endif
  leave_sums();
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    gradient(const __grid_constant__ Layer p, real_t* grad, const u32* gate, const float* grad_gamma,
             const float* grad_beta) {
  const Strip at;
  write_gradients(p, at, grad, gate, grad_gamma + at.col, grad_beta + at.col);
}
