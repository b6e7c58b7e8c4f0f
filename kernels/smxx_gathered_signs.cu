// Puts the signs of binary weights, of which each rank of a run has sent a share, where the products of the
// next step read them: packed along the rows (a product's right operand, layout.cuh), with the columns'
// popcounts; or dense, as +1 and -1; or both.
//
// A share is a number of groups of 32 rows. Of each group it has a word for each column, one after another;
// what one rank has sent of all weights follows what the one before it has.
//
// A block takes 32 columns of a weight and all their rows, a chunk at a time: it reads 32 words of 32 columns
// row by row, and writes the 128 bytes of one column after another. Several weights in one launch.
//
// What bounds it: latency in small layers, else reading and writing a bit for each weight.
//
// The translation unit sets REAL, the type of dense operands.

#include "block.cuh"
#include "elements.cuh"

constexpr int COLUMNS = 32, EACH = CHUNK_WORDS / WARPS;

// Filled by cupybnn/backends/cuda/fused_shares.py, field by field in this order.
struct SharedWeight {
  const u32* gathered;  // what rank 0 has sent of it
  u32* words;           // or null
  int* pops;
  void* dense;  // or null
  i64 groups;   // of a share
  i64 rows, cols, first_block;
  i64 wide;  // whether `dense` is float, whatever REAL is
};

constexpr int MOST = 8;  // in a launch
struct SharedWeights {
  SharedWeight at[MOST];
  i64 count, of_rank;  // words that a rank has sent
};

template <typename E>
__device__ __forceinline__ void write_dense(E* dense, u32 signs, i64 row, i64 rows, i64 cols, i64 col) {
  const int some = (int)max((i64)0, min((i64)32, rows - row));
  for (int r = 0; r < some; r++) from_float(signs >> r & 1 ? 1.0f : -1.0f, dense[(row + r) * cols + col]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    place_signs(const __grid_constant__ SharedWeights weights) {
  __shared__ u32 tile[CHUNK_WORDS][COLUMNS + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int number = 0;
#pragma unroll
  for (int i = 1; i < MOST; i++)
    number += i < weights.count && blockIdx.x >= weights.at[i].first_block;
  const SharedWeight& p = weights.at[number];
  const i64 first = (blockIdx.x - p.first_block) * COLUMNS, col = first + lane;
  const i64 chunks = (p.rows + CHUNK_BITS - 1) / CHUNK_BITS, count = (p.rows + 31) / 32;
  int pop[EACH] = {};
  for (i64 chunk = 0; chunk < chunks; chunk++) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const i64 word = chunk * CHUNK_WORDS + warp + i * WARPS, rank = word / p.groups;
      u32 signs = 0;
      if (word < count && col < p.cols)
        signs = p.gathered[rank * weights.of_rank + (word - rank * p.groups) * p.cols + col];
      tile[warp + i * WARPS][lane] = signs;
      if (!p.dense || col >= p.cols) continue;
      if (p.wide)
        write_dense((float*)p.dense, signs, word * 32, p.rows, p.cols, col);
      else
        write_dense((real_t*)p.dense, signs, word * 32, p.rows, p.cols, col);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const i64 line = first + warp + i * WARPS;
      const u32 signs = tile[lane][warp + i * WARPS];
      pop[i] += __popc(signs);
      if (!p.words || line >= p.cols) continue;
      const i64 position = position_of((u32)line);
      p.words[line_chunk(0, chunks, chunk, p.cols, position) + swizzled_word(position, lane)] = signs;
    }
    __syncthreads();
  }
  if (!p.words) return;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int sum = pop[i];
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL, sum, apart);
    const i64 line = first + warp + i * WARPS;
    if (lane == 0 && line < p.cols) p.pops[line] = sum;
  }
}
