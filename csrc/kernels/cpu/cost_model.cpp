#include "kernels/cpu/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fiak::cpu {
namespace {

// As `python -m benchmarks.cost_model --fit` prints them; the costs of copying, packed_vector and number, are what it
// holds fixed. Measured on one Zen 4 core, and on one core of a Xeon with AMX, where the case table has no bundles of
// one element in bfloat16: that entry is extrapolated. What dense costs with AMX is fitted to fiak_benchmarks' square
// cases with 70% pruned, within 5%.
constexpr CsrRates kAvx2Rates = {8, false, {1.00, 0.90, 0.90}, 0.197, 0.191, 39.7, 2.5, 0.668, 0.0175, 7.8, 0.43};
constexpr CsrRates kAvx512Rates = {16, false, {0.71, 0.66, 2.03}, 0.353, 0.283, 23.6, 5.2, 0.425, 0.0165, 6.8, 0.41};
constexpr CsrRates kAvx512Bf16Rates = {16, true, {0.37, 1.00, 1.20}, 0.526, 0.123, 32.8, 5.0, 0.445, 0.0081, 3.6, 0.21};
constexpr CsrRates kXeonRates = {16, false, {0.93, 1.18, 2.66}, 0.278, 0.254, 46.7, 5.2, 0.451, 0.0118, 9.8, 0.41};
constexpr CsrRates kAmxBf16Rates = {16, true, {1.20, 1.56, 2.28}, 0.840, 0.261, 54.8, 5.0, 0.420, 0.0007, 0.8, 0.14};

/// Vectors of a row of `size` numbers, of all elements together (row_chunks in bundle.h).
int64_t row_vectors(int64_t size, int elements, const CsrRates& rates) {
  const int64_t blocks = rates.pairs ? (size + 7) / 8 : (size + 3) / 4;
  const int64_t of_vector = rates.lanes / 4;
  return (blocks * elements + of_vector - 1) / of_vector;
}

}  // namespace

const CsrRates& csr_rates(Isa isa, bool pairs) {
  if (isa == Isa::kAvx2) return kAvx2Rates;
  if (!pairs) return machine_isa() == Isa::kAmxBf16 ? kXeonRates : kAvx512Rates;
  return isa == Isa::kAmxBf16 ? kAmxBf16Rates : kAvx512Bf16Rates;
}

double entries_cost(const CsrHead& head, const CsrRates& r, bool blocked) {
  const int64_t key_vectors = row_vectors(head.head_size, head.elements, r);
  const int64_t value_vectors = row_vectors(head.value_size, head.elements, r);
  const auto vectors = static_cast<double>(key_vectors + value_vectors);
  // Every run of entries ends with half a group more.
  constexpr double kL1 = 40 * 1024;
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const double bytes = keys * static_cast<double>(std::max(key_vectors, value_vectors) * 4 * r.lanes);
  const double blocks = !blocked || bytes <= 64 * 1024 ? 1 : std::ceil(bytes / kL1);
  const double runs = std::min(rows * blocks, head.nnz);
  const double entries = head.nnz + runs * 1.5;
  const double used = bytes * std::min(1.0, head.tiles * kPlanTileRows * kPlanTileKeys / (rows * keys));
  const double far = blocks == 1 && used > kL1 ? 1 - kL1 / used : 0;
  const double entry = r.entry[head.elements == 1 ? 0 : head.elements == 2 ? 1 : 2];
  return entries * (entry + vectors * (r.entry_vector + far * r.far_vector)) + runs * r.run +
         keys * vectors * r.packed_vector;
}

double dense_cost(const CsrHead& head, const CsrRates& r) {
  const auto numbers = static_cast<double>(head.head_size + (head.value_size + r.lanes - 1) / r.lanes * r.lanes);
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
  if (name == "blocks") return CsrKernel::kBlocks;
  if (name == "dense") return CsrKernel::kDense;
  throw std::invalid_argument("FIAK_CSR_KERNEL must be entries, blocks, dense or auto (got " + name + ")");
}

}  // namespace fiak::cpu
