#include "kernels/cpu/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fiak::cpu {
namespace {

/// Nanoseconds of one of each, as `python -m benchmarks.cost_model --fit` prints them. Measured on one Zen 4 core.
/// The costs of copying, packed_vector and number, are what it holds fixed.
struct Rates {
  // Per entry: of an entry, by elements (1, 2, 4); for each vector of its packed rows of K and V; more for those that
  // the L1 cache does not hold; of a run of entries (those of a row in a block of keys); of a vector of K or V to pack.
  double entry[3], entry_vector, far_vector, run, packed_vector;
  // Dense: of a pair, and for each multiply-add of it; of a row; and of a number of K or V to transpose or copy.
  double pair, pair_multiply, dense_row, number;
};

constexpr Rates kAvx2Rates = {{1.00, 0.90, 0.90}, 0.197, 0.191, 39.7, 2.5, 0.668, 0.0175, 7.8, 0.43};
constexpr Rates kAvx512Rates = {{0.71, 0.66, 2.03}, 0.353, 0.283, 23.6, 5.2, 0.425, 0.0165, 6.8, 0.41};
constexpr Rates kAvx512Bf16Rates = {{0.37, 1.00, 1.20}, 0.526, 0.123, 32.8, 5.0, 0.445, 0.0081, 3.6, 0.21};

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

double entries_cost(const CsrHead& head, Isa isa) {
  const Rates& r = rates(isa);
  const int64_t key_vectors = row_vectors(head.head_size, head.elements, isa);
  const int64_t value_vectors = row_vectors(head.value_size, head.elements, isa);
  const auto vectors = static_cast<double>(key_vectors + value_vectors);
  // Long keys are taken in blocks that fit into the L1 cache, and every run of entries ends with half a group more.
  constexpr double kL1 = 40 * 1024;
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const double bytes = keys * static_cast<double>(std::max(key_vectors, value_vectors)) * (isa == Isa::kAvx2 ? 32 : 64);
  const double blocks = bytes <= 64 * 1024 ? 1 : std::ceil(bytes / kL1);
  const double runs = std::min(rows * blocks, head.nnz);
  const double entries = head.nnz + runs * 1.5;
  const double used = bytes * std::min(1.0, head.tiles * kPlanTileRows * kPlanTileKeys / (rows * keys));
  const double far = blocks == 1 && used > kL1 ? 1 - kL1 / used : 0;
  const double entry = r.entry[head.elements == 1 ? 0 : head.elements == 2 ? 1 : 2];
  return entries * (entry + vectors * (r.entry_vector + far * r.far_vector)) + runs * r.run +
         keys * vectors * r.packed_vector;
}

double dense_cost(const CsrHead& head, Isa isa) {
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
