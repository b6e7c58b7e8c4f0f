// What a training step needs of networks that are not trained: activations, and probabilities.
//
// teacher_layer: a product's affine map and ReLU, or its sign by a threshold, an element at a time.
// Bounded by memory.
//
// soften: the softmax of logits divided by a temperature, a thread per example, as it is or added to a
// mean. Bounded by latency.
//
// The translation unit sets REAL, KIND to one of KIND_*, and CLASSES, at most 32.

#include "block.cuh"
#include "elements.cuh"

#define KIND_AFFINE 0  // z * a + b; in place if there is no `out`
#define KIND_RELU 1    // the same, at least 0
#define KIND_SIGN 2    // b where z >= a, else -b: b is +1 or -1

extern "C" __global__ void __launch_bounds__(THREADS)
    teacher_layer(float* z, const float* __restrict__ a, const float* __restrict__ b, i64 rows, i64 cols,
                  real_t* out) {
  const i64 count = rows * cols;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    const i64 col = i % cols;
    const float x = z[i], y = __fadd_rn(__fmul_rn(x, a[col]), b[col]);
#if KIND == KIND_AFFINE
    if (out)
      from_float(y, out[i]);
    else
      z[i] = y;
#elif KIND == KIND_RELU
    from_float(y > 0 ? y : y != y ? y : 0.0f, out[i]);
#else
    from_float(x >= a[col] ? b[col] : -b[col], out[i]);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    soften(const float* __restrict__ logits, i64 rows, float temperature, float share, int add,
           float* out) {
  const i64 row = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (row >= rows) return;
  float powers[CLASSES], greatest = 0, total = 0;
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    powers[c] = __fdiv_rn(logits[row * CLASSES + c], temperature);
    greatest = c == 0 || powers[c] > greatest ? powers[c] : greatest;
  }
#pragma unroll
  for (int c = 0; c < CLASSES; c++) total += powers[c] = expf(powers[c] - greatest);
#pragma unroll
  for (int c = 0; c < CLASSES; c++) {
    float& to = out[row * CLASSES + c];
    to = (add ? to : 0.0f) + share * __fdiv_rn(powers[c], total);
  }
}
