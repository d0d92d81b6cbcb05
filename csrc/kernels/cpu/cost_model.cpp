#include "kernels/cpu/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fiak::cpu {
namespace {

/// Cycles of one of each. Measured on a Zen 5 core (two 512-bit multiply-adds a cycle).
struct Rates {
  // Per entry: of an entry, by elements (1, 2, 4), and for each vector of its packed rows of K and V; of a row; and of
  // a vector of K or V to pack.
  double entry[3], entry_vector, row, packed_vector;
  // Dense: of a pair, and for each multiply-add of it; of a row; and of a number of K or V to transpose or copy.
  double pair, pair_multiply, dense_row, number;
};

constexpr Rates kAvx2Rates = {{3.0, 2.0, 2.0}, 0.6, 60, 2, 0.8, 0.08, 80, 0.4};
constexpr Rates kAvx512Rates = {{2.0, 1.5, 1.2}, 0.6, 60, 2, 0.4, 0.04, 60, 0.2};
constexpr Rates kAvx512Bf16Rates = {{2.0, 1.5, 1.2}, 0.8, 60, 3, 0.4, 0.02, 60, 0.2};

const Rates& rates(Isa isa) {
  return isa == Isa::kAvx2 ? kAvx2Rates : isa == Isa::kAvx512 ? kAvx512Rates : kAvx512Bf16Rates;
}

/// Vectors of a row of `size` numbers, of all elements together (row_chunks in bundle.h).
int64_t row_vectors(int64_t size, int elements, Isa isa) {
  const int64_t blocks = isa == Isa::kAvx512Bf16 ? (size + 7) / 8 : (size + 3) / 4;
  const int64_t of_vector = isa == Isa::kAvx2 ? 2 : 4;
  return (blocks * elements + of_vector - 1) / of_vector;
}

}  // namespace

double entries_cycles(const CsrHead& head, Isa isa) {
  const Rates& r = rates(isa);
  const int64_t key_vectors = row_vectors(head.head_size, head.elements, isa);
  const int64_t value_vectors = row_vectors(head.value_size, head.elements, isa);
  const auto vectors = static_cast<double>(key_vectors + value_vectors);
  // Long keys are taken in blocks that fit into the L1 cache, and every run of entries ends with half a register more.
  const int64_t bytes = head.keys * std::max(key_vectors, value_vectors) * (isa == Isa::kAvx2 ? 32 : 64);
  const double runs = bytes <= 64 * 1024 ? 1 : std::ceil(bytes / (40.0 * 1024));
  const double half_register = (isa == Isa::kAvx2 ? 4.0 : 8.0) / head.elements;
  const auto rows = static_cast<double>(head.queries);
  const double entries = head.nnz + rows * std::min(runs, head.nnz / rows) * half_register;
  const double entry = r.entry[head.elements == 1 ? 0 : head.elements == 2 ? 1 : 2] + r.entry_vector * vectors;
  return entries * entry + rows * r.row + static_cast<double>(head.keys) * vectors * r.packed_vector;
}

double dense_cycles(const CsrHead& head, Isa isa) {
  const Rates& r = rates(isa);
  const int64_t lanes = isa == Isa::kAvx2 ? 8 : 16;
  const auto numbers = static_cast<double>(head.head_size + (head.value_size + lanes - 1) / lanes * lanes);
  const double pairs = head.tiles * kPlanTileRows * kPlanTileKeys;
  return head.elements *
         (pairs * (r.pair + r.pair_multiply * numbers) + static_cast<double>(head.queries) * r.dense_row +
          static_cast<double>(head.keys) * numbers * r.number);
}

CsrKernel selected_csr_kernel() {
  const char* wanted = std::getenv("FIAK_CSR_KERNEL");
  const std::string name = wanted == nullptr || *wanted == '\0' ? "auto" : wanted;
  if (name == "auto") return CsrKernel::kAuto;
  if (name == "entries") return CsrKernel::kEntries;
  if (name == "dense") return CsrKernel::kDense;
  throw std::invalid_argument("FIAK_CSR_KERNEL must be entries, dense or auto (got " + name + ")");
}

}  // namespace fiak::cpu
