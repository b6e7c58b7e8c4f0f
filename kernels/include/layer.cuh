// A hidden layer's product, dropout and batch norm: the inputs of its activation.
//
// The translation unit sets REAL (elements.cuh), and
//     PRODUCT  type of a hidden product: float; float16_bits or short if these hold its integers;
//              bfloat16_bits, rounded
//     NORM     1: with batch norm
//     DROP     DROP_*: position of dropout, if any
#pragma once

#include "elements.cuh"

typedef PRODUCT product_t;

#define DROP_NONE 0
#define DROP_PRODUCT 1     // hidden products are dropped, before batch norm and sign
#define DROP_ACTIVATION 2  // activations are dropped, after batch norm and ReLU

// Filled by cupybnn/backends/cuda/fused_layers.py, field by field in this order.
struct Layer {
  const product_t* z;
  const u32* kept;  // DROP: mask of the elements that are kept
  const float* mean;
  const float* inverse;  // 1 / standard deviation
  const float* gamma;
  const float* beta;
  i64 rows, cols;
  double keep_scale;  // 1 / keep_prob
  double share;       // 1 / rows that batch norm is of: a division would need a stack
};

#if NORM
constexpr bool HAS_NORM = true;
#else
constexpr bool HAS_NORM = false;
#endif

// The product of V neighboring columns, after dropout if that comes first.
template <int V>
__device__ __forceinline__ void load_product(const Layer& p, i64 row, i64 col, float (&z)[V]) {
  load<V>(p.z + row * p.cols + col, z);
#if DROP == DROP_PRODUCT
  const u32 kept = mask_bits(p.kept, row, col, p.cols);
#pragma unroll
  for (int i = 0; i < V; i++) z[i] = kept >> i & 1 ? __fmul_rn(z[i], (float)p.keep_scale) : 0.0f;
#endif
}

// Mean, deviation and so on of V neighboring columns. Each step is rounded as in the plain engine:
// if a normalized product is near 0, the last bit decides its sign.
template <int V> struct Normal {
  float mean[V], inverse[V], gamma[V], beta[V];
  __device__ __forceinline__ Normal(const Layer& p, i64 col)
      : Normal(p.mean + col, p.inverse + col, p.gamma + col, p.beta + col) {}
  // Load the values of the columns at these addresses.
  __device__ __forceinline__ Normal(const float* means, const float* inverses, const float* gammas,
                                    const float* betas) {
    if constexpr (HAS_NORM) {
      load<V>(means, mean);
      load<V>(inverses, inverse);
      load<V>(gammas, gamma);
      load<V>(betas, beta);
    }
  }
  __device__ __forceinline__ float normal(int i, float z) const {
    return __fmul_rn(__fadd_rn(z, -mean[i]), inverse[i]);
  }
  // The input of sign or ReLU.
  __device__ __forceinline__ float operator()(int i, float z) const {
    if constexpr (HAS_NORM) return __fadd_rn(__fmul_rn(normal(i, z), gamma[i]), beta[i]);
    return z;
  }
};
