// Products of signs with the bit planes of whole weights, put together to products with the weights.
//
// With S_j the product with plane j of a unit, and S that with +1 alone, the product with the weights is
// (sum of 2**j S_j - S) / 2, exactly, and that times a power of two is rounded to float32 once.
//
// What bounds it: reading the products, 48 bytes for each result.

#include "layout.cuh"

constexpr int PLANES = 24;  // of a unit

// planes (rows, pitch) of int16: those of unit 0 first, and the product with +1 after those of the last
// unit; pitch is a multiple of 8. step: a power of two for each unit. out (rows, units).
extern "C" __global__ void __launch_bounds__(256)
    plane_sum(const short* planes, const float* step, float* out, i64 rows, i64 units, i64 pitch) {
  const i64 all = rows * units;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < all;
       i += (i64)gridDim.x * blockDim.x) {
    const i64 row = i / units, unit = i - row * units;
    const uint4* from = (const uint4*)(planes + row * pitch + unit * PLANES);
    i64 sum = 0;
#pragma unroll
    for (int part = 0; part < PLANES / 8; part++) {
      const uint4 v = __ldg(from + part);
      const u32 w[4] = {v.x, v.y, v.z, v.w};
      int low = 0;  // eight planes of less than 16 bits
#pragma unroll
      for (int j = 7; j >= 0; j--)
        low = 2 * low + (int)(short)(w[j / 2] >> j % 2 * 16);
      sum += (i64)low << 8 * part;
    }
    sum -= __ldg(planes + row * pitch + units * PLANES);
    out[i] = __fmul_rn(__ll2float_rn(sum >> 1), __ldg(step + unit));
  }
}
