// Batch norm of the logits, the loss, and the gradients of both, for a few classes.
//
// One block: a batch's logits are about ten kilobytes, and several blocks would wait longer for each
// other than for memory. A thread has every THREADS'th example, and passes over them three times: for
// the statistics; for the loss and the sums that batch norm's gradient needs; for the gradient.
//
// Of several ranks that normalize over a batch of all their examples, each launches three parts, and their
// sums are added up in between: the sums for the statistics; the loss and the sums for the gradient; the
// gradient.
//
// Sums are in a fixed order.
//
// What bounds it: the latency of three passes and of as many sums over the block.
//
// The translation unit sets CLASSES, LOSS and SOFT (loss.cuh); and may set PART to one of PART_*.

#define PART_ALL 0
#define PART_SUMS 1
#define PART_LOSS 2
#define PART_GRADIENT 3

#ifndef PART
#define PART PART_ALL
#endif

#include "block.cuh"
#include "loss.cuh"

// Sums over the block of N numbers per thread.
template <int N>
__device__ __forceinline__ void sum_over_block(const float (&mine)[N], double (&total)[N]) {
  __shared__ float parts[WARPS][N];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float sum = sum_of_warp(mine[n]);
    if (lane == 0) parts[warp][n] = sum;
  }
  __syncthreads();
  if (threadIdx.x < N) {
    double sum = 0;
    for (int w = 0; w < WARPS; w++) sum += parts[w][threadIdx.x];
    total[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Filled by cupybnn/backends/cuda/fused_head.py, field by field in this order.
struct OutputNorm {
  float* logits;  // (rows, CLASSES): the products; afterwards the normalized logits
  float* grad;    // (rows, GRAD_STRIDE): gradient of the products
  const void* labels;
  const float* gamma;
  const float* beta;
  float* running_mean;
  float* running_variance;
  float* grad_gamma;
  float* grad_beta;
  float* mean_loss;
  double* totals;            // PART: sums of the products, and of their squares, of the whole batch
  const float* whole_gamma;  // PART: the gradients of gamma and beta, of the whole batch
  const float* whole_beta;
  i64 rows;
  double share;       // 1 / examples that are normalized together
  double loss_share;  // of an example in the mean loss
  double decay, eps, smoothing;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    output_norm(const __grid_constant__ OutputNorm p) {
  __shared__ double spread[2 * CLASSES], sums[2 * CLASSES + 1];
  __shared__ float mean[CLASSES], inverse[CLASSES], gamma[CLASSES], beta[CLASSES];
  const int rows = (int)p.rows;
#if PART == PART_ALL || PART == PART_SUMS
  {
    float mine[2 * CLASSES] = {};
    for (int row = threadIdx.x; row < rows; row += THREADS)
#pragma unroll
      for (int c = 0; c < CLASSES; c++) {
        const float d = p.logits[row * CLASSES + c] - p.logits[c];  // relative to the first example
        mine[c] += d;
        mine[CLASSES + c] += d * d;
      }
    sum_over_block(mine, spread);
  }
#endif
#if PART == PART_SUMS
  if (threadIdx.x < CLASSES) {
    const int c = threadIdx.x;
    const double origin = p.logits[c];
    p.totals[c] = spread[c] + rows * origin;
    p.totals[CLASSES + c] = spread[CLASSES + c] + origin * (2 * spread[c] + rows * origin);
  }
#else
  if (threadIdx.x < CLASSES) {
    const int c = threadIdx.x;
#if PART == PART_ALL
    const double off = spread[c] * p.share;
    const float variance = (float)fmax(spread[CLASSES + c] * p.share - off * off, 0.0);
    mean[c] = (float)(p.logits[c] + off);
#else
    const double average = p.totals[c] * p.share;
    const float variance = (float)fmax(p.totals[CLASSES + c] * p.share - average * average, 0.0);
    mean[c] = (float)average;
#endif
    inverse[c] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, (float)p.eps)));
    gamma[c] = p.gamma[c];
    beta[c] = p.beta[c];
#if PART != PART_GRADIENT
    const float decay = (float)p.decay, gain = (float)(1 - p.decay);
    p.running_mean[c] = p.running_mean[c] * decay + gain * mean[c];
    p.running_variance[c] = p.running_variance[c] * decay + gain * variance;
#endif
  }
  __syncthreads();
  const auto normal = [&](int row, int c) {
    return __fmul_rn(__fadd_rn(p.logits[row * CLASSES + c], -mean[c]), inverse[c]);
  };
  const auto logit = [&](float n, int c) { return __fadd_rn(__fmul_rn(n, gamma[c]), beta[c]); };

#if PART != PART_GRADIENT
  // Sums of the gradients, of the gradients times the normalized logits, and of the loss.
  float mine[2 * CLASSES + 1] = {};
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    // All loads come before the first store, which would hold them up.
    float n[CLASSES], logits[CLASSES], grad[CLASSES];
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      n[c] = normal(row, c);
      logits[c] = logit(n[c], c);
    }
    mine[2 * CLASSES] +=
        loss_of_row(logits, p.labels, row, (float)p.smoothing, (float)p.loss_share, grad);
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      mine[c] += grad[c];
      mine[CLASSES + c] += grad[c] * n[c];
      p.grad[row * GRAD_STRIDE + c] = grad[c];
    }
  }
  sum_over_block(mine, sums);
  if (threadIdx.x < CLASSES) {
    p.grad_beta[threadIdx.x] = (float)sums[threadIdx.x];
    p.grad_gamma[threadIdx.x] = (float)sums[CLASSES + threadIdx.x];
  }
  if (threadIdx.x == 0) *p.mean_loss = (float)(sums[2 * CLASSES] * p.loss_share);
#else
  if (threadIdx.x < CLASSES) {
    sums[threadIdx.x] = p.whole_beta[threadIdx.x];
    sums[CLASSES + threadIdx.x] = p.whole_gamma[threadIdx.x];
  }
  __syncthreads();
#endif

#if PART != PART_LOSS
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    float n[CLASSES], grad[CLASSES];
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      n[c] = normal(row, c);
      grad[c] = p.grad[row * GRAD_STRIDE + c];
    }
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      p.grad[row * GRAD_STRIDE + c] =
          (grad[c] - (float)(sums[c] * p.share) - n[c] * (float)(sums[CLASSES + c] * p.share)) *
          (gamma[c] * inverse[c]);
      p.logits[row * CLASSES + c] = logit(n[c], c);
    }
  }
#endif
#endif
}
