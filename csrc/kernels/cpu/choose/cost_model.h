// The list of csr_attention's kernel families on the CPU, and what they cost, so that every head of a pattern runs on
// the cheapest: over entries (entries/), forward with all keys at once or in slices that fit into the L1 cache; dense
// with a bit for each pair (dense/); or by rows and columns where they lie (rows/).
//
// Counts of what the kernels do, times the nanoseconds of each, which `python -m benchmarks.cost_model` measures and
// fits. Nothing depends on the number of threads: it must not change what is computed.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa/list.h"
#include "kernels/plan/sections.h"

namespace fiak::cpu {

/// One head of a pattern and the batch elements that a call computes at once.
struct CsrHead {
  int64_t queries, keys;
  double nnz, tiles;  ///< the plan's, or the share of them that `queries` rows have
  int64_t head_dim, value_dim;
  int samples;  ///< 1, 2 or 4
};

/// Nanoseconds of one of each of what the kernels do.
struct CsrRates {
  int lanes;   ///< float32 numbers of a vector
  bool pairs;  ///< whether rows are stored as bfloat16
  // Per entry: of an entry, by samples (1, 2, 4); for each vector of its packed rows of K and V; more for those that
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

/// The kernel families of csr_attention on the CPU; kEntriesSplit is kEntries with the keys in slices.
enum Family : int { kEntries, kEntriesSplit, kDense, kRows, kFamilyCount };

/// One row of the list of families: what it is called, the section of the plan that it reads, whether it takes a prior,
/// and what a head costs it, forward and backward.
struct FamilyCosts {
  const char* name;
  PlanSection reads;
  bool takes_prior;
  double (*forward)(const CsrHead&, const CsrRates&);
  double (*backward)(const CsrHead&, const CsrRates&);
};

/// In the order of Family; of families that cost the same, the first is taken. kRows reads what every plan has, and is
/// taken where no other can be.
extern const FamilyCosts kFamilies[kFamilyCount];

/// The family that the environment variable FIAK_CSR_KERNEL names, for tests and benchmarks, or -1 for "auto". It is
/// read at every call and decides for all heads that the family can compute. Throws std::invalid_argument for another
/// name.
int selected_family();

}  // namespace fiak::cpu
