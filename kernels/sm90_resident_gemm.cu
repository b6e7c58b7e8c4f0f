// A layer of a packed network whose weights stay in shared memory: products of many rows with them.
//
// A block has a strip of a layer's weights, LINES of them with all of K, from the start to the end. What
// goes past are the inputs, 64 rows at a time, a tile, in slots of 128 bytes of each row. So tiles need
// 4096 / LINES bytes per clock from the L2 cache, a third of what sm90_xnor_gemm.cu needs, where both
// operands go past. The blocks of a strip share its rows.
//
// The first warpgroup is the producer: one thread keeps the slots filled. Two consumers take turns: one
// writes a tile out while the tensor cores multiply the other's. Signs are counted where they are made:
// blocks add up the ones of each row, for the kernel that follows.
//
//   DIGITS 0  inputs are signs, laid out as in layout.cuh, wgmma b1 and.popc;
//   DIGITS n  inputs are pixels, a byte each, in C order, which a tensor map describes; a weight is n
//             digits to the base 256, each a line of its own, wgmma u8.s8. Sums of the digits meet in
//             the epilogue: no pass over the inputs for each.
//   END 0     the results are signs, sums compared with a threshold, packed;
//   END 1     of a last layer: weights are 24 bit planes, a line each, and the results numbers.
//
// Shared memory: CHUNKS x LINES lines of 128 bytes; STAGES x 64 lines; what results are compared with.
//
// What bounds it: the tensor cores, once tiles are many; else fetching the weights, which begins before
// the kernel ahead has ended (launch.cuh).
//
// The translation unit sets LINES, CHUNKS (of K, 128 bytes each), LAST (instructions for the last of
// them, 32 bytes each), STAGES, DIGITS and END.

#include "hopper.cuh"
#include "launch.cuh"
#include "steps.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64, CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int SLOT_BYTES = ROWS * CHUNK_BYTES;
constexpr int ACC = LINES / 2;                        // accumulators of a thread
constexpr int PLANES = 24;                            // of a weight of the last layer
constexpr int OF_UNIT = END ? PLANES : DIGITS > 1 ? DIGITS : 1;
constexpr int UNITS = LINES / OF_UNIT;                // of a strip
constexpr int LOADS = DIGITS > 1 ? DIGITS : 1;        // pieces of a strip's chunk in memory
constexpr int PIECE_LINES = LINES / LOADS;
constexpr int WORDS = END ? 1 : UNITS / 32;           // of signs, of a row
static_assert(DIGITS == 0 || !END, "a last layer's inputs are signs");
static_assert(END || (UNITS % 32 == 0 && (WORDS == 1 || WORDS % 2 == 0)), "lanes share words");
static_assert(LAST >= 1 && LAST <= 4, "a chunk is four instructions");

// Whether a thread's registers depend on its role; multiples of 8, and no more than the block has.
constexpr bool ROLES = ACC > 64;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 65536 / 128, "the roles share registers");

// Filled by cupybnn/backends/cuda/resident.py, field by field in this order.
struct ResidentProduct {
  TensorMap map;               // DIGITS: the inputs, boxes of 64 rows and 128 bytes
  void* out;                   // words in the layout of layout.cuh; END: floats, (rows, units)
  const uint4* a;              // !DIGITS: the inputs, ...
  const int* a_ones;           // ... and the ones of each row
  const uint4* b;              // `b_chunks` chunks of each digit, the lowest first; END: lines in the
                               // order of `planes_of`
  const int* b_ones;           // !DIGITS, !END: popcounts of the weights' lines
  const int* threshold;        // !END: bit = (product >= threshold) ^ flip; DIGITS: of the sum of the
                               // highest digit and what the others carry to it
  const int* rest;             // DIGITS > 1: added to the sums of the lowest digit, and of the next << 8
  const unsigned char* flip;
  const i64* constant;         // END: summands of twice the sums
  const float* step;           // END: a power of two for each unit
  Steps after;                 // END
  int* ones;                   // !END: the ones of each row are added
  int* cleared;                // becomes zeros, one for each row, for a later kernel; or null
  i64 rows, units, k, b_chunks, strips;
};

struct Shared {
  unsigned char weights[CHUNKS][LINES * CHUNK_BYTES];
  unsigned char slots[STAGES][SLOT_BYTES];
  alignas(16) int terms[2][UNITS];  // of units, see `fill_terms`
  u32 flip[WORDS], exist[WORDS];
  u64 here[CHUNKS];                 // the weights
  u64 full[STAGES], empty[STAGES];
  u64 turn[CONSUMERS];              // which consumer's tile is next
};

struct Turn : Ring<STAGES> {
  __device__ __forceinline__ void skip_tile() {
    slot += CHUNKS;
    while (slot >= STAGES) { slot -= STAGES; parity ^= 1; }
  }
};

struct Work {
  u32 strip, worker, workers, tiles;
  __device__ __forceinline__ explicit Work(const ResidentProduct& p)
      : strip(blockIdx.x % (u32)p.strips), worker(blockIdx.x / (u32)p.strips),
        workers(gridDim.x / (u32)p.strips), tiles(((u32)p.rows + ROWS - 1) / ROWS) {}
};

__device__ __forceinline__ void load_weights(const ResidentProduct& p, Shared& shared, const Work& work) {
  const u32 all = (u32)padded_lines(END ? p.units * PLANES : p.units), first = work.strip * PIECE_LINES;
  const u32 bytes = (first < all ? min(all - first, (u32)PIECE_LINES) : 0) * CHUNK_BYTES;
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const u32 bar = shared_address(&shared.here[chunk]);
    barrier_expect(bar, bytes * LOADS);
    for (int i = 0; i < LOADS; i++)
      bulk_load(shared_address(shared.weights[chunk]) + i * PIECE_LINES * CHUNK_BYTES,
                p.b + ((i * p.b_chunks + chunk) * all + first) * CHUNK_PIECES, bytes, bar);
  }
}

__device__ __forceinline__ void produce(const ResidentProduct& p, Shared& shared, const Work& work) {
  const u32 lines = (u32)padded_lines(p.rows);
  Turn turn;
  for (u32 t = work.worker; t < work.tiles; t += work.workers) {
    const u32 first = t * ROWS, bytes = DIGITS ? SLOT_BYTES : min(lines - first, (u32)ROWS) * CHUNK_BYTES;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const u32 full = shared_address(&shared.full[turn.slot]), to = shared_address(shared.slots[turn.slot]);
      barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
      barrier_expect(full, bytes);
      if (DIGITS) tensor_load(to, &p.map, chunk * CHUNK_BYTES, (int)first, full);
      else bulk_load(to, p.a + ((i64)chunk * lines + first) * CHUNK_PIECES, bytes, full);
      turn.next();
    }
  }
}

// What the units of the strip are compared with, and which of them exist. For THREADS threads.
//
// Of signs, product = k - 2 ones(a) - 2 ones(b) + 4 acc >= threshold where, for even ones(a),
// acc + terms[0] - ones(a) / 2 >= 0, and for odd ones acc + terms[1] - (ones(a) + 1) / 2 >= 0.
__device__ __forceinline__ void fill_terms(const ResidentProduct& p, Shared& shared, const Work& work) {
#if !END
  const i64 first = (i64)work.strip * UNITS;
  for (int i = threadIdx.x; i < (UNITS + 31) / 32 * 32; i += THREADS) {
    const i64 unit = first + i;
    const bool exists = unit < p.units;
    const int threshold = exists ? __ldg(p.threshold + unit) : 0;
#if DIGITS
    shared.terms[0][i] = -threshold;
    shared.terms[1][i] = DIGITS > 1 && exists ? __ldg(p.rest + unit) : 0;
#else
    // No product exceeds K.
    const int least = max(-(int)p.k, min((int)p.k + 1, threshold));
    const int half = ((int)p.k - 2 * (exists ? __ldg(p.b_ones + unit) : 0) - least) >> 1;
    shared.terms[0][i] = half >> 1;
    shared.terms[1][i] = (half + 1) >> 1;
#endif
    const u32 flips = __ballot_sync(0xffffffffu, exists && __ldg(p.flip + unit));
    const u32 exist = __ballot_sync(0xffffffffu, exists);
    if ((i & 31) == 0) { shared.flip[i / 32] = flips; shared.exist[i / 32] = exist; }
  }
#endif
}

#if DIGITS
typedef WgmmaBytes<LINES> Instruction;
#else
typedef WgmmaB1<LINES> Instruction;
#endif

template <int COUNT>
__device__ __forceinline__ void start_chunk(int (&acc)[ACC], Shared& shared, const Turn& turn, int chunk) {
  barrier_wait(shared_address(&shared.here[chunk]), 0);
  barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
  const u64 a = operand_descriptor(shared_address(shared.slots[turn.slot]));
  const u64 b = operand_descriptor(shared_address(shared.weights[chunk]));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < COUNT; step++) Instruction::run(acc, a + 2 * step, b + 2 * step, chunk | step);
  wgmma_commit();
}

__device__ __forceinline__ void release(Shared& shared, int slot) {
  if ((threadIdx.x & 127) == 0) barrier_arrive(shared_address(&shared.empty[slot]));
}

#if END
// The logits of a tile: lane 4 g + q has planes 6 q to 6 q + 5 of each unit, for rows g and g + 8.
__device__ __forceinline__ void store(const ResidentProduct& p, Shared& shared, const Work& work,
                                      const int (&acc)[ACC], i64 row0, const int (&ones)[2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, line = ((threadIdx.x & 127) >> 5) * 16 + g;
#pragma unroll
  for (int below = 0; below < 2; below++) {
    i64 whole[(UNITS + 3) / 4] = {};  // of units q, q + 4, ...
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      int sum = 0;
#pragma unroll
      for (int f = 2; f >= 0; f--)
#pragma unroll
        for (int b = 1; b >= 0; b--) sum = 2 * sum + acc[(3 * u + f) * 4 + 2 * below + b];
      const int next = __shfl_xor_sync(0xffffffffu, sum, 1);
      sum = q & 1 ? next + (sum << 6) : sum + (next << 6);
      const int far = __shfl_xor_sync(0xffffffffu, sum, 2);
      if (q == (u & 3)) whole[u / 4] = q & 2 ? far + ((i64)sum << 12) : sum + ((i64)far << 12);
    }
    const i64 row = row0 + line_at(line + 8 * below);
#pragma unroll
    for (int i = 0; i < (UNITS + 3) / 4; i++) {
      const int u = 4 * i + q;
      const i64 unit = (i64)work.strip * UNITS + u;
      if (u >= UNITS || row >= p.rows || unit >= p.units) continue;
      const i64 product = 2 * whole[i] - ((i64)ones[below] << PLANES) + __ldg(p.constant + unit);
      const float v = __fmul_rn(__ll2float_rn(product), __ldg(p.step + unit));
      ((float*)p.out)[row * p.units + unit] = after_steps(p.after, (int)unit, v);
    }
  }
}
#else
// The signs of a tile. Of 16 columns a lane has four neighbors (layout.cuh), so it has eight bits of
// each word of its two rows; lanes of four exchange them until each has half of a row's words.
__device__ __forceinline__ void store(const ResidentProduct& p, Shared& shared, const Work& work,
                                      const int (&acc)[ACC], i64 row0, const int (&ones)[2]) {
  constexpr u32 ALL = 0xffffffffu;
  const int lane = threadIdx.x & 31, q = lane & 3, line = ((threadIdx.x & 127) >> 5) * 16 + (lane >> 2);
  const int* terms[2];
  int term[2] = {};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    terms[r] = shared.terms[0];
#if !DIGITS
    terms[r] = shared.terms[ones[r] & 1];
    term[r] = -(ones[r] + 1 >> 1);
#endif
  }
  u32 words[2][WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; w++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 negative = 0;
#pragma unroll
      for (int j = 4 * w + 2; j >= 4 * w; j -= 2) {
        const int4 four = *(const int4*)(terms[r] + 8 * j + 4 * q);
        const int t[4] = {four.x, four.y, four.z, four.w};
#if DIGITS > 1
        const int4 more = *(const int4*)(shared.terms[1] + 8 * j + 4 * q);
        const int rest[4] = {more.x, more.y, more.z, more.w};
#endif
        if (j % 4 == 0) negative <<= 12;
#pragma unroll
        for (int i = 3; i >= 0; i--) {
          const int at = 4 * (j + i / 2) + 2 * r + i % 2;
#if DIGITS > 1
          constexpr int NEXT = PIECE_LINES / 2;  // accumulators of a digit
          int carry = 0;
#pragma unroll
          for (int d = 0; d + 1 < DIGITS; d++) carry = (carry + acc[at + d * NEXT] + (rest[i] >> 8 * d & 255)) >> 8;
          const int v = carry + acc[at + (DIGITS - 1) * NEXT] + t[i];
#else
          const int v = acc[at] + t[i] + term[r];
#endif
          negative = __funnelshift_l((u32)v, negative, 1);
        }
      }
      words[r][w] = negative << 4 * q;
    }
  // Odd lanes gather the second row, the upper two of four the second half.
  u32 row_words[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; w++)
    row_words[w] = (q & 1 ? words[1][w] : words[0][w]) | __shfl_xor_sync(ALL, q & 1 ? words[0][w] : words[1][w], 1);
  constexpr int HALF = (WORDS + 1) / 2;
  const int half = q >> 1, first = WORDS > 1 ? half * HALF : 0;
  u32 mine[HALF];
  int count = 0;
#pragma unroll
  for (int w = 0; w < HALF; w++) {
    if constexpr (WORDS == 1) mine[w] = row_words[w] | __shfl_xor_sync(ALL, row_words[w], 2);
    else mine[w] = (half ? row_words[HALF + w] : row_words[w]) |
                   __shfl_xor_sync(ALL, half ? row_words[w] : row_words[HALF + w], 2);
    mine[w] = (~mine[w] ^ shared.flip[first + w]) & shared.exist[first + w];
    count += __popc(mine[w]);
  }
  if (WORDS > 1) count += __shfl_xor_sync(ALL, count, 2);
  // Of pixels a position is a row's number.
  const int at = line + 8 * (q & 1);
  const i64 row = row0 + (DIGITS ? at : line_at(at));
  const u32 position = (u32)row0 + (DIGITS ? position_of((u32)at) : (u32)at);
  if (row >= p.rows) return;
  if (half == 0) atomicAdd(p.ones + row, count);
  if (WORDS == 1 && half) return;
  const u32 begin = work.strip * WORDS + first, end = (u32)((p.units + CHUNK_BITS - 1) / CHUNK_BITS) * CHUNK_WORDS;
  const u32 lines = (u32)padded_lines(p.rows);
  if constexpr (HALF == 4) {
    if (begin < end) {
      u32* to = (u32*)p.out + ((i64)(begin / CHUNK_WORDS) * lines + position) * CHUNK_WORDS;
      *(uint4*)(to + swizzled_word(position, begin % CHUNK_WORDS)) = make_uint4(mine[0], mine[1], mine[2], mine[3]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < HALF; w++) {
      const u32 word = begin + w;
      if (word >= end) break;
      u32* to = (u32*)p.out + ((i64)(word / CHUNK_WORDS) * lines + position) * CHUNK_WORDS;
      to[swizzled_word(position, word % CHUNK_WORDS)] = mine[w];
    }
  }
}
#endif

__device__ __forceinline__ void consume(const ResidentProduct& p, Shared& shared, const Work& work,
                                        int consumer) {
  Turn turn;
  if (consumer) turn.skip_tile();
  u32 n = 0;
  for (u32 t = work.worker + consumer * work.workers; t < work.tiles; t += CONSUMERS * work.workers, n++) {
    int acc[ACC];
    int last = 0, ones[2] = {};
    const int line = ((threadIdx.x & 127) >> 5) * 16 + ((threadIdx.x & 31) >> 2);
#pragma unroll
    for (int r = 0; r < 2 && !DIGITS; r++) {
      const i64 row = (i64)t * ROWS + line_at(line + 8 * r);
      if (row < p.rows) ones[r] = __ldcg(p.a_ones + row);
    }
    // The first consumer begins.
    barrier_wait(shared_address(&shared.turn[consumer]), (n & 1) ^ (consumer == 0));
#pragma unroll 1
    for (int chunk = 0; chunk + 1 < CHUNKS; chunk++) {
      start_chunk<4>(acc, shared, turn, chunk);
      // The group before has read its slot.
      wgmma_wait<1>();
      if (chunk) release(shared, last);
      last = turn.slot;
      turn.next();
    }
    start_chunk<LAST>(acc, shared, turn, CHUNKS - 1);
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(&shared.turn[consumer ^ 1]));
    wgmma_wait<0>();
    if (CHUNKS > 1) release(shared, last);
    release(shared, turn.slot);
    turn.next();
    turn.skip_tile();
    store(p, shared, work, acc, (i64)t * ROWS, ones);
    if (p.cleared && work.strip == 0) {
      const i64 row = (i64)t * ROWS + (threadIdx.x & 127);
      if ((threadIdx.x & 127) < ROWS && row < p.rows) p.cleared[row] = 0;
    }
    __syncwarp();  // some lanes have stored nothing; instructions for whole warps follow
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    resident_gemm(const __grid_constant__ ResidentProduct p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *(Shared*)raw;
  const int warp = threadIdx.x >> 5, thread = threadIdx.x;
  const Work work(p);
  if (thread == 0) {
    for (int i = 0; i < CHUNKS; i++) barrier_init(shared_address(&shared.here[i]), 1);
    barrier_init_fence();
    load_weights(p, shared, work);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), 1);
    }
    for (int i = 0; i < CONSUMERS; i++) barrier_init(shared_address(&shared.turn[i]), 4);  // its warps
    barrier_init_fence();
  }
  __syncwarp();
  fill_terms(p, shared, work);
  allow_next();
  __syncthreads();
  wait_for_previous();
  if (warp < 4) {
    if constexpr (ROLES) give_registers<PRODUCER_REGISTERS>();
    if (thread == 0) produce(p, shared, work);
  } else {
    if constexpr (ROLES) take_registers<CONSUMER_REGISTERS>();
    consume(p, shared, work, (warp >> 2) - 1);
  }
}
