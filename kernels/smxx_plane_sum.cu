// Products of signs with the bit planes of whole weights, put together to products with the weights.
//
// With S_j the product with plane j of a unit, and S that with +1 alone, the product with the weights is
// (sum of 2**j S_j - S) / 2, exactly, and that times a power of two is rounded to float32 once. The
// steps after the layer follow.
//
// What bounds it: reading the products, 48 bytes for each result.

#include "steps.cuh"

constexpr int PLANES = 24;  // of a unit

// Filled by cupybnn/backends/cuda/byte_product.py, field by field in this order.
struct PlaneSum {
  const short* planes;  // (rows, pitch): those of unit 0 first, and the product with +1 after those of
                        // the last unit; pitch is a multiple of 8
  const float* step;    // a power of two for each unit
  Steps after;
  i64 rows, units, pitch;
  float* out;           // (rows, units)
};

extern "C" __global__ void __launch_bounds__(256) plane_sum(const __grid_constant__ PlaneSum p) {
  const i64 all = p.rows * p.units;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < all;
       i += (i64)gridDim.x * blockDim.x) {
    const i64 row = i / p.units, unit = i - row * p.units;
    const uint4* from = (const uint4*)(p.planes + row * p.pitch + unit * PLANES);
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
    sum -= __ldg(p.planes + row * p.pitch + p.units * PLANES);
    const float v = __fmul_rn(__ll2float_rn(sum >> 1), __ldg(p.step + unit));
    p.out[i] = after_steps(p.after, (int)unit, v);
  }
}
