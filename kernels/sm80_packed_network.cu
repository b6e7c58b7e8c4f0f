// A whole packed network for a few rows, in one launch: all layers, one after the other.
//
// The blocks of a team compute a layer together, an item each: a tile of units for a group of rows.
// They wait for each other before the next layer, whose inputs go through device memory (the L2
// cache). A team is
//   CLUSTER 1   the whole grid, launched cooperatively (COOPERATIVE 1), so that all its blocks run at
//               a time; they count their arrivals in device memory, and the last one of a launch
//               leaves the count at zero;
//   CLUSTER > 1 a cluster (Hopper and later), whose barrier takes a fraction of that time. Each
//               cluster has ROWS rows of its own, and nothing to do with the others.
//
// Products of signs go through the tensor cores (mma.sync m16n8k256 b1 and.popc) with 16 units as
// the rows of a fragment and 8 of the batch as its columns: one lane reads whole 16-byte pieces of
// weights from memory, of lines as layout.cuh has them, and uses their words in four steps. Half of
// a tile's 32 units go to even warps, half to odd ones, which share the chunks of K. Real products
// are fused multiply-adds: a thread has four units of all rows of the group and each `slices`-th
// input. Its order of summation is the same whatever the batch, ROWS and CLUSTER are.
//
// Shared memory: inputs of the group, as bits or as HELD float32 at a time, transposed; then sums of
// each warp.
//
// What bounds it: for a row or a few, the time that a layer's first loads take, and the barriers;
// reading real weights of a wide network from L2; for more rows, multiply-adds of the real layers.
//
// The translation unit sets ROWS (8, 16 or 32), CLUSTER, COOPERATIVE, HELD (floats of inputs in shared
// memory), and PIXELS: 1 if inputs are bytes, which are multiplied by a factor, 0 if they are float32.

#include "hopper.cuh"

#if COOPERATIVE == (CLUSTER > 1)
#error "either a cluster or a cooperative grid is a team"
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr u32 ALL = 0xffffffffu;
constexpr int TILE = 32;  // units of a tile of bits: a word of the result

#define PRODUCT_REAL 0   // numbers by float32 weights
#define PRODUCT_SIGNS 1  // numbers by signs
#define PRODUCT_BITS 2   // signs by signs
#define STEP_MULTIPLY 0
#define STEP_ADD 1
#define STEP_RELU 2

// Filled by cupybnn/backends/cuda/packed_network.py, field by field in this order.
constexpr int MOST_LAYERS = 16;
constexpr int MOST_STEPS = 4;  // of a layer
struct NetworkLayer {
  const void* weight;     // REAL: float32, rows of `pitch`; SIGNS: lines are inputs; BITS: units
  const int* pops;        // BITS: popcounts of the units
  const void* threshold;  // of int32 for BITS, else float32; null: steps
  const unsigned char* flip;
  const float* by[MOST_STEPS];     // factors and summands of the steps
  i64 kinds, steps;       // STEP_* of each, four bits each from the lowest on; and how many
  i64 inputs, units, product;
  i64 pitch;              // REAL: floats of a row of weights, a multiple of 4
  i64 width;              // units of a tile: 32, or 4 for a real product of few units
};
struct Network {
  NetworkLayer layers[MOST_LAYERS];
  i64 count;              // of layers
  i64 word_pitch;         // words of a row of `bits`
  i64 number_pitch;       // floats of a row of `numbers`, a multiple of 4
  double factor;          // of pixels
  const void* x;          // (rows, inputs)
  float* out;             // (rows, classes)
  u32* bits;              // twice (rows, word_pitch)
  float* numbers;         // twice (rows, number_pitch)
  u32* arrived;           // CLUSTER 1: 0 between launches
  i64 rows;
};

struct Sums {
  union {
    float real[WARPS][ROWS][TILE];
    int bits[WARPS / 2][ROWS][TILE];
  };
  int ones[ROWS];
};
constexpr int INPUT_BYTES = HELD * 4;
static_assert(HELD / 32 % THREADS == 0, "a thread has the same inputs however many are held");

// What follows the product in a unit, without the threshold.
__device__ __forceinline__ float after_steps(const NetworkLayer& l, i64 unit, float v) {
#pragma unroll 1
  for (int i = 0; i < (int)l.steps; i++) {
    const int kind = (int)(l.kinds >> 4 * i) & 15;
    if (kind == STEP_RELU) v = v != v ? v : fmaxf(v, 0.0f);
    else if (kind == STEP_ADD) v = __fadd_rn(v, __ldg(l.by[i] + unit));
    else v = __fmul_rn(v, __ldg(l.by[i] + unit));
  }
  return v;
}

__device__ __forceinline__ void multiply_16x8(int* d, const u32* a, const u32* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Where a layer reads and writes.
struct Place {
  const Network& p;
  const NetworkLayer& l;
  int number;       // of the layer
  bool from_bits;   // whether its inputs are signs
  unsigned char* inputs;
  Sums& sums;

  __device__ __forceinline__ const u32* bits_in(i64 row) const {
    return p.bits + ((number & 1 ? 0 : p.rows) + row) * p.word_pitch;
  }
  __device__ __forceinline__ const float* numbers_in(i64 row) const {
    return p.numbers + ((number & 1 ? 0 : p.rows) + row) * p.number_pitch;
  }
  // Store the result of a unit, one of each lane of a warp; all lanes call it.
  template <typename T>
  __device__ __forceinline__ void store(i64 row, i64 unit, bool exists, T v, int lane) const {
    const i64 out_row = (number & 1 ? p.rows : 0) + row;
    if (l.threshold) {
      bool bit = false;
      if (exists) bit = (v >= __ldg((const T*)l.threshold + unit)) != (l.flip[unit] != 0);
      const u32 word = __ballot_sync(ALL, bit);
      if (lane == 0) p.bits[out_row * p.word_pitch + unit / 32] = word;
    } else if (exists) {
      const float result = after_steps(l, unit, (float)v);
      if (number + 1 == p.count) p.out[row * l.units + unit] = result;
      else p.numbers[out_row * p.number_pitch + unit] = result;
    }
  }
};

// A tile of 32 units for R rows of signs, of which `rows` exist.
template <int R>
__device__ __forceinline__ void multiply_bits(const Place& at, i64 tile, i64 row0, int rows) {
  const NetworkLayer& l = at.l;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int chunks = (int)((l.inputs + CHUNK_BITS - 1) / CHUNK_BITS);
  const int pieces = chunks * CHUNK_PIECES, words = (int)((l.inputs + 31) / 32);
  uint4* inputs = (uint4*)at.inputs;
  Sums& sums = at.sums;
  // Pieces of odd rows are turned by half a chunk: lanes of two rows then read different banks.
  for (int r = warp; r < R; r += WARPS) {
    const u32* from = at.bits_in(row0 + r);
    int ones = 0;
    for (int piece = lane; piece < pieces; piece += 32) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[i] = r < rows && 4 * piece + i < words ? __ldcg(from + 4 * piece + i) : 0;
      inputs[r * pieces + (piece ^ (r & 1) << 2)] = make_uint4(w[0], w[1], w[2], w[3]);
      ones += __popc(w[0]) + __popc(w[1]) + __popc(w[2]) + __popc(w[3]);
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) ones += __shfl_xor_sync(ALL, ones, apart);
    if (lane == 0) sums.ones[r] = ones;
  }
  __syncthreads();

  const i64 padded = padded_lines(l.units), first = tile * TILE + (warp & 1) * 16;
  int acc[R / 8][4] = {};
  if (first < padded) {
    const uint4* lines = (const uint4*)l.weight + (first + g) * CHUNK_PIECES + (q ^ g);
    for (int chunk = warp >> 1; chunk < chunks; chunk += WARPS / 2) {
      const uint4* from = lines + chunk * padded * CHUNK_PIECES;
      const int turned = 4 - 8 * ((q ^ g) >> 2);  // to the piece four further on, or back
      uint4 a[4] = {__ldg(from), __ldg(from + 8 * CHUNK_PIECES), __ldg(from + turned),
                    __ldg(from + 8 * CHUNK_PIECES + turned)};
#pragma unroll
      for (int n = 0; n < R / 8; n++) {
        const uint4* row = inputs + (8 * n + g) * pieces + chunk * CHUNK_PIECES;
        const uint4 b[2] = {row[q ^ (g & 1) << 2], row[(q + 4) ^ (g & 1) << 2]};
        const u32 steps[4][6] = {{a[0].x, a[1].x, a[2].x, a[3].x, b[0].x, b[1].x},
                                 {a[0].y, a[1].y, a[2].y, a[3].y, b[0].y, b[1].y},
                                 {a[0].z, a[1].z, a[2].z, a[3].z, b[0].z, b[1].z},
                                 {a[0].w, a[1].w, a[2].w, a[3].w, b[0].w, b[1].w}};
#pragma unroll
        for (int i = 0; i < 4; i++) multiply_16x8(acc[n], steps[i], steps[i] + 4);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < R / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int unit = (warp & 1) * 16 + line_at(g + (i >> 1) * 8);
      sums.bits[warp >> 1][8 * n + 2 * q + (i & 1)][unit] = acc[n][i];
    }
  __syncthreads();

  const i64 unit = tile * TILE + lane;
  const bool exists = unit < l.units;
  const int term = (int)l.inputs - (exists ? 2 * __ldg(l.pops + unit) : 0);
  for (int r = warp; r < rows; r += WARPS) {
    int both = 0;
#pragma unroll
    for (int i = 0; i < WARPS / 2; i++) both += sums.bits[i][r][lane];
    at.store(row0 + r, unit, exists, term - 2 * sums.ones[r] + 4 * both, lane);
  }
}

// Four neighboring inputs of a row, from input k on; those that do not exist are 0.
__device__ __forceinline__ void read_inputs(const Place& at, i64 row, i64 k, float (&v)[4]) {
  const i64 inputs = at.l.inputs;
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = 0;
  if (k >= inputs) return;
  const bool all = k + 4 <= inputs;
  if (at.number > 0) {
    if (at.from_bits) {
      const u32 four = __ldcg(at.bits_in(row) + (k >> 5)) >> (k & 31);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (k + i < inputs) v[i] = four >> i & 1 ? 1.0f : -1.0f;
    } else {
      const float4 four = __ldcg((const float4*)(at.numbers_in(row) + k));
      const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (k + i < inputs) v[i] = w[i];
    }
    return;
  }
#if PIXELS
  const unsigned char* x = (const unsigned char*)at.p.x + row * inputs + k;
  const float factor = (float)at.p.factor;
  if (all && ((u64)x & 3) == 0) {
    const uchar4 four = __ldg((const uchar4*)x);
    const unsigned char w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __fmul_rn((float)w[i], factor);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i < inputs) v[i] = __fmul_rn((float)__ldg(x + i), factor);
  }
#else
  const float* x = (const float*)at.p.x + row * inputs + k;
  if (all && ((u64)x & 15) == 0) {
    const float4 four = __ldg((const float4*)x);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i < inputs) v[i] = __ldg(x + i);
  }
#endif
}

// Of every 16 inputs, number 4 i + j stands at 4 j + i: a warp that has read four neighbors of
// eight rows to a lane then writes to different banks. The same again leads back.
__device__ __forceinline__ int place_of(int k) {
  return (k & ~15) | (k & 3) << 2 | (k >> 2 & 3);
}
// Where the eight rows with number `eight` of an input at a place stand: they take turns.
template <int R> __device__ __forceinline__ int rows_at(int place, int eight) {
  const int turn = R == 8 ? 0 : R == 16 ? place >> 1 : place;
  return place * R + 8 * ((eight + turn) & (R / 8 - 1));
}

// Weights of four units, the first of them `unit`, for an input.
__device__ __forceinline__ float4 read_weights(const NetworkLayer& l, i64 k, i64 unit) {
  if (l.product == PRODUCT_REAL)
    return unit < l.pitch ? __ldg((const float4*)((const float*)l.weight + k * l.pitch + unit))
                          : make_float4(0, 0, 0, 0);
  const u32 position = position_of((u32)k);
  const i64 chunks = (l.units + CHUNK_BITS - 1) / CHUNK_BITS, chunk = unit / CHUNK_BITS;
  const u32* line = (const u32*)l.weight + line_chunk(0, chunks, chunk, l.inputs, position);
  const u32 bits = __ldg(line + swizzled_word(position, (int)(unit % CHUNK_BITS / 32)));
  const u32 minus = ~bits >> (unit & 31);
  auto sign = [&](int i) { return __uint_as_float(0x3f800000u | (minus >> i & 1) << 31); };
  return make_float4(sign(0), sign(1), sign(2), sign(3));
}

// A tile of `width` units for R rows of numbers, of which `rows` exist.
template <int R>
__device__ __forceinline__ void multiply_real(const Place& at, i64 tile, i64 row0, int rows) {
  constexpr int AHEAD = R == 8 ? 8 : 4;  // weights under way
  constexpr int KC = HELD / R;           // inputs in shared memory at a time
  const NetworkLayer& l = at.l;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int width = (int)l.width, quads = width / 4, slices = THREADS / quads;
  const int quad = threadIdx.x % quads, slice = threadIdx.x / quads;
  const i64 unit0 = tile * width + 4 * quad;
  float* inputs = (float*)at.inputs;
  float acc[R][4] = {};
  for (i64 k0 = 0; k0 < l.inputs; k0 += KC) {
    const int here = (int)min(l.inputs - k0, (i64)KC), blocks = (here + 15) / 16;
    if (k0) __syncthreads();
#pragma unroll 4
    for (int i = warp; i < blocks * (R / 8); i += WARPS) {
      const int eight = i % (R / 8), k = i / (R / 8) * 16 + (lane >> 3) * 4;
      const int r = 8 * eight + (lane & 7);
      float v[4] = {};
      if (r < rows) read_inputs(at, row0 + r, k0 + k, v);
#pragma unroll
      for (int e = 0; e < 4; e++)
        inputs[rows_at<R>(place_of(k + e), eight) + (lane & 7)] = v[e];
    }
    __syncthreads();
    // 16 divides the slices, so all of a thread's inputs stand at the same place of 16.
    const int own = place_of(slice);
    for (int place = slice; place < 16 * blocks; place += AHEAD * slices) {
      const i64 k = k0 + (place - slice) + own;
      float4 w[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        w[i] = k + i * slices < k0 + here ? read_weights(l, k + i * slices, unit0)
                                          : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (k + i * slices >= k0 + here) break;
#pragma unroll
        for (int eight = 0; eight < R / 8; eight++) {
          const float4* x = (const float4*)(inputs + rows_at<R>(place + i * slices, eight));
          const float4 low = x[0], high = x[1];
          const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int r = 0; r < 8; r++) {
            acc[8 * eight + r][0] = fmaf(v[r], w[i].x, acc[8 * eight + r][0]);
            acc[8 * eight + r][1] = fmaf(v[r], w[i].y, acc[8 * eight + r][1]);
            acc[8 * eight + r][2] = fmaf(v[r], w[i].z, acc[8 * eight + r][2]);
            acc[8 * eight + r][3] = fmaf(v[r], w[i].w, acc[8 * eight + r][3]);
          }
        }
      }
    }
  }
  Sums& sums = at.sums;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      for (int apart = quads; apart < 32; apart <<= 1)
        acc[r][e] += __shfl_xor_sync(ALL, acc[r][e], apart);
      if (lane < quads) sums.real[warp][r][4 * quad + e] = acc[r][e];
    }
  }
  __syncthreads();
  const i64 unit = tile * width + lane;
  const bool exists = lane < width && unit < l.units;
  for (int r = warp; r < rows; r += WARPS) {
    float sum = 0;
    if (exists)
#pragma unroll
      for (int i = 0; i < WARPS; i++) sum += sums.real[i][r][lane];
    at.store(row0 + r, unit, exists, sum, lane);
  }
}

// The items of a layer that fall to block `rank` of `blocks`: for `rows` rows from row0 on.
template <int R>
__device__ __forceinline__ void take_items(const Place& at, int rank, int blocks, i64 row0,
                                           int rows) {
  const u32 tiles = (u32)((at.l.units + at.l.width - 1) / at.l.width);
  const u32 items = tiles * ((rows + R - 1) / R);
#pragma unroll 1
  for (u32 item = rank; item < items; item += blocks) {
    const int group = (int)(item / tiles) * R;
    __syncthreads();  // shared memory is free
    if (at.l.product == PRODUCT_BITS)
      multiply_bits<R>(at, item % tiles, row0 + group, min(R, rows - group));
    else
      multiply_real<R>(at, item % tiles, row0 + group, min(R, rows - group));
  }
}

#if CLUSTER > 1
#define TEAMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define TEAMS
// Wait until `goal` arrivals were counted, of `all` in this launch; with goal 0 arrive only.
__device__ __forceinline__ void arrive(u32* arrived, u32 goal, u32 all) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicInc(arrived, all - 1);  // the last one of all makes it 0
    u32 seen = 0;
    while (seen < goal)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    __threadfence();
  }
  __syncthreads();
}
#endif

extern "C" __global__ void TEAMS __launch_bounds__(THREADS, 1)
    packed_network(const __grid_constant__ Network p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Sums& sums = *(Sums*)(shared + INPUT_BYTES);
#if CLUSTER > 1
  const int blocks = CLUSTER, rank = cluster_rank();
  const i64 row0 = (i64)(blockIdx.x / CLUSTER) * ROWS;
  const int rows = (int)min(p.rows - row0, (i64)ROWS);
#else
  const int blocks = gridDim.x, rank = blockIdx.x, rows = (int)p.rows;
  const i64 row0 = 0;
#endif
  bool from_bits = false;
#pragma unroll 1
  for (int i = 0; i < (int)p.count; i++) {
    const NetworkLayer& l = p.layers[i];
    const Place at = {p, l, i, from_bits, shared, sums};
#if ROWS > 8
    const int tiles = (int)((l.units + l.width - 1) / l.width);
    // Smaller groups, where the greater ones would leave half of the blocks without one.
    if (2 * tiles * ((rows + ROWS - 1) / ROWS) <= blocks)
      take_items<8>(at, rank, blocks, row0, rows);
    else
#endif
      take_items<ROWS>(at, rank, blocks, row0, rows);
    from_bits = l.threshold != nullptr;
#if CLUSTER > 1
    if (i + 1 < p.count) cluster_sync();
#else
    const u32 all = (u32)blocks * (u32)p.count;
    arrive(p.arrived, i + 1 < p.count ? (u32)blocks * (i + 1) : 0, all);
#endif
  }
}
