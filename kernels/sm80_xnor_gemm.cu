// The 1-bit product on the tensor cores of sm_80 and newer: mma.sync m16n8k256 b1 and.popc.
//
// A block of WARPS_M x WARPS_N warps computes one tile; a warp BLOCKS_M times 16 rows by BLOCKS_N
// times 8 columns of it, with the accumulators in registers. STAGES slots of shared memory hold a
// chunk (1024 bits) of the tile's lines each, filled by 16-byte asynchronous copies and read by
// ldmatrix, whose eight rows are in different banks because the lines are stored swizzled (layout.cuh).
// A tile of 256 x 128 reads 48 bytes per clock and SM from the L2 cache at full rate, which bounds it
// on large products; on small ones, the time to fill the slots does.
//
// The translation unit sets WARPS_M, WARPS_N, BLOCKS_M, BLOCKS_N, STAGES, and the macros of product.cuh.

#include "results.cuh"

constexpr int WARP_M = 16 * BLOCKS_M, WARP_N = 8 * BLOCKS_N;
constexpr int TILE_M = WARP_M * WARPS_M, TILE_N = WARP_N * WARPS_N;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int A_BYTES = TILE_M * CHUNK_BYTES, SLOT_BYTES = A_BYTES + TILE_N * CHUNK_BYTES;
static_assert(BLOCKS_N % 2 == 0, "ldmatrix reads two fragments of b");
static_assert(TILE_M * CHUNK_PIECES % THREADS == 0 && TILE_N * CHUNK_PIECES % THREADS == 0,
              "each thread copies as many pieces");

// Copy LINES lines of one chunk into a slot; lines that do not exist become zeros.
template <int LINES>
__device__ __forceinline__ void copy_lines(u32 to, const uint4* words, i64 first, i64 lines) {
  const uint4* from = words + first * CHUNK_PIECES + threadIdx.x;
#pragma unroll
  for (int i = 0; i < LINES * CHUNK_PIECES / THREADS; i++) {
    const int at = threadIdx.x + i * THREADS;
    const bool exists = first + at / CHUNK_PIECES < lines;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + 16 * at),
                 "l"(exists ? from + i * THREADS : words), "r"(exists ? 16 : 0) : "memory");
  }
}

__device__ __forceinline__ void load_matrices(u32* d, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void multiply_16x8(int* d, const u32* a, const u32* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) xnor_gemm(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ Terms<TILE_M, TILE_N> terms;
  const u32 slots = (u32)__cvta_generic_to_shared(raw);
  BlockTile<TILE_M, TILE_N> tile(p);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
  const int chunks = (int)p.chunks * PLANES;

  int fetched = 0;
  auto fetch = [&]() {
    if (fetched < chunks) {
      const u32 to = slots + fetched % STAGES * SLOT_BYTES;
      copy_lines<TILE_M>(to, tile.a, tile.m, tile.a_lines);
      copy_lines<TILE_N>(to + A_BYTES, tile.b, tile.n, tile.b_lines);
      tile.a += tile.a_lines * CHUNK_PIECES;
      tile.b += tile.b_lines * CHUNK_PIECES;
      fetched++;
      if (PLANES > 1 && fetched % (int)p.chunks == 0) {  // the operand of signs begins again
        if (PLANES_OF_B) tile.a -= p.chunks * tile.a_lines * CHUNK_PIECES;
        else tile.b -= p.chunks * tile.b_lines * CHUNK_PIECES;
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // an empty group keeps the count right
  };

  // The line and the piece that this lane addresses for ldmatrix: 16 lines of a by two pieces, or
  // two pieces of 16 lines of b.
  const int a_line = warp_m + (lane & 15), a_piece = lane >> 4;
  const int b_line = warp_n + (lane & 7) + (lane >> 4) * 8, b_piece = (lane >> 3) & 1;

  terms.fill(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
  int acc[BLOCKS_M][4 * BLOCKS_N] = {};
  for (int i = 0; i < STAGES - 1; i++) fetch();
  for (int chunk = 0; chunk < chunks; chunk++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();  // the chunk has arrived, and all warps have left the slot that is filled next
    fetch();
    const u32 slot = slots + chunk % STAGES * SLOT_BYTES;
#pragma unroll
    for (int i = 0; i < BLOCKS_M; i++) double_at_plane(p, chunk, acc[i]);
#pragma unroll
    for (int step = 0; step < CHUNK_BITS / 256; step++) {
      u32 a[BLOCKS_M][4], b[BLOCKS_N][2];
#pragma unroll
      for (int i = 0; i < BLOCKS_M; i++)
        load_matrices(a[i], slot + (a_line + 16 * i) * CHUNK_BYTES +
                                16 * swizzled_piece(a_line, 2 * step + a_piece));
#pragma unroll
      for (int j = 0; j < BLOCKS_N; j += 2)
        load_matrices(b[j], slot + A_BYTES + (b_line + 8 * j) * CHUNK_BYTES +
                                16 * swizzled_piece(b_line, 2 * step + b_piece));
#pragma unroll
      for (int i = 0; i < BLOCKS_M; i++)
#pragma unroll
        for (int j = 0; j < BLOCKS_N; j++) multiply_16x8(acc[i] + 4 * j, a[i], b[j]);
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  const Results<TILE_M, TILE_N> results(p, terms, tile.item, tile.m, tile.n);
  results.store_all(warp_m, 16, warp_n, acc);
#if OUTPUT == OUTPUT_PACKED
  fill_chunk<TILE_M, TILE_N>(p, tile.item, tile.m, tile.n, threadIdx.x, THREADS);
#endif
}
