// Real numbers to packed signs: bit = (y >= threshold of its column) != flip of its column.
//
// A warp takes a chunk (1024 columns) of several rows. Its thresholds stay in registers, one for each
// of 32 loads, and so do the flips of the word that a lane stores. A load is 32 neighboring columns,
// and the ballot of its comparisons is their word. No shared memory.
//
// What bounds it: reading y. Sixteen loads of 128 bytes are under way for each warp.

#include "layout.cuh"

constexpr int WARPS = 8;
constexpr u32 ALL = 0xffffffffu;

// y (rows, cols) in C order; words and pops in the layout of layout.cuh. pops are zeros when the
// kernel starts. Block (x, y): chunk x, and each gridDim.y * WARPS-th row.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    threshold_pack(const float* y, const float* threshold, const unsigned char* flip, u32* words,
                   int* pops, i64 rows, i64 cols) {
  constexpr int BATCH = 16;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 chunk = blockIdx.x, chunks = gridDim.x, first = chunk * CHUNK_BITS + lane;
  float least[32];
  u32 flips = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const i64 col = first + 32 * i;
    const bool exists = col < cols;
    least[i] = exists ? threshold[col] : 0.0f;
    const u32 word = __ballot_sync(ALL, exists && flip[col]);
    if (i == lane) flips = word;
  }
  const i64 padded = padded_lines(rows);
  const int left = (int)min(cols - first, (i64)CHUNK_BITS);
  for (i64 row = (i64)blockIdx.y * WARPS + warp; row < padded; row += (i64)gridDim.y * WARPS) {
    u32 mine = 0;
    if (row < rows) {
      const float* from = y + row * cols + first;
#pragma unroll
      for (int begin = 0; begin < 32; begin += BATCH) {
        float v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++)
          v[i] = 32 * (begin + i) < left ? from[32 * (begin + i)] : 0.0f;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int at = begin + i;
          const u32 word = __ballot_sync(ALL, 32 * at < left && v[i] >= least[at]);
          if (at == lane) mine = word;
        }
      }
      mine ^= flips;
    }
    const u32 position = position_of((u32)row);
    words[line_chunk(0, chunks, chunk, rows, position) + swizzled_word(position, lane)] = mine;
    int ones = __popc(mine);
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) ones += __shfl_xor_sync(ALL, ones, apart);
    if (lane == 0 && row < rows) atomicAdd(pops + row, ones);
  }
}
