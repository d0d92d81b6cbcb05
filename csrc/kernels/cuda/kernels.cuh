// Every kernel of the library.
#pragma once

#include "kernels/cuda/compact_linear.cuh"
#include "kernels/cuda/compact_rows.cuh"

namespace fiak::cuda {

/// visit(Kernel) for each of them.
template <class Visit>
void for_each_kernel(Visit&& visit) {
  for_each_compact_linear_kernel(visit);
  for_each_compact_rows_kernel(visit);
}

}  // namespace fiak::cuda
