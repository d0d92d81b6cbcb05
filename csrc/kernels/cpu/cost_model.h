// What csr_attention's two forward kernels cost, so that every head of a pattern runs on the cheaper one: per entry
// (csr_attention_simd.cpp), or dense with a bit for each pair (csr_dense.h).
//
// Counts of what the kernels do, times the nanoseconds of each, which `python -m benchmarks.cost_model` measures and
// fits. Nothing depends on the number of threads: it must not change what is computed.
#pragma once

#include <cstdint>

#include "kernels/cpu/dispatch.h"

namespace fiak::cpu {

/// One head of a pattern and the batch elements that a call computes at once.
struct CsrHead {
  int64_t queries, keys;
  double nnz, tiles;  ///< the plan's, or the share of them that `queries` rows have
  int64_t head_size, value_size;
  int elements;  ///< 1, 2 or 4
};

/// Nanoseconds of the per-entry kernel for all `elements`, on kAvx2, kAvx512 or, in bfloat16, kAvx512Bf16.
double entries_cost(const CsrHead& head, Isa isa);

/// The same of the dense kernel.
double dense_cost(const CsrHead& head, Isa isa);

/// For tests and benchmarks the environment variable FIAK_CSR_KERNEL (entries, dense, auto), which is read at every
/// call, names the kernel for all heads that it can compute. Throws std::invalid_argument for another name.
enum class CsrKernel { kAuto, kEntries, kDense };
CsrKernel selected_csr_kernel();

}  // namespace fiak::cpu
