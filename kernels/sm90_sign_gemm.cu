// Packed signs times a bfloat16 matrix, on Hopper's tensor cores: the two products of the backward pass
// of a binary layer.
//
//     RESULT_TRANSPOSED  gradient of the inputs: weights (M inputs x K units) by the products' gradient
//                        (N images x K), stored as N x M; with SUMS, also the sums over images that batch
//                        norm of the layer below needs in its backward pass (tile_sums.cuh)
//     RESULT_UPDATE      gradient of the weights: inputs (K images x M) by the products' gradient
//                        (K x N units); it is not stored, but used to update the weights
//     RESULT_GRADIENT    the same gradient, stored as M x N, for several ranks that add theirs up
//     RESULT_PARTS       the same for layers with few tiles and many images: sums over some of K each, stored in
//                        float as parts x M x N
//
// The signs are those that the forward product reads, packed across K here: a word holds 32 of the M
// results' rows at one k. Warps convert them to bfloat16 operands in registers, 16 rows each, where a shift
// and a byte permutation move two bits to the sign positions. So signs take a sixteenth of the memory
// traffic, and need not be unpacked beforehand.
//
// One warp keeps STAGES slots of shared memory filled with 64 elements of K, the matrix by the copy engine
// and the signs by its own copies. Two warpgroups multiply, 64 rows x 256 columns each, and leave a
// finished tile, rounded to bfloat16, in shared memory. From there three warps store it, or update the
// weights, while the next tile is multiplied: reading and writing three arrays takes two fifths of the
// time that the tensor cores need for a tile of K = 8192. Parts, of which a block has one, are stored by the
// warpgroups.
//
// Shared memory: slots of the matrix and of signs; a tile of results, and the signs of updated weights;
// barriers.
//
// What bounds it: the tensor cores, 256 clocks per 16 of K; the L2 cache must deliver 33 bytes per clock.
//
// The translation unit sets RESULT, and PENALTY and WRITE_GRADIENT (adam.cuh); it may set SUMS to 1, and then
// sets the macros of tile_sums.cuh, too.

#define RESULT_TRANSPOSED 0
#define RESULT_UPDATE 1
#define RESULT_GRADIENT 2
#define RESULT_PARTS 3

#define REAL bfloat16_bits
#define BLOCK_WARPS 12
#ifndef SUMS
#define SUMS 0
#endif
#include "tile_update.cuh"
#include "wgmma.cuh"
#if SUMS
#include "tile_sums.cuh"
#endif

constexpr int TILE_M = 128, TILE_N = 256, DEPTH = 64, STAGES = 4;
constexpr int CONSUMER_WARPS = 8, WRITERS = 3;
constexpr int MATRIX_BYTES = TILE_N * DEPTH * 2, SIGN_WORDS = TILE_M / 32;
static_assert(TILE_M == 128, "of a line of signs a tile has one piece of 16 bytes");
constexpr bool IN_PARTS = RESULT == RESULT_PARTS;
constexpr bool ACROSS = RESULT != RESULT_TRANSPOSED;  // the matrix's neighbors are columns, not elements of K
constexpr int BOX_BYTES = 64 * DEPTH * 2;         // of 64 columns

// A tile of results: rows of the output array, padded so that eight are in different banks.
constexpr int RESULT_ROWS = ACROSS ? TILE_M : TILE_N, RESULT_COLS = ACROSS ? TILE_N : TILE_M;
constexpr int PITCH = RESULT_COLS + 8;

// Registers of a thread by role; see sm90_xnor_gemm.cu.
constexpr int WRITER_REGISTERS = 152, CONSUMER_REGISTERS = 176;
static_assert(WRITER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * (65536 / THREADS / 8 * 8),
              "the roles share the block's registers");

struct SignProduct {
  const uint4* words;  // of K lines of M signs
  void* out;  // RESULT_TRANSPOSED: N x M, RESULT_GRADIENT: M x N, bfloat16; RESULT_PARTS: see above
  i64 m, n, k;
  i64 parts;  // of K; 1 unless RESULT_PARTS
};

struct Shared {
  unsigned char matrix[STAGES][MATRIX_BYTES];
  u32 signs[STAGES][SIGN_WORDS][DEPTH];
#if RESULT != RESULT_PARTS
  bfloat16_bits results[RESULT_ROWS][PITCH];
#endif
#if RESULT == RESULT_UPDATE
  unsigned char signs_after[TILE_M / TOGETHER][TILE_N];
#elif SUMS
  float sums[WRITERS][2 * TILE_M];
#endif
  u64 full[STAGES], empty[STAGES], results_full, results_empty;
#if SUMS
  u32 is_last;
#endif
};

// Tiles in order, those of the same columns first: they read the same part of the matrix, and the signs
// are small. All of one part of K precede those of the next.
struct Tiles {
  u32 rows, of_part, parts, count, slots;
  __device__ __forceinline__ explicit Tiles(const SignProduct& p)
      : rows(((u32)p.m + TILE_M - 1) / TILE_M),
        of_part(rows * (((u32)p.n + TILE_N - 1) / TILE_N)),
        parts(IN_PARTS ? (u32)p.parts : 1),
        count(of_part * parts),
        slots(((u32)p.k + DEPTH - 1) / DEPTH) {}
  __device__ __forceinline__ u32 part(u32 tile) const { return IN_PARTS ? tile / of_part : 0; }
  __device__ __forceinline__ u32 within(u32 tile) const { return IN_PARTS ? tile % of_part : tile; }
  __device__ __forceinline__ int m(u32 tile) const { return (int)(within(tile) % rows) * TILE_M; }
  __device__ __forceinline__ int n(u32 tile) const { return (int)(within(tile) / rows) * TILE_N; }
  // Elements of K, in whole slots: the last one may reach beyond K.
  __device__ __forceinline__ int first_k(u32 tile) const { return (int)(part(tile) * slots / parts) * DEPTH; }
  __device__ __forceinline__ int end_k(u32 tile) const {
    return (int)((part(tile) + 1) * slots / parts) * DEPTH;
  }
};

// Position of a line among the words of a slot: of each 16, a thread reads four, 2t, 2t + 1, 2t + 8 and
// 2t + 9, as neighbors.
__device__ __forceinline__ int place_of(int line) {
  return (line & ~15) | (line & 6) << 1 | (line & 8) >> 2 | (line & 1);
}

// Fill slots. For one warp.
__device__ __forceinline__ void produce(const SignProduct& p, const TensorMap& map, Shared& shared) {
  const Tiles tiles(p);
  const int lane = threadIdx.x & 31;
  const u32 lines = (u32)padded_lines(p.k);
  Ring<STAGES> turn;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int m = tiles.m(tile), n = tiles.n(tile);
    const uint4* chunk = p.words + (i64)(m / CHUNK_BITS) * lines * CHUNK_PIECES;
    const int piece = m % CHUNK_BITS / 128;  // of a line
    const int end = tiles.end_k(tile);
    for (int k = tiles.first_k(tile); k < end; k += DEPTH) {
      const u32 full = shared_address(&shared.full[turn.slot]);
      const u32 matrix = shared_address(shared.matrix[turn.slot]);
      const u32 signs = shared_address(shared.signs[turn.slot]);
      barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
      if (lane == 0) {
        barrier_expect(full, MATRIX_BYTES);
        if constexpr (ACROSS) {
#pragma unroll
          for (int box = 0; box < TILE_N / 64; box++)
            tensor_load(matrix + box * BOX_BYTES, &map, n + 64 * box, k, full);
        } else {
          tensor_load(matrix, &map, k, n, full);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < DEPTH / 32; i++) {
        const int position = i * 32 + lane;
        const u32 stored = (u32)(k + position);
        const u32* from = (const u32*)(chunk + (i64)min(stored, lines - 1) * CHUNK_PIECES +
                                       swizzled_piece(stored, piece));
        const u32 to = signs + place_of(line_at(position)) * 4;
#pragma unroll
        for (int word = 0; word < SIGN_WORDS; word++)
          copy_or_zero(to + word * DEPTH * 4, from + word, stored < lines);
      }
      barrier_arrive_with_copies(full);
      turn.next();
    }
  }
}

__device__ __forceinline__ u32 two_rounded(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// A consumer's pipeline through the slots. It has two instructions in flight, the operands of a third in
// registers, and prepares those of a fourth: the tensor cores never wait for it.
struct Consumer {
  static constexpr int STEPS = DEPTH / 16;  // instructions of a slot
  Shared& shared;
  const int warp, lane;
  const int turned;  // rotation of the words that puts a row's sign in the top bit of a byte
  Ring<STAGES> turn;  // of the slot whose words are loaded
  const uint4* signs;  // this thread's, there
  uint4 loaded;        // elements 2t, 2t + 1, 2t + 8, 2t + 9
  u32 operands[4][4];
  float acc[128];
  u32 mask;

  // This warp has one half of each word, and a thread one bit of each of its bytes.
  __device__ __forceinline__ Consumer(Shared& shared, int warp)
      : shared(shared), warp(warp), lane(threadIdx.x & 31), turned(7 - (lane >> 2) + (warp & 1) * 16) {
    asm volatile("mov.u32 %0, 0x80008000;" : "=r"(mask));  // kept in a register, not recomputed
  }

  // Wait for the current slot.
  __device__ __forceinline__ void enter() {
    barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
    signs = (const uint4*)shared.signs[turn.slot][warp / 2] + (lane & 3);
  }
  __device__ __forceinline__ void load(int step) { loaded = signs[step * 4]; }
  // Two signs as bfloat16 +1 or -1, from the top bit of byte BYTE of each word.
  template <int BYTE> __device__ __forceinline__ u32 two_signs(u32 first, u32 second) const {
    return (__byte_perm(first, second, 0x4400 + 0x1111 * BYTE) & mask) ^ 0xbf80bf80u;
  }
  // Build the operand of a slot's instruction from the loaded words.
  __device__ __forceinline__ void make(int step) {
    u32(&a)[4] = operands[step];
    const u32 x = __funnelshift_l(loaded.x, loaded.x, turned);
    const u32 y = __funnelshift_l(loaded.y, loaded.y, turned);
    const u32 z = __funnelshift_l(loaded.z, loaded.z, turned);
    const u32 w = __funnelshift_l(loaded.w, loaded.w, turned);
    a[0] = two_signs<0>(x, y), a[1] = two_signs<1>(x, y);
    a[2] = two_signs<0>(z, w), a[3] = two_signs<1>(z, w);
  }
  __device__ __forceinline__ void release(int slot) {
    barrier_arrive(shared_address(&shared.empty[slot]));
  }

  // Start instruction STEP of a slot and build the operand of the one after the next, unless this is the
  // tile's LAST slot and there is none; then continue with the next.
  template <int STEP, bool LAST>
  __device__ __forceinline__ void start(u64 b, int before, int k) {
    wgmma_wait<1>();
    if (STEP == 1 && before >= 0) release(before);
    wgmma_fence();
    wgmma_bf16_256<ACROSS>(acc, operands[STEP], b + STEP * (ACROSS ? 128 : 2), k | STEP);
    wgmma_commit();
    if constexpr (STEP + 2 < STEPS || !LAST) make((STEP + 2) % STEPS);
    if constexpr (STEP + 3 == STEPS && !LAST) {
      turn.next();
      enter();
    }
    if constexpr (STEP + 3 < STEPS || !LAST) load((STEP + 3) % STEPS);
    if constexpr (STEP + 1 < STEPS) start<STEP + 1, LAST>(b, before, k);
  }

  // Multiply a tile.
  __device__ __forceinline__ void multiply(int depth) {
    enter();
    load(0), make(0);
    load(1), make(1);
    load(2);
    int before = -1, k = 0;
    for (; k + DEPTH < depth; k += DEPTH) {
      const int slot = turn.slot;
      start<0, false>(descriptor(slot), before, k);
      before = slot;
    }
    start<0, true>(descriptor(turn.slot), before, k);
    wgmma_wait<0>();
    release(turn.slot);
    turn.next();
  }
  __device__ __forceinline__ u64 descriptor(int slot) const {
    const u32 matrix = shared_address(shared.matrix[slot]);
    return ACROSS ? operand_descriptor_across(matrix, BOX_BYTES) : operand_descriptor(matrix);
  }
};

#if RESULT == RESULT_PARTS
// Store a part of a tile: of each 8 columns a lane has two, in rows 8 apart. For the consumers.
__device__ __forceinline__ void store_part(const SignProduct& p, const Tiles& tiles, u32 tile,
                                           const float (&acc)[128], int warp) {
  const int lane = threadIdx.x & 31;
  const int row = tiles.m(tile) + warp * 16 + (lane >> 2), col = tiles.n(tile) + (lane & 3) * 2;
  float* to = (float*)p.out + ((i64)tiles.part(tile) * p.m + row) * p.n + col;
#pragma unroll
  for (int i = 0; i < TILE_N / 8; i++) {
    if (col + 8 * i >= (int)p.n) break;
    if (row < (int)p.m) *(float2*)(to + 8 * i) = make_float2(acc[4 * i], acc[4 * i + 1]);
    if (row + 8 < (int)p.m) *(float2*)(to + 8 * p.n + 8 * i) = make_float2(acc[4 * i + 2], acc[4 * i + 3]);
  }
}
#endif

// Multiply all tiles. For the consumers; `warp` counts theirs.
__device__ __forceinline__ void consume(const SignProduct& p, Shared& shared, int warp) {
  const Tiles tiles(p);
  const int lane = threadIdx.x & 31;
  Consumer consumer(shared, warp);
  int parity = 1;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    consumer.multiply(tiles.end_k(tile) - tiles.first_k(tile));
#if RESULT == RESULT_PARTS
    store_part(p, tiles, tile, consumer.acc, warp);
#else
    // To shared memory, once the previous tile has been written from there.
    barrier_wait(shared_address(&shared.results_empty), parity);
    parity ^= 1;
    const int m = warp * 16 + (lane & 8), n = lane >> 4 << 3;
    const u32 to = ACROSS ? shared_address(&shared.results[m + (lane & 7)][n])
                          : shared_address(&shared.results[n + (lane & 7)][m]);
#pragma unroll
    for (int i = 0; i < TILE_N / 16; i++) {
      const float* v = consumer.acc + 8 * i;
      const u32 rounded[4] = {two_rounded(v[0], v[1]), two_rounded(v[2], v[3]),
                              two_rounded(v[4], v[5]), two_rounded(v[6], v[7])};
      store_blocks<!ACROSS>(to + i * 16 * (ACROSS ? 1 : PITCH) * 2, rounded);
    }
    barrier_arrive(shared_address(&shared.results_full));
#endif
  }
}

#if (RESULT == RESULT_TRANSPOSED || RESULT == RESULT_GRADIENT) && !SUMS
// Store a tile of results. For the writers, of which this is number `writer`.
__device__ __forceinline__ void store_tile(const SignProduct& p, const Shared& shared, int m, int n,
                                           int writer) {
  constexpr int LANES_OF_ROW = RESULT_COLS / 8, AT_ONCE = 32 / LANES_OF_ROW;
  const int lane = threadIdx.x & 31, col = lane % LANES_OF_ROW * 8;
  const i64 width = ACROSS ? p.n : p.m, height = ACROSS ? p.m : p.n;
  const int first_row = ACROSS ? m : n, first_col = ACROSS ? n : m;
  if (first_col + col >= (int)width) return;
  bfloat16_bits* to = (bfloat16_bits*)p.out + first_row * width + first_col + col;
  const int rows = min(RESULT_ROWS, (int)height - first_row);
#pragma unroll 4
  for (int row = writer * AT_ONCE + lane / LANES_OF_ROW; row < rows; row += WRITERS * AT_ONCE)
    *(uint4*)(to + row * width) = *(const uint4*)&shared.results[row][col];
}
#endif

// Set up the barriers, and send each warp to its role; `write(tile's m, n,
// number, writer, wait, release)` waits for the results, and releases them when they have been read.
template <typename Write>
__device__ __forceinline__ void run(const SignProduct& p, const TensorMap& map, const Write& write) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *(Shared*)raw;
  const int warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    // Each lane arrives for its own writes and reads.
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&shared.full[i]), 1 + 32);  // for the matrix; a lane's copies
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
    produce(p, map, shared);
    return;
  }
  if (IN_PARTS) return;
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

#if SUMS
static_assert(RESULT == RESULT_TRANSPOSED && SUMMED_COLS == TILE_M, "a tile is a strip's");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map,
              const __grid_constant__ Layer layer, const __grid_constant__ NormSums to) {
  run(p, map, [&](Shared& shared, int m, int n, u32, int writer, const auto& wait, const auto& release) {
    sum_tile<WRITERS>(layer, to, (bfloat16_bits*)p.out, shared.results, shared.sums, shared.is_last, n, m, writer, wait,
                      release);
  });
}
#elif RESULT == RESULT_PARTS
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map) {
  run(p, map, [](auto&&...) {});
}
#elif RESULT != RESULT_UPDATE
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map) {
  run(p, map, [&](const Shared& shared, int m, int n, u32, int writer, const auto& wait, const auto& release) {
    wait();
    store_tile(p, shared, m, n, writer);
    release();
  });
}
#else
// Each writer stores its part of the penalty in `partials`, from `earlier` on.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map,
              const __grid_constant__ Parameter parameter, const Rates* __restrict__ rates, i64 ring,
              const i64* step, float gain_mean, float gain_square, float* partials, i64 earlier) {
  const Adam move(parameter, rates[*step % ring], gain_mean, gain_square);
  run(p, map, [&](Shared& shared, int m, int n, u32 tile, int writer, const auto& wait, const auto& release) {
    const float sum = update_tile<WRITERS>(parameter, move, shared.results, shared.signs_after, m, n, writer,
                                           wait, release);
#if PENALTY != PENALTY_NONE
    const float total = sum_of_warp(sum);
    if ((threadIdx.x & 31) == 0) partials[earlier + tile * WRITERS + writer] = total;
#endif
  });
}
#endif
