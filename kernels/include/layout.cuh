// How signs are stored on a device: the only definition of the bit layout.
//
// A line is a vector along the packed axis: a row of the left operand, a column of the right one.
// Bit i of a line is 1 where element i is >= 0, and 0 for padding. A line is cut into chunks of
// 1024 bits (128 bytes), and the first chunks of all lines come first, then all second chunks, ...:
//
//     words[batch][chunk][position of the line, of a multiple of 16][32 words]
//
// so that a tile's lines of one chunk are one contiguous piece of memory, which the copy engine of a
// Hopper GPU fetches in one instruction without a tensor map. Inside a chunk's 128 bytes the
// 16-byte pieces are permuted, piece i of the line at position p is at i ^ (p & 7): the 128-byte
// swizzle that Hopper's tensor cores read, and that keeps ldmatrix free of bank conflicts elsewhere.
//
// Sixteen lines are stored in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15. Tensor cores give a
// lane two neighboring columns of every eight; with lines in this order, two adjacent fragments give
// it four neighbors, and a result is stored 16 bytes at a time.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int CHUNK_BITS = 1024;
constexpr int CHUNK_BYTES = CHUNK_BITS / 8;
constexpr int CHUNK_WORDS = CHUNK_BITS / 32;
constexpr int CHUNK_PIECES = CHUNK_BYTES / 16;

// The position of a line, and the line at a position. 32 bits: a matrix has fewer than 2**31 lines.
__device__ __forceinline__ u32 position_of(u32 line) {
  return (line & ~15u) | ((line & 2) << 2) | ((line & 12) >> 1) | (line & 1);
}
__device__ __forceinline__ int line_at(int position) {
  return (position & ~15) | ((position & 6) << 1) | ((position & 8) >> 2) | (position & 1);
}
__device__ __forceinline__ i64 padded_lines(i64 lines) { return (lines + 15) & ~15ll; }

// The slot of 16-byte piece i (0..7) of the line at a position within its 128 bytes, in pieces.
__device__ __forceinline__ int swizzled_piece(u32 position, int i) { return i ^ (int)(position & 7); }
// The same for word i (0..31), in words.
__device__ __forceinline__ int swizzled_word(u32 position, int i) {
  return (swizzled_piece(position, i >> 2) << 2) | (i & 3);
}

// First word of a chunk of the line at a position.
__device__ __forceinline__ i64 line_chunk(i64 batch, i64 chunks, i64 chunk, i64 lines,
                                          u32 position) {
  return ((batch * chunks + chunk) * padded_lines(lines) + position) * CHUNK_WORDS;
}
