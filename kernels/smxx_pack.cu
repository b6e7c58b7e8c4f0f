// Signs of one or two strided arrays, one bit each, and how many are +1 in each line.
//
// The blocks of one launch are dealt out to the operands of a product, so that a call on arrays
// costs one launch for both. An operand is read in one of two ways, whichever is contiguous:
//   along lines    (a row-major left operand) a warp takes 1024 elements of a line: lanes read
//                  neighbours, and together form words;
//   across lines   (a row-major right operand) a lane takes a line, or two neighbouring ones,
//                  and a warp 128 elements of it: one 16-byte piece.
// Any other strides work in the first way, slower.
//
// What bounds it: reading the arrays. Loads are up to 16 bytes wide where alignment allows it, and
// all of a batch are issued before the first is used.
//
// The translation unit sets TYPE_A and TYPE_B, the element types, and SAME_TYPE where they are one.

#include "layout.cuh"
#include "signs.cuh"

constexpr int WARPS = 8;
constexpr u32 ALL = 0xffffffffu;

// Filled by cupybnn/backends/cuda/packing.py, field by field in this order.
struct Operand {
  const char* x;
  u32* words;
  int* pops;         // (batch, lines)
  i64 lines, k, chunks, batch;
  i64 line_stride, k_stride, batch_stride;  // in bytes
  i64 across;        // which of the two ways
  i64 wide;          // whether a lane may read several neighbours at once: adjacent, and aligned
  i64 parts;         // along: warps that share a line; across: blocks that share a line's chunks
  i64 blocks;        // of this operand
};
struct Operands { Operand a, b; };

template <typename T, int V> struct alignas(sizeof(T) * V) Vector { T at[V]; };

// Word `lane` of the 1024 elements from `x`, of which `left` exist; V neighbours to a lane at a time.
template <typename T, int V>
__device__ __forceinline__ u32 pack_chunk_wide(const char* x, i64 left, int lane) {
  constexpr int STEPS = 32 / V;                   // a step is V words
  constexpr int BATCH = STEPS < 8 ? STEPS : 8;    // loads in flight
  constexpr int LANES = 32 / V;                   // that form a word
  const Vector<T, V>* from = (const Vector<T, V>*)x + lane;
  u32 mine = 0;
#pragma unroll
  for (int first = 0; first < STEPS; first += BATCH) {
    Vector<T, V> v[BATCH];
    if (left >= CHUNK_BITS) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) v[i] = from[(first + i) * 32];
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int at = ((first + i) * 32 + lane) * V;
        if (at + V <= left) v[i] = from[(first + i) * 32];
        else
          for (int e = 0; e < V; e++)
            v[i].at[e] = at + e < left ? from[(first + i) * 32].at[e] : missing<T>();
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      u32 word = 0;
#pragma unroll
      for (int e = 0; e < V; e++) word |= (u32)nonnegative(v[i].at[e]) << e;
      word <<= lane % LANES * V;
#pragma unroll
      for (int apart = 1; apart < LANES; apart <<= 1) word |= __shfl_xor_sync(ALL, word, apart);
      word = __shfl_sync(ALL, word, lane % V * LANES);
      if (first + i == lane / V) mine = word;
    }
  }
  return mine;
}

// The same for elements `stride` bytes apart, one to a lane: a ballot is a word.
template <typename T>
__device__ __forceinline__ u32 pack_chunk(const char* x, i64 stride, i64 left, int lane) {
  constexpr int BATCH = 16;
  const char* from = x + lane * stride;
  u32 mine = 0;
#pragma unroll
  for (int first = 0; first < 32; first += BATCH) {
    T v[BATCH];
    if (left >= CHUNK_BITS) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) v[i] = *(const T*)(from + (first + i) * 32 * stride);
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        v[i] = (first + i) * 32 + lane < left ? *(const T*)(from + (first + i) * 32 * stride)
                                              : missing<T>();
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const u32 word = __ballot_sync(ALL, nonnegative(v[i]));
      if (first + i == lane) mine = word;
    }
  }
  return mine;
}

template <typename T>
__device__ __forceinline__ void pack_along(const Operand& p, u32 block, int* shared) {
  constexpr int V = 16 / sizeof(T);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int parts = (int)p.parts, part = warp % parts, lines_here = WARPS / parts;
  // 32 bits, which divide ten times as fast as 64: the caller keeps the number of lines below 2**31.
  const u32 padded = (u32)padded_lines(p.lines);
  const u32 index = block * lines_here + warp / parts;
  const u32 item = index / padded;
  const u32 line = index - item * padded, position = position_of(line);
  int ones = 0;
  if (item < p.batch) {
    const char* x = p.x + item * p.batch_stride + line * p.line_stride;
    for (u32 chunk = part; chunk < (u32)p.chunks; chunk += parts) {
      const i64 start = (i64)chunk * CHUNK_BITS, left = line < p.lines ? p.k - start : 0;
      u32 word = 0;
      if (left > 0)
        word = p.wide ? pack_chunk_wide<T, V>(x + start * sizeof(T), left, lane)
                      : pack_chunk<T>(x + start * p.k_stride, p.k_stride, left, lane);
      p.words[line_chunk(item, p.chunks, chunk, p.lines, position) + swizzled_word(position, lane)] =
          word;
      ones += __popc(word);
    }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) ones += __shfl_xor_sync(ALL, ones, step);
  if (lane == 0) shared[warp] = ones;
  __syncthreads();
  if (lane == 0 && part == 0 && item < p.batch && line < p.lines) {
    for (int i = 1; i < parts; i++) ones += shared[warp + i];
    p.pops[item * p.lines + line] = ones;
  }
}

template <typename T, int V>
__device__ __forceinline__ void pack_across(const Operand& p, u32 block, int* shared) {
  constexpr int IN_16_REGISTERS = 64 / (V * (int)sizeof(T));
  constexpr int BATCH = V == 1 || IN_16_REGISTERS > 16 ? 16 : IN_16_REGISTERS;  // loads in flight
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 groups = (u32)((p.lines + 32 * V - 1) / (32 * V)), parts = (u32)p.parts;
  const u32 part = block % parts, group = block / parts % groups, item = block / parts / groups;
  const u32 line = (group * 32 + lane) * V;
  const char* x = p.x + item * p.batch_stride + line * p.line_stride;
  const bool inside = line + V <= p.lines;  // V divides the number of lines
  int ones[V] = {};
  for (u32 chunk = part; chunk < (u32)p.chunks; chunk += parts) {
    const i64 start = (i64)chunk * CHUNK_BITS + warp * 128;
    const i64 left = inside ? p.k - start : 0;
    const char* from = x + start * p.k_stride;
    u32 piece[V][4] = {};
#pragma unroll
    for (int w = 0; w < 4; w++) {
#pragma unroll
      for (int bit = 0; bit < 32; bit += BATCH) {
        Vector<T, V> v[BATCH];
        if (left >= 128) {
#pragma unroll
          for (int i = 0; i < BATCH; i++)
            v[i] = *(const Vector<T, V>*)(from + i * p.k_stride);
        } else {
#pragma unroll
          for (int i = 0; i < BATCH; i++) {
            if (w * 32 + bit + i < left) {
              v[i] = *(const Vector<T, V>*)(from + i * p.k_stride);
            } else {
#pragma unroll
              for (int e = 0; e < V; e++) v[i].at[e] = missing<T>();
            }
          }
        }
        from += BATCH * p.k_stride;
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
          for (int e = 0; e < V; e++) piece[e][w] |= (u32)nonnegative(v[i].at[e]) << (bit + i);
      }
    }
#pragma unroll
    for (int e = 0; e < V; e++) {
      const uint4 bits = make_uint4(piece[e][0], piece[e][1], piece[e][2], piece[e][3]);
      ones[e] += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
      if (line + e < padded_lines(p.lines)) {
        const u32 position = position_of(line + e);
        uint4* to = (uint4*)(p.words + line_chunk(item, p.chunks, chunk, p.lines, position));
        to[swizzled_piece(position, warp)] = bits;
      }
    }
  }
  // A line's popcount is the sum over the block's warps.
#pragma unroll
  for (int e = 0; e < V; e++) {
    shared[warp * 32 + lane] = ones[e];
    __syncthreads();
    if (warp == 0 && line + e < p.lines) {
      int sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += shared[w * 32 + lane];
      if (p.parts == 1) p.pops[item * p.lines + line + e] = sum;
      else atomicAdd(p.pops + item * p.lines + line + e, sum);  // zeros when the kernel starts
    }
    __syncthreads();
  }
}

template <typename T> __device__ __forceinline__ void pack(const Operand& p, u32 block, int* shared) {
  // More lines to a lane would need too many registers for their words.
  if (!p.across) pack_along<T>(p, block, shared);
  else if (p.wide) pack_across<T, 2>(p, block, shared);
  else pack_across<T, 1>(p, block, shared);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    pack_operands(const __grid_constant__ Operands p) {
  __shared__ int shared[WARPS * 32];
  const bool first = blockIdx.x < p.a.blocks;
#if SAME_TYPE
  pack<TYPE_A>(first ? p.a : p.b, blockIdx.x - (first ? 0 : (u32)p.a.blocks), shared);
#else
  if (first) pack<TYPE_A>(p.a, blockIdx.x, shared);
  else pack<TYPE_B>(p.b, blockIdx.x - (u32)p.a.blocks, shared);
#endif
}
