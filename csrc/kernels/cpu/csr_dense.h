// csr_attention's second kernel, dense attention with a bit for each pair, and which heads run on it.
#pragma once

#include "kernels/cpu/bundle.h"
#include "kernels/cpu/cost_model.h"
#include "kernels/cpu/dense_grads.h"

namespace fiak::cpu::FIAK_ISA {

/// What the queries of a head of a pattern without prior attend to (dense_forward, DenseBackward). The plan must have
/// bits.
class KeptHead {
 public:
  static constexpr bool kMasked = true;
  __attribute__((always_inline)) KeptHead(const CsrArgs& args, HeadPlace at)
      : plan_(args.plan),
        first_(args.query_offsets != nullptr ? args.query_offsets[at.b] : 0),
        row_(args.plan_head(at.b, at.h) * plan_.num_queries + first_),
        keys_(keys_of(args, at.b)) {}
  __attribute__((always_inline)) int64_t end(int64_t n) const {
    for (int64_t w = (keys_ + 63) / 64 - 1; w >= 0; --w) {
      const uint64_t bits = words(n)[w] & ~uint64_t{0} >> (64 - smaller(64, keys_ - 64 * w));
      if (bits != 0) return 64 * (w + 1) - __builtin_clzll(bits);
    }
    return 0;
  }
  template <class Call>
  __attribute__((always_inline)) auto with(int64_t n, int64_t j, Call&& call) const {
    return call(KeptKeys{reinterpret_cast<const char*>(words(n)) + j / 8});
  }
  __attribute__((always_inline)) int64_t spans(int64_t first, int64_t rows, int64_t from, int64_t keys, int64_t unit,
                                               KeySpan* spans) const {
    uint64_t any[kBlockKeys / 64 + 1];
    const int64_t word = from / 64, count = (from + keys + 63) / 64 - word;
    for (int64_t w = 0; w < count; ++w) {
      const uint64_t* bits = words(first) + word + w;
      any[w] = 0;
      for (int64_t i = 0; i < rows; ++i, bits += plan_.row_words) any[w] |= *bits;
    }
    const auto has = [&](int64_t j, int64_t size) __attribute__((always_inline)) {
      const int64_t bit = j - word * 64;
      uint64_t bits = any[bit / 64] >> bit % 64;
      if (bit % 64 + size > 64) bits |= any[bit / 64 + 1] << (64 - bit % 64);
      return (bits & (~uint64_t{0} >> (64 - size))) != 0;
    };
    int64_t found = 0, at = 0;
    for (int64_t j = from; j < from + keys; j += unit) {
      const int64_t size = smaller(unit, from + keys - j);
      if (!has(j, size)) continue;
      if (found > 0 && spans[found - 1].from + spans[found - 1].keys == j) {
        spans[found - 1].keys += size;
      } else {
        spans[found++] = {j, size, at};
      }
      at += unit;
    }
    return found;
  }
  __attribute__((always_inline)) bool needs(int64_t first, int64_t rows, int64_t j, int64_t keys) const {
    const uint64_t* bits = words(first) + j / 64;
    const int64_t low = j % 64;
    uint64_t any = 0, after = 0;
    for (int64_t i = 0; i < rows; ++i, bits += plan_.row_words) {
      any |= bits[0];
      if (low + keys > 64) after |= bits[1];
    }
    any >>= low;
    if (low > 0) any |= after << (64 - low);
    return (any & (~uint64_t{0} >> (64 - keys))) != 0;
  }
  __attribute__((always_inline)) float* grad_weights(int64_t) const { return nullptr; }
  __attribute__((always_inline)) void fetch(int64_t, int64_t, int64_t) const {}
  __attribute__((always_inline)) void fetch_grads(int64_t, int64_t, int64_t) const {}
  __attribute__((always_inline)) int64_t row(int64_t n) const { return n + first_; }

 private:
  __attribute__((always_inline)) const uint64_t* words(int64_t n) const {
    return plan_.bits + (row_ + n) * plan_.row_words;
  }
  const PlanView& plan_;
  int64_t first_, row_, keys_;
};

#if defined(FIAK_ISA_AMX_BF16)
constexpr Isa kIsa = Isa::kAmxBf16;
#elif defined(FIAK_ISA_AVX512_BF16)
constexpr Isa kIsa = Isa::kAvx512Bf16;
#elif defined(FIAK_ISA_AVX512)
constexpr Isa kIsa = Isa::kAvx512;
#else
constexpr Isa kIsa = Isa::kAvx2;
#endif

/// What a call has of a head of the plan; without tiles where only the kernel per entry can compute it.
FIAK_INLINE CsrHead shape_of(const CsrArgs& args, int64_t head, bool tiles, int elements) {
  const PlanView& plan = args.plan;
  const auto nnz = static_cast<double>(plan.first_entry(head + 1) - plan.first_entry(head));
  const double share = static_cast<double>(args.queries) / static_cast<double>(larger(1, plan.num_queries));
  return {args.queries,  args.keys,      share * nnz, tiles ? share * static_cast<double>(plan.tiles[head]) : 0.0,
          args.head_dim, args.value_dim, elements};
}

/// The kernel for each query head of each group, and what it costs.
class HeadCosts {
 public:
  /// For bundles of `elements` batch elements, stored as the kernel per entry does.
  __attribute__((always_inline)) HeadCosts(const CsrArgs& args, int elements, Storage storage)
      : args_(args),
        heads_(args.query_heads),
        groups_(args.groups()),
        memory_((groups_ * heads_ + 1) * (2 * sizeof(double) + 1)) {
    const int64_t heads = groups_ * heads_;
    bundles_ = static_cast<double*>(memory_.data());
    singles_ = bundles_ + heads + 1;
    kernels_ = reinterpret_cast<char*>(singles_ + heads + 1);
    const CsrRates& entries_rates = csr_rates(kIsa, storage == Storage::kBFloat16);
    const CsrRates& dense_rates = csr_rates(kIsa, storage_of(args.dtype) == Storage::kBFloat16);
    const CsrKernel wanted = selected_csr_kernel();
    const bool choice = args.plan.bits != nullptr && args.prior == nullptr;
    bundles_[0] = singles_[0] = 0;
    for (int64_t head = 0; head < heads; ++head) {
      CsrHead shape = shape_of(args, args.plan_head(head / heads_, head % heads_), choice, elements);
      CsrKernel kernel = wanted;
      if (kernel == CsrKernel::kAuto) {
        const double all = entries_cost(shape, entries_rates, false), blocks = entries_cost(shape, entries_rates, true);
        kernel = blocks < all ? CsrKernel::kBlocks : CsrKernel::kEntries;
        if (choice && dense_cost(shape, dense_rates) < (blocks < all ? blocks : all)) kernel = CsrKernel::kDense;
      }
      if (kernel == CsrKernel::kDense && !choice) kernel = CsrKernel::kBlocks;
      if (args.plan.columns == nullptr) kernel = CsrKernel::kRows;  // columns are wide
      kernels_[head] = static_cast<char>(kernel);
      const auto cost = [&] {
        return kernel == CsrKernel::kDense ? dense_cost(shape, dense_rates)
                                           : entries_cost(shape, entries_rates, kernel == CsrKernel::kBlocks);
      };
      bundles_[head + 1] = bundles_[head] + cost();
      shape.elements = 1;
      singles_[head + 1] = singles_[head] + cost();
    }
  }
  __attribute__((always_inline)) CsrKernel kernel(int64_t b, int64_t h) const {
    return static_cast<CsrKernel>(kernels_[b % groups_ * heads_ + h]);
  }

  /// What comes before row `row` of head h in bundle k of a group, of which `full` come before those of one element
  /// and `count` are all; groups follow each other. Rows of a head share its cost by their entries.
  __attribute__((always_inline)) double before(int64_t group, int64_t k, int64_t full, int64_t count, int64_t h,
                                               int64_t row) const {
    const int64_t first = group * heads_;
    double cost = static_cast<double>(full) * bundles_[first] + static_cast<double>(count - full) * singles_[first];
    if (group == groups_) return cost;
    const double bundle = bundles_[first + heads_] - bundles_[first],
                 single = singles_[first + heads_] - singles_[first];
    cost += static_cast<double>(smaller(k, full)) * bundle + static_cast<double>(larger(0, k - full)) * single;
    const double* costs = k < full ? bundles_ : singles_;
    cost += costs[first + h] - costs[first];
    if (row == 0) return cost;
    const PlanView& plan = args_.plan;
    const int64_t head = args_.plan_head(group, h), begin = plan.first_entry(head);
    const int64_t at = plan.row_offsets[head * plan.num_queries + row];
    const int64_t all = plan.first_entry(head + 1) - begin + plan.num_queries;
    return cost +
           (costs[first + h + 1] - costs[first + h]) * static_cast<double>(at - begin + row) / static_cast<double>(all);
  }

 private:
  const CsrArgs& args_;
  int64_t heads_, groups_;
  SharedScratch memory_;
  double *bundles_, *singles_;  // of the heads before, for a bundle and for a single element
  char* kernels_;               // of CsrKernel
};

/// The key heads whose backward runs on the dense kernel, for all batch elements, and the others.
class HeadsByKernel {
 public:
  /// For bundles of `elements` batch elements, stored as the kernel per entry does.
  __attribute__((always_inline)) HeadsByKernel(const CsrArgs& args, int elements, Storage storage)
      : memory_(2 * args.key_heads * sizeof(int64_t)) {
    auto* dense = static_cast<int64_t*>(memory_.data());
    int64_t* entries = dense + args.key_heads;
    dense_ = {dense, 0};
    entries_ = {entries, 0};
    const CsrKernel wanted = selected_csr_kernel();
    const bool choice = args.plan.bits != nullptr && args.prior == nullptr;
    for (int64_t head = 0; head < args.key_heads; ++head) {
      const bool cheaper = choice && wanted == CsrKernel::kAuto && dense_is_cheaper(args, head, elements, storage);
      if (choice && (wanted == CsrKernel::kDense || cheaper)) {
        dense[dense_.count++] = head;
      } else {
        entries[entries_.count++] = head;
      }
    }
  }
  __attribute__((always_inline)) const KeyHeads& dense() const { return dense_; }
  __attribute__((always_inline)) const KeyHeads& entries() const { return entries_; }

 private:
  /// Over all groups and the query heads that read the key head.
  __attribute__((always_inline)) static bool dense_is_cheaper(const CsrArgs& args, int64_t key_head, int elements,
                                                              Storage storage) {
    const CsrRates& entries_rates = csr_rates(kIsa, storage == Storage::kBFloat16);
    const CsrRates& dense_rates = csr_rates(kIsa, storage_of(args.dtype) == Storage::kBFloat16);
    double entries = 0, dense = 0;
    for (int64_t group = 0; group < args.groups(); ++group) {
      for (int64_t h = key_head * shared_heads(args); h < (key_head + 1) * shared_heads(args); ++h) {
        const CsrHead shape = shape_of(args, args.plan_head(group, h), true, elements);
        entries += entries_grad_cost(shape, entries_rates);
        dense += dense_grad_cost(shape, dense_rates);
      }
    }
    return dense < entries;
  }

  SharedScratch memory_;
  KeyHeads dense_, entries_;
};

}  // namespace fiak::cpu::FIAK_ISA
