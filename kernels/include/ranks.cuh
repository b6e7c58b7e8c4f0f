// The sum of what the ranks of a run have: one definition for the exchange that adds arrays up (smxx_peers.cu)
// and for the update that reads gradients where they are (smxx_adam.cu), which thus compute the same numbers.
//
// The translation unit sets RANKS, their number, and the macros of elements.cuh.
#pragma once

#include "elements.cuh"

constexpr int MOST_RANKS = 8;
static_assert(1 <= RANKS && RANKS <= MOST_RANKS, "a number of ranks");

// Element by element: what the next rank has is added to what those before it have, in float; at the end the
// sum is rounded once, to the elements' type.
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
