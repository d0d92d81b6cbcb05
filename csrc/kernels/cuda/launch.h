// Launching kernels from torch-free code: limits, the current device's size, errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/cuda/kernel.h"

namespace fiak::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

/// Blocks for `items` pieces of work, `items_per_block` each, dealt out in a grid-stride loop: enough to fill the
/// device several times, and far below the grid's limit whatever the sizes.
inline int64_t grid_stride_blocks(int64_t items, int64_t items_per_block, const char* kernel) {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kernel);
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return std::clamp<int64_t>(wanted, 1, int64_t{processors} * 32);
}

/// Checks a one-dimensional grid and a block's dynamic shared memory against the current device's limits, and opts in
/// to more than the 48 KiB that every kernel may have.
inline void prepare(const void* kernel, int64_t blocks, size_t shared_bytes, const char* name) {
  const auto refuse = [&](const std::string& what, int64_t needed, int64_t limit) {
    if (needed <= limit) return;
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(needed) + " " + what + ", of at most " +
                             std::to_string(limit));
  };
  refuse("blocks", blocks, std::numeric_limits<int32_t>::max());
  if (shared_bytes <= 48 * 1024) return;
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  refuse("bytes of shared memory", static_cast<int64_t>(shared_bytes), limit);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
}

/// Launches a described kernel on a stream of the current device.
struct LaunchOnStream {
  void* stream;  ///< a cudaStream_t

  template <class Params>
  void operator()(const Kernel<Params>& kernel, int64_t blocks, const Params& params) const {
    prepare(reinterpret_cast<const void*>(kernel.function), blocks, kernel.shared_bytes, kernel.name);
    kernel.function<<<static_cast<unsigned>(blocks), static_cast<unsigned>(kernel.threads), kernel.shared_bytes,
                      static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), kernel.name);
  }
};

}  // namespace fiak::cuda
