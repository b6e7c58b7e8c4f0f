// Traversal of a layer by strips of columns, with sums over its rows.
//
// The translation unit sets the macros of layer.cuh, and
//     VECTOR   neighboring columns of a lane: 1, 2 or 4; it divides the number of columns
//     COLS, CLUSTER  columns of a strip and blocks of its cluster (see below)
//     HELD     rows of a thread that stay in shared memory between passes, or 0 (see below)
//     BLOCK_WARPS  warps of a block (block.cuh): 16 for strips of many rows
// and may set WHOLE to 1: every strip has COLS columns, and every thread HELD rows, or a multiple of 8.
#pragma once

#ifndef WHOLE
#define WHOLE 0
#endif

#include "block.cuh"
#include "hopper.cuh"
#include "layer.cuh"

// A strip: COLS neighboring columns, whose rows are shared by the blocks of one blockIdx.x. Used for
// sums over rows. A thread has VECTOR neighboring columns, LANES threads have a row.
constexpr int LANES = COLS / VECTOR, ROWS_AT_ONCE = THREADS / LANES;
static_assert(COLS % 32 == 0 && LANES <= 32, "a strip's rows are whole words of masks");

struct Strip {
  int lane = threadIdx.x % LANES;
  int first_col = blockIdx.x * COLS, col = first_col + lane * VECTOR;
  int step = gridDim.y * ROWS_AT_ONCE;  // from a row of a thread to its next
  int first_row = blockIdx.y * ROWS_AT_ONCE;  // the same for all threads of a block, ...
  int skip = threadIdx.x / LANES;             // ... whose rows are this much further
  int rows, cols;
  __device__ __forceinline__ explicit Strip(const Layer& p) : rows((int)p.rows), cols((int)p.cols) {}
  __device__ __forceinline__ bool has_cols() const { return WHOLE || col < cols; }
  // Existing columns, in place of those beyond the last.
  __device__ __forceinline__ int safe_col() const { return has_cols() ? col : 0; }
  // Row `turn` of a thread, and whether any thread of the block has one.
  __device__ __forceinline__ int row(int turn) const { return first_row + turn * step + skip; }
  __device__ __forceinline__ bool begins(int turn) const {
    return WHOLE && HELD ? turn < HELD : first_row + turn * step < rows;
  }
  __device__ __forceinline__ bool has_row(int row) const { return WHOLE || row < rows; }
  __device__ __forceinline__ bool has(int row) const { return has_row(row) && has_cols(); }
  // A row that exists: the last one, in place of one beyond it.
  __device__ __forceinline__ int safe_row(int row) const { return WHOLE ? row : min(row, rows - 1); }
  // Offset of a thread's elements of a row that exists.
  __device__ __forceinline__ int offset(int row) const { return safe_row(row) * cols + safe_col(); }
  // Offset of the mask word with a thread's columns of a row, and their first bit in it.
  __device__ __forceinline__ int word(int row) const {
    return safe_row(row) * ((cols + 31) >> 5) + (safe_col() >> 5);
  }
  __device__ __forceinline__ int bit() const { return safe_col() & 31; }
};

// Held: if shared memory has room for a block's rows of a strip, they are copied there once, with all
// copies in flight together, and every pass reads them there. Device memory is then read only once,
// and a block waits for it once. A thread copies its own elements; masks, and other data that all
// columns of a row need, are copied by some of the row's lanes, which are in one warp.
//
// Dynamic shared memory holds for each row of the block: COLS products, COLS elements of another array
// if a kernel holds one (`OTHER`), mask words, and data that a kernel adds at the end.
#if HELD
static_assert(CLUSTER > 1 && COLS == 32, "of use where there is a second pass; a word a row");
extern __shared__ __align__(16) unsigned char held[];
constexpr int HELD_ROWS = HELD * ROWS_AT_ONCE;

template <int BYTES> __device__ __forceinline__ void copy_aside(void* to, const void* from) {
  const u32 at = shared_address(to);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES)
                 : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all groups of this warp's copies except the last `later`.
__device__ __forceinline__ void wait_for_groups(int later) {
  switch (later) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
  __syncwarp();
}

// A thread's V elements in each of its rows, for an array of element type E.
template <typename E> struct HeldElements {
  typedef Vector<E, VECTOR> Elements;
  Elements* own;
  __device__ __forceinline__ explicit HeldElements(void* from)
      : own((Elements*)from + threadIdx.x) {}
  __device__ __forceinline__ void copy(const Strip& at, const E* from, int turn) const {
    copy_aside<sizeof(Elements)>(own + turn * THREADS, from + at.offset(at.row(turn)));
  }
  __device__ __forceinline__ Elements operator()(int turn) const { return own[turn * THREADS]; }
};

// N times 4 bytes per row, the same for all its lanes.
template <typename E> struct HeldByRow {
  static constexpr int PIECES = sizeof(E) < 16 ? 1 : sizeof(E) / 16, PIECE = sizeof(E) / PIECES;
  static_assert(PIECES <= LANES, "a lane copies a piece");
  E* rows;
  int skip = threadIdx.x / LANES;
  __device__ __forceinline__ explicit HeldByRow(void* from) : rows((E*)from) {}
  __device__ __forceinline__ void copy(const Strip& at, const E* row, int turn) const {
    if (at.lane < PIECES)
      copy_aside<PIECE>((char*)(rows + turn * ROWS_AT_ONCE + skip) + at.lane * PIECE,
                        (const char*)row + at.lane * PIECE);
  }
  __device__ __forceinline__ const E& operator()(int turn) const {
    return rows[turn * ROWS_AT_ONCE + skip];
  }
};

constexpr int HELD_PRODUCTS = HELD_ROWS * COLS * sizeof(product_t);
constexpr int HELD_KEPT = DROP != DROP_NONE ? HELD_ROWS * 4 : 0;
constexpr int HELD_MORE = HELD_PRODUCTS + HELD_KEPT;  // where a kernel's own data begin
__device__ __forceinline__ HeldElements<product_t> held_products() {
  return HeldElements<product_t>(held);
}
__device__ __forceinline__ HeldByRow<u32> held_kept() { return HeldByRow<u32>(held + HELD_PRODUCTS); }

// Start all copies, GROUP rows per group: products, dropout masks, and the copies of `copy_more` for
// row `turn` of a thread.
constexpr int GROUP = HELD < 8 ? HELD : 8;
static_assert(HELD % GROUP == 0, "whole groups");
template <typename More>
__device__ __forceinline__ void hold(const Layer& p, const Strip& at, const More& copy_more) {
#pragma unroll 1
  for (int turn = 0; turn < HELD; turn += GROUP) {
    if (at.begins(turn)) {
#pragma unroll
      for (int b = 0; b < GROUP; b++) {
        held_products().copy(at, p.z, turn + b);
        if (DROP != DROP_NONE) held_kept().copy(at, p.kept + at.word(at.row(turn + b)), turn + b);
        copy_more(turn + b);
      }
    }
    end_group();
  }
}
#endif

// A thread's products of ROWS rows from row `turn` on, and their dropout masks. All are loaded before
// the first is used, whether the row exists or not: no load waits for another. In the FIRST pass, what is
// held may be still on its way.
template <int ROWS_, bool FIRST> struct Products {
  Vector<product_t, VECTOR> raw[ROWS_];
  u32 keeps[ROWS_];
  __device__ __forceinline__ Products(const Layer& p, const Strip& at, int turn) {
#if HELD
    static_assert(GROUP % ROWS_ == 0, "a batch is part of a group");
    if (FIRST) wait_for_groups(HELD / GROUP - 1 - turn / GROUP);
#pragma unroll
    for (int b = 0; b < ROWS_; b++) {
      raw[b] = held_products()(turn + b);
      keeps[b] = DROP != DROP_NONE ? held_kept()(turn + b) >> at.bit() : 0;
    }
#else
#pragma unroll
    for (int b = 0; b < ROWS_; b++) {
      const int row = at.row(turn + b);
      raw[b] = *(const Vector<product_t, VECTOR>*)(p.z + at.offset(row));
      keeps[b] = DROP != DROP_NONE ? p.kept[at.word(row)] >> at.bit() : 0;
    }
#endif
  }
  __device__ __forceinline__ u32 kept(int b, int i) const { return keeps[b] >> i & 1; }
  // Those of row b, after dropout if that comes first.
  __device__ __forceinline__ void load(const Layer& p, int b, float (&z)[VECTOR]) const {
    to_floats<VECTOR>(raw[b], z);
    if (DROP != DROP_PRODUCT) return;
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
      z[i] = kept(b, i) ? __fmul_rn(z[i], (float)p.keep_scale) : 0.0f;
  }
};

// If a second pass needs the sums over rows, the blocks of a strip form a cluster, and all of them get
// the sums (CLUSTER blocks; Hopper and later). Otherwise (CLUSTER 1) the last block to arrive gets
// them, and the second pass is a separate launch.
#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(1, CLUSTER, 1)
#else
#define IN_CLUSTERS
#endif
// Two blocks per multiprocessor are enough. By default the compiler saves registers for more, and
// serialises loads that should be in flight together.
#define BY_STRIPS __launch_bounds__(THREADS, 2)

// Whether this block, among those that got the sums, writes the results.
__device__ __forceinline__ bool writes_sums() { return CLUSTER == 1 || blockIdx.y == 0; }

// Sums over all rows of N numbers per column. True where `total` holds them; the order of summation
// does not depend on which block comes last. Must be followed by `leave_sums`.
template <int N>
__device__ __forceinline__ bool sum_over_rows(const float (&mine)[N][VECTOR], float* partials,
                                              u32* tickets, i64 cols, double (&total)[N][COLS]) {
  constexpr int PAIRS = N * COLS;
  __shared__ float parts[WARPS][N][COLS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      float sum = mine[n][i];
#pragma unroll
      for (int apart = LANES; apart < 32; apart <<= 1) sum += __shfl_xor_sync(ALL, sum, apart);
      if (lane < LANES) parts[warp][n][lane * VECTOR + i] = sum;
    }
  __syncthreads();
#if CLUSTER > 1
  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += (&parts[w][0][0])[i];
    (&parts[0][0][0])[i] = sum;  // which no other thread reads
  }
  cluster_sync();
  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
    float parts_of[CLUSTER];
#pragma unroll
    for (int block = 0; block < CLUSTER; block++)
      parts_of[block] =
          __int_as_float(load_from_block(shared_address(&parts[0][0][0] + i), block));
    double sum = 0;
#pragma unroll
    for (int block = 0; block < CLUSTER; block++) sum += parts_of[block];
    (&total[0][0])[i] = sum;
  }
  cluster_arrive_relaxed();
#else
  const i64 first = (i64)blockIdx.x * COLS;
  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += (&parts[w][0][0])[i];
    if (first + i % COLS < cols)
      partials[((i64)blockIdx.y * N + i / COLS) * cols + first + i % COLS] = sum;
  }
  if (!is_last_block(tickets + blockIdx.x, gridDim.y)) return false;
  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
    double sum = 0;
    if (first + i % COLS < cols) {
#pragma unroll 8
      for (u32 s = 0; s < gridDim.y; s++)
        sum += __ldcg(partials + ((i64)s * N + i / COLS) * cols + first + i % COLS);
    }
    (&total[0][0])[i] = sum;
  }
#endif
  __syncthreads();
  return true;
}

// At the end of a kernel: no block of a cluster may end while another reads its sums.
__device__ __forceinline__ void leave_sums() {
#if CLUSTER > 1
  cluster_wait();
#endif
}
