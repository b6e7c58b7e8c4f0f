// The head of the network, for a few classes: last activation, last layer, loss, and backward to the
// last hidden product, without ever storing the activation or its gradient.
//
// logits: a warp computes the logits of ROWS rows, with the weights (transposed) and batch norm of WIDTH
// columns at a time in shared memory; a block loads all data for them at once, including products, so
// that it waits only once; for single rows, it loads the next columns' before it computes with these.
// Then the loss and its gradient; each block writes its part of the loss.
//
// head_sums: by strips (strips.cuh). An activation's gradient is the product of a row of CLASSES
// numbers and the column's CLASSES weights, computed on the fly. Sums over rows: the gradients of the
// weights and of batch norm. In clusters it also computes the gradient of the hidden product. The blocks
// of one extra strip sum the loss.
//
// head_gradient: only the gradient of the hidden product, by strips; it may also find the greatest magnitude
// of each of its rows and columns (gradient_writer.cuh).
//
// The gradient of the hidden product may overwrite the product if its elements have the same size: a
// thread writes only elements that it alone has read.
//
// What bounds all three: reading the products, once if they stay in shared memory between the passes,
// and 2 CLASSES operations per pass.
//
// The translation unit sets the macros of strips.cuh, or, for `logits`, of layer.cuh and VECTOR; and
//     CLASSES  at most 32
//     HEAD     HEAD_*: input of the last layer
//     LOSS     LOSS_* (loss.cuh), and SOFT
//     OUTPUT_NORM  1: a batch norm follows the logits, and smxx_output_norm.cu continues from there
//     ROWS     for `logits`; without it the unit holds the other two
// and may set GREATEST to 1 for `head_gradient`.

#define HEAD_NONE 0  // the hidden product, after batch norm
#define HEAD_RELU 1
#define HEAD_SIGN 2  // signs, multiplied by signs of weights: all binary; times a factor, or batch norm
#define GATE_NONE 0
#define GATE_WINDOW 1
#define GATE_CLIP 2

#include "block.cuh"
#include "layer.cuh"
#include "loss.cuh"
#ifndef ROWS
#include "gradient_writer.cuh"
#endif

// A weight as used by the product.
__device__ __forceinline__ float as_read(float w) {
#if HEAD == HEAD_SIGN
  return nonnegative(w) ? 1.0f : -1.0f;
#else
  return w;
#endif
}

// The last activation of an element, and the factor of its gradient in the backward pass.
struct Activation {
  float value, passes;
  __device__ __forceinline__ Activation(const Layer& p, float y, u32 kept, float window) {
    value = y;
    passes = 1.0f;
#if HEAD == HEAD_RELU
    passes = y > 0 ? 1.0f : 0.0f;
    value = y > 0 ? y : y != y ? y : 0.0f;
#elif HEAD == HEAD_SIGN
    passes = fabsf(y) <= window ? 1.0f : 0.0f;
    value = nonnegative(y) ? 1.0f : -1.0f;
#endif
#if DROP == DROP_ACTIVATION
    const float factor = kept & 1 ? (float)p.keep_scale : 0.0f;
    value = __fmul_rn(value, factor);
    passes *= factor;
#endif
  }
};

// A product after dropout, if that comes first.
__device__ __forceinline__ float dropped(const Layer& p, float z, u32 kept) {
#if DROP == DROP_PRODUCT
  return kept & 1 ? __fmul_rn(z, (float)p.keep_scale) : 0.0f;
#else
  return z;
#endif
}

__device__ __forceinline__ u32 kept_bits(const Layer& p, i64 row, i64 col) {
#if DROP != DROP_NONE
  return mask_bits(p.kept, row, col, p.cols);
#else
  return 0;
#endif
}

#ifdef ROWS
constexpr int WIDTH = CLASSES <= 16 ? 512 : 256, STRIDE = WIDTH + 4, TURNS = WIDTH / (32 * VECTOR);
constexpr int EACH = WIDTH / THREADS;  // columns whose weights and batch norm a thread loads
static_assert(WIDTH % THREADS == 0, "the same for all threads");
constexpr bool AHEAD = ROWS == 1;  // the next columns are loaded while these are computed

// Two blocks per multiprocessor where 128 registers are enough.
constexpr bool FEW_REGISTERS =
    ROWS <= 2 || (sizeof(product_t) == 2 && CLASSES <= 10 && DROP == DROP_NONE);

extern "C" __global__ void __launch_bounds__(THREADS, FEW_REGISTERS ? 2 : 1)
    logits(const __grid_constant__ Layer p, const float* __restrict__ weight,
           const void* __restrict__ labels, float smoothing, float share,
           const float* __restrict__ factor, float* out, float* grad, float* partials) {
  __shared__ __align__(16) float w[CLASSES][STRIDE];
  __shared__ __align__(16) float norms[4][HAS_NORM ? WIDTH : 1];  // mean, 1 / deviation, gamma, beta
#if !OUTPUT_NORM
  __shared__ float losses[2][WARPS];
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 row0 = ((i64)blockIdx.x * WARPS + warp) * ROWS;
  float acc[ROWS][CLASSES] = {};
  Vector<product_t, VECTOR> z[TURNS][ROWS];
  float weights[EACH * CLASSES], of_norm[4][EACH];
  const auto fetch = [&](i64 col0) {
    const int width = (int)min((i64)WIDTH, p.cols - col0);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int skip = (turn * 32 + lane) * VECTOR;
        if (skip < width)
          z[turn][r] = *(const Vector<product_t, VECTOR>*)(p.z + min(row0 + r, p.rows - 1) * p.cols +
                                                           col0 + skip);
      }
    // A weight beyond the last is never read.
#pragma unroll
    for (int i = 0; i < EACH * CLASSES; i++)
      weights[i] = weight[col0 * CLASSES + min(threadIdx.x + i * THREADS, width * CLASSES - 1)];
    if constexpr (HAS_NORM) {
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const i64 col = col0 + min(threadIdx.x + i * THREADS, width - 1);
        of_norm[0][i] = p.mean[col];
        of_norm[1][i] = p.inverse[col];
        of_norm[2][i] = p.gamma[col];
        of_norm[3][i] = p.beta[col];
      }
    }
  };
  if (AHEAD) fetch(0);
  for (i64 col0 = 0; col0 < p.cols; col0 += WIDTH) {
    const int width = (int)min((i64)WIDTH, p.cols - col0);
    if (!AHEAD) fetch(col0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH * CLASSES; i++) {
      const int at = threadIdx.x + i * THREADS;
      w[at % CLASSES][at / CLASSES] = as_read(weights[i]);
    }
    if constexpr (HAS_NORM) {
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < EACH; i++) norms[n][threadIdx.x + i * THREADS] = of_norm[n][i];
    }
    __syncthreads();
    Vector<product_t, VECTOR> now[TURNS][ROWS];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) now[turn][r] = z[turn][r];
    if (AHEAD && col0 + WIDTH < p.cols) fetch(col0 + WIDTH);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int skip = (turn * 32 + lane) * VECTOR;
      if (skip >= width) continue;
      const i64 col = col0 + skip;
      const Normal<VECTOR> norm(norms[0] + skip, norms[1] + skip, norms[2] + skip, norms[3] + skip);
      float h[ROWS][VECTOR];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const u32 kept = kept_bits(p, min(row0 + r, p.rows - 1), col);
        float products[VECTOR];
        to_floats<VECTOR>(now[turn][r], products);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          h[r][i] = Activation(p, norm(i, dropped(p, products[i], kept >> i)), kept >> i, 0.0f).value;
      }
#pragma unroll
      for (int c = 0; c < CLASSES; c++) {
        float of_class[VECTOR];
        load<VECTOR>(&w[c][skip], of_class);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int i = 0; i < VECTOR; i++) acc[r][c] = __fmaf_rn(h[r][i], of_class[i], acc[r][c]);
      }
    }
  }
#if !OUTPUT_NORM
  float sum = 0, of_factor = 0;
#endif
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const i64 row = row0 + r;
    if (row >= p.rows) continue;  // the same for the whole warp
#pragma unroll
    for (int c = 0; c < CLASSES; c++) acc[r][c] = sum_of_warp(acc[r][c]);
#if OUTPUT_NORM
#pragma unroll
    for (int c = 0; c < CLASSES; c++)
      if (lane == c) out[row * CLASSES + c] = acc[r][c];
#else
    float of_logits[CLASSES];
#if HEAD == HEAD_SIGN
    float product[CLASSES];
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      product[c] = acc[r][c];
      acc[r][c] *= *factor;
    }
#endif
    sum += loss_of_row(acc[r], labels, row, smoothing, share, of_logits);
#if HEAD == HEAD_SIGN
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      of_factor += of_logits[c] * product[c];
      of_logits[c] *= *factor;  // the gradient of the products
    }
#endif
#pragma unroll
    for (int c = 0; c < CLASSES; c++)
      if (lane == c) {
        out[row * CLASSES + c] = acc[r][c];
        grad[row * GRAD_STRIDE + c] = of_logits[c];
      }
#endif
  }
#if !OUTPUT_NORM
  if (lane == 0) {
    losses[0][warp] = sum;
    losses[1][warp] = of_factor;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += losses[threadIdx.x][i];
    partials[(i64)threadIdx.x * gridDim.x + blockIdx.x] = total;
  }
#endif
}
#else
// If the last layer reads what batch norm gives, the sums for its weights and for batch norm's parameters are
// all made of the sums of normal * (gradient of a logit), and of those gradients alone: with n rows,
//     weight'[j][c] = gamma[j] * N[j][c] + beta[j] * G[c],   N[j][c] = sum(normal[j] * logit'[c]),
//     gamma'[j] = sum_c(w[j][c] * N[j][c]),  beta'[j] = sum_c(w[j][c] * G[c]),  G[c] = sum(logit'[c])
// where a class's G takes the place of the sum of a column. So all COLS columns of a strip must have sums: in a
// cluster they do. Without clusters, more classes would need too much shared memory.
#define LINEAR \
  (NORM && HEAD == HEAD_NONE && DROP != DROP_ACTIVATION && (CLUSTER > 1 || (WHOLE && CLASSES <= 12)))
constexpr int MOST = CLASSES > 12 ? 1 : VECTOR == 4 ? 2 : 4;
constexpr int BATCH = HELD && HELD < MOST ? HELD : MOST;  // rows whose gradients of logits are in flight, ...
// ... and whose products are.
constexpr int AHEAD = CLUSTER > 1 ? BATCH : sizeof(product_t) == 2 ? 8 : 4;

struct alignas(16) RowOfLogits { float4 at[GRAD_STRIDE / 4]; };

#if HELD
__device__ __forceinline__ HeldByRow<RowOfLogits> held_of_logits() {
  return HeldByRow<RowOfLogits>(held + HELD_MORE);
}
#endif

// The logits' gradients of some rows, which all lanes need; loaded after `Products` and in the same way.
struct OfLogits {
  RowOfLogits raw[BATCH];
  __device__ __forceinline__ OfLogits(const Strip& at, const float* grad, int turn) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
#if HELD
      raw[b] = held_of_logits()(turn + b);
#else
      raw[b] = ((const RowOfLogits*)grad)[at.safe_row(at.row(turn + b))];
#endif
    }
  }
  __device__ __forceinline__ float operator()(int b, int c) const {
    const float4& four = raw[b].at[c / 4];
    return c % 4 == 0 ? four.x : c % 4 == 1 ? four.y : c % 4 == 2 ? four.z : four.w;
  }
};

// The weights of a thread's columns, and the gradient of their activations in a row.
struct Weights {
  float w[VECTOR][CLASSES];
  __device__ __forceinline__ Weights(const float (&of_strip)[CLASSES][COLS], int lane) {
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      float of_class[VECTOR];
      load<VECTOR>(&of_strip[c][lane * VECTOR], of_class);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) w[i][c] = of_class[i];
    }
  }
  __device__ __forceinline__ Weights(const float* weight, int col) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
#pragma unroll
      for (int c = 0; c < CLASSES; c++) w[i][c] = as_read(weight[(col + i) * CLASSES + c]);
  }
  __device__ __forceinline__ float gradient(int i, const OfLogits& of_logits, int b) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < CLASSES; c++) sum += of_logits(b, c) * w[i][c];
    return sum;
  }
};

// A gradient of the last activation, after its gate.
__device__ __forceinline__ float gated(float dh, const Activation& h) {
#if GATE == GATE_CLIP
  return dh > 1 ? 1.0f : dh < -1 ? -1.0f : dh;
#elif GATE == GATE_NONE && HEAD == HEAD_SIGN
  return dh;
#else
  return dh * h.passes;
#endif
}

// Arguments shared by both passes.
struct Back {
  const float* weight;
  const float* grad;
  real_t* out;
  double window;
  const float* partials;  // of `logits`
  float* mean_loss;
  float* grad_factor;
  i64 partial_count;
  double share;  // of an example in the mean loss
};

// `of_gamma` and `of_beta` are those of the thread's columns.
__device__ __forceinline__ void write_gradients(const Layer& p, const Strip& at, const Back& back,
                                                const Normal<VECTOR>& norm,
                                                const Weights& weights, const float* of_gamma,
                                                const float* of_beta, u32* row_most = nullptr,
                                                u32* col_most = nullptr) {
#if NORM
  float gammas[VECTOR], betas[VECTOR];
  load<VECTOR>(of_gamma, gammas);
  load<VECTOR>(of_beta, betas);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    gammas[i] *= (float)p.share;
    betas[i] *= (float)p.share;
  }
#endif
  GradientWriter writer;
#pragma unroll 1
  for (int first = 0; at.begins(first); first += AHEAD) {
    const Products<AHEAD, false> products(p, at, first);
#pragma unroll
    for (int batch = 0; batch < AHEAD; batch += BATCH) {
      const OfLogits of_logits(at, back.grad, first + batch);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int own = batch + b, row = at.row(first + own);
        float z[VECTOR], dz[VECTOR];
        products.load(p, own, z);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const Activation h(p, norm(i, z[i]), products.kept(own, i), (float)back.window);
          dz[i] = gated(weights.gradient(i, of_logits, b), h);
#if NORM
          dz[i] = (dz[i] - betas[i] - norm.normal(i, z[i]) * gammas[i]) *
                  (norm.gamma[i] * norm.inverse[i]);
#endif
#if DROP == DROP_PRODUCT
          dz[i] = products.kept(own, i) ? dz[i] * (float)p.keep_scale : 0.0f;
#endif
        }
        writer.write(at, row, dz, back.out, row_most);
      }
    }
  }
  writer.finish(at, col_most);
}

// For one block: sum the parts of the loss, and of the gradient of the logits' factor, from `logits`.
__device__ __forceinline__ void add_up_loss(const Back& back) {
#if !OUTPUT_NORM
  const double total = sum_of_partials(back.partials, back.partial_count);
  if (threadIdx.x == 0) *back.mean_loss = (float)(total * back.share);
#if HEAD == HEAD_SIGN
  __syncthreads();
  const double of_factor = sum_of_partials(back.partials + back.partial_count, back.partial_count);
  if (threadIdx.x == 0) *back.grad_factor = (float)of_factor;
#endif
#endif
}

#if LINEAR
// The sums N of a thread's columns, and G of class at.lane + LANES * i in place i.
__device__ __forceinline__ void add_up(const Layer& p, const Strip& at, const Back& back,
                                       const Normal<VECTOR>& norm,
                                       float (&sums)[CLASSES + 1][VECTOR]) {
#pragma unroll 1
  for (int first = 0; at.begins(first); first += AHEAD) {
    const Products<AHEAD, true> products(p, at, first);
#pragma unroll
    for (int batch = 0; batch < AHEAD; batch += BATCH) {
      const OfLogits of_logits(at, back.grad, first + batch);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int own = batch + b, row = at.row(first + own);
        float z[VECTOR];
        products.load(p, own, z);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
          const float normal = at.has(row) ? norm.normal(i, z[i]) : 0.0f;
#pragma unroll
          for (int c = 0; c < CLASSES; c++) sums[c][i] += normal * of_logits(b, c);
        }
#if HELD
        const float* of_row = (const float*)&held_of_logits()(first + own);
#else
        const float* of_row = back.grad + at.safe_row(row) * GRAD_STRIDE;
#endif
#pragma unroll
        for (int i = 0; i * LANES < CLASSES; i++)
          if (at.lane + i * LANES < CLASSES && at.has_row(row))
            sums[CLASSES][i] += of_row[at.lane + i * LANES];
      }
    }
  }
}
#endif

extern "C" __global__ void BY_STRIPS IN_CLUSTERS
    head_sums(const __grid_constant__ Layer p, const __grid_constant__ Back back, float* partials,
              u32* tickets, float* grad_weight, float* grad_gamma, float* grad_beta) {
  constexpr int SUMS = CLASSES + (LINEAR ? 1 : HAS_NORM ? 2 : 0);
  __shared__ double total[SUMS][COLS];
  __shared__ __align__(16) float gammas[COLS], betas[COLS];
  if (blockIdx.x == gridDim.x - 1) {  // beyond the last strip
    if (blockIdx.y == 0) add_up_loss(back);
    return;
  }
  const Strip at(p);
#if HELD
  hold(p, at, [&](int turn) {
    const int row = at.safe_row(at.row(turn));
    held_of_logits().copy(at, (const RowOfLogits*)back.grad + row, turn);
  });
#endif
  float sums[SUMS][VECTOR] = {};
  const Normal<VECTOR> norm(p, at.safe_col());
#if LINEAR
  // Loaded meanwhile, and written where `sum_over_rows` makes them visible.
  __shared__ __align__(16) float of_strip[CLASSES][COLS];
  __shared__ float of_norm[2][COLS];  // gamma, beta
  constexpr int EACH = (COLS * CLASSES + THREADS - 1) / THREADS;
  const auto exists = [&](int i) { return i < COLS * CLASSES && at.first_col + i / CLASSES < at.cols; };
  float some[EACH], gamma_or_beta = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int number = threadIdx.x + i * THREADS;
    some[i] = exists(number) ? as_read(back.weight[at.first_col * CLASSES + number]) : 0.0f;
  }
  const int column = threadIdx.x % COLS;
  if (threadIdx.x < 2 * COLS && at.first_col + column < at.cols)
    gamma_or_beta = (threadIdx.x < COLS ? p.gamma : p.beta)[at.first_col + column];
  add_up(p, at, back, norm, sums);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int number = threadIdx.x + i * THREADS;
    if (number < COLS * CLASSES) of_strip[number % CLASSES][number / CLASSES] = some[i];
  }
  if (threadIdx.x < 2 * COLS) of_norm[threadIdx.x / COLS][column] = gamma_or_beta;
#else
  const Weights weights(back.weight, at.safe_col());
#pragma unroll 1
  for (int turn = 0; at.begins(turn); turn += BATCH) {
    const Products<BATCH, true> products(p, at, turn);
    const OfLogits of_logits(at, back.grad, turn);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const bool inside = at.has(at.row(turn + b));
      float z[VECTOR];
      products.load(p, b, z);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const Activation h(p, norm(i, z[i]), products.kept(b, i), (float)back.window);
        const float value = inside ? h.value : 0.0f;
#pragma unroll
        for (int c = 0; c < CLASSES; c++) sums[c][i] += value * of_logits(b, c);
#if NORM
        const float dy = inside ? gated(weights.gradient(i, of_logits, b), h) : 0.0f;
        sums[CLASSES][i] += dy;
        sums[CLASSES + 1][i] += dy * norm.normal(i, z[i]);
#endif
      }
    }
  }
#endif
  if (!sum_over_rows<SUMS>(sums, partials, tickets, p.cols, total)) return;
#if LINEAR
  const auto of_class = [&](int c) { return total[CLASSES][c % LANES * VECTOR + c / LANES]; };
  if (writes_sums())
    for (int i = threadIdx.x; exists(i); i += THREADS) {
      const int j = i / CLASSES, c = i % CLASSES;
      grad_weight[at.first_col * CLASSES + i] =
          (float)(of_norm[0][j] * total[c][j] + of_norm[1][j] * of_class(c));
    }
  if (threadIdx.x < COLS) {
    double of_gamma = 0, of_beta = 0;
#pragma unroll
    for (int c = 0; c < CLASSES; c++) {
      of_gamma += of_strip[c][column] * total[c][column];
      of_beta += of_strip[c][column] * of_class(c);
    }
    gammas[column] = (float)of_gamma;
    betas[column] = (float)of_beta;
    if (writes_sums() && at.first_col + column < at.cols) {
      grad_gamma[at.first_col + column] = gammas[column];
      grad_beta[at.first_col + column] = betas[column];
    }
  }
#if CLUSTER > 1
  __syncthreads();
  write_gradients(p, at, back, norm, Weights(of_strip, at.lane), gammas + at.lane * VECTOR,
                  betas + at.lane * VECTOR);
  __syncwarp();
#endif
#else
  if (writes_sums())
    for (int i = threadIdx.x; i < COLS * CLASSES; i += THREADS)
      if (at.first_col + i / CLASSES < p.cols)
        grad_weight[at.first_col * CLASSES + i] = (float)total[i % CLASSES][i / CLASSES];
#if NORM
  if (threadIdx.x < COLS) {
    betas[threadIdx.x] = (float)total[CLASSES][threadIdx.x];
    gammas[threadIdx.x] = (float)total[CLASSES + 1][threadIdx.x];
    if (writes_sums() && at.first_col + threadIdx.x < p.cols) {
      grad_beta[at.first_col + threadIdx.x] = betas[threadIdx.x];
      grad_gamma[at.first_col + threadIdx.x] = gammas[threadIdx.x];
    }
  }
#endif
#if CLUSTER > 1
  __syncthreads();
  write_gradients(p, at, back, norm, weights, gammas + at.lane * VECTOR, betas + at.lane * VECTOR);
  __syncwarp();
#endif
#endif
  leave_sums();
}

#if !HELD
extern "C" __global__ void BY_STRIPS
    head_gradient(const __grid_constant__ Layer p, const __grid_constant__ Back back,
                  const float* __restrict__ grad_gamma, const float* __restrict__ grad_beta, u32* row_most,
                  u32* col_most) {
  const Strip at(p);
  write_gradients(p, at, back, Normal<VECTOR>(p, at.safe_col()), Weights(back.weight, at.safe_col()),
                  grad_gamma + at.safe_col(), grad_beta + at.safe_col(), row_most, col_most);
}
#endif
#endif
