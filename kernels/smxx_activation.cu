// A hidden layer's activation from its product: batch statistics; then batch norm, sign or ReLU, and
// the mask that the backward pass needs, one bit per element.
//
// normalise: the statistics, by strips (strips.cuh). One pass: sums of the differences from the first
// row's product and of their squares, which avoid cancellation and are exact for the integers of a
// binary product. Updates the running statistics. In clusters it also computes the activations.
//
// activate: only the activations, also by strips. Signs are packed as a product's left operand
// (layout.cuh); their popcounts are accumulated word by word, starting from zeros.
//
// Of several ranks that normalize over a batch of all their rows, each launches `normalise` for its sums alone
// (SHARED_BATCH), the sums are added up, and `whole_statistics` and `activate` follow.
//
// What bounds both: reading the products, once if they stay in shared memory between the passes.
//
// The translation unit sets the macros of strips.cuh, and
//     OUTPUT   OUTPUT_*
//     GATE     1: write the mask of where the gradient passes
// and may set
//     SHARED_BATCH  1: the rows are a part of those that batch norm is of

#define OUTPUT_PACKED_SIGN 0
#define OUTPUT_SIGN 1
#define OUTPUT_RELU 2
#define OUTPUT_NONE 3
#define OUTPUT_BOTH_SIGNS 4  // packed, and dense for the backward pass

#define PACKED (OUTPUT == OUTPUT_PACKED_SIGN || OUTPUT == OUTPUT_BOTH_SIGNS)

#ifndef SHARED_BATCH
#define SHARED_BATCH 0
#endif

#include "strips.cuh"

constexpr int BATCH = HELD && HELD < 8 ? HELD : 8;  // rows whose loads are in flight

struct Activations {
  real_t* dense;
  u32* words;
  int* pops;
  u32* gate;
  double window;
};

// All lanes of a warp take part, whether they have elements or not.
__device__ __forceinline__ void write_activations(const Layer& p, const Strip& at,
                                                  const Normal<VECTOR>& norm, const Activations& to) {
  const i64 chunks = (p.cols + CHUNK_BITS - 1) / CHUNK_BITS;
  const bool first_of_word = at.lane % (32 / VECTOR) == 0;
  const float window = (float)to.window;
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH> z(p, at, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const i64 row = at.row(turn + b);
      const bool inside = at.has((int)row);
      u32 signs = 0, passes = 0;
      float out[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float y = norm(i, z(p, b, i));
#if OUTPUT == OUTPUT_RELU
        bool pass = y > 0;
        out[i] = y > 0 ? y : y != y ? y : 0.0f;  // NaN is passed on
#if DROP == DROP_ACTIVATION
        pass = pass && z.kept(b, i);
        out[i] = z.kept(b, i) ? __fmul_rn(out[i], (float)p.keep_scale) : 0.0f;
#endif
#else
        const bool pass = fabsf(y) <= window;
        out[i] = nonnegative(y) ? 1.0f : -1.0f;
        signs |= (u32)nonnegative(y) << i;
#endif
        passes |= (u32)pass << i;
      }
#if OUTPUT != OUTPUT_PACKED_SIGN
      if (inside) store<VECTOR>(to.dense + row * p.cols + at.col, out);
#endif
#if GATE
      passes = join_bits<VECTOR>(inside ? passes : 0, threadIdx.x & 31);
      if (inside && first_of_word) to.gate[row * mask_words(p.cols) + (at.col >> 5)] = passes;
#endif
#if PACKED
      signs = join_bits<VECTOR>(inside ? signs : 0, threadIdx.x & 31);
      if (inside && first_of_word) {
        const i64 position = position_of(row), word = at.col >> 5;
        to.words[line_chunk(0, chunks, word / CHUNK_WORDS, p.rows, position) +
                 swizzled_word(position, (int)(word % CHUNK_WORDS))] = signs;
        if (signs) atomicAdd(to.pops + row, __popc(signs));
      }
#endif
    }
  }
}

#if NORM
extern "C" __global__ void BY_STRIPS IN_CLUSTERS
    normalise(const __grid_constant__ Layer p, float* partials, u32* tickets, float* mean,
              float* inverse, float* running_mean, float* running_variance, double* sums_of_rows,
              float decay, float gain, float eps, const __grid_constant__ Activations to) {
  __shared__ double total[2][COLS];
  __shared__ __align__(16) float means[COLS], inverses[COLS];
  const Strip at(p);
#if HELD
  hold<BATCH>(p, at, [](int) {});
#endif
  float sums[2][VECTOR] = {}, origin[VECTOR];
  load_product<VECTOR>(p, 0, at.safe_col(), origin);
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH> z(p, at, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float d = at.has(at.row(turn + b)) ? z(p, b, i) - origin[i] : 0.0f;
        sums[0][i] += d;
        sums[1][i] += d * d;
      }
  }
  if (!sum_over_rows<2>(sums, partials, tickets, p.cols, total)) return;
  const i64 col = at.first_col + threadIdx.x;
  if (threadIdx.x < COLS && col < p.cols) {
    float first[1];
    load_product<1>(p, 0, col, first);
#if SHARED_BATCH
    const double origin = first[0], sum = total[0][threadIdx.x];
    sums_of_rows[col] = sum + p.rows * origin;
    sums_of_rows[p.cols + col] = total[1][threadIdx.x] + origin * (2 * sum + p.rows * origin);
#else
    const double sum = total[0][threadIdx.x], shift = sum * p.share;
    const float average = (float)(shift + first[0]);
    const float variance = (float)fmax(total[1][threadIdx.x] * p.share - shift * shift, 0.0);
    means[threadIdx.x] = average;
    inverses[threadIdx.x] = 1.0f / sqrtf(variance + eps);
    if (writes_sums()) {
      mean[col] = average;
      inverse[col] = inverses[threadIdx.x];
      running_mean[col] = running_mean[col] * decay + gain * average;
      running_variance[col] = running_variance[col] * decay + gain * variance;
    }
#endif
  }
#if CLUSTER > 1 && OUTPUT != OUTPUT_NONE
  __syncthreads();
  const int own = at.lane * VECTOR, col0 = at.safe_col();
  const Normal<VECTOR> norm(means + own, inverses + own, p.gamma + col0, p.beta + col0);
  write_activations(p, at, norm, to);
#endif
  leave_sums();
}
#endif

#if NORM && SHARED_BATCH
// The statistics of a column from the sums of all ranks.
extern "C" __global__ void __launch_bounds__(THREADS)
    whole_statistics(const __grid_constant__ Layer p, const double* __restrict__ sums_of_rows, float* mean,
                     float* inverse, float* running_mean, float* running_variance, float decay,
                     float gain, float eps) {
  const i64 col = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (col >= p.cols) return;
  const double middle = sums_of_rows[col] * p.share;
  const float average = (float)middle;
  const float variance = (float)fmax(sums_of_rows[p.cols + col] * p.share - middle * middle, 0.0);
  mean[col] = average;
  inverse[col] = 1.0f / sqrtf(variance + eps);
  running_mean[col] = running_mean[col] * decay + gain * average;
  running_variance[col] = running_variance[col] * decay + gain * variance;
}
#endif

#if OUTPUT != OUTPUT_NONE && !HELD
extern "C" __global__ void BY_STRIPS
    activate(const __grid_constant__ Layer p, const __grid_constant__ Activations to) {
  const Strip at(p);
  write_activations(p, at, Normal<VECTOR>(p, at.safe_col()), to);
}
#endif
