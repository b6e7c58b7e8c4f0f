// Packed signs times bit planes of a rounded gradient, on Hopper's 1-bit tensor cores: the two products of
// the backward pass of a binary layer.
//
//     RESULT_STORED  gradient of the inputs: the gradient's levels (M images x K units), scaled for each
//                    row, by weights (K x N inputs), stored as M x N
//     RESULT_UPDATE  gradient of the weights: inputs (M inputs x K images) by the gradient's levels (K x N
//                    units), scaled for each column; it is not stored, but used to update the weights
//
// Both operands are packed along K, and laid out as the tensor cores read them (layout.cuh). The chunks of
// the levels are those of all planes, the highest first; those of the signs are read again for each, and
// accumulators are doubled in between (product.cuh).
//
// One thread keeps STAGES slots of shared memory filled with 1024 bits of K. Two warpgroups multiply, 64
// rows x 256 columns each, and leave a finished tile, scaled and rounded to bfloat16, in shared memory.
// From there three warps store it, or update the weights, while the next tile is multiplied.
//
// Shared memory: slots; a tile of results, and the signs of updated weights; barriers.
//
// What bounds it: with few planes the memory, for an update moves 25 bytes for each weight; else the L2
// cache, which must deliver 48 bytes per clock.
//
// The translation unit sets RESULT and PLANES, and PENALTY and WRITE_GRADIENT (adam.cuh).

#define RESULT_STORED 0
#define RESULT_UPDATE 1

#define REAL bfloat16_bits
#define BLOCK_WARPS 12
#define PLANES_OF_B (RESULT == RESULT_UPDATE)
#include "product.cuh"
#include "tile_update.cuh"
#include "wgmma.cuh"

constexpr int TILE_M = 128, TILE_N = 256, STAGES = 3;
constexpr int CONSUMER_WARPS = 8, WRITERS = 3;
constexpr int A_BYTES = TILE_M * CHUNK_BYTES, B_BYTES = TILE_N * CHUNK_BYTES;
constexpr int PITCH = TILE_N + 8;

// Registers of a thread by role; see sm90_xnor_gemm.cu.
constexpr int WRITER_REGISTERS = 152, CONSUMER_REGISTERS = 176;
static_assert(WRITER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * (65536 / THREADS / 8 * 8),
              "the roles share the block's registers");

// Filled by cupybnn/backends/cuda/plane_gemm.py, field by field in this order.
struct PlaneProduct {
  const uint4* a;
  const uint4* b;
  const int* pop_a;
  const int* pop_b;
  const float* scale;  // of rows, or of columns
  bfloat16_bits* out;  // RESULT_STORED: M x N
  i64 m, n, k, chunks;
};

struct Shared {
  unsigned char slots[STAGES][A_BYTES + B_BYTES];
  bfloat16_bits results[TILE_M][PITCH];
#if RESULT == RESULT_UPDATE
  unsigned char signs_after[TILE_M / TOGETHER][TILE_N];
#endif
  u64 full[STAGES], empty[STAGES], results_full, results_empty;
};

// Tiles in order, those of the same columns first.
struct Tiles {
  u32 rows, count;
  __device__ __forceinline__ explicit Tiles(const PlaneProduct& p)
      : rows(((u32)p.m + TILE_M - 1) / TILE_M),
        count(rows * (((u32)p.n + TILE_N - 1) / TILE_N)) {}
  __device__ __forceinline__ int m(u32 tile) const { return (int)(tile % rows) * TILE_M; }
  __device__ __forceinline__ int n(u32 tile) const { return (int)(tile / rows) * TILE_N; }
};

// Fill slots. For one thread.
__device__ __forceinline__ void produce(const PlaneProduct& p, Shared& shared) {
  const Tiles tiles(p);
  const u32 a_lines = (u32)padded_lines(p.m), b_lines = (u32)padded_lines(p.n);
  Ring<STAGES> turn;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const u32 m = tiles.m(tile), n = tiles.n(tile);
    const u32 a_bytes = min(a_lines - m, (u32)TILE_M) * CHUNK_BYTES;
    const u32 b_bytes = min(b_lines - n, (u32)TILE_N) * CHUNK_BYTES;
    for (u32 plane = 0; plane < PLANES; plane++)
      for (u32 chunk = 0; chunk < (u32)p.chunks; chunk++) {
        const u32 through = plane * (u32)p.chunks + chunk;
        const uint4* a = p.a + ((u64)(PLANES_OF_B ? chunk : through) * a_lines + m) * CHUNK_PIECES;
        const uint4* b = p.b + ((u64)(PLANES_OF_B ? through : chunk) * b_lines + n) * CHUNK_PIECES;
        const u32 full = shared_address(&shared.full[turn.slot]);
        const u32 slot = shared_address(shared.slots[turn.slot]);
        barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
        barrier_expect(full, a_bytes + b_bytes);
        bulk_load(slot, a, a_bytes, full);
        bulk_load(slot + A_BYTES, b, b_bytes, full);
        turn.next();
      }
  }
}

__device__ __forceinline__ u32 two_rounded(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// Multiply the chunks of a plane into the accumulators of a warpgroup, which are kept if `more`.
__device__ __forceinline__ void multiply(int (&acc)[TILE_N / 2], Shared& shared, Ring<STAGES>& turn, int chunks,
                                         int group, int more) {
  int last = 0;
  for (int chunk = 0; chunk < chunks; chunk++) {
    barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
    const u32 slot = shared_address(shared.slots[turn.slot]);
    const u64 a = operand_descriptor(slot + group * 64 * CHUNK_BYTES);
    const u64 b = operand_descriptor(slot + A_BYTES);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < CHUNK_BITS / 256; step++)
      WgmmaB1<TILE_N>::run(acc, a + 2 * step, b + 2 * step, more | chunk | step);
    wgmma_commit();
    // The instructions before these have read their slot.
    wgmma_wait<1>();
    if (chunk) barrier_arrive(shared_address(&shared.empty[last]));
    last = turn.slot;
    turn.next();
  }
  wgmma_wait<0>();
  barrier_arrive(shared_address(&shared.empty[last]));
}

// Multiply all tiles. For the consumers; `warp` counts theirs.
__device__ __forceinline__ void consume(const PlaneProduct& p, Shared& shared, int warp) {
  const Tiles tiles(p);
  const int group = warp >> 2;
  Ring<STAGES> turn;
  int parity = 1;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    int acc[TILE_N / 2];
    multiply(acc, shared, turn, (int)p.chunks, group, 0);
#pragma unroll 1
    for (int plane = 1; plane < PLANES; plane++) {
#pragma unroll
      for (int i = 0; i < TILE_N / 2; i++) acc[i] += acc[i];
      multiply(acc, shared, turn, (int)p.chunks, group, 1);
    }
    // To shared memory, once the previous tile has been written from there. A lane has two rows, and four
    // neighboring columns of every 16 (results.cuh).
    barrier_wait(shared_address(&shared.results_empty), parity);
    parity ^= 1;
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // read again, to keep no derived values
    const int m = tiles.m(tile), n = tiles.n(tile);
    const int row = warp * 16 + line_at(lane >> 2), col = 4 * (lane & 3);
    int row_term[2];
    float row_scale[2];
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int at = min(m + row + 2 * below, (int)p.m - 1);
      row_term[below] = K_TERM * (int)p.k + A_TERM * __ldg(p.pop_a + at);
      row_scale[below] = PLANES_OF_B ? 1.0f : __ldg(p.scale + at);
    }
#pragma unroll
    for (int j = 0; j < TILE_N / 16; j++) {
      // Columns are a multiple of eight: four neighbors exist or not together.
      const int at = min(n + col + 16 * j, (int)p.n - 4);
      const int4 pops = __ldg((const int4*)(p.pop_b + at));
      const float4 scales = PLANES_OF_B ? __ldg((const float4*)(p.scale + at)) : make_float4(1, 1, 1, 1);
      const int pop[4] = {pops.x, pops.y, pops.z, pops.w};
      const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
      for (int below = 0; below < 2; below++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 sum = (u32)acc[8 * j + 4 * (i / 2) + 2 * below + i % 2];
          const int product = (int)((u32)row_term[below] + (u32)(B_TERM * pop[i]) + (u32)ACC_TERM * sum);
          v[i] = __fmul_rn(__int2float_rn(product), PLANES_OF_B ? scale[i] : row_scale[below]);
        }
        *(uint2*)&shared.results[row + 2 * below][col + 16 * j] =
            make_uint2(two_rounded(v[0], v[1]), two_rounded(v[2], v[3]));
      }
    }
    barrier_arrive(shared_address(&shared.results_full));
  }
}

#if RESULT == RESULT_STORED
// Store a tile of results, a row at a time. For the writers, of which this is number `writer`.
__device__ __forceinline__ void store_tile(const PlaneProduct& p, const Shared& shared, int m, int n,
                                           int writer) {
  const int col = (threadIdx.x & 31) * 8;
  if (n + col >= (int)p.n) return;
  bfloat16_bits* to = p.out + m * p.n + n + col;
  const int rows = min(TILE_M, (int)p.m - m);
#pragma unroll 4
  for (int row = writer; row < rows; row += WRITERS)
    *(uint4*)(to + row * p.n) = *(const uint4*)&shared.results[row][col];
}
#endif

// Set up the barriers, and send each warp to its role; `write(tile's m, n,
// number, writer, wait, release)` waits for the results, and releases them when they have been read.
template <typename Write>
__device__ __forceinline__ void run(const PlaneProduct& p, const Write& write) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *(Shared*)raw;
  const int warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    // Each lane arrives for its own writes and reads.
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), CONSUMER_WARPS * 32);
    }
    barrier_init(shared_address(&shared.results_full), CONSUMER_WARPS * 32);
    barrier_init(shared_address(&shared.results_empty), WRITERS * 32);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= 4) {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, shared, warp - 4);
    return;
  }
  give_registers<WRITER_REGISTERS>();
  if (warp == 0) {
    if (threadIdx.x == 0) produce(p, shared);
    return;
  }
  const Tiles tiles(p);
  int parity = 0;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    write(
        shared, tiles.m(tile), tiles.n(tile), tile, warp - 1,
        [&] { barrier_wait(shared_address(&shared.results_full), parity); },
        [&] { barrier_arrive(shared_address(&shared.results_empty)); });
    parity ^= 1;
  }
}

#if RESULT == RESULT_STORED
extern "C" __global__ void __launch_bounds__(THREADS, 1) plane_gemm(const __grid_constant__ PlaneProduct p) {
  run(p, [&](const Shared& shared, int m, int n, u32, int writer, const auto& wait, const auto& release) {
    wait();
    store_tile(p, shared, m, n, writer);
    release();
  });
}
#else
// Each writer stores its part of the penalty in `partials`, from `earlier` on.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    plane_gemm(const __grid_constant__ PlaneProduct p, const __grid_constant__ Parameter parameter,
               const Rates* __restrict__ rates, i64 ring, const i64* step, float gain_mean,
               float gain_square, float* partials, i64 earlier) {
  const Adam move(parameter, rates[*step % ring], gain_mean, gain_square);
  run(p, [&](Shared& shared, int m, int n, u32 tile, int writer, const auto& wait, const auto& release) {
    const float sum = update_tile<WRITERS>(parameter, move, shared.results, shared.signs_after, m, n, writer,
                                           wait, release);
#if PENALTY != PENALTY_NONE
    const float total = sum_of_warp(sum);
    if ((threadIdx.x & 31) == 0) partials[earlier + tile * WRITERS + writer] = total;
#endif
  });
}
#endif
