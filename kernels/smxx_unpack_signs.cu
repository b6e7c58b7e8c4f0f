// Packed signs (layout.cuh) as +1 and -1, row-major, for a dense product to read.
//
// unpack_rows: of a left operand, whose lines are rows. A thread turns one byte into eight neighbours, 16
// or 32 bytes.
//
// unpack_columns: of a right operand, whose lines are columns. A warp takes a word, 32 rows, of
// 32 * VECTOR columns; a block eight words that follow each other, which lie together.
//
// What bounds both: writing.
//
// The translation unit sets REAL, and VECTOR, which divides the number of columns: 8 or 1 for rows, up
// to 16 bytes of them for columns.

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

extern "C" __global__ void __launch_bounds__(THREADS)
    unpack_columns(const u32* __restrict__ words, i64 rows, i64 cols, real_t* __restrict__ out) {
  const i64 chunks = (rows + CHUNK_BITS - 1) / CHUNK_BITS;
  const u32 groups = (u32)((cols + 32 * VECTOR - 1) / (32 * VECTOR));
  const int word = (int)(blockIdx.x / groups) * WARPS + (threadIdx.x >> 5);
  const i64 col = ((i64)(blockIdx.x % groups) * 32 + (threadIdx.x & 31)) * VECTOR;
  const i64 row0 = (i64)word * 32;
  if (row0 >= rows || col >= cols) return;
  u32 bits[VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    const u32 position = position_of((u32)(col + i));
    bits[i] = words[line_chunk(0, chunks, word / CHUNK_WORDS, cols, position) +
                    swizzled_word(position, word % CHUNK_WORDS)];
  }
  const int count = (int)min(rows - row0, (i64)32);
#pragma unroll 8
  for (int r = 0; r < count; r++) {
    float v[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) v[i] = bits[i] >> r & 1 ? 1.0f : -1.0f;
    store<VECTOR>(out + (row0 + r) * cols + col, v);
  }
}
