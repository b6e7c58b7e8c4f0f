// Launches that overlap (programmatic dependent launch, sm_90 and newer; PTX ISA, griddepcontrol).
//
// A kernel that is launched so may begin before the one ahead of it in the stream has ended. Until
// `wait_for_previous` returns it must not write memory, and what it reads may be about to change.
// Without such a launch, and on older GPUs, both do nothing.
#pragma once

// Let the next kernel begin as soon as there is room for its blocks.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// For every thread, since each one's later accesses count.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
