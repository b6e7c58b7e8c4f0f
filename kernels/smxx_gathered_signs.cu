// Puts the signs of a binary weight, of which each rank of a run has sent a share, where the products of
// the next step read them: packed along the rows (a product's right operand, layout.cuh), with the columns'
// popcounts; or dense, as +1 and -1; or both.
//
// A share is a number of groups of 32 rows. Of each group it has a word for each column, one after another;
// what one rank has sent follows what the one before it has.
//
// A block takes 32 columns and all their rows, a chunk at a time: it reads 32 words of 32 columns row by row,
// and writes the 128 bytes of one column after another.
//
// What bounds it: latency in small layers, else reading and writing a bit for each weight.
//
// The translation unit sets REAL, the type of dense signs.

#include "block.cuh"
#include "elements.cuh"

constexpr int COLUMNS = 32, EACH = CHUNK_WORDS / WARPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    place_signs(const u32* __restrict__ gathered, i64 of_rank, i64 groups, i64 rows, i64 cols, u32* words,
                int* pops, real_t* dense) {
  __shared__ u32 tile[CHUNK_WORDS][COLUMNS + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 first = (i64)blockIdx.x * COLUMNS, col = first + lane;
  const i64 chunks = (rows + CHUNK_BITS - 1) / CHUNK_BITS, count = (rows + 31) / 32;
  int pop[EACH] = {};
  for (i64 chunk = 0; chunk < chunks; chunk++) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const i64 word = chunk * CHUNK_WORDS + warp + i * WARPS, rank = word / groups;
      u32 signs = 0;
      if (word < count && col < cols) signs = gathered[rank * of_rank + (word - rank * groups) * cols + col];
      tile[warp + i * WARPS][lane] = signs;
      if (!dense || col >= cols) continue;
      const int some = (int)max((i64)0, min((i64)32, rows - word * 32));
      for (int r = 0; r < some; r++)
        from_float(signs >> r & 1 ? 1.0f : -1.0f, dense[(word * 32 + r) * cols + col]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const i64 line = first + warp + i * WARPS;
      const u32 signs = tile[lane][warp + i * WARPS];
      pop[i] += __popc(signs);
      if (!words || line >= cols) continue;
      const i64 position = position_of((u32)line);
      words[line_chunk(0, chunks, chunk, cols, position) + swizzled_word(position, lane)] = signs;
    }
    __syncthreads();
  }
  if (!words) return;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int sum = pop[i];
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL, sum, apart);
    const i64 line = first + warp + i * WARPS;
    if (lane == 0 && line < cols) pops[line] = sum;
  }
}
