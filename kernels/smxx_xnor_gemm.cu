// The 1-bit product on any GPU, without tensor cores: AND and popcount, 32 bits at a time.
//
// A block computes a tile of 64 x 64 results; a thread 4 x 4 of them, 16 apart. Shared memory holds
// one chunk (1024 bits) of the tile's 64 + 64 lines, 16 KiB, swizzled as in memory (layout.cuh).
// Popcount, at 16 words per clock and SM on most GPUs, bounds it.

#include "results.cuh"

constexpr int TILE = 64, SIDE = 16, EACH = TILE / SIDE, THREADS = SIDE * SIDE;

__device__ __forceinline__ void load_lines(uint4* to, const uint4* words, i64 first, i64 lines) {
  for (int i = threadIdx.x; i < TILE * CHUNK_PIECES; i += THREADS)
    to[i] = first + i / CHUNK_PIECES < lines ? words[first * CHUNK_PIECES + i] : make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) xnor_gemm(const __grid_constant__ Product p) {
  __shared__ uint4 a[TILE * CHUNK_PIECES], b[TILE * CHUNK_PIECES];
  __shared__ Terms<TILE, TILE> terms;
  const BlockTile<TILE, TILE> tile(p);
  const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
  const int px = position_of(tx), py = position_of(ty);

  terms.fill(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
  int acc[EACH][EACH] = {};
  for (i64 chunk = 0; chunk < p.chunks * PLANES; chunk++) {
    load_lines(a, tile.a_chunk(p, chunk), tile.m, tile.a_lines);
    load_lines(b, tile.b_chunk(p, chunk), tile.n, tile.b_lines);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) double_at_plane(p, chunk, acc[i]);
#pragma unroll 1
    for (int piece = 0; piece < CHUNK_PIECES; piece++) {
      uint4 x[EACH], y[EACH];
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        x[i] = a[(py + SIDE * i) * CHUNK_PIECES + swizzled_piece(py, piece)];
        y[i] = b[(px + SIDE * i) * CHUNK_PIECES + swizzled_piece(px, piece)];
      }
#pragma unroll
      for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++)
          acc[i][j] += __popc(x[i].x & y[j].x) + __popc(x[i].y & y[j].y) +
                       __popc(x[i].z & y[j].z) + __popc(x[i].w & y[j].w);
    }
    __syncthreads();
  }

  const Results<TILE, TILE> results(p, terms, tile.item, tile.m, tile.n);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = ty + SIDE * i;
#if OUTPUT == OUTPUT_PACKED
    int ones = 0;
#pragma unroll
    for (int w = 0; w < EACH / 2; w++) {
      // Half a warp has a row: 16 columns in one ballot, the next 16 in another.
      u32 half[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int value = results.product(terms.row[row], terms.col[32 * w + SIDE * h + tx],
                                          acc[i][2 * w + h]);
        half[h] = __ballot_sync(0xffffffffu, value < 0) >> (threadIdx.x & 16);
      }
      const u32 word = results.word_of_signs(w, (half[0] & 0xffffu) | (half[1] << 16));
      if (tx == 0) results.store_word(row, w, word);
      ones += __popc(word);
    }
    if (tx == 0) results.count(row, ones);
#else
#pragma unroll
    for (int j = 0; j < EACH; j++) results.store(row, tx + SIDE * j, acc[i][j]);
#endif
  }
#if OUTPUT == OUTPUT_PACKED
  fill_chunk<TILE, TILE>(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
#endif
}
