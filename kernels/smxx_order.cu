// The images of training steps, as defined in cupybnn/backends/order.py. A thread computes an image
// from its position in an epoch alone: first the epoch's keys (four blocks of Philox), then passes
// of the Feistel network until a result is an image. From 17 images on, these are less than two on
// average. Where examples have weights, a binary search then finds the interval that contains the
// point.
//
// What bounds it: integer multiplications, some 140 for each image.

#include "philox.cuh"

constexpr int ROUNDS = 12, WORDS = 16;

// Filled by cupybnn/backends/cuda/order.py, field by field in this order.
struct Order {
  const double* ends;  // (sources,): where the interval of each image ends, or null
  i64 images, sources, last;
  u64 seed;
  i64 bits, offset_bits;  // of the network (0: none), and of the offset of an epoch's points
  i64 step, batch, first;
  i64 rows, count;  // images of a step, and in all
};

__device__ __forceinline__ u32 mixed(u32 x) {
  x *= 0x85EBCA6Bu;
  x ^= x >> 15;
  return x * 0xC2B2AE35u;
}

// Permute the numbers of an epoch.
__device__ __forceinline__ u32 permuted(const Order& p, const u32 (&words)[WORDS], u32 x) {
  const int left_bits = (int)p.bits / 2, right_bits = (int)p.bits - left_bits;
  const u32 right_mask = (1u << right_bits) - 1, mask = (1u << left_bits << right_bits) - 1;
  do {
    x = x + words[ROUNDS] & mask;
    u32 left = x >> right_bits, right = x & right_mask;
#pragma unroll
    for (int i = 0; i < ROUNDS; i += 2) {
      left ^= mixed(right ^ words[i]) >> 32 - left_bits;
      right ^= mixed(left ^ words[i + 1]) >> 32 - right_bits;
    }
    x = left << right_bits | right;
  } while (x >= (u32)p.images);
  return x;
}

// The image whose interval contains a point: the first that ends behind it.
__device__ __forceinline__ i64 image_at(const Order& p, double point) {
  i64 low = 0, high = p.sources;
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (p.ends[middle] <= point)
      low = middle + 1;
    else
      high = middle;
  }
  return min(low, p.last);
}

extern "C" __global__ void __launch_bounds__(256) fill(const __grid_constant__ Order p, int* __restrict__ out) {
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < p.count; i += gridDim.x * 256ll) {
    const i64 position = (p.step + i / p.rows) * p.batch + (p.first + i % p.rows) % p.batch;
    const i64 epoch = position / p.images;
    i64 image = position - epoch * p.images;
    u32 words[WORDS];
#pragma unroll
    for (int block = 0; block < WORDS / 4; block++) {
      const uint4 four = philox(p.seed, (u64)epoch, block);
      words[4 * block] = four.x;
      words[4 * block + 1] = four.y;
      words[4 * block + 2] = four.z;
      words[4 * block + 3] = four.w;
    }
    if (p.bits) image = permuted(p, words, (u32)image);
    if (p.ends) {
      const u64 word = (u64)words[ROUNDS + 1] << 32 | words[ROUNDS + 2];
      const double offset = (double)(word >> 64 - p.offset_bits) / (double)(1ull << p.offset_bits);
      image = image_at(p, (double)image + offset);
    }
    out[i] = (int)image;
  }
}
