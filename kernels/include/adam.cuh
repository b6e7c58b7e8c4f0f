// One step of Adam or AdamW for an element, with the penalty and its gradient, the pseudo-gradient of a
// latent weight and its clipping; and the description of a parameter.
//
// The translation unit sets, in addition to the macros of elements.cuh, PENALTY, one of PENALTY_*; and
// WRITE_GRADIENT, 1 to write gradients in float, including the penalty. It may set GATED to 0 if no
// parameter is CLIPPED or has a WINDOW.
#pragma once

#ifndef GATED
#define GATED 1
#endif

#include "block.cuh"
#include "elements.cuh"

#define PENALTY_NONE 0
#define PENALTY_L1 1
#define PENALTY_BIPOLAR 2  // sum(1 - w**2)

constexpr i64 BINARY = 1;   // the copy holds signs
constexpr i64 CLIPPED = 2;  // pseudo-gradient: limited to [-1, 1]
constexpr i64 WINDOW = 4;   // pseudo-gradient: 0 where the weight is outside [-1, 1]
constexpr i64 ALIGNED = 8;  // four neighbors can be loaded and stored together
constexpr i64 ROUNDED = 16; // the gradient comes from a dense product, in real_t; otherwise float
constexpr i64 SENT = 32;    // `words` has a word of 32 rows for each column, row by row, to be sent

// Filled by cupybnn/backends/cuda/fused_parameter.py, field by field in this order.
struct Parameter {
  float* weight;
  const void* grad;
  float* mean;
  float* square;
  real_t* copy;     // or null
  u32* words;  // or null
  int* pops;
  float* kept_grad;  // receives the gradient; may alias grad
  i64 rows, cols, count, first_block, flags;
  double limit;  // 0: none
  double lr_scale, penalty, weight_decay;
};

// Rates of one step, from the host.
struct Rates {
  float lr, factor, eps, unused;  // lr; lr * root / (1 - b1**t) and eps * root, root = sqrt(1 - b2**t)
};

// Values common to all elements of a parameter. No element branches: several are processed at once.
struct Adam {
  bool windowed;
  float bound, limit;  // of the gradient and of the weight; infinite for none
  float penalty, factor, shrink, eps, gain_mean, gain_square;

  __device__ __forceinline__ Adam(const Parameter& p, const Rates& rate, float gain_mean,
                                  float gain_square)
      : windowed(p.flags & WINDOW),
        bound(p.flags & CLIPPED ? 1.0f : __int_as_float(0x7f800000)),
        limit(p.limit > 0 ? (float)p.limit : __int_as_float(0x7f800000)),
        penalty((float)p.penalty),
        factor(rate.factor * (float)p.lr_scale),
        shrink(1.0f - rate.lr * (float)p.lr_scale * (float)p.weight_decay),
        eps(rate.eps),
        gain_mean(gain_mean),
        gain_square(gain_square) {
    asm volatile("" : "+f"(limit));  // kept, not converted from double again for each element
  }

  // NaN stays NaN.
  static __device__ __forceinline__ float within(float x, float most) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("{ .reg .f32 least;\nneg.f32 least, %2;\n"
        "min.NaN.f32 %0, %1, %2;\nmax.NaN.f32 %0, %0, least; }" : "=f"(y) : "f"(x), "f"(most));
    return y;
#else
    return x > most ? most : x < -most ? -most : x;
#endif
  }
  // Update weight v with the gradient d and its means m and s (of the square); if the weight exists, add
  // its penalty to `sum`.
  __device__ __forceinline__ void operator()(float& v, float& d, float& m, float& s, bool exists,
                                             float& sum) const {
#if GATED
    d = within(d, bound);
    d = !windowed | (fabsf(v) <= 1) ? d : 0.0f;
#endif
#if PENALTY == PENALTY_L1
    sum += exists ? penalty * fabsf(v) : 0.0f;
    d += v > 0 ? penalty : v < 0 ? -penalty : 0.0f;
#elif PENALTY == PENALTY_BIPOLAR
    sum += exists ? penalty * (1.0f - v * v) : 0.0f;
    d -= 2.0f * penalty * v;
#endif
    m += (d - m) * gain_mean;
    s += (d * d - s) * gain_square;
    // Accurate to a few ulp of the step; exact roots and quotients take 30 instructions.
    float root, inverse;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(s));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(root + eps));
    v = within(v * shrink - m * inverse * factor, limit);
  }
};

// Address of a column's signs of 32 rows in the packed matrix: `word` counts such groups of rows.
__device__ __forceinline__ u32* packed_signs(const Parameter& p, i64 col, i64 word) {
  const i64 chunks = (p.rows + CHUNK_BITS - 1) / CHUNK_BITS, position = position_of((u32)col);
  return p.words + line_chunk(0, chunks, word / CHUNK_WORDS, p.cols, position) +
         swizzled_word(position, (int)(word % CHUNK_WORDS));
}
// Replace the signs there.
__device__ __forceinline__ void pack_signs(const Parameter& p, i64 col, u32* to, u32 after, u32 before) {
  if (after == before) return;
  *to = after;
  const int more = __popc(after) - __popc(before);
  if (more) atomicAdd(p.pops + col, more);
}
