// Pixels, a byte each, in the layout of packed words (layout.cuh): a chunk is 128 of them.
//
// A thread writes a piece of 16 pixels. After a line's pixels come two constants, 2 and 1, and zeros; all
// of a line that does not exist is zeros.
//
// What bounds it: reading the pixels and writing them.

#include "layout.cuh"

constexpr int PIECE = 16;

// Filled by cupybnn/backends/cuda/byte_product.py, field by field in this order.
struct ByteLines {
  uint4* words;     // `chunks` chunks a line, which have room for cols + 2 pixels
  u32* cleared;     // words that become zeros, for the launches that follow
  i64 clear;        // how many
  i64 rows, cols, chunks;
  const unsigned char* x;  // (rows, cols) in C order
};

extern "C" __global__ void __launch_bounds__(256) byte_lines(const __grid_constant__ ByteLines p) {
  const int pieces = (int)p.chunks * CHUNK_PIECES, used = (int)((p.cols + 2 + PIECE - 1) / PIECE);
  const i64 padded = padded_lines(p.rows), all = padded * pieces;
  const i64 begin = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;
  const bool aligned = (((u64)p.x | (u64)p.cols) & (PIECE - 1)) == 0;
  for (i64 i = begin; i < p.clear; i += step) p.cleared[i] = 0;
  for (i64 i = begin; i < all; i += step) {
    const i64 row = i / pieces;
    const int piece = (int)(i - row * pieces), first = piece * PIECE;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < p.rows && piece < used) {
      const unsigned char* from = p.x + row * p.cols + first;
      if (aligned && first + PIECE <= p.cols) {
        v = __ldg((const uint4*)from);
      } else {
        u32 w[4] = {};
#pragma unroll
        for (int b = 0; b < PIECE; b++) {
          const i64 at = first + b;
          const u32 pixel = at < p.cols ? __ldg(from + b)
                                        : at < p.cols + 2 ? (u32)(p.cols + 2 - at) : 0;
          w[b / 4] |= pixel << b % 4 * 8;
        }
        v = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
    const u32 position = position_of((u32)row);
    const i64 line = (piece / CHUNK_PIECES) * padded + position;
    p.words[line * CHUNK_PIECES + swizzled_piece(position, piece % CHUNK_PIECES)] = v;
  }
}
