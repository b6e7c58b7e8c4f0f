// +1 or -1 for each element of an array, as defined in signs.cuh: CuPy's own comparison treats negative
// denormals as 0 (-ftz=true). Threads stride over the elements.
//
// What bounds it: reading the elements and writing their signs.
//
// The translation unit sets TYPE, the element type, and RESULT, with +1 and -1 given as ONE and
// MINUS_ONE (bits of a half-precision number, or values).

#include "layout.cuh"
#include "signs.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sign(const TYPE* __restrict__ x, RESULT* __restrict__ out, i64 count) {
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    out[i] = nonnegative(x[i]) ? (RESULT)(ONE) : (RESULT)(MINUS_ONE);
}
