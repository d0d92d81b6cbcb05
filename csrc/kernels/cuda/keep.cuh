// What kernels read of `keep` [heads, kept]: ascending rows, padded at the end with -1.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace fiak::cuda {

/// The row that head h keeps at place k, or -1.
__device__ __forceinline__ int64_t kept_row(const int64_t* keep, int64_t kept, int64_t rows, int64_t h, int64_t k) {
  const int64_t row = keep[h * kept + k];
  if (row >= rows) __trap();  // keep's values are on the device; out of bounds must not be read
  return row;
}

/// The place k of head h that has `row`, or -1. The -1 at the end count as larger than any row.
__device__ __forceinline__ int64_t find_row(const int64_t* keep, int64_t kept, int64_t h, int64_t row) {
  const int64_t* rows = keep + h * kept;
  int64_t low = 0, high = kept;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (rows[middle] >= 0 && rows[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < kept && rows[low] == row ? low : -1;
}

}  // namespace fiak::cuda
