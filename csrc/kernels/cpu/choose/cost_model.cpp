#include "kernels/cpu/choose/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/cpu/choose/rates.h"
#include "kernels/plan/plan.h"

namespace fiak::cpu {
namespace {

constexpr double kPlanTilePairs = kPlanTileRows * kPlanTileKeys;

/// The packed rows of a head's K and V.
struct PackedRows {
  double key_vectors, value_vectors, bytes;  // of a key; the last of the wider row

  explicit PackedRows(const CsrHead& head)
      : key_vectors(vectors(head, head.head_dim)),
        value_vectors(vectors(head, head.value_dim)),
        bytes(std::max(key_vectors, value_vectors) * 4 * head.lanes) {}
  static double vectors(const CsrHead& head, int64_t size) {
    return static_cast<double>(row_vectors(size, head.storage, head.samples, head.lanes));
  }
};

/// Counts of `entries` entries that read `vectors` vectors each.
CsrCounts count_entries(const CsrHead& head, double entries, double vectors) {
  CsrCounts counts{};
  (head.samples == 1 ? counts.entry_1 : head.samples == 2 ? counts.entry_2 : counts.entry_4) = entries;
  counts.entry_vector = entries * vectors;
  return counts;
}

template <bool kSplit>
CsrCounts count_entries_forward(const CsrHead& head) {
  const PackedRows packed(head);
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const double bytes = keys * packed.bytes, vectors = packed.key_vectors + packed.value_vectors;
  const double slices = !kSplit || bytes <= kWholePanelBytes ? 1 : std::ceil(bytes / kSliceBytes);
  const double segments = std::min(rows * slices, head.nnz);
  // The last group of four entries of a segment is half full.
  CsrCounts counts = count_entries(head, head.nnz + segments * 1.5, vectors);
  const double used = bytes * std::min(1.0, head.tiles * kPlanTilePairs / (rows * keys));
  if (slices == 1 && used > kSliceBytes) counts.far_vector = counts.entry_vector * (1 - kSliceBytes / used);
  counts.segment = segments;
  counts.packed_vector = keys * vectors;
  return counts;
}

CsrCounts count_entries_backward(const CsrHead& head) {
  const PackedRows packed(head);
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const auto slices = [&](double count) { return std::max(1.0, std::ceil(count * packed.bytes / kSliceBytes)); };
  const double segments = std::min(rows * slices(keys), head.nnz) + std::min(keys * slices(rows), head.nnz);
  CsrCounts counts = count_entries(head, head.nnz + segments * 0.75, 3 * packed.key_vectors + 2 * packed.value_vectors);
  counts.segment = segments;
  counts.packed_vector = (keys + rows) * (packed.key_vectors + packed.value_vectors);
  return counts;
}

/// Counts of pairs of `products` multiply-adds each, and of `numbers` numbers of each key.
CsrCounts count_dense(const CsrHead& head, int64_t products, int64_t numbers) {
  CsrCounts counts{};
  counts.pair = head.samples * head.tiles * kPlanTilePairs;
  counts.pair_multiply = counts.pair * static_cast<double>(products);
  counts.dense_row = static_cast<double>(head.samples * head.queries);
  counts.number = static_cast<double>(head.samples * head.keys * numbers);
  return counts;
}

int64_t padded(const CsrHead& head, int64_t size) { return (size + head.lanes - 1) / head.lanes * head.lanes; }

CsrCounts count_dense_forward(const CsrHead& head) {
  const int64_t numbers = head.head_dim + padded(head, head.value_dim);
  return count_dense(head, numbers, numbers);
}

CsrCounts count_dense_backward(const CsrHead& head) {
  const int64_t numbers = head.head_dim + head.value_dim;
  return count_dense(head, numbers + 2 * padded(head, head.head_dim) + padded(head, head.value_dim), numbers);
}

}  // namespace

const CsrRates& csr_rates(Isa isa, Isa machine, Storage storage) {
  if (isa == Isa::kAvx2) return kAvx2Rates;
  if (storage == Storage::kFloat32) return machine == Isa::kAmxBf16 ? kXeonRates : kAvx512Rates;
  return isa == Isa::kAmxBf16 ? kAmxBf16Rates : kAvx512Bf16Rates;
}

double csr_cost(const CsrCounts& counts, const CsrCounts& rates) {
  double cost = 0;
#define FIAK_ADD(name) cost += counts.name * rates.name;
  FIAK_FOR_COUNTS(FIAK_ADD)
#undef FIAK_ADD
  return cost;
}

const FamilyCosts kFamilies[kFamilyCount] = {
    {"entries", PlanSection::kColumns, true, count_entries_forward<false>, count_entries_backward},
    {"entries_sliced", PlanSection::kColumns, true, count_entries_forward<true>, count_entries_backward},
    {"dense", PlanSection::kBits, false, count_dense_forward, count_dense_backward},
    {"rows", PlanSection::kRowOffsets, true, count_entries_forward<false>, count_entries_backward},
};

int selected_family() {
  const char* wanted = std::getenv("FIAK_CSR_KERNEL");
  const std::string name = wanted == nullptr || *wanted == '\0' ? "auto" : wanted;
  if (name == "auto") return -1;
  std::string names;
  int i = 0;
  for (const FamilyCosts& family : kFamilies) {
    if (name == family.name) return i;
    names += family.name + std::string(", ");
    ++i;
  }
  throw std::invalid_argument("FIAK_CSR_KERNEL must be one of " + names + "auto (got " + name + ")");
}

}  // namespace fiak::cpu
