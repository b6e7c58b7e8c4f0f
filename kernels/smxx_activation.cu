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
// What bounds them: reading the products, once if they stay in shared memory between the passes; in clusters,
// a block's chain of loads, barrier and sums; and the L2 cache, which takes some 40 writes a clock, of whole
// sectors of 32 bytes or of single words. So wide strips write several words of a row at a time.
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

// All lanes of a warp take part, whether they have elements or not. Lanes put the bits of BATCH rows
// together; then each writes the words of a row.
__device__ __forceinline__ void write_activations(const Layer& p, const Strip& at,
                                                  const Normal<VECTOR>& norm, const Activations& to) {
  const i64 chunks = (p.cols + CHUNK_BITS - 1) / CHUNK_BITS;
  const float window = (float)to.window;
  const u32 mine = at.has_cols() ? ~0u : 0;
#pragma unroll 1
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH, false> products(p, at, turn);
    u32 signs = 0, passes = 0;  // bit VECTOR * b + i: of column i in row b
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float z[VECTOR], out[VECTOR];
      products.load(p, b, z);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float y = norm(i, z[i]);
        const u32 bit = 1u << (VECTOR * b + i);
#if OUTPUT == OUTPUT_RELU
        bool pass = y > 0;
        out[i] = y > 0 ? y : y != y ? y : 0.0f;  // NaN is passed on
#if DROP == DROP_ACTIVATION
        pass = pass && products.kept(b, i);
        out[i] = products.kept(b, i) ? __fmul_rn(out[i], (float)p.keep_scale) : 0.0f;
#endif
#else
        const bool pass = fabsf(y) <= window;
        // Without batch norm, y may be a denormal number, which comparisons take for 0.
        const bool sign = HAS_NORM ? y >= 0 : nonnegative(y);
        out[i] = sign ? 1.0f : -1.0f;
        signs |= sign ? bit : 0;
#endif
        passes |= pass ? bit : 0;
      }
#if OUTPUT != OUTPUT_PACKED_SIGN
      if (at.has(at.row(turn + b))) store<VECTOR>(to.dense + at.offset(at.row(turn + b)), out);
#endif
    }
    // The lanes of a word have a row each now.
    constexpr int OF_WORD = 32 / VECTOR;
    const int lane = threadIdx.x & 31, number = lane % OF_WORD, row = at.row(turn + number);
    const int within = (at.first_col >> 5) + at.lane / OF_WORD;  // the word's place in a row
    const bool writes = number < BATCH && at.has_row(row) && (WHOLE || within * 32 < at.cols);
#if GATE
    const u32 gate = join_rows<VECTOR, BATCH>(passes & mine, lane);
    if (writes) to.gate[row * ((at.cols + 31) >> 5) + within] = gate;
#endif
#if PACKED
    const u32 word = join_rows<VECTOR, BATCH>(signs & mine, lane);
    int count = writes ? __popc(word) : 0;
#pragma unroll
    for (int apart = OF_WORD; apart < LANES; apart <<= 1) count += __shfl_xor_sync(ALL, count, apart);
    if (writes) {
      const u32 position = position_of(row);
      to.words[line_chunk(0, chunks, within / CHUNK_WORDS, p.rows, position) +
               swizzled_word(position, within % CHUNK_WORDS)] = word;
      if (at.lane < OF_WORD && count) atomicAdd(to.pops + row, count);
    }
#endif
  }
}

#if NORM
extern "C" __global__ void BY_STRIPS IN_CLUSTERS
    normalise(const __grid_constant__ Layer p, float* partials, u32* tickets, float* mean,
              float* inverse, float* running_mean, float* running_variance, double* sums_of_rows,
              float decay, float gain, float eps, const __grid_constant__ Activations to) {
  __shared__ double total[2][COLS];
  __shared__ __align__(16) float norms[4][COLS];  // mean, 1 / deviation, gamma, beta
  const Strip at(p);
#if HELD
  hold(p, at, [](int) {});
#endif
  // What each part of the threads needs once the sums are there, loaded meanwhile.
  const int number = threadIdx.x % COLS, part = threadIdx.x / COLS;
  const i64 col = at.first_col + number;
  const bool exists = part < 2 && col < p.cols;
  float first[1] = {}, before_mean = 0, before_variance = 0, gamma = 0, beta = 0;
  if (exists && part == 0) {
    load_product<1>(p, 0, col, first);
    if (writes_sums()) {
      before_mean = running_mean[col];
      before_variance = running_variance[col];
    }
  } else if (exists) {
    gamma = p.gamma[col];
    beta = p.beta[col];
  }
  float sums[2][VECTOR] = {}, origin[VECTOR];
  load_product<VECTOR>(p, 0, at.safe_col(), origin);
#pragma unroll 1
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH, true> products(p, at, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      float z[VECTOR];
      products.load(p, b, z);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float d = at.has(at.row(turn + b)) ? z[i] - origin[i] : 0.0f;
        sums[0][i] += d;
        sums[1][i] += d * d;
      }
    }
  }
  if (!sum_over_rows<2>(sums, partials, tickets, p.cols, total)) return;
#if SHARED_BATCH
  if (exists && part == 0) {
    const double origin = first[0], sum = total[0][number];
    sums_of_rows[col] = sum + p.rows * origin;
    sums_of_rows[p.cols + col] = total[1][number] + origin * (2 * sum + p.rows * origin);
  }
#else
  if (exists && part == 0) {
    const double sum = total[0][number], shift = sum * p.share;
    const float average = (float)(shift + first[0]);
    const float variance = (float)fmax(total[1][number] * p.share - shift * shift, 0.0);
    norms[0][number] = average;
    norms[1][number] = 1.0f / sqrtf(variance + eps);
    if (writes_sums()) {
      mean[col] = average;
      inverse[col] = norms[1][number];
      running_mean[col] = before_mean * decay + gain * average;
      running_variance[col] = before_variance * decay + gain * variance;
    }
  } else if (exists) {
    norms[2][number] = gamma;
    norms[3][number] = beta;
  }
#endif
#if CLUSTER > 1 && OUTPUT != OUTPUT_NONE
  __syncthreads();
  const int own = at.lane * VECTOR;
  write_activations(p, at, Normal<VECTOR>(norms[0] + own, norms[1] + own, norms[2] + own, norms[3] + own),
                    to);
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
