// Random numbers of one draw, as defined in cupybnn/backends/random.py: a thread computes four
// neighboring ones, a block of Philox, and stores them together.
//
// The index of the draw is passed by value or, if `numbers` is not null, read from the device, so that
// a captured graph can increment it.
//
// What bounds it: forty multiplications per 16-byte block, so on large GPUs the integer units rather
// than memory.
//
// The translation unit sets UNIFORM: 0 for the words themselves, 1 for floats in [0, 1) from their
// upper 24 bits. The result's memory is a whole number of blocks; the last one may be used in part.

#include "philox.cuh"

#if UNIFORM
typedef float4 Four;
__device__ __forceinline__ Four result_of(uint4 w) {
  // Exact: 24 bits times a power of two.
  constexpr float STEP = 1.0f / (1 << 24);
  return make_float4((float)(w.x >> 8) * STEP, (float)(w.y >> 8) * STEP, (float)(w.z >> 8) * STEP,
                     (float)(w.w >> 8) * STEP);
}
#else
typedef uint4 Four;
__device__ __forceinline__ Four result_of(uint4 w) { return w; }
#endif

extern "C" __global__ void __launch_bounds__(256)
    draw(Four* __restrict__ out, i64 blocks, u64 first, u64 seed, u64 number,
         const u64* __restrict__ numbers) {
  if (numbers) number = *numbers;
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < blocks; i += gridDim.x * 256ll)
    out[i] = result_of(philox(seed, number, first + i));
}
