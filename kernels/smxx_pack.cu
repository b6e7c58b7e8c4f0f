// Signs of one or two strided arrays, one bit each, and how many are +1 in each line.
//
// The blocks of one launch are dealt out to the operands of a product, so that a call on arrays
// costs one launch for both. An operand is read in one of two ways, whichever is contiguous:
//   along lines    (a row-major left operand) a warp takes 1024 elements of a line: lanes read
//                  neighbours, and a ballot is a word;
//   across lines   (a row-major right operand) a lane takes a line, or the VECTOR neighbouring
//                  lines that four bytes hold, and a warp 128 elements of it: one 16-byte piece.
// Any other strides work in the first way, slower.
//
// What bounds it: reading the arrays. 32 loads of a warp are in flight at a time.
//
// The translation unit sets TYPE_A and TYPE_B, the element types.

#include "layout.cuh"
#include "signs.cuh"

constexpr int WARPS = 8;

// Filled by cupybnn/backends/cuda/packing.py, field by field in this order.
struct Operand {
  const char* x;
  u32* words;
  int* pops;         // (batch, lines)
  i64 lines, k, chunks, batch;
  i64 line_stride, k_stride, batch_stride;  // in bytes
  i64 across;        // which of the two ways
  i64 vector;        // elements a lane reads at a time: 1, or as many as fill four bytes
  i64 parts;         // along: warps that share a line; across: blocks that share a line's chunks
  i64 blocks;        // of this operand
};
struct Operands { Operand a, b; };

// Spread the low 32 / V bits of a word so that V - 1 zeros follow each.
template <int V> __device__ __forceinline__ u32 spread(u32 x) {
  if constexpr (V == 2) {
    x = (x | (x << 8)) & 0x00ff00ffu;
    x = (x | (x << 4)) & 0x0f0f0f0fu;
    x = (x | (x << 2)) & 0x33333333u;
    x = (x | (x << 1)) & 0x55555555u;
  } else if constexpr (V == 4) {
    x = (x | (x << 12)) & 0x000f000fu;
    x = (x | (x << 6)) & 0x03030303u;
    x = (x | (x << 3)) & 0x11111111u;
  }
  return x;
}

template <typename T, int V> struct alignas(sizeof(T) * V) Vector { T at[V]; };

// Word `lane` of 1024 elements from `x`, of which `left` exist; neighbours are `stride` bytes apart
// (and adjacent if V > 1).
template <typename T, int V>
__device__ __forceinline__ u32 pack_chunk(const char* x, i64 stride, i64 left, int lane) {
  u32 mine[V] = {};
  constexpr int STEPS = 32 / V;
  const char* from = x + (i64)lane * V * stride;
  const bool full = left >= CHUNK_BITS;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int first = (step * 32 + lane) * V;
    Vector<T, V> v = {};
    if (V > 1 ? full || first + V <= left : full || first < left) v = *(const Vector<T, V>*)from;
    else if (V > 1)
      for (int i = 0; i < V; i++)
        if (first + i < left) v.at[i] = ((const T*)from)[i];
#pragma unroll
    for (int i = 0; i < V; i++) {
      const u32 ballot = __ballot_sync(0xffffffffu, (full || first + i < left) && nonnegative(v.at[i]));
      if (step == lane / V) mine[i] = ballot;
    }
    from += 32 * V * stride;
  }
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < V; i++)
    word |= V == 1 ? mine[i]
                   : spread<V>((mine[i] >> (lane % V * (32 / V))) & ((1u << (32 / V % 32)) - 1)) << i;
  return word;
}

template <typename T, int V>
__device__ __forceinline__ void pack_along(const Operand& p, i64 block, int* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int parts = (int)p.parts, part = warp % parts, lines_here = WARPS / parts;
  const i64 lines8 = round_up_to_eight(p.lines);
  const i64 index = block * lines_here + warp / parts;
  const i64 item = index / lines8, line = index % lines8;
  int ones = 0;
  if (item < p.batch) {
    const char* x = p.x + item * p.batch_stride + line * p.line_stride;
    for (i64 chunk = part; chunk < p.chunks; chunk += parts) {
      const i64 start = chunk * CHUNK_BITS;
      const i64 left = line < p.lines ? p.k - start : 0;
      const u32 word = left > 0 ? pack_chunk<T, V>(x + start * p.k_stride, p.k_stride, left, lane) : 0;
      p.words[line_chunk(item, p.chunks, chunk, lines8, line) + swizzled_word(line, lane)] = word;
      ones += __popc(word);
    }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) ones += __shfl_xor_sync(0xffffffffu, ones, step);
  if (lane == 0) shared[warp] = ones;
  __syncthreads();
  if (lane == 0 && part == 0 && item < p.batch && line < p.lines) {
    for (int i = 1; i < parts; i++) ones += shared[warp + i];
    p.pops[item * p.lines + line] = ones;
  }
}

template <typename T, int V>
__device__ __forceinline__ void pack_across(const Operand& p, i64 block, int* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 lines8 = round_up_to_eight(p.lines);
  const i64 groups = (p.lines + 32 * V - 1) / (32 * V);
  const i64 part = block % p.parts, group = block / p.parts % groups, item = block / p.parts / groups;
  const i64 line = (group * 32 + lane) * V;
  const char* x = p.x + item * p.batch_stride + line * p.line_stride;
  const bool inside = line + V <= p.lines;  // V divides the number of lines
  int ones[V] = {};
  for (i64 chunk = part; chunk < p.chunks; chunk += p.parts) {
    const i64 start = chunk * CHUNK_BITS + warp * 128;
    const char* from = x + start * p.k_stride;
    u32 piece[V][4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      u32 word[V] = {};
      const i64 left = inside ? p.k - start - 32 * w : 0;
#pragma unroll
      for (int bit = 0; bit < 32; bit++) {
        if (bit < left) {
          const Vector<T, V> v = *(const Vector<T, V>*)from;
#pragma unroll
          for (int i = 0; i < V; i++) word[i] |= (u32)nonnegative(v.at[i]) << bit;
        }
        from += p.k_stride;
      }
#pragma unroll
      for (int i = 0; i < V; i++) {
        piece[i][w] = word[i];
        ones[i] += __popc(word[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < V; i++)
      if (line + i < lines8) {
        u32* to = p.words + line_chunk(item, p.chunks, chunk, lines8, line + i);
        ((uint4*)to)[swizzled_piece(line + i, warp)] =
            make_uint4(piece[i][0], piece[i][1], piece[i][2], piece[i][3]);
      }
  }
#pragma unroll
  for (int i = 0; i < V; i++) shared[(warp * 32 + lane) * V + i] = ones[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * V; i += WARPS * 32) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared[w * 32 * V + i];
    const i64 at = group * 32 * V + i;
    if (at < p.lines) {
      if (p.parts == 1) p.pops[item * p.lines + at] = sum;
      else atomicAdd(p.pops + item * p.lines + at, sum);  // zeros when the kernel starts
    }
  }
}

template <typename T> __device__ __forceinline__ void pack(const Operand& p, i64 block, int* shared) {
  constexpr int V = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  if (p.across) {
    if (p.vector == V) pack_across<T, V>(p, block, shared);
    else pack_across<T, 1>(p, block, shared);
  } else {
    if (p.vector == V) pack_along<T, V>(p, block, shared);
    else pack_along<T, 1>(p, block, shared);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    pack_operands(const __grid_constant__ Operands p) {
  __shared__ int shared[WARPS * 32 * 4];
  if (blockIdx.x < p.a.blocks) pack<TYPE_A>(p.a, blockIdx.x, shared);
  else pack<TYPE_B>(p.b, blockIdx.x - p.a.blocks, shared);
}
