// What csr_attention's kernels cost, so that every head of a pattern runs on the cheapest: per entry
// (csr_attention_simd.cpp), forward with all keys at once or in blocks that fit into the L1 cache, or dense with a bit
// for each pair (csr_dense.h).
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
  int64_t head_dim, value_dim;
  int elements;  ///< 1, 2 or 4
};

/// Nanoseconds of one of each of what the kernels do.
struct CsrRates {
  int lanes;   ///< float32 numbers of a vector
  bool pairs;  ///< whether rows are stored as bfloat16
  // Per entry: of an entry, by elements (1, 2, 4); for each vector of its packed rows of K and V; more for those that
  // the L1 cache does not hold; of a run of entries (those of a row in a block of keys); of a vector of K or V to pack.
  double entry[3], entry_vector, far_vector, run, packed_vector;
  // Dense: of a pair, and for each multiply-add of it; of a row; and of a number of K or V to transpose or copy.
  double pair, pair_multiply, dense_row, number;
  // The same of backward, where they differ; runs are of rows and of columns.
  struct {
    double entry[3], entry_vector, run, pair, pair_multiply, dense_row;
  } grads;
};

/// Those of an instruction set, not kScalar, for rows stored as bfloat16 (`pairs`, where it has them) or float32.
const CsrRates& csr_rates(Isa isa, bool pairs);

/// Nanoseconds of the per-entry kernel for all `elements`, with the keys in small blocks or not.
double entries_cost(const CsrHead& head, const CsrRates& rates, bool blocked);

/// The same of the dense kernel.
double dense_cost(const CsrHead& head, const CsrRates& rates);

/// The same of backward.
double entries_grad_cost(const CsrHead& head, const CsrRates& rates);
double dense_grad_cost(const CsrHead& head, const CsrRates& rates);

/// For tests and benchmarks the environment variable FIAK_CSR_KERNEL (entries, blocks, dense, rows, auto), which is
/// read at every call, names the kernel for all heads that it can compute; backward, entries and blocks are the same.
/// Rows is what long and very sparse patterns run on (csr_rows.h). Throws std::invalid_argument for another name.
enum class CsrKernel { kAuto, kEntries, kBlocks, kDense, kRows };
CsrKernel selected_csr_kernel();

}  // namespace fiak::cpu
