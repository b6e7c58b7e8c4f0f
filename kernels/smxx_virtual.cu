// Images that are moved along a direction, or mixed in pairs, within a training step.
//
// move_images: a block takes an image. Once through its direction for the length, a second time to move
// its pixels, with the direction read or drawn again: it is in the L1 cache, or ten rounds of arithmetic.
// Clears popcounts that later kernels add to.
//
// mix_images: a block takes an image and adds a share of the next one; it mixes the labels, too. Formulas
// in cupybnn/data/mixing.py.
//
// What bounds both: latency; a batch of images is about a megabyte.
//
// The step number is read from the device, so that each launch of a captured graph draws new numbers.
//
// The rows may be a part of a batch. Random numbers are those of an image's place in the whole batch.
//
// The translation unit sets REAL, DIRECTION to one of DIRECTION_*, and DROP to whether pixels are dropped.

#include "block.cuh"
#include "elements.cuh"
#include "philox.cuh"

#define DIRECTION_NONE 0      // only pixels are dropped
#define DIRECTION_GRADIENT 1  // of the pixels; dropped ones have none
#define DIRECTION_RANDOM 2    // cupybnn.backends.random.bell

// Filled by cupybnn/backends/cuda/fused_virtual.py, field by field in this order.
struct Move {
  const real_t* x;
  const real_t* gradient;
  const i64* step;
  real_t* out;
  int* pops;  // to be cleared
  i64 rows, cols, pop_count;
  i64 first;      // place of row 0 in the whole batch
  u64 seed;       // of random directions
  u64 drop_seed;  // of the dropped pixels
  i64 draw, last;
  double distance;
};

__device__ __forceinline__ bool keeps(const Move& p, u64 number, i64 at) {
  return !DROP || Draw{p.drop_seed, number + p.draw, (u32)p.last}.kept(at, 1);
}

// Of the element `at` of the rows, which is number `drawn` of the whole batch.
__device__ __forceinline__ float direction(const Move& p, u64 number, i64 at, i64 drawn) {
#if DIRECTION == DIRECTION_GRADIENT
  return keeps(p, number, drawn) ? to_float(p.gradient[at]) : 0.0f;
#elif DIRECTION == DIRECTION_RANDOM
  return (float)bell(p.seed, number, drawn);
#else
  return 0.0f;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) move_images(const __grid_constant__ Move p) {
  __shared__ double parts[WARPS];
  const u64 number = (u64)*p.step;
  const i64 base = (i64)blockIdx.x * p.cols, drawn = p.first * p.cols + base;
  double factor = 0;
  if (DIRECTION != DIRECTION_NONE) {
    double sum = 0;  // of squares, which may be too small for a float
    for (i64 i = threadIdx.x; i < p.cols; i += THREADS) {
      const double d = direction(p, number, base + i, drawn + i);
      sum += d * d;
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL, sum, apart);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++) sum += parts[w];
    factor = sum > 0 ? p.distance / sqrt(sum) : 0.0;
  }
  for (i64 i = threadIdx.x; i < p.cols; i += THREADS) {
    const i64 at = base + i;
    const float moved = to_float(p.x[at]) + (float)(direction(p, number, at, drawn + i) * factor);
    from_float(keeps(p, number, drawn + i) ? moved : 0.0f, p.out[at]);
  }
  for (i64 i = base / p.cols * THREADS + threadIdx.x; i < p.pop_count; i += p.rows * THREADS)
    p.pops[i] = 0;
}

struct Mix {
  const real_t* x;
  const i64* step;
  const i64* labels;
  real_t* out;
  float* targets;  // (rows, classes), or null
  i64 rows, cols, classes;  // rows of the result
  i64 sources, first;       // rows of x, one more if they are a part of a batch; place of row 0
  u64 seed;
  i64 some;  // whether only half of the images are mixed
};

extern "C" __global__ void __launch_bounds__(THREADS) mix_images(const __grid_constant__ Mix p) {
  const u64 number = (u64)*p.step;
  const i64 row = blockIdx.x, next = row + 1 < p.sources ? row + 1 : 0, place = p.first + row;
  // Two numbers per image, uniform in [0, 1).
  float share = 0.5f * ((float)(random_word(p.seed, number, 2 * place) >> 8) * 0x1p-24f);
  if (p.some && (float)(random_word(p.seed, number, 2 * place + 1) >> 8) * 0x1p-24f >= 0.5f) share = 0;
  const auto mixed = [&](float own, float other) { return own + share * (other - own); };
  for (i64 i = threadIdx.x; i < p.cols; i += THREADS)
    from_float(mixed(to_float(p.x[row * p.cols + i]), to_float(p.x[next * p.cols + i])),
               p.out[row * p.cols + i]);
  if (p.targets)
    for (i64 c = threadIdx.x; c < p.classes; c += THREADS)
      p.targets[row * p.classes + c] =
          mixed(p.labels[row] == c ? 1.0f : 0.0f, p.labels[next] == c ? 1.0f : 0.0f);
}
