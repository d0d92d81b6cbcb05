// Prints name, threads of a block, bytes of dynamic shared memory and of parameters of every CUDA kernel, one a line.
// benchmarks/cuda_resources.py joins them with what the compiler says.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <cstdio>
#include <type_traits>

#include "kernels/cuda/kernels.cuh"

int main() {
  fiak::cuda::for_each_kernel([](const auto& kernel) {
    using Params = typename std::decay_t<decltype(kernel)>::Params;
    std::printf("%s %d %zu %zu\n", kernel.name, kernel.threads, kernel.shared_bytes, sizeof(Params));
  });
}
