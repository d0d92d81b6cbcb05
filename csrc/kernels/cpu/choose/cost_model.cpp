#include "kernels/cpu/choose/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/cpu/dispatch.h"

namespace fiak::cpu {
namespace {

// As `python -m benchmarks.cost_model --fit` prints them; the costs of copying, packed_vector and number, are what it
// holds fixed. Measured on one Zen 4 core, and on one core of a Xeon with AMX, where the case table has no bundles of
// one element in bfloat16: that entry is extrapolated. What dense costs with AMX is fitted to fiak_benchmarks' square
// cases with 70% pruned, within 5%. Backward's are fitted to the same machines' results of benchmarks.compare, those of
// AVX2 on a Zen 3 core. What dense backward costs with AMX is not measured: it is put together from the forward pass's
// parts, and nearly doubled, so that what is measured wins where the two are close.
constexpr CsrRates kAvx2Rates = {
    /*lanes=*/8,
    /*pairs=*/false,
    /*entry=*/{1.00, 0.90, 0.90},
    /*entry_vector=*/0.197,
    /*far_vector=*/0.191,
    /*run=*/39.7,
    /*packed_vector=*/2.5,
    /*pair=*/0.668,
    /*pair_multiply=*/0.0175,
    /*dense_row=*/7.8,
    /*number=*/0.43,
    /*grads=*/
    {/*entry=*/{3.55, 5.03, 5.03},
     /*entry_vector=*/0.383,
     /*run=*/104.1,
     /*pair=*/0.804,
     /*pair_multiply=*/0.0324,
     /*dense_row=*/350.5},
};
constexpr CsrRates kAvx512Rates = {
    /*lanes=*/16,
    /*pairs=*/false,
    /*entry=*/{0.71, 0.66, 2.03},
    /*entry_vector=*/0.353,
    /*far_vector=*/0.283,
    /*run=*/23.6,
    /*packed_vector=*/5.2,
    /*pair=*/0.425,
    /*pair_multiply=*/0.0165,
    /*dense_row=*/6.8,
    /*number=*/0.41,
    /*grads=*/
    {/*entry=*/{3.04, 3.68, 5.81},
     /*entry_vector=*/0.336,
     /*run=*/39.6,
     /*pair=*/0.210,
     /*pair_multiply=*/0.0199,
     /*dense_row=*/126.0},
};
constexpr CsrRates kAvx512Bf16Rates = {
    /*lanes=*/16,
    /*pairs=*/true,
    /*entry=*/{0.33, 0.97, 1.10},
    /*entry_vector=*/0.549,
    /*far_vector=*/0.225,
    /*run=*/51.8,
    /*packed_vector=*/5.0,
    /*pair=*/0.568,
    /*pair_multiply=*/0.0085,
    /*dense_row=*/6.4,
    /*number=*/0.21,
    /*grads=*/
    {/*entry=*/{2.97, 4.38, 7.34},
     /*entry_vector=*/0.437,
     /*run=*/61.0,
     /*pair=*/0.562,
     /*pair_multiply=*/0.0096,
     /*dense_row=*/81.4},
};
constexpr CsrRates kXeonRates = {
    /*lanes=*/16,
    /*pairs=*/false,
    /*entry=*/{0.93, 1.18, 2.66},
    /*entry_vector=*/0.278,
    /*far_vector=*/0.254,
    /*run=*/46.7,
    /*packed_vector=*/5.2,
    /*pair=*/0.451,
    /*pair_multiply=*/0.0118,
    /*dense_row=*/9.8,
    /*number=*/0.41,
    /*grads=*/
    {/*entry=*/{4.75, 7.27, 15.0},
     /*entry_vector=*/0.268,
     /*run=*/56.5,
     /*pair=*/0.377,
     /*pair_multiply=*/0.0142,
     /*dense_row=*/193.5},
};
constexpr CsrRates kAmxBf16Rates = {
    /*lanes=*/16,
    /*pairs=*/true,
    /*entry=*/{1.20, 1.56, 2.28},
    /*entry_vector=*/0.840,
    /*far_vector=*/0.261,
    /*run=*/54.8,
    /*packed_vector=*/5.0,
    /*pair=*/0.420,
    /*pair_multiply=*/0.0007,
    /*dense_row=*/0.8,
    /*number=*/0.14,
    /*grads=*/
    {/*entry=*/{4.80, 6.39, 12.9},
     /*entry_vector=*/0.805,
     /*run=*/78.1,
     /*pair=*/2.0,
     /*pair_multiply=*/0.0025,
     /*dense_row=*/150.0},
};

/// Vectors of a row of `size` numbers, of all samples together (row_vectors in bundle.h).
int64_t row_vectors(int64_t size, int samples, const CsrRates& rates) {
  const int64_t blocks = rates.pairs ? (size + 7) / 8 : (size + 3) / 4;
  const int64_t of_vector = rates.lanes / 4;
  return (blocks * samples + of_vector - 1) / of_vector;
}

template <bool kSplit>
double entries_cost(const CsrHead& head, const CsrRates& r) {
  const int64_t key_vectors = row_vectors(head.head_dim, head.samples, r);
  const int64_t value_vectors = row_vectors(head.value_dim, head.samples, r);
  const auto vectors = static_cast<double>(key_vectors + value_vectors);
  // Every run of entries ends with half a group more.
  constexpr double kL1 = 40 * 1024;
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const double bytes = keys * static_cast<double>(std::max(key_vectors, value_vectors) * 4 * r.lanes);
  const double blocks = !kSplit || bytes <= 64 * 1024 ? 1 : std::ceil(bytes / kL1);
  const double runs = std::min(rows * blocks, head.nnz);
  const double entries = head.nnz + runs * 1.5;
  const double used = bytes * std::min(1.0, head.tiles * kPlanTileRows * kPlanTileKeys / (rows * keys));
  const double far = blocks == 1 && used > kL1 ? 1 - kL1 / used : 0;
  const double entry = r.entry[head.samples == 1 ? 0 : head.samples == 2 ? 1 : 2];
  return entries * (entry + vectors * (r.entry_vector + far * r.far_vector)) + runs * r.run +
         keys * vectors * r.packed_vector;
}

double dense_cost(const CsrHead& head, const CsrRates& r) {
  const auto numbers = static_cast<double>(head.head_dim + (head.value_dim + r.lanes - 1) / r.lanes * r.lanes);
  const double pairs = head.tiles * kPlanTileRows * kPlanTileKeys;
  return head.samples *
         (pairs * (r.pair + r.pair_multiply * numbers) + static_cast<double>(head.queries) * r.dense_row +
          static_cast<double>(head.keys) * numbers * r.number);
}

double entries_grad_cost(const CsrHead& head, const CsrRates& r) {
  const int64_t key_vectors = row_vectors(head.head_dim, head.samples, r);
  const int64_t value_vectors = row_vectors(head.value_dim, head.samples, r);
  const auto vectors = static_cast<double>(3 * key_vectors + 2 * value_vectors);
  const auto row_bytes = static_cast<double>(std::max(key_vectors, value_vectors) * 4 * r.lanes);
  const auto rows = static_cast<double>(head.queries), keys = static_cast<double>(head.keys);
  const auto blocks = [&](double count) { return std::max(1.0, std::ceil(count * row_bytes / (40 * 1024))); };
  const double runs = std::min(rows * blocks(keys), head.nnz) + std::min(keys * blocks(rows), head.nnz);
  const double entry = r.grads.entry[head.samples == 1 ? 0 : head.samples == 2 ? 1 : 2];
  return (head.nnz + runs * 0.75) * (entry + vectors * r.grads.entry_vector) + runs * r.grads.run +
         (keys + rows) * static_cast<double>(key_vectors + value_vectors) * r.packed_vector;
}

double dense_grad_cost(const CsrHead& head, const CsrRates& r) {
  const auto padded = [&](int64_t size) { return (size + r.lanes - 1) / r.lanes * r.lanes; };
  const auto numbers =
      static_cast<double>(head.head_dim + 2 * padded(head.head_dim) + head.value_dim + padded(head.value_dim));
  const double pairs = head.tiles * kPlanTileRows * kPlanTileKeys;
  return head.samples * (pairs * (r.grads.pair + r.grads.pair_multiply * numbers) +
                         static_cast<double>(head.queries) * r.grads.dense_row +
                         static_cast<double>(head.keys * (head.head_dim + head.value_dim)) * r.number);
}

}  // namespace

const CsrRates& csr_rates(Isa isa, bool pairs) {
  if (isa == Isa::kAvx2) return kAvx2Rates;
  if (!pairs) return machine_isa() == Isa::kAmxBf16 ? kXeonRates : kAvx512Rates;
  return isa == Isa::kAmxBf16 ? kAmxBf16Rates : kAvx512Bf16Rates;
}

const FamilyCosts kFamilies[kFamilyCount] = {
    {"entries", PlanSection::kColumns, true, entries_cost<false>, entries_grad_cost},
    {"entries_split", PlanSection::kColumns, true, entries_cost<true>, entries_grad_cost},
    {"dense", PlanSection::kBits, false, dense_cost, dense_grad_cost},
    {"rows", PlanSection::kRowOffsets, true, entries_cost<false>, entries_grad_cost},
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
