// The sum of a matrix's parts, always in the same order, rounded once: for products whose K is divided among
// blocks (sm90_sign_gemm.cu).
//
// A thread has four neighboring elements. What bounds it: reading the parts, from the L2 cache if they fit.
//
// The translation unit sets REAL.

#include "elements.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sum_parts(const float* parts, i64 count, i64 number, real_t* out) {
  constexpr int TOGETHER = 8;  // loads in flight
  const i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (at >= count) return;
  float sum[4] = {};
  for (i64 first = 0; first < number; first += TOGETHER) {
    float4 part[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
      part[i] = first + i < number ? __ldcg((const float4*)(parts + (first + i) * count + at))
                                   : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      sum[0] += part[i].x;
      sum[1] += part[i].y;
      sum[2] += part[i].z;
      sum[3] += part[i].w;
    }
  }
  store<4>(out + at, sum);
}
