// The matrix products of a warpgroup: one function per shape, because the registers of an instruction
// are part of its text.
#pragma once

#include "hopper.cuh"

// A thread's N / 2 accumulators by name, as in the text of the instruction, ...
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96 NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_120 NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_128 NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
// ... and as its operands, c being the constraint: "+r" or "+f".
#define OPERANDS_4(c, i) c(d[i]), c(d[(i) + 1]), c(d[(i) + 2]), c(d[(i) + 3])
#define OPERANDS_8(c, i) OPERANDS_4(c, i), OPERANDS_4(c, (i) + 4)
#define OPERANDS_12(c, i) OPERANDS_8(c, i), OPERANDS_4(c, (i) + 8)
#define OPERANDS_16(c, i) OPERANDS_8(c, i), OPERANDS_8(c, (i) + 8)
#define OPERANDS_32(c, i) OPERANDS_16(c, i), OPERANDS_16(c, (i) + 16)
#define OPERANDS_48(c, i) OPERANDS_32(c, i), OPERANDS_16(c, (i) + 32)
#define OPERANDS_64(c, i) OPERANDS_32(c, i), OPERANDS_32(c, (i) + 32)
#define OPERANDS_96(c, i) OPERANDS_64(c, i), OPERANDS_32(c, (i) + 64)
#define OPERANDS_120(c, i) OPERANDS_96(c, i), OPERANDS_16(c, (i) + 96), OPERANDS_8(c, (i) + 112)
#define OPERANDS_128(c, i) OPERANDS_64(c, i), OPERANDS_64(c, (i) + 64)

// On 32 bytes of each line, for 64 lines of a and N lines of b: WgmmaB1 on bits,
// acc (+)= popcount(a & b), WgmmaBytes on unsigned bytes of a and signed ones of b, acc (+)= a b.
// `accumulate` 0 overwrites the accumulators. A, B and KEEP are the indices of the operands that follow
// the COUNT accumulators.
template <int N> struct WgmmaB1;
template <int N> struct WgmmaBytes;
#define WGMMA_LINES(NAME, KIND, N, COUNT, A, B, KEEP)                                      \
  template <> struct NAME<N> {                                                             \
    static __device__ __forceinline__ void run(int* d, u64 a, u64 b, int accumulate) {     \
      asm volatile(                                                                        \
          "{ .reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\n"                         \
          "wgmma.mma_async.sync.aligned.m64n" #N KIND " {" NAMES_##COUNT                   \
          "}, %" #A ", %" #B ", keep; }"                                                   \
          : OPERANDS_##COUNT("+r", 0) : "l"(a), "l"(b), "r"(accumulate));                  \
    }                                                                                      \
  };
#define WGMMA_EACH(N, COUNT, A, B, KEEP)                                            \
  WGMMA_LINES(WgmmaB1, "k256.s32.b1.b1.and.popc", N, COUNT, A, B, KEEP)             \
  WGMMA_LINES(WgmmaBytes, "k32.s32.u8.s8", N, COUNT, A, B, KEEP)
WGMMA_EACH(16, 8, 8, 9, 10)
WGMMA_EACH(24, 12, 12, 13, 14)
WGMMA_EACH(32, 16, 16, 17, 18)
WGMMA_EACH(64, 32, 32, 33, 34)
WGMMA_EACH(96, 48, 48, 49, 50)
WGMMA_EACH(128, 64, 64, 65, 66)
WGMMA_EACH(192, 96, 96, 97, 98)
WGMMA_EACH(240, 120, 120, 121, 122)
WGMMA_EACH(256, 128, 128, 129, 130)

// On bfloat16, acc (+)= a b, for 64 rows of a, which are in registers (PTX ISA, wgmma: each thread has
// the elements 2t, 2t + 1, then 2t + 8, 2t + 9 of its rows g and g + 8), and 256 columns of b. B_ALONG_N:
// the rows of b, not its columns, are contiguous.
template <int B_ALONG_N>
__device__ __forceinline__ void wgmma_bf16_256(float (&d)[128], const u32 (&a)[4], u64 b, int accumulate) {
  asm volatile(
      "{ .reg .pred keep;\nsetp.ne.b32 keep, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES_128
      "}, {%128, %129, %130, %131}, %132, keep, 1, 1, %134; }"
      : OPERANDS_128("+f", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_ALONG_N));
}
