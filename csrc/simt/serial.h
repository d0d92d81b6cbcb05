// Runs CUDA device code on the CPU, for tests: kernels without barriers, warp collectives or shared memory, one thread
// after the other. Include this before the .cuh; g++ then compiles the code that nvcc compiles.
#pragma once

#include <cstdio>
#include <cstdlib>

#define __device__
#define __global__

namespace fiak::simt {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 thread_index, block_index, block_size{1, 1, 1}, grid_size{1, 1, 1};

/// kernel(arguments...) for every thread of a one-dimensional grid. The order is backwards when `reverse` is set: code
/// without barriers must not depend on it.
template <class Kernel, class... Arguments>
void run_serial(Kernel* kernel, unsigned blocks, unsigned threads, bool reverse, const Arguments&... arguments) {
  grid_size.x = blocks;
  block_size.x = threads;
  const unsigned all = blocks * threads;
  for (unsigned i = 0; i < all; ++i) {
    const unsigned at = reverse ? all - 1 - i : i;
    block_index.x = at / threads;
    thread_index.x = at % threads;
    kernel(arguments...);
  }
}

}  // namespace fiak::simt

#define threadIdx ::fiak::simt::thread_index
#define blockIdx ::fiak::simt::block_index
#define blockDim ::fiak::simt::block_size
#define gridDim ::fiak::simt::grid_size

[[noreturn]] inline void __trap() {
  std::fputs("device code trapped\n", stderr);
  std::abort();
}
