// The start of a training step: its batch, and dropout masks.
//
// gather: a thread copies VECTOR neighboring pixels of an image of the batch at a time, and loads EACH
// such groups before it stores the first. Pixels stay integers, exact in any type; the first product
// applies their scale. Bounded by latency: the step number, the image index and then the image's row,
// at a random address, are read one after another. Clears popcounts that later kernels add to.
//
// gather_deformed: the same with a random deformation of each image (formulas in
// cupybnn/data/augmentation.py). A block takes an image and samples it from shared memory, where the
// elastic field's bumps and noise are too: first columns of the field are summed, then each pixel's.
// Bounded by arithmetic.
//
// attack: moves the pixels of the batch by the sign of their gradient, which a first pass through the
// network has computed. Bounded by memory.
//
// dropout_mask: a thread computes one word, 32 elements of a row. Bounded by the integer multiplications
// of Philox, about 20 per element.
//
// The step number is read from the device, so that each launch of a captured graph draws new numbers.
//
// The rows may be a part of a batch. Random numbers are those of an image's place in the whole batch.
//
// The translation unit sets REAL, VECTOR (for gather and attack), and DROP to whether pixels are dropped.

#include "block.cuh"
#include "elements.cuh"
#include "philox.cuh"

// Filled by cupybnn/backends/cuda/fused_batch.py, field by field in this order.
struct Batch {
  const unsigned char* images;
  const i64* all_labels;
  const int* order;  // (ring, rows): indices of the images of each step
  const i64* step;
  real_t* x;
  i64* labels;
  int* pops;  // to be cleared
  i64 ring, rows, cols, pop_count;
  i64 first, whole;  // place of row 0 in the whole batch, and its images; after the last comes the first
  u64 seed;   // of the dropped pixels
  i64 draw, last;
};

__device__ __forceinline__ const int* images_of_step(const Batch& p) {
  return p.order + *p.step % p.ring * p.rows;
}
__device__ __forceinline__ i64 place_of_row(const Batch& p, i64 row) {
  const i64 place = p.first + row;
  return place < p.whole ? place : place - p.whole;
}
__device__ __forceinline__ void clear_pops(const Batch& p) {
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < p.pop_count; i += (i64)gridDim.x * THREADS)
    p.pops[i] = 0;
}

// Set the dropped ones of N neighboring pixels to 0; `first` is the place of the first in the whole batch.
template <int N>
__device__ __forceinline__ void drop_pixels(const Batch& p, i64 first, float (&v)[N]) {
  if (!DROP) return;
  const u32 kept = Draw{p.seed, (u64)(*p.step + p.draw), (u32)p.last}.kept(first, N);
#pragma unroll
  for (int e = 0; e < N; e++) v[e] = kept >> e & 1 ? v[e] : 0.0f;
}

constexpr int EACH = 4;

extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ Batch p) {
  const int* batch = images_of_step(p);
  // A batch has fewer than 2**31 pixels.
  const u32 groups = (u32)p.cols / VECTOR, count = (u32)p.rows * groups, step = gridDim.x * THREADS;
  for (u32 first = blockIdx.x * THREADS + threadIdx.x; first < count; first += EACH * step) {
    // Beyond the last group, load the last one again; it is not stored.
    u32 row[EACH], col[EACH];
    i64 image[EACH], label[EACH];
    Vector<unsigned char, VECTOR> pixels[EACH];
#pragma unroll
    for (int g = 0; g < EACH; g++) {
      const u32 i = min(first + g * step, count - 1);
      row[g] = i / groups;
      col[g] = (i - row[g] * groups) * VECTOR;
      image[g] = batch[row[g]];
    }
#pragma unroll
    for (int g = 0; g < EACH; g++) {
      pixels[g] = *(const Vector<unsigned char, VECTOR>*)(p.images + image[g] * p.cols + col[g]);
      if (col[g] == 0) label[g] = p.all_labels[image[g]];
    }
#pragma unroll
    for (int g = 0; g < EACH; g++) {
      if (first + g * step >= count) continue;
      float v[VECTOR];
#pragma unroll
      for (int e = 0; e < VECTOR; e++) v[e] = pixels[g].at[e];
      drop_pixels<VECTOR>(p, place_of_row(p, row[g]) * p.cols + col[g], v);
      store<VECTOR>(p.x + (i64)row[g] * p.cols + col[g], v);
      if (col[g] == 0) p.labels[row[g]] = label[g];
    }
  }
  clear_pops(p);
}

struct Deformation {
  i64 height, width;
  u64 seed;
  double shift, rotation, scale, shear, elastic;  // rotation in radians
  double bump_height, bump_width;                 // of the elastic field, in pixels
  i64 knots_down, knots_right, flip;
};

// The source positions of the pixels of one deformed image.
struct Sampling {
  float cosine, sine, tall, wide, shear, down, right;
  bool flip;
  Sampling() = default;
  __device__ __forceinline__ Sampling(const Deformation& d, u64 step, u32 image) {
    // Eight numbers per image, in [-1, 1).
    float draw[8];
#pragma unroll
    for (int block = 0; block < 2; block++) {
      const uint4 words = philox(d.seed, 2 * step, 2 * (u64)image + block);
      const u32 four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; i++) draw[4 * block + i] = 2.0f * ((float)(four[i] >> 8) * 0x1p-24f) - 1.0f;
    }
    const float angle = draw[0] * (float)d.rotation;
    cosine = cosf(angle);
    sine = sinf(angle);
    tall = 1.0f + (float)d.scale * draw[1];
    wide = 1.0f + (float)d.scale * draw[2];
    shear = (float)d.shear * draw[3];
    down = (float)d.shift * draw[4];
    right = (float)d.shift * draw[5];
    flip = d.flip && draw[6] < 0;
  }
};

// A smooth random field: bumps at the knots of a grid, each times a random number. In shared memory.
struct Field {
  float *noise, *down, *right, *columns;  // (2, down, right), (height, down), (width, right), (2, height, right)
  int knots_down, knots_right;

  __device__ __forceinline__ Field(const Deformation& d, float* at)
      : knots_down((int)d.knots_down), knots_right((int)d.knots_right) {
    noise = at;
    down = noise + 2 * knots_down * knots_right;
    right = down + (int)d.height * knots_down;
    columns = right + (int)d.width * knots_right;
  }
  __device__ __forceinline__ float* end(const Deformation& d) const {
    return columns + 2 * (int)d.height * knots_right;
  }
  // Bumps at the pixels of an axis, each row of unit norm times `amount`.
  __device__ __forceinline__ static void bumps(float* table, int size, int knots, float width, float amount) {
    for (int i = threadIdx.x; i < size; i += THREADS) {
      float square = 0;
      for (int k = 0; k < knots; k++) {
        const float far = ((float)i - width * (float)(k - 2)) / width, bump = expf(-0.5f * far * far);
        table[i * knots + k] = bump;
        square += bump * bump;
      }
      const float scale = amount / sqrtf(square);
      for (int k = 0; k < knots; k++) table[i * knots + k] *= scale;
    }
  }
  // The whole block calls it; `place` is the image's in its batch.
  __device__ __forceinline__ void make(const Deformation& d, u64 step, u64 place) {
    const int height = (int)d.height, numbers = 2 * knots_down * knots_right;
    for (int i = threadIdx.x; i < numbers; i += THREADS) {
      const u64 at = place * numbers + i;
      const uint4 words = philox(d.seed, 2 * step + 1, at >> 2);
      const u32 word = (at & 3) == 0 ? words.x : (at & 3) == 1 ? words.y : (at & 3) == 2 ? words.z : words.w;
      // Of variance 1.
      noise[i] = (2.0f * ((float)(word >> 8) * 0x1p-24f) - 1.0f) * 1.7320508f;
    }
    bumps(down, height, knots_down, (float)d.bump_height, (float)d.elastic);
    bumps(right, (int)d.width, knots_right, (float)d.bump_width, 1.0f);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * height * knots_right; i += THREADS) {
      const int right_knot = i % knots_right, line = i / knots_right, axis = line >= height;
      const float* bump = down + (line - axis * height) * knots_down;
      const float* random = noise + axis * knots_down * knots_right + right_knot;
      float sum = 0;
      for (int k = 0; k < knots_down; k++) sum += bump[k] * random[k * knots_right];
      columns[i] = sum;
    }
  }
  // How far the pixel is displaced down (axis 0) or right (axis 1).
  __device__ __forceinline__ float at(const Deformation& d, int axis, int row, int col) const {
    const float* line = columns + (axis * (int)d.height + row) * knots_right;
    float sum = 0;
    for (int k = 0; k < knots_right; k++) sum += line[k] * right[col * knots_right + k];
    return sum;
  }
};

__device__ __forceinline__ float pixel(const unsigned char* image, const Deformation& d, int row, int col) {
  return row >= 0 && row < d.height && col >= 0 && col < d.width ? image[row * (int)d.width + col] : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_deformed(const __grid_constant__ Batch p, const __grid_constant__ Deformation d) {
  extern __shared__ float dynamic[];
  __shared__ Sampling shared;
  Field field(d, dynamic);
  const bool elastic = d.elastic > 0;
  unsigned char* image = (unsigned char*)(elastic ? field.end(d) : dynamic);
  const i64 row = blockIdx.x, place = place_of_row(p, row), number = images_of_step(p)[row];
  if (threadIdx.x == 0) {
    shared = Sampling(d, (u64)*p.step, (u32)place);
    p.labels[row] = p.all_labels[number];
  }
  for (int i = threadIdx.x; i < p.cols; i += THREADS) image[i] = p.images[number * p.cols + i];
  if (elastic) field.make(d, (u64)*p.step, (u64)place);
  __syncthreads();
  const Sampling s = shared;
  const float middle_y = (d.height - 1) * 0.5f, middle_x = (d.width - 1) * 0.5f;
  for (int i = threadIdx.x; i < p.cols; i += THREADS) {
    const int at_row = i / (int)d.width, at_col = i - at_row * (int)d.width;
    const float y0 = at_row - middle_y - s.down, x0 = at_col - middle_x - s.right;
    const float y1 = s.cosine * y0 + s.sine * x0;
    const float x1 = s.cosine * x0 - s.sine * y0 - s.shear * y1;
    // Beyond the border of zeros there are only zeros.
    const float y2 = y1 / s.tall + middle_y, x2 = (s.flip ? -x1 : x1) / s.wide + middle_x;
    const float y3 = elastic ? y2 + field.at(d, 0, at_row, at_col) : y2;
    const float x3 = elastic ? x2 + field.at(d, 1, at_row, at_col) : x2;
    const float y = fminf(fmaxf(y3, -1.0f), (float)d.height);
    const float x = fminf(fmaxf(x3, -1.0f), (float)d.width);
    const float top = floorf(y), left = floorf(x);
    const int r = (int)top, c = (int)left;
    const float a = pixel(image, d, r, c), b = pixel(image, d, r + 1, c);
    const float above = a + (x - left) * (pixel(image, d, r, c + 1) - a);
    const float below = b + (x - left) * (pixel(image, d, r + 1, c + 1) - b);
    float v[1] = {above + (y - top) * (below - above)};
    drop_pixels<1>(p, place * p.cols + i, v);
    store<1>(p.x + row * p.cols + i, v);
  }
  clear_pops(p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attack(const __grid_constant__ Batch p, const real_t* __restrict__ gradient, float amount) {
  const i64 count = p.rows * p.cols / VECTOR;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    float g[VECTOR], v[VECTOR], moved[VECTOR];
    load<VECTOR>(gradient + i * VECTOR, g);
    load<VECTOR>(p.x + i * VECTOR, v);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) moved[e] = v[e] + (g[e] > 0 ? amount : g[e] < 0 ? -amount : 0.0f);
    drop_pixels<VECTOR>(p, p.first * p.cols + i * VECTOR, moved);
    store<VECTOR>(p.x + i * VECTOR, moved);
  }
  clear_pops(p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout_mask(const i64* __restrict__ step, i64 rows, i64 cols, i64 first, u64 seed, i64 draw,
                 u32 last, u32* __restrict__ kept) {
  const i64 words = mask_words(cols), count = rows * words;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (i64)gridDim.x * THREADS) {
    const i64 row = i / words, col = (i - row * words) * 32;
    kept[i] = Draw{seed, (u64)(*step + draw), last}.kept((first + row) * cols + col,
                                                         (int)min((i64)32, cols - col));
  }
}
