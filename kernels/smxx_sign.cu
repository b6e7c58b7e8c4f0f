// +1 or -1 for each element of an array, by the one definition of signs.cuh: a comparison of CuPy's
// own takes the least negative numbers for 0 (-ftz=true). A thread takes every so-many-th element.
//
// What bounds it: reading the elements and writing their signs.
//
// The translation unit sets TYPE, the elements' type, and RESULT, of which +1 and -1 are ONE and
// MINUS_ONE (bits of a half-precision number, or values).

#include "layout.cuh"
#include "signs.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sign(const TYPE* __restrict__ x, RESULT* __restrict__ out, i64 count) {
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    out[i] = nonnegative(x[i]) ? (RESULT)(ONE) : (RESULT)(MINUS_ONE);
}
