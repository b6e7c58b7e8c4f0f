// The end of the network, for a few classes: last activation, last layer, loss, and all the way back
// to the last hidden product, without ever storing the activation or its gradient.
//
// logits: a warp computes ROWS rows' logits, with the weights of 256 columns at a time in shared
// memory, transposed; then their loss and its gradient. The last block adds up the loss.
//
// head_sums: by columns (training.cuh). An activation's gradient is the product of a row of CLASSES
// numbers and the column's CLASSES weights, made on the way. Sums over rows: the gradients of the
// weights, and those of batch norm.
//
// head_gradient: by columns; the gradient of the hidden product.
//
// What bounds all three: reading the products once, and 2 CLASSES operations for each.
//
// The translation unit sets what training.cuh wants, and
//     CLASSES  at most 32
//     RELU     1: the last activation is ReLU. 0: there is none
//     LOSS     LOSS_*
//     ROWS     for `logits`; without it the unit holds the other two

#define LOSS_CROSS_ENTROPY 0
#define LOSS_SQUARED_HINGE 1

#include "training.cuh"

// The last activation of an element, and by how much its gradient is multiplied on the way back.
struct Activation {
  float value, passes;
  __device__ __forceinline__ Activation(const Layer& p, float y, u32 kept) {
    value = y;
    passes = 1.0f;
#if RELU
    passes = y > 0 ? 1.0f : 0.0f;
    value = y > 0 ? y : y != y ? y : 0.0f;
#endif
#if DROP == DROP_ACTIVATION
    const float factor = kept & 1 ? (float)p.keep_scale : 0.0f;
    value = __fmul_rn(value, factor);
    passes *= factor;
#endif
  }
};

__device__ __forceinline__ u32 kept_bits(const Layer& p, i64 row, i64 col) {
#if DROP != DROP_NONE
  return mask_bits(p.kept, row, col, p.cols);
#else
  return 0;
#endif
}

// Loss of one example, the same in every lane, and the gradient of the mean loss for its logits.
__device__ __forceinline__ float loss_of(const float (&logit)[CLASSES], int label, float smoothing,
                                         float share, float (&grad)[CLASSES]) {
  float loss = 0;
#if LOSS == LOSS_CROSS_ENTROPY
  float greatest = logit[0], total = 0;
#pragma unroll
  for (int c = 1; c < CLASSES; c++) greatest = logit[c] > greatest ? logit[c] : greatest;
#pragma unroll
  for (int c = 0; c < CLASSES; c++) total += grad[c] = expf(logit[c] - greatest);
  const float log_total = logf(total), per_total = __fdividef(1.0f, total);
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    const float target = (c == label ? 1.0f - smoothing : 0.0f) + smoothing / CLASSES;
    loss += target * (log_total - (logit[c] - greatest));
    grad[c] = (grad[c] * per_total - target) * share;
  }
#else
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    const float target = c == label ? 1.0f : -1.0f;
    const float margin = 1.0f - target * logit[c];
    const float over = margin > 0 || margin != margin ? margin : 0.0f;
    loss += over * over / CLASSES;
    grad[c] = target * over * (-2.0f / CLASSES * share);
  }
#endif
  return loss;
}

#ifdef ROWS
extern "C" __global__ void __launch_bounds__(THREADS)
    logits(const __grid_constant__ Layer p, const float* __restrict__ weight,
           const i64* __restrict__ labels, float smoothing, float* out, float* grad, float* partials,
           u32* ticket, float* loss) {
  constexpr int WIDTH = 256, STRIDE = WIDTH + 4;
  __shared__ __align__(16) float w[CLASSES][STRIDE];
  __shared__ float losses[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 row0 = ((i64)blockIdx.x * WARPS + warp) * ROWS;
  float acc[ROWS][CLASSES] = {};
  for (i64 col0 = 0; col0 < p.cols; col0 += WIDTH) {
    __syncthreads();
    const int width = (int)min((i64)WIDTH, p.cols - col0);
    for (int i = threadIdx.x; i < width * CLASSES; i += THREADS)
      w[i % CLASSES][i / CLASSES] = weight[col0 * CLASSES + i];
    __syncthreads();
#pragma unroll 2
    for (int skip = lane * VECTOR; skip < width; skip += 32 * VECTOR) {
      const i64 col = col0 + skip;
      const Normal<VECTOR> norm(p, col);
      float h[ROWS][VECTOR];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const i64 row = min(row0 + r, p.rows - 1);
        load_product<VECTOR>(p, row, col, h[r]);
        const u32 kept = kept_bits(p, row, col);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          h[r][i] = Activation(p, norm(i, h[r][i]), kept >> i).value;
      }
#pragma unroll
      for (int c = 0; c < CLASSES; c++) {
        float of_class[VECTOR];
        load<VECTOR>(&w[c][skip], of_class);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int i = 0; i < VECTOR; i++) acc[r][c] += h[r][i] * of_class[i];
      }
    }
  }
  float sum = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const i64 row = row0 + r;
    if (row >= p.rows) continue;  // the same for the whole warp
    float of_logits[CLASSES];
#pragma unroll
    for (int c = 0; c < CLASSES; c++) acc[r][c] = sum_of_warp(acc[r][c]);
    sum += loss_of(acc[r], (int)labels[row], smoothing, (float)p.share, of_logits);
#pragma unroll
    for (int c = 0; c < CLASSES; c++)
      if (lane == c) {
        out[row * CLASSES + c] = acc[r][c];
        grad[row * CLASSES + c] = of_logits[c];
      }
  }
  if (lane == 0) losses[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < WARPS; i++) sum += losses[i];
    partials[blockIdx.x] = sum;
  }
  if (!is_last_block(ticket, gridDim.x)) return;
  const double total = sum_of_partials(partials, gridDim.x);
  if (threadIdx.x == 0) *loss = (float)(total * p.share);
}
#else

// The weights of V neighbouring columns, and the gradient of their activations in a row.
template <int V> struct Weights {
  float w[V][CLASSES];
  __device__ __forceinline__ Weights(const float* weight, i64 col) {
#pragma unroll
    for (int i = 0; i < V; i++)
#pragma unroll
      for (int c = 0; c < CLASSES; c++) w[i][c] = weight[(col + i) * CLASSES + c];
  }
  __device__ __forceinline__ float gradient(int i, const float (&of_logits)[CLASSES]) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < CLASSES; c++) sum += of_logits[c] * w[i][c];
    return sum;
  }
};

// A row's gradients of the logits, which all lanes need.
__device__ __forceinline__ void load_row(const float* grad, i64 row, float (&of_logits)[CLASSES]) {
#pragma unroll
  for (int c = 0; c < CLASSES; c++) of_logits[c] = __ldg(grad + row * CLASSES + c);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    head_sums(const __grid_constant__ Layer p, const float* __restrict__ weight,
              const float* __restrict__ grad, float* partials, u32* tickets, float* grad_weight,
              float* grad_gamma, float* grad_beta) {
  constexpr int SUMS = CLASSES + (HAS_NORM ? 2 : 0);
  __shared__ double total[SUMS][32 * VECTOR];
  const ByColumns at;
  float sums[SUMS][VECTOR] = {};
  if (at.col < p.cols) {
    const Normal<VECTOR> norm(p, at.col);
    const Weights<VECTOR> weights(weight, at.col);
#pragma unroll 2
    for (i64 row = at.first_row; row < p.rows; row += at.step) {
      float z[VECTOR], of_logits[CLASSES];
      load_product<VECTOR>(p, row, at.col, z);
      load_row(grad, row, of_logits);
      const u32 kept = kept_bits(p, row, at.col);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const Activation h(p, norm(i, z[i]), kept >> i);
#pragma unroll
        for (int c = 0; c < CLASSES; c++) sums[c][i] += h.value * of_logits[c];
#if NORM
        const float dy = weights.gradient(i, of_logits) * h.passes;
        sums[CLASSES][i] += dy;
        sums[CLASSES + 1][i] += dy * norm.normal(i, z[i]);
#endif
      }
    }
  }
  if (!sum_over_rows<SUMS, VECTOR>(sums, partials, tickets, p.cols, total)) return;
  const i64 first = (i64)blockIdx.x * 32 * VECTOR;
  for (int i = threadIdx.x; i < 32 * VECTOR * CLASSES; i += THREADS)
    if (first + i / CLASSES < p.cols)
      grad_weight[first * CLASSES + i] = (float)total[i % CLASSES][i / CLASSES];
#if NORM
  if (threadIdx.x < 32 * VECTOR && first + threadIdx.x < p.cols) {
    grad_beta[first + threadIdx.x] = (float)total[CLASSES][threadIdx.x];
    grad_gamma[first + threadIdx.x] = (float)total[CLASSES + 1][threadIdx.x];
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    head_gradient(const __grid_constant__ Layer p, const float* __restrict__ weight,
                  const float* __restrict__ grad, const float* __restrict__ grad_gamma,
                  const float* __restrict__ grad_beta, real_t* __restrict__ out) {
  const ByColumns at;
  if (at.col >= p.cols) return;
  const Normal<VECTOR> norm(p, at.col);
  const Weights<VECTOR> weights(weight, at.col);
#if NORM
  const float share = (float)p.share;
  float of_gamma[VECTOR], of_beta[VECTOR];
  load<VECTOR>(grad_gamma + at.col, of_gamma);
  load<VECTOR>(grad_beta + at.col, of_beta);
#endif
#pragma unroll 2
  for (i64 row = at.first_row; row < p.rows; row += at.step) {
    float z[VECTOR], of_logits[CLASSES], dz[VECTOR];
    load_row(grad, row, of_logits);
    load_product<VECTOR>(p, row, at.col, z);
    const u32 kept = kept_bits(p, row, at.col);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      dz[i] = weights.gradient(i, of_logits) * Activation(p, norm(i, z[i]), kept >> i).passes;
#if NORM
      dz[i] = (dz[i] - of_beta[i] * share - norm.normal(i, z[i]) * (of_gamma[i] * share)) *
              (norm.gamma[i] * norm.inverse[i]);
#endif
#if DROP == DROP_PRODUCT
      dz[i] = kept >> i & 1 ? dz[i] * (float)p.keep_scale : 0.0f;
#endif
    }
    store<VECTOR>(out + row * p.cols + at.col, dz);
  }
}
#endif
