// The start of a training step: its batch, and what dropout keeps.
//
// gather: a thread copies VECTOR neighbouring pixels of an image of the batch. Pixels stay the whole
// numbers that they are, exact in any type; the first product multiplies by their scale. Bounded by
// latency: rows of the data set are read at random.
//
// dropout_mask: a thread makes one word, 32 elements of a row. Bounded by the integer multiplications
// of Philox, about 20 for each element.
//
// The number of the step is read from the device, so that a captured graph draws anew at each launch.
//
// The translation unit sets REAL, VECTOR, and DROP to whether pixels are dropped.

#define NORM 0
#define PRODUCT float
#include "training.cuh"
#include "philox.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const unsigned char* __restrict__ images, const i64* __restrict__ all_labels,
           const int* __restrict__ order, i64 ring, const i64* __restrict__ step, i64 rows, i64 cols,
           u64 seed, i64 draw, u32 last, real_t* __restrict__ x, i64* __restrict__ labels) {
  const int* batch = order + *step % ring * rows;
  const u32 groups = (u32)cols / VECTOR;
  const i64 count = rows * groups;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    const i64 row = i / groups, col = (i - row * groups) * VECTOR, image = batch[row];
    const Vector<unsigned char, VECTOR> pixels =
        *(const Vector<unsigned char, VECTOR>*)(images + image * cols + col);
    float v[VECTOR];
#pragma unroll
    for (int e = 0; e < VECTOR; e++) v[e] = pixels.at[e];
    if (DROP) {
      const u32 kept = Draw{seed, (u64)(*step + draw), last}.kept(row * cols + col, VECTOR);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) v[e] = kept >> e & 1 ? v[e] : 0.0f;
    }
    store<VECTOR>(x + row * cols + col, v);
    if (col == 0) labels[row] = all_labels[image];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_mask(const i64* __restrict__ step, i64 rows, i64 cols, u64 seed, i64 draw, u32 last,
                 u32* __restrict__ kept) {
  const i64 words = mask_words(cols), count = rows * words;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    const i64 row = i / words, col = (i - row * words) * 32;
    kept[i] = Draw{seed, (u64)(*step + draw), last}.kept(row * cols + col,
                                                         (int)min((i64)32, cols - col));
  }
}
