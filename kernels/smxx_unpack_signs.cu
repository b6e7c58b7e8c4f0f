// Unpacks signs (layout.cuh) to +1 and -1, row-major, for a dense product.
//
// unpack_rows: a left operand, whose lines are rows. A thread converts one byte to eight neighbors, 16 or
// 32 bytes.
//
// unpack_columns: a right operand, whose lines are columns. A thread takes 16 bytes, 128 rows, of each of
// VECTOR columns; the threads of a block write a row's neighbors together.
//
// What bounds both: writing.
//
// The translation unit sets REAL, and VECTOR, which divides the number of columns: 8 or 1 for rows, up
// to 16 bytes of them for columns.

#include "block.cuh"
#include "elements.cuh"

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
    unpack_columns(const uint4* __restrict__ words, i64 rows, i64 cols, real_t* __restrict__ out) {
  const i64 chunks = (rows + CHUNK_BITS - 1) / CHUNK_BITS;
  const u32 groups = (u32)((cols + THREADS * VECTOR - 1) / (THREADS * VECTOR));
  const int piece = (int)(blockIdx.x / groups);
  const i64 col = ((i64)(blockIdx.x % groups) * THREADS + threadIdx.x) * VECTOR;
  const i64 row0 = (i64)piece * 128;
  if (col >= cols) return;
  u32 bits[4][VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    const u32 position = position_of((u32)(col + i));
    const i64 first = line_chunk(0, chunks, piece / CHUNK_PIECES, cols, position) / 4;
    const uint4 four = words[first + swizzled_piece(position, piece % CHUNK_PIECES)];
    bits[0][i] = four.x, bits[1][i] = four.y, bits[2][i] = four.z, bits[3][i] = four.w;
  }
#pragma unroll
  for (int word = 0; word < 4; word++) {
    const i64 from = row0 + word * 32;
    const int count = (int)max((i64)0, min(rows - from, (i64)32));
#pragma unroll 8
    for (int r = 0; r < count; r++) {
      float v[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; i++) v[i] = bits[word][i] >> r & 1 ? 1.0f : -1.0f;
      store<VECTOR>(out + (from + r) * cols + col, v);
    }
  }
}
