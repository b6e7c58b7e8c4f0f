// What follows the last product of a packed network: factors, summands and ReLU, a unit at a time, each
// step rounded in float32.
#pragma once

#include "layout.cuh"

constexpr int MOST_STEPS = 4;
#define STEP_MULTIPLY 0
#define STEP_ADD 1
#define STEP_RELU 2

// Filled by cupybnn/backends/cuda/steps.py, field by field in this order.
struct Steps {
  const float* by[MOST_STEPS];  // factors and summands
  i64 kinds, count;             // STEP_* of each, four bits each from the lowest on; and how many
};

__device__ __forceinline__ float after_steps(const Steps& s, int unit, float v) {
#pragma unroll 1
  for (int i = 0; i < (int)s.count; i++) {
    const int kind = (int)(s.kinds >> 4 * i) & 15;
    if (kind == STEP_RELU) v = v != v ? v : fmaxf(v, 0.0f);
    else if (kind == STEP_ADD) v = __fadd_rn(v, __ldg(s.by[i] + unit));
    else v = __fmul_rn(v, __ldg(s.by[i] + unit));
  }
  return v;
}
