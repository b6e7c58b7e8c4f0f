// Signs of one or two strided arrays, one bit each, and the number of +1 in each line.
//
// The blocks of one launch are divided among the operands of a product, so that a call on arrays
// costs one launch for both. An operand is read in one of two ways, whichever is contiguous:
//   along lines    (a row-major left operand) a warp takes 1024 elements of a line, or several times
//                  that for small elements: lanes read neighbors, and together form words;
//   across lines   (a row-major right operand) a lane takes a line, or neighboring ones in 8 or 16
//                  bytes, and a warp 32 elements of it: one word.
// Any other strides use the first way, slower.
//
// What bounds it: reading the arrays. Loads are up to 16 bytes wide if alignment allows, and all loads
// of a batch are issued before the first is used: 2 to 4 KiB for each of 24 warps.
//
// The translation unit sets TYPE_A and TYPE_B, the element types, and SAME_TYPE if they are equal.

#include "launch.cuh"
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
  i64 across;        // whether it is read across lines
  i64 wide;          // whether a lane may read several neighbors at once: adjacent, and aligned
  i64 parts;         // along: warps that share a line; across: blocks that share a line
  i64 blocks;        // for this operand
};
struct Operands { Operand a, b; };

template <typename T, int V> struct alignas(sizeof(T) * V) Vector { T at[V]; };
template <typename T> struct IsBool { static constexpr bool value = false; };
template <> struct IsBool<bool> { static constexpr bool value = true; };

// Signs of the elements in 16 bytes; the first is bit 0.
template <typename T> __device__ __forceinline__ u32 signs_of(const uint4& v) {
  constexpr int V = 16 / sizeof(T);
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  u32 signs = 0;
  if constexpr (sizeof(T) == 1) {
#pragma unroll
    for (int i = 3; i >= 0; i--)
      // The product brings the four top bits to bits 28 to 31, and nothing carries into them.
      signs = __funnelshift_l(nonnegative_each<T>(words[i]) * 0x00204081u, signs, 4);
  } else if constexpr (sizeof(T) == 2) {
    u32 apart = 0;  // of the first of each two from bit 0 on, two apart, of the second from bit 16
#pragma unroll
    for (int i = 0; i < 4; i++) apart |= nonnegative_each<T>(words[i]) >> (15 - 2 * i);
    signs = (apart | apart >> 15) & 0xffu;
  } else {
    const Vector<T, V>& elements = *(const Vector<T, V>*)&v;
#pragma unroll
    for (int e = 0; e < V; e++) signs |= (u32)nonnegative(elements.at[e]) << e;
  }
  return signs;
}

// Of 32 / V loads of 32 V elements each, x has this lane's V signs of load i in bits V i and up.
// The lanes of a group of 32 / V exchange them, as in a matrix transpose, and each gets a word: this is
// its index among the 32.
template <int V> __device__ __forceinline__ int word_of_lane(int lane) {
  constexpr int LANES = 32 / V;
  return lane % LANES * V + lane / LANES;
}
template <int V> __device__ __forceinline__ u32 exchange(u32 x, int lane) {
#pragma unroll
  for (int apart = 16 / V; apart; apart >>= 1) {
    u32 low = 0;  // the fields whose number does not have the bit `apart`
#pragma unroll
    for (int bit = 0; bit < 32; bit++)
      if (!(bit / V & apart)) low |= 1u << bit;
    const u32 other = __shfl_xor_sync(ALL, x, apart);
    x = lane & apart ? (x & ~low) | (other >> V * apart & low)
                     : (x & low) | (other & low) << V * apart;
  }
  return x;
}

// Words `word_of_lane` of UNITS chunks of a line, the first at `x` with `left_all` elements from
// there on, the others `step` elements further each. 16 bytes to a lane at a time.
template <typename T, int V, int UNITS>
__device__ __forceinline__ void pack_chunks_wide(const char* x, int step, i64 left_all, int lane,
                                                 u32 (&word)[UNITS]) {
  constexpr int STEPS = 32 / V;                 // loads of a chunk
  constexpr int BATCH = STEPS < 8 ? STEPS : 8;  // of them in flight, for each of UNITS
  // Stands for elements that do not exist: all bits set, a negative number or a NaN in every type
  // except bool.
  const u32 none = IsBool<T>::value ? 0 : ~0u;
  const int most = (UNITS - 1) * step + CHUNK_BITS, left = (int)min(left_all, (i64)most);
#pragma unroll
  for (int u = 0; u < UNITS; u++) word[u] = 0;
#pragma unroll
  for (int first = 0; first < STEPS; first += BATCH) {
    uint4 v[UNITS][BATCH];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const uint4* from = (const uint4*)x + u * (step / V) + first * 32 + lane;
      const int whole = (left - u * step) / V - first * 32 - lane;  // vectors from this lane's on
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        v[u][i] = make_uint4(none, none, none, none);
        if (left == most || i * 32 < whole) v[u][i] = from[i * 32];
      }
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int i = 0; i < BATCH; i++) word[u] |= signs_of<T>(v[u][i]) << (first + i) * V;
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    // The rest of a line after the last whole vector: part of vector `last`, for one lane.
    const int exist = left - u * step, last = exist / V;
    if (exist > 0 && exist < CHUNK_BITS && lane == last % 32)
#pragma unroll 1
      for (int e = last * V; e < exist; e++)
        word[u] |= (u32)nonnegative(((const T*)x)[u * step + e]) << (last / 32 * V + e - last * V);
    word[u] = exchange<V>(word[u], lane);
  }
}

// Word `lane` of the 1024 elements from `x`, `stride` bytes apart, of which `left` exist, one to a
// lane: a ballot is a word.
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
  constexpr int V = 16 / sizeof(T), STEPS = 32 / V;
  constexpr int UNITS = STEPS < 8 ? 8 / STEPS : 1;  // chunks at a time: eight loads in flight
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int parts = (int)p.parts, part = warp % parts, lines_here = WARPS / parts;
  // 32-bit division is ten times as fast as 64-bit: the caller keeps the number of lines below 2**31.
  const u32 padded = (u32)padded_lines(p.lines);
  const u32 index = block * lines_here + warp / parts;
  const u32 item = index / padded;
  const u32 line = index - item * padded, position = position_of(line);
  int ones = 0;
  if (item < p.batch) {
    const char* x = p.x + item * p.batch_stride + line * p.line_stride;
    const u32 chunks = (u32)p.chunks;
    auto store = [&](u32 chunk, int at, u32 word) {
      u32* to = p.words + line_chunk(item, chunks, chunk, p.lines, position);
      to[swizzled_word(position, at)] = word;
      ones += __popc(word);
    };
    for (u32 chunk = part; chunk < chunks; chunk += p.wide ? UNITS * parts : parts) {
      const i64 start = (i64)chunk * CHUNK_BITS, left = line < p.lines ? p.k - start : 0;
      if (p.wide) {
        u32 word[UNITS];
        pack_chunks_wide<T, V>(x + start * sizeof(T), parts * CHUNK_BITS, left, lane, word);
#pragma unroll
        for (int u = 0; u < UNITS; u++)
          if (chunk + u * parts < chunks) store(chunk + u * parts, word_of_lane<V>(lane), word[u]);
      } else {
        store(chunk, lane,
              left > 0 ? pack_chunk<T>(x + start * p.k_stride, p.k_stride, left, lane) : 0);
      }
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

// Words of four or two lines, from registers that each have the bits of some of the 32 places for
// all the lines: the columns of a small matrix of bytes, or of halves, from its rows.
__device__ __forceinline__ void separate(const u32 (&mixed)[2], u32 (&word)[2]) {
  word[0] = __byte_perm(mixed[0], mixed[1], 0x5410);
  word[1] = __byte_perm(mixed[0], mixed[1], 0x7632);
}
__device__ __forceinline__ void separate(const u32 (&mixed)[4], u32 (&word)[4]) {
  const u32 front[2] = {__byte_perm(mixed[0], mixed[1], 0x5140),
                        __byte_perm(mixed[0], mixed[1], 0x7362)};
  const u32 back[2] = {__byte_perm(mixed[2], mixed[3], 0x5140),
                       __byte_perm(mixed[2], mixed[3], 0x7362)};
#pragma unroll
  for (int e = 0; e < 4; e++)
    word[e] = __byte_perm(front[e / 2], back[e / 2], e % 2 ? 0x7632 : 0x5410);
}

// Bytes as they are loaded: as small elements they would be taken apart and put together again.
template <int BYTES> struct Raw { typedef Vector<u32, BYTES / 4> type; };
template <> struct Raw<2> { typedef unsigned short type; };
template <> struct Raw<1> { typedef unsigned char type; };

// How a lane reads 32 places of V neighboring lines: BATCH at a time, and the next ones before it uses
// them, so that loads are always under way.
template <typename T, int V> struct Places {
  // Whether a lane's elements of one place fill registers, for signs to be taken all at a time.
  static constexpr bool FILL = sizeof(T) < 4 && V > 1;
  static constexpr int BYTES = V * sizeof(T), BATCH = BYTES <= 4 ? 16 : BYTES == 8 ? 8 : 4;
  static constexpr int REGISTERS = FILL ? BYTES / 4 : 1, LINES = V / REGISTERS, BITS = 8 * sizeof(T);
  typedef typename Raw<BYTES>::type Bytes;
  typedef Bytes Batch[BATCH];

  u32 mixed[REGISTERS][LINES];  // FILL: bit i of each element of number i / BITS is of place i
  u32 word[V];

  // `left` places exist.
  static __device__ __forceinline__ void load(Batch& v, const char* from, i64 stride, i64 left) {
    if (left >= BATCH) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) v[i] = *(const Bytes*)(from + i * stride);
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (i < left) v[i] = *(const Bytes*)(from + i * stride);
        else memset(&v[i], IsBool<T>::value ? 0 : 255, sizeof(Bytes));  // a negative number or a NaN
    }
  }
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int r = 0; r < REGISTERS; r++)
#pragma unroll
      for (int e = 0; e < LINES; e++) mixed[r][e] = 0;
#pragma unroll
    for (int e = 0; e < V; e++) word[e] = 0;
  }
  // Take the signs of places `first` and following.
  __device__ __forceinline__ void take(const Batch& v, int first) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int place = first + i;
      if constexpr (FILL) {
#pragma unroll
        for (int r = 0; r < REGISTERS; r++)
          mixed[r][place / BITS] |=
              nonnegative_each<T>(v[i].at[r]) >> (BITS - 1 - place % BITS);
      } else {
#pragma unroll
        for (int e = 0; e < V; e++) word[e] |= (u32)nonnegative(((const T*)&v[i])[e]) << place;
      }
    }
  }
  __device__ __forceinline__ void end() {
    if constexpr (FILL) {
#pragma unroll
      for (int r = 0; r < REGISTERS; r++) {
        u32 apart[LINES];
        separate(mixed[r], apart);
#pragma unroll
        for (int e = 0; e < LINES; e++) word[r * LINES + e] = apart[e];
      }
    }
  }
};

// A block takes 256 places of 32 V lines at a time, eight words, which it turns in shared memory: then two
// threads write 32 bytes of a line, a whole sector of the L2 cache.
template <typename T, int V>
__device__ __forceinline__ void pack_across(const Operand& p, u32 block, u32* shared) {
  constexpr int LINES = 32 * V, PITCH = LINES + 4, PIECES = 2 * LINES;
  constexpr int EACH = (PIECES + WARPS * 32 - 1) / (WARPS * 32);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 groups = (u32)((p.lines + LINES - 1) / LINES), parts = (u32)p.parts;
  const u32 part = block % parts, group = block / parts % groups, item = block / parts / groups;
  const u32 line = group * LINES + lane * V;
  const char* x = p.x + item * p.batch_stride + line * p.line_stride;
  const bool inside = line + V <= p.lines;  // V divides the number of lines
  int ones[EACH] = {};
  typedef Places<T, V> Reader;
  constexpr int BATCH = Reader::BATCH;
  Reader places;
  typename Reader::Batch v[2];
  const u32 quarters = 4 * (u32)p.chunks;
  i64 stride = p.k_stride;
  asm volatile("" : "+l"(stride));  // or its multiples are computed in advance and spilled
  // Of this warp's 32 places of a quarter: where they begin, and how many exist.
  auto place = [&](u32 quarter) { return (i64)quarter * 256 + warp * 32; };
  auto left = [&](u32 quarter) { return inside ? p.k - place(quarter) : 0; };
  Reader::load(v[0], x + place(part) * stride, stride, left(part));
  for (u32 quarter = part; quarter < quarters; quarter += parts) {
    const char* from = x + place(quarter) * stride;
    places.begin();
#pragma unroll
    for (int first = 0; first < 32; first += BATCH) {
      from += BATCH * stride;
      if (first + BATCH < 32)
        Reader::load(v[(first / BATCH + 1) % 2], from, stride, left(quarter) - first - BATCH);
      else if (quarter + parts < quarters)
        Reader::load(v[0], x + place(quarter + parts) * stride, stride, left(quarter + parts));
      places.take(v[first / BATCH % 2], first);
    }
    places.end();
    *(Vector<u32, V>*)(shared + warp * PITCH + lane * V) = *(const Vector<u32, V>*)places.word;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int index = threadIdx.x + e * WARPS * 32, piece = index & 1;
      const u32 own = group * LINES + index / 2;
      if (index >= PIECES || own >= padded_lines(p.lines)) continue;
      const u32* words = shared + 4 * piece * PITCH + index / 2;
      const uint4 bits = make_uint4(words[0], words[PITCH], words[2 * PITCH], words[3 * PITCH]);
      ones[e] += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
      const u32 position = position_of(own);
      uint4* to = (uint4*)(p.words + line_chunk(item, p.chunks, quarter / 4, p.lines, position));
      to[swizzled_piece(position, quarter % 4 * 2 + piece)] = bits;
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int index = threadIdx.x + e * WARPS * 32;
    const u32 own = group * LINES + index / 2;
    const int sum = ones[e] + __shfl_xor_sync(ALL, ones[e], 1);
    if (index & 1 || index >= PIECES || own >= p.lines) continue;
    if (p.parts == 1) p.pops[item * p.lines + own] = sum;
    else if (sum) atomicAdd(p.pops + item * p.lines + own, sum);  // zeros when the kernel starts
  }
}

template <typename T> __device__ __forceinline__ void pack(const Operand& p, u32 block, u32* shared) {
  constexpr int V = sizeof(T) < 4 ? 8 / sizeof(T) : 2;
  if (!p.across) pack_along<T>(p, block, (int*)shared);
  else if (p.wide) pack_across<T, V>(p, block, shared);
  else pack_across<T, 1>(p, block, shared);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    pack_operands(const __grid_constant__ Operands p) {
  __shared__ __align__(16) u32 shared[WARPS * (32 * 8 + 4)];
  allow_next();
  wait_for_previous();
  const bool first = blockIdx.x < p.a.blocks;
#if SAME_TYPE
  pack<TYPE_A>(first ? p.a : p.b, blockIdx.x - (first ? 0 : (u32)p.a.blocks), shared);
#else
  if (first) pack<TYPE_A>(p.a, blockIdx.x, shared);
  else pack<TYPE_B>(p.b, blockIdx.x - (u32)p.a.blocks, shared);
#endif
}
