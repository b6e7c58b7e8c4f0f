// Unpacks bit planes to levels: a thread writes one element. The result is (batch, lines, k) in C order.
//
// The translation unit sets PLANES and UNSIGNED.

#include "layout.cuh"

extern "C" __global__ void __launch_bounds__(256)
    unpack_planes(const u32* words, short* out, i64 batch, i64 lines, i64 k, i64 chunks) {
  const i64 count = batch * lines * k;
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    const i64 line = i / k % lines, item = i / k / lines, bit = i % k;
    const u32 position = position_of((u32)line);
    const int at = swizzled_word(position, (int)(bit % CHUNK_BITS / 32));
    int number = 0;
    for (int plane = 0; plane < PLANES; plane++) {
      const i64 chunk = plane * chunks + bit / CHUNK_BITS;
      const u32 word = words[line_chunk(item, PLANES * chunks, chunk, lines, position) + at];
      number = 2 * number + (int)(word >> (bit & 31) & 1);
    }
    out[i] = (short)(UNSIGNED ? number : 2 * number - ((1 << PLANES) - 1));
  }
}
