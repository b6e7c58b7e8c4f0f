// Block-wide helpers: the number of warps, sums over a warp, and sums of other blocks' results.
//
// The translation unit may set BLOCK_WARPS, the warps of a block: 8 by default.
#pragma once

#include "layout.cuh"

#ifndef BLOCK_WARPS
#define BLOCK_WARPS 8
#endif

constexpr int WARPS = BLOCK_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) v += __shfl_xor_sync(ALL, v, apart);
  return v;
}

// Whether this block is the last of `blocks` to arrive; with `sees`, it then sees the others' earlier
// writes. Resets the ticket to 0.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 blocks, bool sees = true) {
  __shared__ bool last;
  if (sees) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  if (sees && last) __threadfence();
  return last;
}

// The sum of `count` numbers written by other blocks, in a fixed order; in thread 0.
__device__ __forceinline__ double sum_of_partials(const float* partials, i64 count) {
  __shared__ double sums[THREADS];
  double sum = 0;
  for (i64 i = threadIdx.x; i < count; i += THREADS) sum += __ldcg(partials + i);
  sums[threadIdx.x] = sum;
#pragma unroll
  for (int half = THREADS / 2; half; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}
