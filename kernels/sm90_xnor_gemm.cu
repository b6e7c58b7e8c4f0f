// The 1-bit product on Hopper's tensor cores: wgmma b1 and.popc, 64 x N x 256 bits per instruction.
//
// A block computes tiles of TILE_M x TILE_N results, one after another. The first warpgroup is the
// producer: one thread keeps STAGES slots of shared memory filled with 1024 bits of K each, by bulk
// copies of memory that is already laid out as the tensor cores read it (layout.cuh); its second warp
// loads the terms of a tile's rows and columns. CONSUMERS warpgroups own 64 * BLOCKS_M lines of the
// tile each, with the accumulators in registers. While they write a tile out, the next tile's slots
// are already being filled.
//
// Shared memory: STAGES x (TILE_M + TILE_N) lines of 128 bytes; two barriers per stage, where `full`
// counts the bytes that arrive in a slot and `empty` the warpgroups that have read it; two for the
// terms; the terms.
//
// What bounds it: the tensor cores do 32,768 bit products per clock, for which a tile needs
// 4096 (1/TILE_M + 1/TILE_N) bytes per clock from the L2 cache, which was seen to deliver 45 per SM if
// nothing else is read or written. So tiles are as large as the registers allow, and CLUSTER_M x CLUSTER_N
// blocks can share their loads: each loads a part of the common lines and the copy engine writes it to all
// of them. At K = 8192 writing a tile out takes about as long as its products; they hide it if DEFERRED.
//
// SPLIT_K > 1: the blocks of a cluster take the same tile and a part of K each, and sum over the
// cluster's shared memory; for products of few tiles. With `parts` clusters for a tile, the last one to
// add its sums to those in memory stores the results. A block's part must have at most 63 chunks.
//
// DEFERRED: a tile is written out while the next one is multiplied, in so many pieces. Its accumulators,
// none above K, are kept as 16-bit numbers, two per register, and pieces are stored during the next tile's
// products, at equal intervals. Needs K of at most 63 chunks, and at least one for each piece. Without it the
// tensor cores wait for every tile to be written out, a third of the time at K = 8192. Even so, a piece's
// instructions delay them: see bench/NOTES.md.
//
// DIGITS > 0: the same on bytes, wgmma u8.s8, 64 x N x 32 per instruction, at an eighth of the rate. The
// digits of b are multiplied one after the other, from the lowest on; in between the accumulators are
// divided by 256 and rounded down, so that the sign of the last sums, less a threshold, is exact.
//
// PLANES > 1: the same for bit planes of one operand, from the highest on; in between the accumulators are
// doubled. The tensor cores wait for that once for each plane of a tile.
//
// The translation unit sets CONSUMERS, BLOCKS_M, TILE_N, STAGES, CLUSTER_M, CLUSTER_N, SPLIT_K,
// DEFERRED, and the macros of product.cuh.

#define HALVES (DEFERRED && OUTPUT != OUTPUT_PACKED)
#include "results.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64 * BLOCKS_M;  // per consumer
constexpr int TILE_M = ROWS * CONSUMERS;
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int A_BYTES = TILE_M * CHUNK_BYTES, B_BYTES = TILE_N * CHUNK_BYTES;
constexpr int SLOT_BYTES = A_BYTES + B_BYTES;
constexpr int ACC = TILE_N / 2;  // accumulators per thread and block of 64 lines

static_assert(SPLIT_K == 1 || (CLUSTER == 1 && !DEFERRED), "a cluster shares tiles or splits K");
static_assert(!DIGITS || !DEFERRED, "sums of bytes need more than 16 bits");
static_assert(DIGITS <= 1 || SPLIT_K == 1, "parts that were rounded down do not add up");
static_assert(PLANES == 1 || (SPLIT_K == 1 && !DEFERRED && !DIGITS), "sums of levels need more than 16 bits");
// Passes over the chunks of the operand without digits or planes, and those of each operand's.
constexpr int PASSES = DIGITS > 1 ? DIGITS : PLANES;
constexpr bool AGAIN_B = PASSES > 1 && !DIGITS && !PLANES_OF_B;  // which is read again
constexpr int A_PASSES = AGAIN_B ? PASSES : 1, B_PASSES = AGAIN_B ? 1 : PASSES;
static_assert(TILE_M % (8 * CLUSTER_N) == 0 && TILE_N % (8 * CLUSTER_M) == 0, "whole swizzles");

// Whether a thread's registers depend on its role. Small tiles need few: then two blocks fit a
// multiprocessor, and the next kernel's blocks begin while this one's end.
constexpr bool ROLES = SPLIT_K == 1 && BLOCKS_M * ACC > 64;
// Registers of a thread by role, multiples of 8. Together they must not exceed what the block was
// launched with, or the last warpgroup to ask for more waits forever.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int LAUNCH_REGISTERS = CONSUMERS == 1 ? 232 : 65536 / THREADS / 8 * 8;
static_assert(CONSUMERS <= 2, "three would be left with too few registers for their accumulators");
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (CONSUMERS + 1) * LAUNCH_REGISTERS,
              "the roles share the block's registers");
// Chunks of a block's first tile that the L2 cache fetches while the kernel ahead is still at work. More
// of them take its bandwidth from what that kernel loads.
constexpr int PREFETCHED = 6;
constexpr int TERM_WARPS = 2;  // that load terms: of rows, and of columns

typedef Terms<TILE_M, TILE_N> TileTerms;
typedef Results<TILE_M, TILE_N> TileResults;

// If deferred, two tiles' terms are needed at a time: one is still being written out, one multiplied.
constexpr int TERMS = DEFERRED ? 2 : 1;

struct Shared {
  unsigned char slots[STAGES][SLOT_BYTES];
  u64 full[STAGES], empty[STAGES], terms_full[TERMS], terms_empty[TERMS];
  TileTerms terms[TERMS];
  bool last;  // SPLIT_K > 1: whether all other parts of the tile have been added up
};

typedef Ring<STAGES> Turn;

// This block's share of the loads of one operand for a tile: the SHARERS blocks that need the same
// LINES lines load an equal part of them each, for all.
template <int LINES, int SHARERS> struct Share {
  const char* from;
  u32 bytes;    // that this block loads
  u32 arrives;  // bytes that arrive in a slot, from all sharers together
  __device__ __forceinline__ Share(const uint4* words, u32 first, u32 padded, int share) {
    constexpr u32 PART = LINES / SHARERS;
    const u32 lines = first < padded ? min(padded - first, (u32)LINES) : 0;
    const u32 skip = SHARERS == 1 ? 0 : share * PART;
    arrives = lines * CHUNK_BYTES;
    bytes = (skip < lines ? min(lines - skip, PART) : 0) * CHUNK_BYTES;
    from = (const char*)words + (u64)(first + skip) * CHUNK_BYTES;
  }
  __device__ __forceinline__ void load(u32 to, u32 bar, int share, unsigned short blocks) const {
    if (bytes == 0) return;
    if constexpr (SHARERS == 1)
      bulk_load(to, from, bytes, bar);
    else
      bulk_load_multicast(to + share * (LINES / SHARERS * CHUNK_BYTES), from, bytes, bar, blocks);
  }
};

struct Work {
  u32 tiles_m, tiles_n, count;  // in tiles of a cluster; the caller keeps them below 2**31
  __device__ __forceinline__ explicit Work(const Product& p) {
    // In 32 bits, which m and n fit: there are uniform registers for that.
    tiles_m = ((u32)p.m + TILE_M * CLUSTER_M - 1) / (TILE_M * CLUSTER_M);
    tiles_n = ((u32)p.n + TILE_N * CLUSTER_N - 1) / (TILE_N * CLUSTER_N);
    count = tiles_m * tiles_n * (u32)p.batch;
  }
};

// The chunks of K of one of `count` equal parts.
struct Span {
  int begin, end;
  __device__ __forceinline__ Span(u32 chunks, u32 index, u32 count) {
    const u32 each = chunks / count, more = chunks % count;
    begin = (int)(index * each + min(index, more));
    end = begin + (int)(each + (index < more));
  }
};

// The tile of a block, and its part of K.
struct Place {
  u32 tile;
  Span span;
  __device__ __forceinline__ Place(const Product& p, u32 worker, int rank)
      : tile(SPLIT_K > 1 ? worker / (u32)p.parts : worker),
        span((u32)p.chunks, SPLIT_K > 1 ? worker % (u32)p.parts * SPLIT_K + rank : 0,
             SPLIT_K > 1 ? (u32)p.parts * SPLIT_K : 1) {}
};

// This block's position in a cluster that shares tiles; blocks that split K have the same tile.
__device__ __forceinline__ int rank_in_m(int rank) { return SPLIT_K > 1 ? 0 : rank % CLUSTER_M; }
__device__ __forceinline__ int rank_in_n(int rank) { return SPLIT_K > 1 ? 0 : rank / CLUSTER_M; }

__device__ __forceinline__ void produce(const Product& p, const Work& work, Shared& shared,
                                        int rank, const Place& place, u32 workers) {
  const u32 a_lines = (u32)padded_lines(p.m), b_lines = (u32)padded_lines(p.n);
  const int rank_m = rank_in_m(rank), rank_n = rank_in_n(rank);
  unsigned short a_blocks = 0, b_blocks = 0;
  for (int i = 0; i < CLUSTER_N; i++) a_blocks |= 1 << (rank_m + CLUSTER_M * i);
  for (int i = 0; i < CLUSTER_M; i++) b_blocks |= 1 << (rank_n * CLUSTER_M + i);
  const int begin = place.span.begin, end = place.span.end;

  Turn turn;
  for (u32 t = place.tile; t < work.count; t += workers) {
    const Tile tile(t, work.tiles_m, work.tiles_n, (u32)p.group);
    Share<TILE_M, CLUSTER_N> a(
        p.a + (tile.item * p.a_step * p.chunks * A_PASSES + begin) * a_lines * CHUNK_PIECES,
        (tile.m * CLUSTER_M + rank_m) * TILE_M, a_lines, rank_n);
    Share<TILE_N, CLUSTER_M> b(
        p.b + (tile.item * p.b_step * p.chunks * B_PASSES + begin) * b_lines * CHUNK_PIECES,
        (tile.n * CLUSTER_N + rank_n) * TILE_N, b_lines, rank_m);
    int left = end;  // of this pass
    for (int chunk = begin; chunk < end * PASSES; chunk++) {
      if (PASSES > 1 && left-- == 0) {
        left = end - 1;
        if (AGAIN_B) b.from -= (u64)end * b_lines * CHUNK_BYTES;
        else a.from -= (u64)end * a_lines * CHUNK_BYTES;
      }
      const u32 full = shared_address(&shared.full[turn.slot]);
      const u32 data = shared_address(shared.slots[turn.slot]);
      barrier_wait(shared_address(&shared.empty[turn.slot]), turn.parity ^ 1);
      barrier_expect(full, a.arrives + b.arrives);
      a.load(data, full, rank_n, a_blocks);
      b.load(data + A_BYTES, full, rank_m, b_blocks);
      a.from += (u64)a_lines * CHUNK_BYTES;
      b.from += (u64)b_lines * CHUNK_BYTES;
      turn.next();
    }
  }
}

// Have the L2 cache fetch the first chunks of the operands: once, by the blocks of the first row and the
// first column of tiles.
__device__ __forceinline__ void prefetch(const Product& p, const Work& work, int rank, const Place& place) {
  if (place.tile >= work.count) return;
  const u32 a_lines = (u32)padded_lines(p.m), b_lines = (u32)padded_lines(p.n);
  const Tile tile(place.tile, work.tiles_m, work.tiles_n, (u32)p.group);
  const int begin = place.span.begin, end = min(place.span.end, begin + PREFETCHED);
  Share<TILE_M, CLUSTER_N> a(
      p.a + (tile.item * p.a_step * p.chunks * A_PASSES + begin) * a_lines * CHUNK_PIECES,
      (tile.m * CLUSTER_M + rank_in_m(rank)) * TILE_M, a_lines, rank_in_n(rank));
  Share<TILE_N, CLUSTER_M> b(
      p.b + (tile.item * p.b_step * p.chunks * B_PASSES + begin) * b_lines * CHUNK_PIECES,
      (tile.n * CLUSTER_N + rank_in_n(rank)) * TILE_N, b_lines, rank_in_m(rank));
  for (int chunk = begin; chunk < end; chunk++) {
    if (tile.n == 0) bulk_prefetch(a.from, a.bytes);
    if (tile.m == 0) bulk_prefetch(b.from, b.bytes);
    a.from += (u64)a_lines * CHUNK_BYTES;
    b.from += (u64)b_lines * CHUNK_BYTES;
  }
}

// Have the L2 cache fetch the popcounts of a tile's rows or columns. For one warp.
__device__ __forceinline__ void prefetch_terms(const Product& p, const Work& work, int rank, u32 t,
                                               bool rows) {
  if (t >= work.count) return;
  const Tile tile(t, work.tiles_m, work.tiles_n, (u32)p.group);
  const i64 first = rows ? (i64)(tile.m * CLUSTER_M + rank_in_m(rank)) * TILE_M
                         : (i64)(tile.n * CLUSTER_N + rank_in_n(rank)) * TILE_N;
  const i64 at = first + 32 * (threadIdx.x & 31), end = min(first + (rows ? TILE_M : TILE_N), rows ? p.m : p.n);
  const int* from = rows ? p.pop_a + tile.item * p.a_step * p.m : p.pop_b + tile.item * p.b_step * p.n;
  if (at < end) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// Load the terms of each tile, once the consumers have released the previous ones. For TERM_WARPS warps.
__device__ __forceinline__ void bring_terms(const Product& p, const Work& work, Shared& shared, int rank,
                                            u32 worker, u32 workers, bool rows) {
  Ring<TERMS> ring;
  const int lane = threadIdx.x & 31;
  for (u32 t = worker; t < work.count; t += workers) {
    const Tile tile(t, work.tiles_m, work.tiles_n, (u32)p.group);
    barrier_wait(shared_address(&shared.terms_empty[ring.slot]), ring.parity ^ 1);
    TileTerms& terms = shared.terms[ring.slot];
    if (rows)
      terms.fill_rows(p, tile.item, (i64)(tile.m * CLUSTER_M + rank_in_m(rank)) * TILE_M, lane, 32);
    else
      terms.fill_columns(p, tile.item, (i64)(tile.n * CLUSTER_N + rank_in_n(rank)) * TILE_N, lane, 32);
    barrier_arrive(shared_address(&shared.terms_full[ring.slot]));
    ring.next();
  }
}

#if OUTPUT == OUTPUT_PACKED
// Write the zeros that end the lines of each tile. For one warp.
__device__ __forceinline__ void fill_chunks(const Product& p, const Work& work, int rank, u32 worker,
                                            u32 workers) {
  for (u32 t = worker; t < work.count; t += workers) {
    const Tile tile(t, work.tiles_m, work.tiles_n, (u32)p.group);
    fill_chunk<TILE_M, TILE_N>(p, tile.item, (i64)(tile.m * CLUSTER_M + rank_in_m(rank)) * TILE_M,
                               (i64)(tile.n * CLUSTER_N + rank_in_n(rank)) * TILE_N, threadIdx.x & 31, 32);
  }
}
#endif

// Tell the blocks that write into this slot that one more warpgroup here has read it.
__device__ __forceinline__ void release(Shared& shared, int slot) {
  const int thread = threadIdx.x & 127;
  const u32 empty = shared_address(&shared.empty[slot]);
  if constexpr (CLUSTER == 1) {
    if (thread == 0) barrier_arrive(empty);
  } else {
    if (thread < CLUSTER) barrier_arrive_at(empty, thread);
  }
}

#if DIGITS
typedef WgmmaBytes<TILE_N> Instruction;
#else
typedef WgmmaB1<TILE_N> Instruction;
#endif

// Start the product of the chunk in the current slot; chunk 0 overwrites the accumulators.
__device__ __forceinline__ void start_chunk(int (&acc)[BLOCKS_M][ACC], Shared& shared, const Turn& turn,
                                            int chunk, int wg) {
  barrier_wait(shared_address(&shared.full[turn.slot]), turn.parity);
  const u32 data = shared_address(shared.slots[turn.slot]);
  const u64 a = operand_descriptor(data + wg * ROWS * CHUNK_BYTES);
  const u64 b = operand_descriptor(data + A_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < CHUNK_BITS / 256; step++)
#pragma unroll
    for (int block = 0; block < BLOCKS_M; block++)
      Instruction::run(acc[block], a + 2 * step + block * (64 * CHUNK_BYTES / 16), b + 2 * step,
                       chunk | step);
  wgmma_commit();
}

// Release the previous slot: one group of instructions stays in flight, the one before it has read slot
// `last`.
__device__ __forceinline__ void finish_before(Shared& shared, Turn& turn, int chunk, int& last) {
  wgmma_wait<1>();
  if (chunk) release(shared, last);
  last = turn.slot;
  turn.next();
}

// Multiply chunks `first` to `chunks` into the accumulators of consumer `wg`, which are kept if `more`.
__device__ __forceinline__ void multiply(int (&acc)[BLOCKS_M][ACC], Shared& shared, Turn& turn,
                                         int first, int chunks, int wg, int last, int more = 0) {
  for (int chunk = first; chunk < chunks; chunk++) {
    start_chunk(acc, shared, turn, chunk | more, wg);
    finish_before(shared, turn, chunk, last);
  }
  wgmma_wait<0>();
  release(shared, last);
}
// All chunks, once for each digit or plane.
__device__ __forceinline__ void multiply_all(int (&acc)[BLOCKS_M][ACC], Shared& shared, Turn& turn,
                                             int chunks, int wg) {
  multiply(acc, shared, turn, 0, chunks, wg, 0);
#pragma unroll 1
  for (int pass = 1; pass < PASSES; pass++) {
#pragma unroll
    for (int block = 0; block < BLOCKS_M; block++)
#pragma unroll
      for (int i = 0; i < ACC; i++) acc[block][i] = DIGITS ? acc[block][i] >> 8 : 2 * acc[block][i];
    multiply(acc, shared, turn, 0, chunks, wg, 0, 1);
  }
}

// The warp's position in a tile, for Results.
__device__ __forceinline__ int first_row(int wg) { return wg * ROWS + ((threadIdx.x & 127) >> 5) * 16; }

__device__ __forceinline__ TileResults results_of(const Product& p, const Work& work,
                                                  const TileTerms& terms, u32 t, int rank) {
  const Tile tile(t, work.tiles_m, work.tiles_n, (u32)p.group);
  return TileResults(p, terms, tile.item, (i64)(tile.m * CLUSTER_M + rank_in_m(rank)) * TILE_M,
                     (i64)(tile.n * CLUSTER_N + rank_in_n(rank)) * TILE_N);
}

#if DEFERRED
constexpr int PIECES = DEFERRED;
static_assert(TILE_N % (32 * PIECES) == 0, "whole pieces");

// A finished tile that has yet to be written out.
struct Pending {
  Halves<BLOCKS_M, ACC> acc;
  int ones[BLOCKS_M];
  Leftover<BLOCKS_M> leftover;

  __device__ __forceinline__ void take(const int (&from)[BLOCKS_M][ACC]) {
    acc.take(from);
#pragma unroll
    for (int block = 0; block < BLOCKS_M; block++) ones[block] = 0;
  }

  template <int PIECE = 0>
  __device__ __forceinline__ void store(const TileResults& results, int wg, int piece) {
    constexpr int COUNT = TILE_N / 8 / PIECES;
    if constexpr (PIECE + 1 < PIECES)
      if (piece > PIECE) return store<PIECE + 1>(results, wg, piece);
    results.store_fragments<PIECE * COUNT, COUNT, TILE_N / 8>(first_row(wg), 64, 0, acc, ones, leftover);
    if (PIECE == PIECES - 1) results.count_fragments(first_row(wg), 64, ones);
  }
};

// Consume all tiles, writing each out during the next one's products.
__device__ __forceinline__ void consume(const Product& p, const Work& work, Shared& shared, int rank,
                                        u32 worker, u32 workers, int wg) {
  if (worker >= work.count) return;
  Turn turn;
  Ring<TERMS> ring;  // of the pending tile
  Pending pending;
  int acc[BLOCKS_M][ACC];
  multiply(acc, shared, turn, 0, (int)p.chunks, wg, 0);
  pending.take(acc);
  u32 t = worker;
  const int group = __shfl_sync(0xffffffffu, wg, 0);  // the same for all lanes, which saves a register
  for (u32 next = t + workers; next < work.count; t = next, next += workers) {
    barrier_wait(shared_address(&shared.terms_full[ring.slot]), ring.parity);
    const TileResults results = results_of(p, work, shared.terms[ring.slot], t, rank);
    // Pieces are stored at equal intervals, those of the second warpgroup in between: one of them multiplies
    // while the other stores.
    int last = 0, piece = 0, next_piece = group * (int)p.chunks / (2 * PIECES);
    for (int chunk = 0; chunk < (int)p.chunks; chunk++) {
      start_chunk(acc, shared, turn, chunk, wg);
      if (chunk == next_piece) {
        pending.store(results, wg, piece);
        piece++;
        next_piece = (2 * piece + group) * (int)p.chunks / (2 * PIECES);
      }
      finish_before(shared, turn, chunk, last);
    }
    barrier_arrive(shared_address(&shared.terms_empty[ring.slot]));
    ring.next();
    wgmma_wait<0>();
    release(shared, last);
    pending.take(acc);
  }
  barrier_wait(shared_address(&shared.terms_full[ring.slot]), ring.parity);
  const TileResults results = results_of(p, work, shared.terms[ring.slot], t, rank);
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) pending.store(results, wg, piece);
}
#elif SPLIT_K == 1
// Consume all tiles, writing each out before starting the next.
__device__ __forceinline__ void consume(const Product& p, const Work& work, Shared& shared, int rank,
                                        u32 worker, u32 workers, int wg) {
  Turn turn;
  Ring<TERMS> ring;
  for (u32 t = worker; t < work.count; t += workers) {
    int acc[BLOCKS_M][ACC];
    multiply_all(acc, shared, turn, (int)p.chunks, wg);
    barrier_wait(shared_address(&shared.terms_full[ring.slot]), ring.parity);
    const TileResults results = results_of(p, work, shared.terms[ring.slot], t, rank);
    results.store_all(first_row(wg), 64, 0, acc);
    barrier_arrive(shared_address(&shared.terms_empty[ring.slot]));
    ring.next();
  }
}
#endif

#if SPLIT_K > 1
// Sum the parts of a tile over the cluster: each block sums and stores an equal share of rows, from
// counts of 16 bits. With further clusters for the tile, sums are added up in memory, and the cluster's
// block that comes last stores its share.
// For the consumers; the producer's warps join the barriers of the cluster on their own.
__device__ __forceinline__ void store_split(const int (&acc)[BLOCKS_M][ACC], Shared& shared,
                                            const Product& p, const TileResults& results, u32 tile,
                                            int rank, int wg) {
  constexpr int PITCH = TILE_N * 2 + 32;  // keeps the four rows of half a warp's store in different banks
  constexpr int SHARE = TILE_M / SPLIT_K, ACROSS = TILE_N / 8, VECTORS = SHARE * ACROSS;
  constexpr int STORERS = CONSUMERS * 128, EACH = (VECTORS + STORERS - 1) / STORERS;
  static_assert(TILE_M * PITCH <= STAGES * SLOT_BYTES, "the parts replace the slots");
  static_assert(OUTPUT != OUTPUT_PACKED || VECTORS % 32 == 0, "whole warps make words");
  const int thread = wg * 128 + (threadIdx.x & 127);
  const int lane = threadIdx.x & 31, warp = (threadIdx.x & 127) >> 5;
  const u32 parts = shared_address(shared.slots);
  // The other consumers must have read their last slot before it is overwritten with parts.
  asm volatile("bar.sync 1, %0;" ::"n"(STORERS) : "memory");
#pragma unroll
  for (int block = 0; block < BLOCKS_M; block++)
#pragma unroll
    for (int j = 0; j < ACC; j += 8)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        const int* from = acc[block] + j + 2 * below;  // four neighbors: layout.cuh
        const int position = wg * ROWS + block * 64 + warp * 16 + (lane >> 2) + 8 * below;
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(parts + position * PITCH + j * 4 +
                                                              8 * (lane & 3)),
                     "r"(from[0] | from[1] << 16), "r"(from[4] | from[5] << 16) : "memory");
      }
  cluster_sync();
  uint4 got[EACH][SPLIT_K];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int vector = min(thread + e * STORERS, VECTORS - 1);
    const u32 from = parts + (rank * SHARE + vector / ACROSS) * PITCH + vector % ACROSS * 16;
#pragma unroll
    for (int block = 0; block < SPLIT_K; block++) got[e][block] = load_four_from_block(from, block);
  }
  int sum[EACH][8] = {};
#pragma unroll
  for (int e = 0; e < EACH; e++)
#pragma unroll
    for (int block = 0; block < SPLIT_K; block++) {
      const u32 pairs[4] = {got[e][block].x, got[e][block].y, got[e][block].z, got[e][block].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[e][2 * i] += pairs[i] & 0xffffu;
        sum[e][2 * i + 1] += pairs[i] >> 16;
      }
    }
  cluster_arrive();  // the others' parts have been read
  if (p.parts > 1) {
    // Neighboring threads add to neighbors.
    int* sums = p.sums + ((u64)tile * SPLIT_K + rank) * (8 * VECTORS + 1);
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (VECTORS % STORERS == 0 || thread + e * STORERS < VECTORS)
          atomicAdd(sums + i * VECTORS + thread + e * STORERS, sum[e][i]);
    __threadfence();
    asm volatile("bar.sync 1, %0;" ::"n"(STORERS) : "memory");
    if (thread == 0) shared.last = atomicAdd(sums + 8 * VECTORS, 1) + 1 == (int)p.parts;
    asm volatile("bar.sync 1, %0;" ::"n"(STORERS) : "memory");
    if (!shared.last) return;
    __threadfence();
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (VECTORS % STORERS == 0 || thread + e * STORERS < VECTORS)
          sum[e][i] = __ldcg(sums + i * VECTORS + thread + e * STORERS);
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int vector = thread + e * STORERS;
    if (vector >= VECTORS) break;
    const int row = line_at(rank * SHARE + vector / ACROSS);
    results.store_eight(row, vector % ACROSS * 8, sum[e]);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    __cluster_dims__(SPLIT_K > 1 ? SPLIT_K : CLUSTER, 1, 1)
    xnor_gemm(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *(Shared*)raw;
  const int wg = (int)(threadIdx.x >> 7) - 1, warp = (threadIdx.x & 127) >> 5;  // wg -1: producer
  constexpr bool clustered = CLUSTER > 1 || SPLIT_K > 1;
  constexpr int BLOCKS = SPLIT_K > 1 ? SPLIT_K : CLUSTER;
  const int rank = clustered ? cluster_rank() : 0;
  const u32 workers = gridDim.x / BLOCKS;
  const Place place(p, blockIdx.x / BLOCKS, rank);
  const Work work(p);

  static_assert(STAGES <= 32, "a lane for each slot");
  const int slot = (int)threadIdx.x - 128;
  if (0 <= slot && slot < STAGES) {
    barrier_init(shared_address(&shared.full[slot]), 1);
    barrier_init(shared_address(&shared.empty[slot]), CONSUMERS * CLUSTER);
    barrier_init_fence();
  }
  if (slot == STAGES) {
    for (int i = 0; i < TERMS; i++) {
      // Each lane arrives for its own writes and reads.
      barrier_init(shared_address(&shared.terms_full[i]), 32 * TERM_WARPS);
      barrier_init(shared_address(&shared.terms_empty[i]), CONSUMERS * 128);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == 0) prefetch(p, work, rank, place);
#if !DIGITS  // bytes have no popcounts
  if (wg < 0 && (warp == 1 || warp == 2)) prefetch_terms(p, work, rank, place.tile, warp == 1);
#endif
  allow_next();
  // Blocks that split K leave each other's barriers alone.
  if constexpr (CLUSTER > 1) cluster_sync(); else __syncthreads();
  wait_for_previous();

  if (wg < 0) {
    if constexpr (ROLES) give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(p, work, shared, rank, place, workers);
    if (warp == 1 || warp == 2) bring_terms(p, work, shared, rank, place.tile, workers, warp == 1);
#if OUTPUT == OUTPUT_PACKED
    if (warp == 3 && (SPLIT_K == 1 || rank == 0)) fill_chunks(p, work, rank, place.tile, workers);
#endif
    __syncwarp();
    if constexpr (SPLIT_K > 1) {
      cluster_sync();
      cluster_arrive();
    }
  } else {
    if constexpr (ROLES) take_registers<CONSUMER_REGISTERS>();
#if SPLIT_K > 1
    // One tile per cluster: the parts replace the slots, so nothing may be loaded after them. The
    // caller ensures that each block has at least one chunk.
    Turn turn;
    int acc[BLOCKS_M][ACC];
    multiply(acc, shared, turn, 0, place.span.end - place.span.begin, wg, 0);
    barrier_wait(shared_address(&shared.terms_full[0]), 0);
    const TileResults results = results_of(p, work, shared.terms[0], place.tile, rank);
    store_split(acc, shared, p, results, place.tile, rank, wg);
#else
    consume(p, work, shared, rank, place.tile, workers, wg);
#endif
  }
  // No block may end while another of its cluster still writes to its shared memory or reads it.
  if constexpr (CLUSTER > 1) cluster_sync();
  if constexpr (SPLIT_K > 1) cluster_wait();
}
