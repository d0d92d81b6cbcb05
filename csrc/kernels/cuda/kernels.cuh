// Every kernel of the library.
#pragma once

#include "kernels/cuda/compact_linear.cuh"
#include "kernels/cuda/compact_rows.cuh"
#include "kernels/cuda/csr_attention.cuh"
#include "kernels/cuda/prior_attention.cuh"

namespace fiak::cuda {

/// visit(Kernel) for each of them.
template <class Visit>
void for_each_kernel(Visit&& visit) {
  for_each_compact_linear_kernel(visit);
  for_each_compact_rows_kernel(visit);
  for_each_csr_entries_kernel(visit);
  for_each_csr_tiles_kernel(visit);
  for_each_prior_kernel(visit);
}

}  // namespace fiak::cuda
