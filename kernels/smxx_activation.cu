// A hidden layer's way from product to activation: batch statistics; then batch norm, sign or ReLU,
// and what the backward pass needs of it, one bit an element.
//
// statistics: by columns (training.cuh). One pass: sums of the distances to the first row's product
// and of their squares, which lose nothing to cancellation and are exact for the integers of a binary
// product. The last block of a group of columns finishes and updates the running statistics.
//
// activate: PARTS warps share ROWS rows, a lane has VECTOR neighbouring columns. Signs are packed as
// a product's left operand (layout.cuh) with their popcounts, or written dense.
//
// What bounds both: reading the products once, from the L2 cache where they fit it.
//
// The translation unit sets what training.cuh wants, and for `activate`
//     OUTPUT   OUTPUT_*
//     GATE     1: write the mask of where the gradient passes
//     ROWS, PARTS

#define OUTPUT_PACKED_SIGN 0
#define OUTPUT_SIGN 1
#define OUTPUT_RELU 2

#include "training.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    statistics(const __grid_constant__ Layer p, float* partials, u32* tickets, float* mean,
               float* inverse, float* running_mean, float* running_variance, float decay,
               float gain, float eps) {
  constexpr int BATCH = 4;  // loads in flight
  __shared__ double total[2][32 * VECTOR];
  const ByColumns at;
  float sums[2][VECTOR] = {};
  if (at.col < p.cols) {
    float origin[VECTOR];
    load_product<VECTOR>(p, 0, at.col, origin);
    for (i64 first = at.first_row; first < p.rows; first += BATCH * at.step) {
      float z[BATCH][VECTOR];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const i64 row = first + b * at.step;
        if (row < p.rows) {
          load_product<VECTOR>(p, row, at.col, z[b]);
        } else {
#pragma unroll
          for (int i = 0; i < VECTOR; i++) z[b][i] = origin[i];
        }
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const float d = z[b][i] - origin[i];
          sums[0][i] += d;
          sums[1][i] += d * d;
        }
    }
  }
  if (!sum_over_rows<2, VECTOR>(sums, partials, tickets, p.cols, total)) return;
  const i64 col = (i64)blockIdx.x * 32 * VECTOR + threadIdx.x;
  if (threadIdx.x >= 32 * VECTOR || col >= p.cols) return;
  float origin[1];
  load_product<1>(p, 0, col, origin);
  const double n = (double)p.rows, sum = total[0][threadIdx.x], shift = sum / n;
  const float average = (float)((sum + n * origin[0]) / n);
  const float variance = (float)fmax(total[1][threadIdx.x] / n - shift * shift, 0.0);
  mean[col] = average;
  inverse[col] = 1.0f / sqrtf(variance + eps);
  running_mean[col] = running_mean[col] * decay + gain * average;
  running_variance[col] = running_variance[col] * decay + gain * variance;
}

#ifdef OUTPUT
extern "C" __global__ void __launch_bounds__(THREADS)
    activate(const __grid_constant__ Layer p, real_t* dense, u32* words, int* pops, u32* gate,
             float window) {
  __shared__ int shared[WARPS][ROWS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % PARTS;
  const i64 row0 = ((i64)blockIdx.x * (WARPS / PARTS) + warp / PARTS) * ROWS;
  const i64 chunks = (p.cols + CHUNK_BITS - 1) / CHUNK_BITS;
  int ones[ROWS] = {};
  for (i64 col0 = part * 32 * VECTOR; col0 < p.cols; col0 += PARTS * 32 * VECTOR) {
    const i64 col = col0 + lane * VECTOR;
    const bool inside = col < p.cols;
    const Normal<VECTOR> norm(p, inside ? col : 0);
    float z[ROWS][VECTOR];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (inside && row0 + r < p.rows) load_product<VECTOR>(p, row0 + r, col, z[r]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const i64 row = row0 + r;
      if (row >= p.rows) continue;  // the same for the whole warp
      u32 signs = 0, passes = 0;
      if (inside) {
        float out[VECTOR];
#if DROP == DROP_ACTIVATION
        const u32 kept = mask_bits(p.kept, row, col, p.cols);
#endif
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const float y = norm(i, z[r][i]);
#if OUTPUT == OUTPUT_RELU
          bool pass = y > 0;
          out[i] = y > 0 ? y : y != y ? y : 0.0f;  // a NaN is not hidden
#if DROP == DROP_ACTIVATION
          pass = pass && kept >> i & 1;
          out[i] = kept >> i & 1 ? __fmul_rn(out[i], (float)p.keep_scale) : 0.0f;
#endif
#else
          const bool pass = fabsf(y) <= window;
          out[i] = nonnegative(y) ? 1.0f : -1.0f;
          signs |= (u32)nonnegative(y) << i;
#endif
          passes |= (u32)pass << i;
        }
#if OUTPUT != OUTPUT_PACKED_SIGN
        store<VECTOR>(dense + row * p.cols + col, out);
#endif
      }
      const bool writes = inside && (col & 31) == 0;  // of the lanes of a word, its first
#if GATE
      passes = join_bits<VECTOR>(passes, lane);
      if (writes) gate[row * mask_words(p.cols) + (col >> 5)] = passes;
#endif
#if OUTPUT == OUTPUT_PACKED_SIGN
      signs = join_bits<VECTOR>(signs, lane);
      if (writes) {
        const i64 position = position_of(row), word = col >> 5;
        words[line_chunk(0, chunks, word / CHUNK_WORDS, p.rows, position) +
              swizzled_word(position, (int)(word % CHUNK_WORDS))] = signs;
        ones[r] += __popc(signs);
      }
#endif
    }
  }
#if OUTPUT == OUTPUT_PACKED_SIGN
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) ones[r] += __shfl_xor_sync(ALL, ones[r], apart);
    if (lane == 0) shared[warp][r] = ones[r];
  }
  __syncthreads();
  if (part == 0 && lane < ROWS && row0 + lane < p.rows) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < PARTS; i++) sum += shared[warp + i][lane];
    pops[row0 + lane] = sum;
  }
#endif
}
#endif
