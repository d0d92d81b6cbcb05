// The list of csr_attention's kernel families on the CPU, and what they cost, so that every head of a pattern runs on
// the cheapest: over entries (entries/), forward with all keys at once or in slices that fit into the L1 cache; dense
// with a bit for each pair (dense/); or by rows and columns where they lie (rows/).
//
// A cost is what the kernels count, times the nanoseconds of each: rates.h, which `python -m benchmarks.cost_model`
// measures and fits. Nothing depends on the number of threads: it must not change what is computed.
#pragma once

#include <cstdint>

#include "kernels/cpu/entries/packing.h"
#include "kernels/cpu/isa/list.h"
#include "kernels/plan/sections.h"

namespace fiak::cpu {

/// X(name) of all that kernels count. Over entries: entries, by the samples of a bundle; vectors of the packed rows of
/// K and V that these read, and those of them that the L1 cache does not hold; segments (a row's entries in one slice
/// of keys; backward also a column's); vectors of K and V to pack. Dense: pairs; their multiply-adds; rows; and numbers
/// of K and V to transpose or copy.
// clang-format off
#define FIAK_FOR_COUNTS(X) \
  X(entry_1) X(entry_2) X(entry_4) X(entry_vector) X(far_vector) X(segment) X(packed_vector) \
  X(pair) X(pair_multiply) X(dense_row) X(number)
// clang-format on

/// How many there are of each, or the nanoseconds that one takes.
struct CsrCounts {
#define FIAK_MEMBER(name) double name;
  FIAK_FOR_COUNTS(FIAK_MEMBER)
#undef FIAK_MEMBER
};

/// One head of a pattern and the samples that a call computes at once.
struct CsrHead {
  int64_t queries, keys;
  double nnz, tiles;  ///< the plan's, or the share of them that `queries` rows have
  int64_t head_dim, value_dim;
  int samples;      ///< 1, 2 or 4
  Storage storage;  ///< of packed rows
  int lanes;        ///< float32 numbers of a vector
};

struct CsrRates {
  const char* name;
  CsrCounts forward, backward;
};

/// Those of an instruction set, not kScalar, on a machine whose best one is `machine`, for rows stored as bfloat16,
/// where it has them, or float32.
const CsrRates& csr_rates(Isa isa, Isa machine, Storage storage);

/// The nanoseconds of so many of each.
double csr_cost(const CsrCounts& counts, const CsrCounts& rates);

/// The kernel families of csr_attention on the CPU; kEntriesSliced is kEntries with the keys in slices.
enum Family : int { kEntries, kEntriesSliced, kDense, kRows, kFamilyCount };

/// One row of the list of families: what it is called, the section of the plan that it reads, whether it takes a prior,
/// and what it counts of a head, forward and backward.
struct FamilyCosts {
  const char* name;
  PlanSection reads;
  bool takes_prior;
  CsrCounts (*forward)(const CsrHead&);
  CsrCounts (*backward)(const CsrHead&);
};

/// In the order of Family; of families that cost the same, the first is taken. kRows reads what every plan has, and is
/// taken where no other can be.
extern const FamilyCosts kFamilies[kFamilyCount];

/// The family that the environment variable FIAK_CSR_KERNEL names, for tests and benchmarks, or -1 for "auto". It is
/// read at every call and decides for all heads that the family can compute. Throws std::invalid_argument for another
/// name.
int selected_family();

}  // namespace fiak::cpu
