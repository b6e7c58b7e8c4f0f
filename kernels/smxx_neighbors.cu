// The images of a training step, each moved by random multiples of its differences to its nearest
// neighbors. Formula in cupybnn/data/neighbors.py; whole numbers, so that NumPy agrees bit for bit.
//
// move_among_neighbors: a block takes an image. First its neighbors and multiples, into shared memory,
// then VECTOR adjacent pixels a thread. Bounded by latency: the step number, the image's index, those of
// its neighbors and then their rows, at random addresses, are read one after another.
//
// The step number is read from the device, so that each launch of a captured graph draws new numbers.
//
// The rows may be a part of a batch. Random numbers are those of an image's place in the whole batch.
//
// The translation unit sets REAL, which does not matter here, VECTOR, and DIGITS, the binary digits of a
// multiple after the point.

#include "block.cuh"
#include "philox.cuh"

// Filled by cupybnn/backends/cuda/fused_neighbors.py, field by field in this order.
struct Neighbors {
  const unsigned char* images;
  const i64* all_labels;
  const int* order;  // (ring, rows): indices of the images of each step
  const int* table;  // (images, nearest)
  const i64* step;
  unsigned char* out;  // (rows, cols)
  i64* labels;
  i64 ring, rows, cols, nearest;
  i64 first, whole;  // place of row 0 in the whole batch, and its images; after the last comes the first
  u64 seed;
  i64 factor, brightest;
};

constexpr int TOGETHER = 4;  // neighbors whose pixels are loaded before the first is used

struct alignas(VECTOR) Pixels {
  unsigned char at[VECTOR];
};

extern "C" __global__ void __launch_bounds__(THREADS)
    move_among_neighbors(const __grid_constant__ Neighbors p) {
  extern __shared__ int shared[];
  const int nearest = (int)p.nearest;
  int *draws = shared, *around = shared + nearest;
  const i64 step = *p.step, row = blockIdx.x, number = p.order[step % p.ring * p.rows + row];
  const i64 place = p.first + row < p.whole ? p.first + row : p.first + row - p.whole;
  for (int j = threadIdx.x; j < nearest; j += THREADS) {
    draws[j] = bell(p.seed, (u64)step, (u64)(place * nearest + j));
    around[j] = p.table[number * nearest + j];
  }
  if (threadIdx.x == 0) p.labels[row] = p.all_labels[number];
  __syncthreads();
  for (i64 i = threadIdx.x * VECTOR; i < p.cols; i += THREADS * VECTOR) {
    const Pixels own = *(const Pixels*)(p.images + number * p.cols + i);
    int total[VECTOR] = {};
    for (int j = 0; j < nearest; j += TOGETHER) {
      Pixels other[TOGETHER];
#pragma unroll
      for (int t = 0; t < TOGETHER; t++)
        other[t] = *(const Pixels*)(p.images + (i64)around[min(j + t, nearest - 1)] * p.cols + i);
#pragma unroll
      for (int t = 0; t < TOGETHER; t++) {
        const int draw = j + t < nearest ? draws[j + t] : 0;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) total[e] += draw * (other[t].at[e] - own.at[e]);
      }
    }
    Pixels moved;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      const i64 value = own.at[e] + (total[e] * p.factor + (1 << DIGITS - 1) >> DIGITS);
      moved.at[e] = (unsigned char)max((i64)0, min(value, p.brightest));
    }
    *(Pixels*)(p.out + row * p.cols + i) = moved;
  }
}
