// The end of a kernel that computes the gradient of a product by strips (strips.cuh): it is written, and if
// GREATEST is 1, the greatest magnitudes of its rows and columns are found: as bits of floats, which
// integers order alike (see smxx_gradient_levels.cu).
#pragma once

#include "strips.cuh"

__device__ __forceinline__ u32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Zeros in memory when the kernel starts. All threads of a block construct it, and all finish.
struct Greatest {
  u32 own[VECTOR] = {};  // of the thread's columns
  u32* of_strip;         // of the block's, in shared memory
  __device__ __forceinline__ explicit Greatest(u32 (&shared)[COLS]) : of_strip(shared) {
    for (int i = threadIdx.x; i < COLS; i += THREADS) of_strip[i] = 0;
    __syncthreads();
  }
  // The elements that all lanes of a warp have written, rounded.
  __device__ __forceinline__ void take(const Strip& at, int row, const float (&v)[VECTOR], u32* rows) {
    const bool exist = at.has(row);
    u32 all = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      real_t rounded;
      from_float(v[i], rounded);
      const u32 magnitude = exist ? magnitude_bits(to_float(rounded)) : 0;
      own[i] = max(own[i], magnitude);
      all = max(all, magnitude);
    }
#if __CUDA_ARCH__ >= 800
    if constexpr (LANES == 32) {
      all = __reduce_max_sync(ALL, all);
    } else
#endif
    {
#pragma unroll
      for (int apart = 1; apart < LANES; apart <<= 1) all = max(all, __shfl_xor_sync(ALL, all, apart));
    }
    if (at.lane == 0 && all) atomicMax(rows + row, all);
  }
  __device__ __forceinline__ void finish(const Strip& at, u32* columns) const {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) atomicMax(of_strip + at.lane * VECTOR + i, own[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < COLS; i += THREADS)
      if (at.first_col + i < at.cols && of_strip[i]) atomicMax(columns + at.first_col + i, of_strip[i]);
  }
};

// What writes a gradient. All threads of a block construct it, and all finish.
struct GradientWriter {
#if GREATEST
  Greatest greatest;
  __device__ __forceinline__ GradientWriter() : greatest(memory()) {}
  static __device__ __forceinline__ u32 (&memory())[COLS] {
    __shared__ u32 of_strip[COLS];
    return of_strip;
  }
#endif
  // Write a thread's elements of a row.
  __device__ __forceinline__ void write(const Strip& at, int row, const float (&dz)[VECTOR], real_t* out,
                                        u32* row_most) {
    if (at.has(row)) store<VECTOR>(out + at.offset(row), dz);
#if GREATEST
    greatest.take(at, row, dz, row_most);
#endif
  }
  __device__ __forceinline__ void finish(const Strip& at, u32* col_most) const {
#if GREATEST
    greatest.finish(at, col_most);
#endif
  }
};
