// Launching kernels from torch-free code: limits, the current device's size, errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fiak::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

/// Blocks for `items` pieces of work, `items_per_block` each, dealt out in a grid-stride loop: enough to fill the
/// device several times, and far below the grid's limit whatever the sizes.
inline unsigned grid_stride_blocks(int64_t items, int64_t items_per_block, const char* kernel) {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kernel);
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, int64_t{processors} * 32));
}

}  // namespace fiak::cuda
