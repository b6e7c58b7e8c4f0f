// A packed network of pixels and signs for a few rows, in one launch: all layers, one after the other.
//
// The first layer multiplies pixels, bytes, with digits of weights (mma.sync u8 s8; see DIGITS in
// product.cuh), those in between signs with signs (b1 and.popc), and the last one adds or subtracts
// real weights. A block has the same 32 units, a tile, of each layer for all ROWS rows of its group. A
// tile's weights, thresholds and flips are one piece of memory, in the order in which lanes take them,
// and the copy engine fetches them before the launch waits for the work in front of it
// (griddepcontrol). So what is left between two layers is to hand the signs round:
//   CLUSTER 16  a group is a cluster: each block writes its signs to the shared memory of all;
//   CLUSTER 1   a group is any number of blocks of a cooperative launch. A word of signs and the number
//               of the launch are written together, 8 bytes to device memory, and readers wait until
//               the number is that of this launch: one trip to the L2 cache instead of three for
//               data, a barrier and its answer. The same for the sums of the last layer.
//
// Warps share rows and K: SPLITS of them have the same rows, and each SPLITS-th step of K. Their sums
// meet in shared memory, where the digits were.
//
// What bounds it: the latency of fetching pixels, and of handing signs round, for each layer; for 64 rows
// and wide layers, shared memory, from which a pair of fragments of rows needs all weights.
//
// The translation unit sets ROWS (8, 16, 32 or 64), DIGITS (1 or 3) and CLUSTER.

#include "hopper.cuh"
#include "steps.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr u32 ALL = 0xffffffffu;
constexpr int TILE = 32;                       // units of a block
constexpr int STEP_WORDS = 8;                  // of a line, for one instruction: 256 bits or 32 bytes
constexpr int FRAGMENT_BYTES = 512;            // of 16 units and a step
constexpr int TOGETHER = ROWS >= 16 ? 2 : 1;   // fragments of 8 rows of a warp
constexpr int PARTS = ROWS / (8 * TOGETHER);   // of the rows
constexpr int SPLITS = WARPS / PARTS;          // of K
constexpr int EACH = ROWS / WARPS;             // rows of a warp, where each takes whole rows
constexpr int PITCH = TILE + 4;                // of sums: lanes of a fragment write to different banks
constexpr int MOST_LAYERS = 16;

// Filled by cupybnn/backends/cuda/pixel_network.py, field by field in this order.
struct PixelNetwork {
  const unsigned char* tiles;  // `tile_bytes` each: for each layer but the last fragments, thresholds
                               // and flips; then the last layer's weights, `classes` for each unit
  i64 tile_bytes;
  i64 count;                   // of layers but the last
  i64 steps[MOST_LAYERS];      // of K, for each of them
  i64 blocks[MOST_LAYERS];     // that have a tile of each
  i64 at[MOST_LAYERS];         // where a layer starts in a tile; then where the last weights are
  i64 team;                    // blocks of a group
  i64 inputs, classes;
  i64 inputs_at, sums_at, last_at;  // in shared memory: pixels; sums of warps; sums of the last layer
  Steps after;                 // the last layer
  const unsigned char* x;      // (rows, inputs)
  float* out;                  // (rows, classes)
  u64* slots;                  // CLUSTER 1: (count, 64, pitch) signs, then (64, classes, pitch) sums
  u32* control;                // CLUSTER 1: number of launches, and arrivals in this one
  i64 rows;
};

__device__ __forceinline__ void wait_for_work_in_front() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

template <bool BYTES>
__device__ __forceinline__ void multiply_16x8(int* d, const uint4& a, u32 b0, u32 b1) {
  if constexpr (BYTES)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Words of a line of `steps` steps in shared memory: 4 times an odd number, so that the same word of eight
// lines is in different banks.
__device__ __forceinline__ int line_pitch(int steps) { return steps * STEP_WORDS + 4; }

// The sums of a tile: of D digits, each SPLITS-th step of K by a warp.
template <int D, bool BYTES>
__device__ __forceinline__ void multiply_tile(const uint4* fragments, const u32* lines, int steps,
                                              int* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int part = warp / SPLITS, split = warp % SPLITS, pitch = line_pitch(steps);
  int acc[D][2][TOGETHER][4] = {};
  const u32* own = lines + (part * TOGETHER * 8 + g) * pitch + q;
#pragma unroll 2
  for (int step = split; step < steps; step += SPLITS) {
    u32 b[TOGETHER][2];
#pragma unroll
    for (int n = 0; n < TOGETHER; n++) {
      b[n][0] = own[n * 8 * pitch + step * STEP_WORDS];
      b[n][1] = own[n * 8 * pitch + step * STEP_WORDS + 4];
    }
#pragma unroll
    for (int d = 0; d < D; d++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const uint4 a = fragments[((d * 2 + m) * steps + step) * 32 + lane];
#pragma unroll
        for (int n = 0; n < TOGETHER; n++) multiply_16x8<BYTES>(acc[d][m][n], a, b[n][0], b[n][1]);
      }
  }
  if (BYTES) __syncthreads();  // the sums replace the digits
#pragma unroll
  for (int d = 0; d < D; d++)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < TOGETHER; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = (part * TOGETHER + n) * 8 + 2 * q + (i & 1), unit = m * 16 + g + (i & 2) * 4;
          sums[((split * D + d) * ROWS + row) * PITCH + unit] = acc[d][m][n][i];
        }
}

// The product of this lane's unit and a row.
template <int D>
__device__ __forceinline__ int product_of(const int* sums, int row, int lane) {
  int value = 0;
#pragma unroll
  for (int d = 0; d < D; d++) {
    value >>= 8;
#pragma unroll
    for (int split = 0; split < SPLITS; split++)
      value += sums[((split * D + d) * ROWS + row) * PITCH + lane];
  }
  return value;
}

__device__ __forceinline__ void store_at(u32 address, int block, u32 value) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2; }" ::"r"(address), "r"(block), "r"(value) : "memory");
}
__device__ __forceinline__ void store_slot(u64* to, u32 value, u32 number) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)number << 32 | value)
               : "memory");
}
__device__ __forceinline__ void load_slots(const u64* from, u64 (&v)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(v[0]), "=l"(v[1]) : "l"(from) : "memory");
}

// Fetch the signs of `rows` rows, a word from each block that has a tile, into lines of shared memory, and
// count them. A warp takes EACH rows, all at a time.
__device__ __forceinline__ void collect(const u64* slots, i64 slot_pitch, int blocks, int rows,
                                        u32 number, u32* lines, int steps, int* ones) {
  constexpr int AHEAD = 2;  // pairs of words of a lane, of each row
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pitch = line_pitch(steps);
  const int pairs = (blocks + 1) / 2, all = steps * STEP_WORDS / 2;
  int n[EACH] = {};
  for (int first = lane; first < all; first += 32 * AHEAD) {
    u64 v[EACH][AHEAD][2];
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        const int row = warp + WARPS * i, pair = first + 32 * j;
        if (row < rows && pair < pairs) load_slots(slots + row * slot_pitch + 2 * pair, v[i][j]);
      }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        const int row = warp + WARPS * i, pair = first + 32 * j;
        if (row >= rows || pair >= all) continue;
        uint2 words = make_uint2(0, 0);
        if (pair < pairs) {
          const bool both = 2 * pair + 1 < blocks;
          while ((u32)(v[i][j][0] >> 32) != number || (both && (u32)(v[i][j][1] >> 32) != number))
            load_slots(slots + row * slot_pitch + 2 * pair, v[i][j]);
          words = make_uint2((u32)v[i][j][0], both ? (u32)v[i][j][1] : 0);
        }
        *(uint2*)(lines + row * pitch + 2 * pair) = words;
        n[i] += __popc(words.x) + __popc(words.y);
      }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int sum = (int)__reduce_add_sync(ALL, (u32)n[i]);
    if (lane == 0) ones[warp + WARPS * i] = sum;
  }
}

// The rows' pixels, two constants after them, and zeros. What is in lines of rows that do not exist is
// multiplied, too, but not used.
__device__ __forceinline__ void bring_pixels(const PixelNetwork& p, i64 row0, int rows, u32* lines) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int steps = (int)p.steps[0], pitch = line_pitch(steps), inputs = (int)p.inputs;
  const unsigned char* x = p.x + (row0 + warp) * inputs;
  if ((((u64)p.x | inputs) & 15) == 0) {
    for (int piece = lane; piece < inputs / 16; piece += 32) {
      uint4 v[EACH];
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (warp + WARPS * i < rows) v[i] = __ldcg((const uint4*)(x + WARPS * i * inputs) + piece);
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (warp + WARPS * i < rows) *(uint4*)(lines + (warp + WARPS * i) * pitch + 4 * piece) = v[i];
    }
  } else {
    for (int row = warp; row < rows; row += WARPS)
      for (int word = lane; word < inputs / 4; word += 32) {
        const unsigned char* from = p.x + (row0 + row) * inputs + 4 * word;
        u32 v = 0;
#pragma unroll
        for (int b = 0; b < 4; b++) v |= (u32)__ldcg(from + b) << 8 * b;
        lines[row * pitch + word] = v;
      }
  }
  // Words with the constants, and those after them.
  for (int row = warp; row < rows; row += WARPS)
    for (int word = inputs / 4 + lane; word < steps * STEP_WORDS; word += 32) {
      u32 v = 0;
#pragma unroll
      for (int b = 0; b < 4; b++) {
        const int at = 4 * word + b;
        const u32 pixel = at < inputs ? __ldcg(p.x + (row0 + row) * inputs + at)
                                      : at < inputs + 2 ? (u32)(inputs + 2 - at) : 0;
        v |= pixel << 8 * b;
      }
      lines[row * pitch + word] = v;
    }
}

// Give the next launch another number, when all blocks have taken that of this one.
__device__ __forceinline__ void count_launch(const PixelNetwork& p, u32 number) {
  if (blockIdx.x != 0 || threadIdx.x != THREADS - 1) return;
  u32 arrivals;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                  : "=r"(arrivals) : "l"(p.control + 1) : "memory");
  while (arrivals != gridDim.x);
  p.control[1] = 0;
  p.control[0] = number;
}

#if CLUSTER > 1
#define TEAMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define TEAMS
#endif

extern "C" __global__ void TEAMS __launch_bounds__(THREADS, ROWS == 8 ? 2 : 1)
    pixel_network(const __grid_constant__ PixelNetwork p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ u64 arrived[MOST_LAYERS];
  __shared__ int ones[ROWS];
  __shared__ u32 signs[ROWS];
  __shared__ u32 launch_number;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int count = (int)p.count, team = (int)p.team, classes = (int)p.classes;
  const int rank = CLUSTER > 1 ? cluster_rank() : blockIdx.x % team;
  const i64 row0 = (i64)(blockIdx.x / team) * ROWS;
  const int rows = (int)min(p.rows - row0, (i64)ROWS);
  let_next_start();

  // Weights do not depend on the work in front.
  if (threadIdx.x == 0) {
    for (int l = 0; l < count; l++) barrier_init(shared_address(arrived + l), 1);
    barrier_init_fence();
    const unsigned char* tile = p.tiles + rank * p.tile_bytes;
    for (int l = 0; l < count; l++) {
      if (rank >= (int)p.blocks[l]) continue;
      const u32 bar = shared_address(arrived + l), begin = (u32)p.at[l], end = (u32)p.at[l + 1];
      // The last weights come with the last signs.
      const u32 stop = l + 1 < count ? end : (u32)p.tile_bytes;
      barrier_expect(bar, stop - begin);
      for (u32 at = begin; at < stop; at += 1 << 14)
        bulk_load(shared_address(shared + at), tile + at, min(stop - at, 1u << 14), bar);
    }
  }
  u32* const pixels = (u32*)(shared + p.inputs_at);
  int* const sums = (int*)(shared + p.sums_at);
  float* const last = (float*)(shared + p.last_at);
  // Where the inputs of layer l are. Of a cluster, others write there while this block still reads the
  // pixels or the inputs of the layer before.
  auto lines_of = [&](int l) {
    if (l == 0 || CLUSTER == 1) return pixels;
    u32* const after = pixels + ROWS * line_pitch((int)p.steps[0]);
    return l & 1 ? after : after + ROWS * line_pitch(CLUSTER * TILE / 256);
  };
  if (CLUSTER > 1) {
    // Words of units that do not exist stay zeros.
    for (int i = threadIdx.x; i < 2 * ROWS * line_pitch(CLUSTER * TILE / 256); i += THREADS)
      lines_of(1)[i] = 0;
    cluster_arrive();
  }
  wait_for_work_in_front();
  u32 number = 0;
  if (CLUSTER == 1 && threadIdx.x == 0) {
    // Acquire: this block arrives after it has read the number.
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(p.control) : "memory");
    launch_number = number + 1;
    atomicAdd(p.control + 1, 1);
  }
  bring_pixels(p, row0, rows, pixels);
  __syncthreads();
  if (CLUSTER == 1) number = launch_number;
  if (CLUSTER > 1) cluster_wait();  // all have started, and made their lines zeros

  const i64 slot_pitch = (team + 1) & ~1;
  u64* const sum_slots = p.slots + p.count * 64 * slot_pitch;
#pragma unroll 1
  for (int l = 0; l < count; l++) {
    const int steps = (int)p.steps[l];
    u32* const lines = lines_of(l);
    if (l > 0) {
      if (CLUSTER > 1) {
        cluster_sync();
        for (int r = warp; r < rows; r += WARPS) {
          u32 n = 0;
          for (int i = lane; i < steps * STEP_WORDS; i += 32) n += __popc(lines[r * line_pitch(steps) + i]);
          n = __reduce_add_sync(ALL, n);
          if (lane == 0) ones[r] = (int)n;
        }
      } else {
        __syncthreads();  // the lines have been read
        if (l == 1) count_launch(p, number);
        collect(p.slots + ((l - 1) * 64 + row0) * slot_pitch, slot_pitch, (int)p.blocks[l - 1], rows,
                number, lines, steps, ones);
        __syncthreads();
      }
    }
    if (rank >= (int)p.blocks[l]) continue;  // the whole block
    const unsigned char* tile = shared + p.at[l];
    barrier_wait(shared_address(arrived + l), 0);
    if (l == 0) multiply_tile<DIGITS, true>((const uint4*)tile, lines, steps, sums);
    else multiply_tile<1, false>((const uint4*)tile, lines, steps, sums);
    __syncthreads();
    const int* thresholds = (const int*)(tile + (l ? 1 : DIGITS) * 2 * steps * FRAGMENT_BYTES);
    const int threshold = thresholds[lane];
    const u32 flips = (u32)thresholds[TILE];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int r = warp + WARPS * i;
      if (r >= rows) break;
      const int value = l ? 4 * product_of<1>(sums, r, lane) - 2 * ones[r]
                          : product_of<DIGITS>(sums, r, lane);
      const u32 word = __ballot_sync(ALL, value >= threshold) ^ flips;
      if (l + 1 == count) {
        if (lane == 0) signs[r] = word;
      } else if (CLUSTER > 1) {
        u32* to = lines_of(l + 1) + r * line_pitch((int)p.steps[l + 1]) + rank;
        if (lane < CLUSTER) store_at(shared_address(to), lane, word);
      } else if (lane == 0) {
        store_slot(p.slots + (l * 64 + row0 + r) * slot_pitch + rank, word, number);
      }
    }
  }

  // The last layer: this block's signs add or subtract their weights.
  const int tiles = (int)p.blocks[count - 1];
  if (rank < tiles) {
    __syncthreads();
    const float* weights = (const float*)(shared + p.at[count]);
    for (int i = threadIdx.x; i < rows * classes; i += THREADS) {
      const int row = i / classes, unit = i - row * classes;
      const u32 minus = ~signs[row];
      float sum = 0;
#pragma unroll
      for (int k = 0; k < TILE; k++)
        sum += __uint_as_float(__float_as_uint(weights[k * classes + unit]) ^ (minus >> k & 1) << 31);
      if (CLUSTER > 1)
        store_at(shared_address(last + (row / CLUSTER * classes + unit) * CLUSTER + rank),
                 row % CLUSTER, __float_as_uint(sum));
      else
        store_slot(sum_slots + ((row0 + row) * classes + unit) * slot_pitch + rank,
                   __float_as_uint(sum), number);
    }
  }
  if (CLUSTER > 1) cluster_sync();
#if CLUSTER > 1
  // Rows are dealt out to blocks, and their classes to warps.
  for (int row = rank; row < rows; row += CLUSTER)
    for (int unit = warp; unit < classes; unit += WARPS) {
      float sum = lane < tiles ? last[(row / CLUSTER * classes + unit) * CLUSTER + lane] : 0.0f;
#pragma unroll
      for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL, sum, apart);
      if (lane == 0) p.out[(row0 + row) * classes + unit] = after_steps(p.after, unit, sum);
    }
#else
  if (count == 1) count_launch(p, number);
  // Results are dealt out to the warps of all blocks.
  for (int at = warp * team + rank; at < rows * classes; at += WARPS * team) {
    const int row = at / classes, unit = at - row * classes;
    const u64* slots = sum_slots + ((row0 + row) * classes + unit) * slot_pitch;
    float sum = 0;
    for (int first = 2 * lane; first < tiles; first += 128) {
      u64 v[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (first + 64 * i < tiles) load_slots(slots + first + 64 * i, v[i]);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int tile = first + 64 * i;
        if (tile >= tiles) break;
        const bool both = tile + 1 < tiles;
        while ((u32)(v[i][0] >> 32) != number || (both && (u32)(v[i][1] >> 32) != number))
          load_slots(slots + tile, v[i]);
        sum += __uint_as_float((u32)v[i][0]);
        if (both) sum += __uint_as_float((u32)v[i][1]);
      }
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(ALL, sum, apart);
    if (lane == 0) p.out[(row0 + row) * classes + unit] = after_steps(p.after, unit, sum);
  }
#endif
}
