// Instructions of sm_90a under readable names: barriers in shared memory, asynchronous copies, clusters,
// registers by role, and the helpers of a warpgroup's matrix products (wgmma.cuh): their order, operand
// descriptors, and storing their results (PTX ISA: mbarrier, cp.async, cp.async.bulk,
// barrier.cluster, setmaxnreg, wgmma, stmatrix).
#pragma once

#include "layout.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrive on the same barrier of another block of the cluster. Without release at cluster scope, which
// would wait for all earlier stores of results.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, int block) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(bar), "r"(block)
      : "memory");
}
// Without acquire at cluster scope, which would invalidate the L1 cache at every wait: through these
// barriers other blocks only signal that they have finished reading; they pass no data.
__device__ __forceinline__ void barrier_wait(u32 bar, int parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(bar), "r"(parity)
      : "memory");
}

// A position in a ring of slots: which one, and the parity of its barriers.
template <int SLOTS> struct Ring {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == SLOTS) { slot = 0; parity ^= 1; }
  }
};

// Copy bytes (a multiple of 16) from device memory; `bar` counts their arrival.
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to), "l"(from), "r"(bytes), "r"(bar)
      : "memory");
}
// The same, to the same offset in each block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 bar,
                                                    unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "h"(blocks)
      : "memory");
}

// Fetch bytes (a multiple of 16) into the L2 cache, where later writes to them are seen.
__device__ __forceinline__ void bulk_prefetch(const void* from, u32 bytes) {
  if (bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// How the copy engine finds boxes of a matrix (CUtensorMap of the driver API).
struct alignas(64) TensorMap { u64 opaque[16]; };

// Copy a box of a matrix described by a tensor map, starting at column x and row y; elements outside
// the matrix are zeros, which `bar` counts too.
__device__ __forceinline__ void tensor_load(u32 to, const void* map, int x, int y, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(bar)
      : "memory");
}
// Copy a word from this thread, or write zeros for data that does not exist; ...
__device__ __forceinline__ void copy_or_zero(u32 to, const u32* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 4 : 0)
               : "memory");
}
// ... and arrive when all of this thread's copies have.
__device__ __forceinline__ void barrier_arrive_with_copies(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All lanes of a warp arrive and wait together (aligned): after a loop or a branch of some they meet first,
// since the compiler need not join them again in front of inline assembly.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// Without making writes visible to the others: they only wait for each other to arrive.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
__device__ __forceinline__ int load_from_block(u32 address, int block) {
  int value;
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.s32 %0, [remote]; }"
      : "=r"(value) : "r"(address), "r"(block) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_four_from_block(u32 address, int block) {
  uint4 v;
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote]; }"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address), "r"(block) : "memory");
  return v;
}

template <int REGISTERS> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Store four 8 x 8 blocks of 16-bit elements from tensor-core result registers: each lane gives the
// address of one row or, if TRANSPOSED, one column.
template <bool TRANSPOSED> __device__ __forceinline__ void store_blocks(u32 to, const u32 (&v)[4]) {
  if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// Descriptor of a K-major operand whose lines are 128 bytes long, swizzled: leading offset 16 bytes,
// stride offset 1024 bytes (eight lines), 128-byte swizzle. Advancing 256 bits along K adds 32 bytes,
// 2 in the address field.
__device__ __forceinline__ u64 operand_descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// The same for an operand whose lines' neighbors are contiguous, 64 elements of 16 bits at a time, and
// swizzled likewise: stride offset 1024 bytes (eight elements along K), and `next` bytes to the next
// 64 lines. 16 elements along K are 2048 bytes further, 128 in the address field.
__device__ __forceinline__ u64 operand_descriptor_across(u32 address, u32 next) {
  return (u64)((address & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | (64ull << 32) | (1ull << 62);
}
