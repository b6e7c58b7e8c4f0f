// The loss of one example and its gradient.
//
// The translation unit sets CLASSES, at most 32, and LOSS, one of LOSS_*; and may set SOFT to 1: the
// targets are probabilities, CLASSES floats a row, instead of class numbers.
#pragma once

#define LOSS_CROSS_ENTROPY 0
#define LOSS_SQUARED_HINGE 1
#define LOSS_DIVERGENCE 2  // of predictions from targets that are probabilities

#ifndef SOFT
#define SOFT 0
#endif

// Rows of the logits' gradient are padded, so that they can be read 16 bytes at a time.
constexpr int GRAD_STRIDE = (CLASSES + 3) / 4 * 4;

// The loss, and the gradient of the mean loss for the logits; `share` is 1 / examples. As in
// `cupybnn.ops.softmax_cross_entropy`, a class without a label adds nothing to the loss, even where
// its logit is -inf or the difference of two overflows, and the gradient is weight * softmax - target
// with the sum of the targets as weight: `smoothing` alone if the label is out of range. An example
// of weight 0 has a gradient of 0, even where its softmax is NaN.
__device__ __forceinline__ float loss_of(const float (&logit)[CLASSES], int label, float smoothing,
                                         float share, float (&grad)[CLASSES]) {
  float loss = 0;
#if LOSS == LOSS_CROSS_ENTROPY
  float greatest = logit[0], total = 0;
#pragma unroll
  for (int c = 1; c < CLASSES; c++) greatest = logit[c] > greatest ? logit[c] : greatest;
#pragma unroll
  for (int c = 0; c < CLASSES; c++) total += grad[c] = expf(logit[c] - greatest);
  const float weight = label >= 0 && label < CLASSES ? 1.0f : smoothing;
  const float log_total = logf(total), per_total = weight * __fdividef(1.0f, total);
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    const float target = (c == label ? 1.0f - smoothing : 0.0f) + smoothing / CLASSES;
    // Rounded as written: the loss must not depend on how the compiler treats different product types.
    if (target > 0)
      loss = __fmaf_rn(target, __fadd_rn(log_total, -__fadd_rn(logit[c], -greatest)), loss);
    const float slope = __fmul_rn(__fmaf_rn(grad[c], per_total, -target), share);
    grad[c] = weight > 0 ? slope : 0.0f;
  }
#else
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    const float target = c == label ? 1.0f : -1.0f;
    const float margin = 1.0f - target * logit[c];
    const float over = margin > 0 || margin != margin ? margin : 0.0f;
    loss = __fmaf_rn(over, __fmul_rn(over, 1.0f / CLASSES), loss);
    grad[c] = target * over * (-2.0f / CLASSES * share);
  }
#endif
  return loss;
}

// The same for probabilities: as `cupybnn.ops.softmax_cross_entropy`, `squared_hinge` and
// `softmax_divergence` define it.
__device__ __forceinline__ float soft_loss_of(const float (&logit)[CLASSES], const float* targets,
                                              float smoothing, float share, float (&grad)[CLASSES]) {
  float loss = 0;
#if LOSS == LOSS_SQUARED_HINGE
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    const float target = 2.0f * targets[c] - 1.0f;
    const float margin = target == 0 && isinf(logit[c]) ? 1.0f : 1.0f - target * logit[c];
    const float over = margin > 0 || margin != margin ? margin : 0.0f;
    loss = __fmaf_rn(over, __fmul_rn(over, 1.0f / CLASSES), loss);
    grad[c] = target * over * (-2.0f / CLASSES * share);
  }
#else
  float greatest = logit[0], total = 0, weight = 0;
#pragma unroll
  for (int c = 1; c < CLASSES; c++) greatest = logit[c] > greatest ? logit[c] : greatest;
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    total += grad[c] = expf(logit[c] - greatest);
    weight += targets[c];
  }
  if (LOSS == LOSS_CROSS_ENTROPY) weight += smoothing * (1.0f - weight);
  const float log_total = logf(total), per_total = weight * __fdividef(1.0f, total);
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    float target = targets[c];
    if (LOSS == LOSS_CROSS_ENTROPY) target = target * (1.0f - smoothing) + smoothing / CLASSES;
    if (target > 0) {
      loss = __fmaf_rn(target, __fadd_rn(log_total, -__fadd_rn(logit[c], -greatest)), loss);
      if (LOSS == LOSS_DIVERGENCE) loss = __fmaf_rn(target, logf(target), loss);
    }
    const float slope = __fmul_rn(__fmaf_rn(grad[c], per_total, -target), share);
    grad[c] = weight != 0 ? slope : 0.0f;
  }
#endif
  return loss;
}

// The loss of the example in a row of the targets: i64 class numbers or, if SOFT, probabilities.
__device__ __forceinline__ float loss_of_row(const float (&logit)[CLASSES], const void* targets,
                                             long long row, float smoothing, float share,
                                             float (&grad)[CLASSES]) {
#if SOFT
  return soft_loss_of(logit, (const float*)targets + row * CLASSES, smoothing, share, grad);
#else
  return loss_of(logit, (int)((const long long*)targets)[row], smoothing, share, grad);
#endif
}
