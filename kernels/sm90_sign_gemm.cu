// Signs, of which one operand has only the bits, times a bfloat16 matrix, on Hopper's tensor cores: the
// two products of the backward pass of a binary layer.
//
//     RESULT_TRANSPOSED  gradient of the inputs: weights (M inputs x K units) by the products' gradient
//                        (N images x K), stored as N x M
//     RESULT_UPDATE      gradient of the weights: inputs (K images x M) by the products' gradient
//                        (K x N units); it is not stored: the weights are updated by it
//
// The signs are those that the forward product reads, packed across K here: a word holds 32 of the M
// results' rows at one k. Warps make bfloat16 operands of them in registers, 32 rows each, where a shift
// and a byte permutation put two bits where signs belong. So signs take a sixteenth of the memory
// traffic, and nobody unpacks them beforehand.
//
// One warp keeps STAGES slots of shared memory filled with 64 elements of K, the matrix by the copy engine
// and the signs by copies of its own. Two warpgroups multiply, 128 rows x 128 columns each, and leave a
// finished tile, rounded to bfloat16, in shared memory. From there seven warps store it, or update the
// weights, while the next tile is multiplied: reading three arrays and writing them takes the memory
// a third of the time that a tile of K = 8192 takes the tensor cores.
//
// Shared memory: slots; barriers; a tile of results.
//
// What bounds it: the tensor cores, 256 clocks for 16 of K; the L2 cache has to bring 18 bytes a clock.
//
// The translation unit sets RESULT, and PENALTY and WRITE_GRADIENT (adam.cuh).

#define RESULT_TRANSPOSED 0
#define RESULT_UPDATE 1

#define REAL bfloat16_bits
#define BLOCK_WARPS 16
#define VECTOR 4
#define NORM 0
#define DROP 0
#define PRODUCT float
#include "adam.cuh"
#include "wgmma.cuh"

constexpr int TILE_M = 256, TILE_N = 128, DEPTH = 64, STAGES = 8;
constexpr int CONSUMER_WARPS = 8, WRITERS = 7;
constexpr int MATRIX_BYTES = TILE_N * DEPTH * 2, SIGN_WORDS = TILE_M / 32;
constexpr bool ACROSS = RESULT == RESULT_UPDATE;  // the matrix's neighbours are columns, not elements of K
constexpr int BOX_BYTES = 64 * DEPTH * 2;         // of 64 columns

// A tile of results: rows of the array that is written, apart so far that eight are in different banks.
constexpr int RESULT_ROWS = ACROSS ? TILE_M : TILE_N, RESULT_COLS = ACROSS ? TILE_N : TILE_M;
constexpr int PITCH = RESULT_COLS + 8;

// Registers of a thread by role; see sm90_xnor_gemm.cu.
constexpr int WRITER_REGISTERS = 80, CONSUMER_REGISTERS = 176;
static_assert(WRITER_REGISTERS + CONSUMER_REGISTERS <= 65536 / THREADS / 8 * 8 * 2,
              "the roles, two warpgroups each, share the block's registers");

// Rows of a tile that a warp updates in turn, a nibble of the packed signs; and those whose weights are
// loaded together.
#ifndef TOG
#define TOG 2
#endif
constexpr int NIBBLE = 4, GROUPS = TILE_M / NIBBLE, TOGETHER = TOG;

struct SignProduct {
  const uint4* words;  // of K lines of M signs
  bfloat16_bits* out;  // RESULT_TRANSPOSED: N x M
  i64 m, n, k;
};

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Shared {
  unsigned char matrix[STAGES][MATRIX_BYTES];
  u32 signs[STAGES][DEPTH][SIGN_WORDS];
  bfloat16_bits results[RESULT_ROWS][PITCH];
#if RESULT == RESULT_UPDATE
  unsigned char nibbles[GROUPS][TILE_N];  // signs of a group's rows: after, and before
#endif
  u64 full[STAGES], empty[STAGES], results_full, results_empty;
};

// Tiles one after the other, those of the same columns first: they read the same part of the matrix, and the
// signs are small.
struct Tiles {
  u32 rows, count;
  __device__ __forceinline__ explicit Tiles(const SignProduct& p)
      : rows(((u32)p.m + TILE_M - 1) / TILE_M),
        count(rows * (((u32)p.n + TILE_N - 1) / TILE_N)) {}
  __device__ __forceinline__ int m(u32 tile) const { return (int)(tile % rows) * TILE_M; }
  __device__ __forceinline__ int n(u32 tile) const { return (int)(tile / rows) * TILE_N; }
};

// Where a line of 16 stands in a slot: lines that the four lanes of a row read together are neighbours.
__device__ __forceinline__ int place_of(int line) {
  return (line & ~15) | (line >> 1 & 3) | (line & 1) << 2 | (line & 8);
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
    const int piece = m % CHUNK_BITS / 128;  // of a line, the first of two
    for (int k = 0; k < (int)p.k; k += DEPTH) {
      const u32 full = shared_address(&shared.full[turn.slot]);
      const u32 matrix = shared_address(shared.matrix[turn.slot]);
      const u32 signs = shared_address(shared.signs[turn.slot]);
      barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
      if (lane == 0) {
        barrier_expect(full, MATRIX_BYTES);
        if constexpr (ACROSS) {
          tensor_load(matrix, &map, n, k, full);
          tensor_load(matrix + BOX_BYTES, &map, n + 64, k, full);
        } else {
          tensor_load(matrix, &map, k, n, full);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < DEPTH * 2 / 32; i++) {
        const int position = i * 16 + (lane >> 1), half = lane & 1;
        const u32 stored = (u32)(k + position);
        const uint4* from =
            chunk + (i64)min(stored, lines - 1) * CHUNK_PIECES + swizzled_piece(stored, piece + half);
        copy_or_zero(signs + (place_of(line_at(position)) * SIGN_WORDS + half * 4) * 4, from,
                     stored < lines);
      }
      barrier_arrive_with_copies(full);
      turn.next();
    }
  }
}

// Two signs as bfloat16 +1 or -1: those that stand in the top bit of byte BYTE of each word.
template <int BYTE> __device__ __forceinline__ u32 two_signs(u32 first, u32 second) {
  return (__byte_perm(first, second, 0x4400 + 0x1111 * BYTE) & 0x80008000u) ^ 0xbf80bf80u;
}

// The words of 16 elements of K for this warp's 32 rows: a thread's elements 2t, 2t + 1, 2t + 8, 2t + 9.
struct Words {
  u32 at[4];
  __device__ __forceinline__ void load(const u32* from) {
#pragma unroll
    for (int i = 0; i < 4; i++) at[i] = from[i * 4 * SIGN_WORDS];
  }
  __device__ __forceinline__ void shift(int by) {
#pragma unroll
    for (int i = 0; i < 4; i++) at[i] <<= by;
  }
};

// The operand of the warp's first (HALF 0) or last (1) 16 rows.
template <int HALF> __device__ __forceinline__ void make_operand(u32 (&a)[4], const Words& words) {
  const u32(&w)[4] = words.at;
  a[0] = two_signs<2 * HALF>(w[0], w[1]), a[1] = two_signs<2 * HALF + 1>(w[0], w[1]);
  a[2] = two_signs<2 * HALF>(w[2], w[3]), a[3] = two_signs<2 * HALF + 1>(w[2], w[3]);
}

__device__ __forceinline__ u32 two_rounded(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// A consumer's way through the slots. It has two instructions under way, the operands of a third in
// registers, and makes those of a fourth: the tensor cores never wait for it.
struct Consumer {
  static constexpr int COUNT = 2 * DEPTH / 16;  // instructions of a slot
  Shared& shared;
  const int warp, lane;
  Ring<STAGES> turn;  // of the slot whose words are loaded
  const u32* signs;   // this thread's, there
  Words loaded, words;
  u32 operands[4][4];
  float acc[2][64];

  __device__ __forceinline__ Consumer(Shared& shared, int warp)
      : shared(shared), warp(warp), lane(threadIdx.x & 31) {}

  // Wait for the slot whose turn it is.
  __device__ __forceinline__ void enter() {
    barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
    signs = &shared.signs[turn.slot][lane & 3][warp];
  }
  __device__ __forceinline__ void load(int step) { loaded.load(signs + step * 16 * SIGN_WORDS); }
  // Make the operand of instruction I of a slot.
  template <int I> __device__ __forceinline__ void make() {
    if constexpr (I % 2 == 0) {
      words = loaded;
      words.shift(7 - (lane >> 2));
    }
    make_operand<I % 2>(operands[I % 4], words);
  }
  __device__ __forceinline__ void release(int slot) {
    if (lane == 0) barrier_arrive(shared_address(&shared.empty[slot]));
  }

  // Begin a tile.
  __device__ __forceinline__ void begin() {
    enter();
    load(0);
    make<0>();
    make<1>();
    load(1);
  }

  // Start instruction I of a slot, and make what comes two later ready; of the tile's LAST slot nothing.
  template <int I, bool LAST>
  __device__ __forceinline__ void step(u64 b, int slot, int before, int k) {
    wgmma_wait<1>();
    if (I == 1 && before >= 0) release(before);
    wgmma_fence();
    wgmma_bf16_128<ACROSS>(acc[I % 2], operands[I % 4], b + I / 2 * (ACROSS ? 128 : 2), k | I / 2);
    wgmma_commit();
    constexpr int NEXT = I + 2;
    if constexpr (NEXT < COUNT || !LAST) {
      make<NEXT % COUNT>();
      if constexpr (I % 2 == 1) {
        constexpr int STEP = (NEXT + 1) / 2;
        if constexpr (STEP == DEPTH / 16 && !LAST) {
          turn.next();
          enter();
        }
        if constexpr (STEP < DEPTH / 16 || !LAST) load(STEP % (DEPTH / 16));
      }
    }
    if constexpr (I + 1 < COUNT) step<I + 1, LAST>(b, slot, before, k);
  }

  // Multiply a tile.
  __device__ __forceinline__ void multiply(int depth) {
    begin();
    int before = -1, k = 0;
    for (; k + DEPTH < depth; k += DEPTH) {
      const int slot = turn.slot;
      step<0, false>(descriptor(slot), slot, before, k);
      before = slot;
    }
    step<0, true>(descriptor(turn.slot), turn.slot, before, k);
    wgmma_wait<0>();
    release(turn.slot);
    turn.next();
  }
  __device__ __forceinline__ u64 descriptor(int slot) const {
    const u32 matrix = shared_address(shared.matrix[slot]);
    return ACROSS ? operand_descriptor_across(matrix, BOX_BYTES) : operand_descriptor(matrix);
  }
};

// Multiply all tiles. For the consumers; `warp` counts theirs.
__device__ __forceinline__ void consume(const SignProduct& p, Shared& shared, int warp) {
  const Tiles tiles(p);
  const int lane = threadIdx.x & 31;
  Consumer consumer(shared, warp);
  int parity = 1;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    consumer.multiply((int)p.k);
    // To shared memory, once the tile before has been written from there.
    barrier_wait(shared_address(&shared.results_empty), parity);
    parity ^= 1;
#pragma unroll
    for (int block = 0; block < 2; block++) {
      const int m = warp * 32 + block * 16 + (lane & 8), n = lane >> 4 << 3;
      const u32 to = ACROSS ? shared_address(&shared.results[m + (lane & 7)][n])
                            : shared_address(&shared.results[n + (lane & 7)][m]);
#pragma unroll
      for (int i = 0; i < TILE_N / 16; i++) {
        const float* v = consumer.acc[block] + 8 * i;
        const u32 rounded[4] = {two_rounded(v[0], v[1]), two_rounded(v[2], v[3]),
                                two_rounded(v[4], v[5]), two_rounded(v[6], v[7])};
        store_blocks<!ACROSS>(to + i * 16 * (ACROSS ? 1 : PITCH) * 2, rounded);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.results_full));
  }
}

#if RESULT == RESULT_TRANSPOSED
// Store a tile of results. For the writers, of which this is number `writer`.
__device__ __forceinline__ void store_tile(const SignProduct& p, const Shared& shared, int m, int n,
                                           int writer) {
  const int col = (threadIdx.x & 31) * 8;
  if (m + col >= (int)p.m) return;
  bfloat16_bits* to = p.out + n * p.m + m + col;
#pragma unroll 4
  for (int row = writer; row < min(TILE_N, (int)p.n - n); row += WRITERS)
    *(uint4*)(to + row * p.m) = *(const uint4*)&shared.results[row][col];
}
#else
// Update the weights by a tile of gradients; return what it adds to the penalty.
__device__ __forceinline__ float update_tile(const Parameter& p, const Adam& move, Shared& shared, int m,
                                             int n, int writer) {
  const int lane = threadIdx.x & 31, col = n + lane * 4;
  const bool has_cols = col < (int)p.cols;
  float sum = 0;
#pragma unroll 1
  for (int group = writer; group < GROUPS; group += WRITERS) {
    u32 signs[4] = {};
#pragma unroll 1
    for (int skip = 0; skip < NIBBLE; skip += TOGETHER) {
      const i64 row = m + group * NIBBLE + skip;
      if (!has_cols || row >= p.rows) break;
      float w[TOGETHER][4], mean[TOGETHER][4], square[TOGETHER][4];
#pragma unroll
      for (int r = 0; r < TOGETHER; r++) {
        const i64 at = min(row + r, p.rows - 1) * p.cols + col;
        load<4>(p.weight + at, w[r]);
        load<4>(p.mean + at, mean[r]);
        load<4>(p.square + at, square[r]);
      }
#pragma unroll
      for (int r = 0; r < TOGETHER; r++) {
        if (row + r >= p.rows) break;
        float gradient[4];
        load<4>(&shared.results[group * NIBBLE + skip + r][lane * 4], gradient);
        u32 changes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          changes[i] = (u32)nonnegative(w[r][i]) << 4;
          move(w[r][i], gradient[i], mean[r][i], square[r][i], true, sum);
          changes[i] |= (u32)nonnegative(w[r][i]);
          signs[i] |= changes[i] << (skip + r);
        }
        const i64 at = (row + r) * p.cols + col;
        store<4>(p.weight + at, w[r]);
        store<4>(p.mean + at, mean[r]);
        store<4>(p.square + at, square[r]);
#if WRITE_GRADIENT
        store<4>(p.left + at, gradient);
#endif
      }
    }
    *(u32*)&shared.nibbles[group][lane * 4] =
        signs[0] | signs[1] << 8 | signs[2] << 16 | signs[3] << 24;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(WRITERS * 32) : "memory");
  for (int i = writer * 32 + lane; i < SIGN_WORDS * TILE_N; i += WRITERS * 32) {
    const int word = i / TILE_N, at = i % TILE_N;
    u32 after = 0, before = 0;
#pragma unroll
    for (int group = 0; group < 8; group++) {
      const u32 both = shared.nibbles[word * 8 + group][at];
      after |= (both & 15) << (4 * group);
      before |= (both >> 4) << (4 * group);
    }
    if (n + at < (int)p.cols) pack_column(p, n + at, m / 32 + word, after, before);
  }
  return sum;
}
#endif

// Set up the barriers, and send each warp to its role; `write(tile's m, n, number, writer)`.
template <typename Write>
__device__ __forceinline__ void run(const SignProduct& p, const TensorMap& map, const Write& write) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *(Shared*)raw;
  const int warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&shared.full[i]), 1 + 32);  // who expects the bytes, and copies
      barrier_init(shared_address(&shared.empty[i]), CONSUMER_WARPS);
    }
    barrier_init(shared_address(&shared.results_full), CONSUMER_WARPS);
    barrier_init(shared_address(&shared.results_empty), WRITERS);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= 4 && warp < 4 + CONSUMER_WARPS) {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, shared, warp - 4);
    return;
  }
  give_registers<WRITER_REGISTERS>();
  if (warp == 0) {
    produce(p, map, shared);
    return;
  }
  const Tiles tiles(p);
  const int writer = warp < 4 ? warp - 1 : warp - 1 - CONSUMER_WARPS;
  int parity = 0;
  for (u32 tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    barrier_wait(shared_address(&shared.results_full), parity);
    parity ^= 1;
    write(shared, tiles.m(tile), tiles.n(tile), tile, writer);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared.results_empty));
  }
}

#if RESULT == RESULT_TRANSPOSED
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map) {
  run(p, map, [&](const Shared& shared, int m, int n, u32, int writer) {
    store_tile(p, shared, m, n, writer);
  });
}
#else
// Of the penalty each writer leaves its part in `partials`, from `earlier` on.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sign_gemm(const __grid_constant__ SignProduct p, const __grid_constant__ TensorMap map,
              const __grid_constant__ Parameter parameter, const Rates* __restrict__ rates, i64 ring,
              const i64* step, float gain_mean, float gain_square, float* partials, i64 earlier) {
  const Adam move(parameter, rates[*step % ring], gain_mean, gain_square);
  run(p, map, [&](Shared& shared, int m, int n, u32 tile, int writer) {
    const float sum = update_tile(parameter, move, shared, m, n, writer);
#if PENALTY != PENALTY_NONE
    const float total = sum_of_warp(sum);
    if ((threadIdx.x & 31) == 0) partials[earlier + tile * WRITERS + writer] = total;
#endif
  });
}
#endif
