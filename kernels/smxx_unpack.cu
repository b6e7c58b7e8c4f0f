// Unpacks signs to an array of +1 and -1: a thread writes one element. The result is (batch, lines, k)
// in C order. The translation unit sets TYPE, with +1 and -1 given as ONE and MINUS_ONE (bits of a
// half-precision number, or values).

#include "layout.cuh"

extern "C" __global__ void __launch_bounds__(256)
    unpack_lines(const u32* words, TYPE* out, i64 batch, i64 lines, i64 k, i64 chunks) {
  const i64 count = batch * lines * k;
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    const i64 line = i / k % lines, item = i / k / lines, bit = i % k;
    const u32 position = position_of((u32)line);
    const u32* from = words + line_chunk(item, chunks, bit / CHUNK_BITS, lines, position);
    const u32 word = from[swizzled_word(position, (int)(bit % CHUNK_BITS / 32))];
    out[i] = (word >> (bit & 31)) & 1 ? (TYPE)(ONE) : (TYPE)(MINUS_ONE);
  }
}
