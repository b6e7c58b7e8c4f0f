// The backward pass of a hidden layer: from the gradient of its activation to that of its product.
//
// First the gate (STE or ReLU, one bit per element), then batch norm. With n rows, sums over them,
// dy the gradient after the gate, and normal = (z - mean) / deviation:
//     beta' = sum(dy),  gamma' = sum(dy * normal),
//     z' = gamma / deviation * (dy - (beta' + normal * gamma') / n)
//
// gradient_sums: the two sums, by strips (strips.cuh); in clusters it also computes z'. gradient: z'.
// Without batch norm only the second is needed, for the gate. z' may overwrite the incoming gradient, or
// the product if its elements have the same size: a thread writes only elements that it alone has read.
//
// What bounds both: reading gradients and products, once if they stay in shared memory between the
// passes.
//
// `gradient` may also find the greatest magnitude of each row and column of z' (gradient_writer.cuh).
//
// The translation unit sets the macros of strips.cuh, and GATE, one of GATE_*; it may set GREATEST.

#define GATE_NONE 0
#define GATE_MASK 1
#define GATE_CLIP 2  // limited to [-1, 1]

#include "gradient_writer.cuh"

constexpr int MOST = BLOCK_WARPS > 8 ? 4 : 8;  // as registers allow
constexpr int BATCH = HELD && HELD < MOST ? HELD : MOST;  // rows whose loads are in flight

#if HELD
__device__ __forceinline__ HeldElements<real_t> held_gradients() {
  return HeldElements<real_t>(held + HELD_MORE);
}
__device__ __forceinline__ HeldByRow<u32> held_gates() {
  return HeldByRow<u32>(held + HELD_MORE + HELD_ROWS * COLS * sizeof(real_t));
}
#endif

// A thread's gradients of BATCH rows after the gate, loaded after `Products` and in the same way. In the
// first pass they are held without those that the gate stops.
template <bool FIRST> struct Gradients {
  Vector<real_t, VECTOR> raw[BATCH];
  __device__ __forceinline__ Gradients(const Strip& at, const real_t* grad, const u32* gate, int turn) {
#if HELD
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      raw[b] = held_gradients()(turn + b);
      if (GATE == GATE_MASK && FIRST) {
        keep_only(raw[b], held_gates()(turn + b) >> at.bit());
        held_gradients().own[(turn + b) * THREADS] = raw[b];
      }
    }
#else
    u32 passes[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int row = at.row(turn + b);
      raw[b] = *(const Vector<real_t, VECTOR>*)(grad + at.offset(row));
      passes[b] = GATE == GATE_MASK ? gate[at.word(row)] >> at.bit() : 0;
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++)
      if (GATE == GATE_MASK) keep_only(raw[b], passes[b]);
#endif
  }
  // Those of row b.
  __device__ __forceinline__ void load(const Layer& p, int b, float (&dy)[VECTOR]) const {
    to_floats<VECTOR>(raw[b], dy);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      if (GATE == GATE_CLIP) dy[i] = dy[i] > 1 ? 1.0f : dy[i] < -1 ? -1.0f : dy[i];
      if (DROP == DROP_ACTIVATION) dy[i] *= (float)p.keep_scale;  // the gate is 0 for dropped elements
    }
  }
};

// `of_gamma` and `of_beta` are those of the thread's columns.
__device__ __forceinline__ void write_gradients(const Layer& p, const Strip& at,
                                                const Normal<VECTOR>& norm, const real_t* grad,
                                                real_t* out, const u32* gate, const float* of_gamma,
                                                const float* of_beta, u32* row_most = nullptr,
                                                u32* col_most = nullptr) {
  GradientWriter writer;
#if NORM
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
#pragma unroll 1
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH, false> products(p, at, turn);
    const Gradients<false> gradients(at, grad, gate, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int row = at.row(turn + b);
      float z[VECTOR], dz[VECTOR];
      products.load(p, b, z);
      gradients.load(p, b, dz);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
#if NORM
        dz[i] = (dz[i] - betas[i] - norm.normal(i, z[i]) * gammas[i]) * factor[i];
#endif
#if DROP == DROP_PRODUCT
        dz[i] = products.kept(b, i) ? dz[i] * (float)p.keep_scale : 0.0f;
#endif
      }
      writer.write(at, row, dz, out, row_most);
    }
  }
  writer.finish(at, col_most);
}

#if NORM
extern "C" __global__ void BY_STRIPS IN_CLUSTERS
    gradient_sums(const __grid_constant__ Layer p, const real_t* grad, real_t* out, const u32* gate,
                  float* partials, u32* tickets, float* grad_gamma, float* grad_beta) {
  __shared__ double total[2][COLS];
  __shared__ __align__(16) float gammas[COLS], betas[COLS];
  const Strip at(p);
#if HELD
  hold(p, at, [&](int turn) {
    held_gradients().copy(at, grad, turn);
    if (GATE == GATE_MASK) held_gates().copy(at, gate + at.word(at.row(turn)), turn);
  });
#endif
  float sums[2][VECTOR] = {};
  const Normal<VECTOR> norm(p, at.safe_col());
#pragma unroll 1
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH, true> products(p, at, turn);
    const Gradients<true> gradients(at, grad, gate, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float z[VECTOR], dy[VECTOR];
      products.load(p, b, z);
      gradients.load(p, b, dy);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float d = at.has(at.row(turn + b)) ? dy[i] : 0.0f;
        sums[0][i] += d;
        sums[1][i] += d * norm.normal(i, z[i]);
      }
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
  write_gradients(p, at, norm, grad, out, gate, gammas + at.lane * VECTOR, betas + at.lane * VECTOR);
  __syncwarp();
#endif
  leave_sums();
}
#endif

#if !HELD
extern "C" __global__ void BY_STRIPS
    gradient(const __grid_constant__ Layer p, const real_t* grad, real_t* out, const u32* gate,
             const float* grad_gamma, const float* grad_beta, u32* row_most, u32* col_most) {
  const Strip at(p);
  write_gradients(p, at, Normal<VECTOR>(p, at.safe_col()), grad, out, gate, grad_gamma + at.safe_col(),
                  grad_beta + at.safe_col(), row_most, col_most);
}
#endif
