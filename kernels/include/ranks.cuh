// The sum of an array over the ranks of a run. The exchange that sums arrays (smxx_peers.cu) and
// the update that reads gradients from all GPUs (smxx_adam.cu) share this definition, so they
// compute the same numbers.
//
// The translation unit sets RANKS, their number, and the macros of elements.cuh.
#pragma once

#include "elements.cuh"

constexpr int MOST_RANKS = 8;
static_assert(1 <= RANKS && RANKS <= MOST_RANKS, "a number of ranks");

// Add the elements of the next rank to the sum of those before it, in float. At the end, `rounded`
// rounds the sum once, to the elements' type.
template <int V, typename E>
__device__ __forceinline__ void add_rank(bool first, const Vector<E, V>& its, float (&total)[V]) {
  float more[V];
  to_floats<V>(its, more);
#pragma unroll
  for (int i = 0; i < V; i++) total[i] = first ? more[i] : __fadd_rn(total[i], more[i]);
}
template <typename E, int V>
__device__ __forceinline__ Vector<E, V> rounded(const float (&total)[V]) {
  Vector<E, V> sum;
#pragma unroll
  for (int i = 0; i < V; i++) from_float(total[i], sum.at[i]);
  return sum;
}
