// The 1-bit product on Turing's tensor cores: mma m8n8k128, which supports only XOR. The product of the
// signs is then K - 2 popcount(a ^ b), and no popcounts of the lines are needed.
//
// A block of four warps computes a tile of 64 x 64 results, a warp 32 x 32. Shared memory holds one
// chunk (1024 bits) of the tile's 64 + 64 lines, 16 KiB; while it is multiplied, the next one is loaded
// into registers. Loads from shared memory bound it: 2 words for each 8 x 8 x 128 product.

#define XOR_ACC 1
#include "results.cuh"

constexpr int TILE = 64, WARP_TILE = 32, THREADS = 128;
constexpr int PIECES = TILE * CHUNK_PIECES / THREADS;  // per operand and thread
constexpr int BLOCKS = WARP_TILE / 16, FRAGMENTS = WARP_TILE / 8;

struct Lines {
  uint4 piece[PIECES];
  __device__ __forceinline__ void load(const uint4* words, i64 first, i64 lines) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int at = threadIdx.x + i * THREADS;
      piece[i] = first + at / CHUNK_PIECES < lines ? words[first * CHUNK_PIECES + at]
                                                    : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void store(uint4* to) const {
#pragma unroll
    for (int i = 0; i < PIECES; i++) to[threadIdx.x + i * THREADS] = piece[i];
  }
};

__device__ __forceinline__ void multiply_8x8(int* d, u32 a, u32 b) {
  asm volatile(
      "mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1]) : "r"(a), "r"(b));
}

extern "C" __global__ void __launch_bounds__(THREADS) xnor_gemm(const __grid_constant__ Product p) {
  __shared__ Terms<TILE, TILE> terms;
  __shared__ uint4 shared_a[TILE * CHUNK_PIECES], shared_b[TILE * CHUNK_PIECES];
  const BlockTile<TILE, TILE> tile(p);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp / 2 * WARP_TILE, warp_n = warp % 2 * WARP_TILE;

  terms.fill(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
  int acc[BLOCKS][4 * FRAGMENTS] = {};
  Lines next_a, next_b;
  next_a.load(tile.a, tile.m, tile.a_lines);
  next_b.load(tile.b, tile.n, tile.b_lines);
  const i64 chunks = p.chunks * PLANES;
  for (i64 chunk = 0; chunk < chunks; chunk++) {
    next_a.store(shared_a);
    next_b.store(shared_b);
    __syncthreads();
    if (chunk + 1 < chunks) {
      next_a.load(tile.a_chunk(p, chunk + 1), tile.m, tile.a_lines);
      next_b.load(tile.b_chunk(p, chunk + 1), tile.n, tile.b_lines);
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) double_at_plane(p, chunk, acc[block]);
    const u32* words_a = (const u32*)shared_a + (warp_m + lane / 4) * CHUNK_WORDS;
    const u32* words_b = (const u32*)shared_b + (warp_n + lane / 4) * CHUNK_WORDS;
#pragma unroll
    for (int piece = 0; piece < CHUNK_PIECES; piece++) {
      const int at = swizzled_piece(lane / 4, piece) * 4 + lane % 4;
      u32 a[2 * BLOCKS], b[FRAGMENTS];
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++) a[i] = words_a[i * 8 * CHUNK_WORDS + at];
#pragma unroll
      for (int j = 0; j < FRAGMENTS; j++) b[j] = words_b[j * 8 * CHUNK_WORDS + at];
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++)
          multiply_8x8(acc[i / 2] + 4 * j + i % 2 * 2, a[i], b[j]);
    }
    __syncthreads();
  }
  const Results<TILE, TILE> results(p, terms, tile.item, tile.m, tile.n);
  results.store_all(warp_m, 16, warp_n, acc);
#if OUTPUT == OUTPUT_PACKED
  fill_chunk<TILE, TILE>(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
#endif
}
