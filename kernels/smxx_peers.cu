// Exchanges between the GPUs of one host, which read each other's memory.
//
// Every rank launches the same kernels in the same order with the same grid, each on a GPU of its
// own. Block b of a rank meets block b of the others: it writes the number of the meeting into the
// memory of each, and waits until all have written theirs. Earlier kernels have written what a rank
// sends into the rank's own memory. The others read it after the first meeting; the rank may
// overwrite it after the last.
//
// A rank that is lost never comes. So waiting blocks look now and then at a word of the host's
// memory, which the host sets to end all exchanges. They then leave, whatever the result is.
//
// What bounds it: for small arrays latency, some microseconds a meeting; for large ones the
// connection. So a thread reads several pieces of 16 bytes at a time. There are few blocks, to
// leave room for other kernels.
//
// The translation unit sets KIND (how elements are combined, as in peers.py), RANKS and REAL.
// Nothing depends on REAL.

#include "ranks.cuh"

enum { COPIED = 0, FLOATS = 1, BFLOATS = 2 };

constexpr int PEER_THREADS = 512;
// Pieces that a thread reads of each rank at a time.
constexpr int TOGETHER = KIND == COPIED ? 8 : RANKS >= 8 ? 1 : 8 / RANKS;

// Filled by cupybnn/backends/cuda/peers.py, field by field in this order. The ranks' arrays are aligned to 16
// bytes, and so is their size.
struct Peers {
  const uint4* sent[MOST_RANKS];  // by rank: its array, read from `first` on
  u32* marks[MOST_RANKS];         // by rank: where the others write into its memory, 8 words a block
  u32* meetings;                  // number of them so far, by block of this rank
  const u32* ended;               // in the host's memory: not 0 if ranks must stop waiting
  i64 rank;
};

__device__ __forceinline__ u32 acquire(const u32* from) {
  u32 found;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(from) : "memory");
  return found;
}
__device__ __forceinline__ void release(u32* to, u32 v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
// Never from a cache of this multiprocessor, which does not see what other devices write.
__device__ __forceinline__ uint4 read(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// Whether all ranks' blocks of this number have come to the same meeting.
__device__ __forceinline__ bool meet(const Peers& p, u32 number) {
  __syncthreads();  // what this block has read
  bool all = true;
  if (threadIdx.x < RANKS && threadIdx.x != p.rank) {
    release(p.marks[threadIdx.x] + MOST_RANKS * blockIdx.x + p.rank, number);
    const u32* theirs = p.marks[p.rank] + MOST_RANKS * blockIdx.x + threadIdx.x;
    for (int rounds = 1; (int)(acquire(theirs) - number) < 0; rounds++)
      if (rounds % 1024 == 0 && *(const volatile u32*)p.ended) {
        all = false;
        break;
      }
  }
  return __syncthreads_and(all);
}

template <typename E>
__device__ __forceinline__ uint4 sum(const uint4 (&of)[RANKS]) {
  constexpr int V = sizeof(uint4) / sizeof(E);
  float total[V];
#pragma unroll
  for (int rank = 0; rank < RANKS; rank++) add_rank<V>(rank == 0, *(const Vector<E, V>*)&of[rank], total);
  const Vector<E, V> sum = rounded<E>(total);
  return *(const uint4*)&sum;
}

// Write `count` pieces of 16 bytes from piece `first` on: their sum over the ranks, or each rank's,
// one after another.
extern "C" __global__ void __launch_bounds__(PEER_THREADS)
    combine(const __grid_constant__ Peers p, i64 first, i64 count, uint4* __restrict__ out) {
  u32 number = p.meetings[blockIdx.x];
  const i64 start = (i64)blockIdx.x * PEER_THREADS + threadIdx.x, step = (i64)gridDim.x * PEER_THREADS;
  if (meet(p, ++number)) {
    if constexpr (KIND == COPIED) {
      for (int k = 0; k < RANKS; k++) {
        const int rank = (int)(p.rank + k) % RANKS;  // not all from the same one
        for (i64 i = start; i < count; i += TOGETHER * step) {
          uint4 v[TOGETHER];
#pragma unroll
          for (int j = 0; j < TOGETHER; j++)
            if (i + j * step < count) v[j] = read(p.sent[rank] + first + i + j * step);
#pragma unroll
          for (int j = 0; j < TOGETHER; j++)
            if (i + j * step < count) out[rank * count + i + j * step] = v[j];
        }
      }
    } else {
      for (i64 i = start; i < count; i += TOGETHER * step) {
        uint4 v[TOGETHER][RANKS];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
          if (i + j * step >= count) continue;
#pragma unroll
          for (int rank = 0; rank < RANKS; rank++) v[j][rank] = read(p.sent[rank] + first + i + j * step);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++)
          if (i + j * step < count)
            out[i + j * step] = KIND == BFLOATS ? sum<bfloat16_bits>(v[j]) : sum<float>(v[j]);
      }
    }
    meet(p, ++number);
  }
  if (threadIdx.x == 0) p.meetings[blockIdx.x] = number;
}
