// How signs are stored on a device: the one place that knows.
//
// A line is a vector along the packed axis: a row of the left operand, a column of the right one.
// Bit i of a line is 1 where element i is >= 0, and 0 for padding. A line is cut into chunks of
// 1024 bits (128 bytes), and all lines' first chunks lie together, then all second chunks, ...:
//
//     words[batch][chunk][line, rounded up to a multiple of eight][32 words]
//
// so that any run of lines of one chunk is one contiguous piece of memory, which the copy engine
// of a Hopper GPU fetches in one instruction without a tensor map. Inside a chunk's 128 bytes the
// 16-byte pieces are permuted, piece p of line r stands at p ^ (r & 7): the 128-byte swizzle that
// the tensor cores of Hopper read, and that keeps ldmatrix free of bank conflicts elsewhere.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int CHUNK_BITS = 1024;
constexpr int CHUNK_BYTES = CHUNK_BITS / 8;
constexpr int CHUNK_WORDS = CHUNK_BITS / 32;
constexpr int CHUNK_PIECES = CHUNK_BYTES / 16;

// Where word w (0..31) of a line stands within the line's 128 bytes, in words.
__device__ __forceinline__ int swizzled_word(i64 line, int w) {
  return (((w >> 2) ^ (int)(line & 7)) << 2) | (w & 3);
}

// Where 16-byte piece p (0..7) of a line stands within the line's 128 bytes, in pieces.
__device__ __forceinline__ int swizzled_piece(i64 line, int p) { return p ^ (int)(line & 7); }

__device__ __forceinline__ i64 round_up_to_eight(i64 lines) { return (lines + 7) & ~7ll; }

// First word of one line's chunk.
__device__ __forceinline__ i64 line_chunk(i64 batch, i64 chunks, i64 chunk, i64 lines8, i64 line) {
  return ((batch * chunks + chunk) * lines8 + line) * CHUNK_WORDS;
}
