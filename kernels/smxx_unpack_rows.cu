// Packed signs of rows (layout.cuh) as +1 and -1, row-major, for a dense product to read.
//
// A thread turns one byte into eight neighbours, 16 or 32 bytes. What bounds it: writing them.
//
// The translation unit sets REAL, and VECTOR: 8 where that divides the number of columns, else 1.

#define NORM 0
#define DROP 0
#define PRODUCT float
#include "training.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    unpack_rows(const unsigned char* __restrict__ words, i64 rows, i64 cols, real_t* __restrict__ out) {
  const i64 chunks = (cols + CHUNK_BITS - 1) / CHUNK_BITS;
  const u32 groups = (u32)((cols + 7) / 8);
  const i64 count = rows * groups;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    const i64 row = i / groups, position = position_of(row);
    const int group = (int)(i - row * groups), word = group >> 2;
    const u32 bits =
        words[4 * (line_chunk(0, chunks, word / CHUNK_WORDS, rows, position) +
                   swizzled_word(position, word % CHUNK_WORDS)) +
              (group & 3)];
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = bits >> e & 1 ? 1.0f : -1.0f;
    real_t* to = out + row * cols + group * 8;
    if constexpr (VECTOR == 8) {
      store<8>(to, v);
    } else {
      for (int e = 0; e < 8; e++)
        if (group * 8 + e < cols) from_float(v[e], to[e]);
    }
  }
}
