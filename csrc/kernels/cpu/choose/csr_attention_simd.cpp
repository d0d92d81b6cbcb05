// csr_attention on vectors: every head of the pattern on the family that takes it at the least cost (cost_model.h).
// Threads split the rows by what they cost.
#include <cstring>

#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/choose/cost_model.h"
#include "kernels/cpu/decode/decode.h"
#include "kernels/cpu/dense/csr_dense.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/entries/segments.h"
#include "kernels/cpu/isa/list.h"
#include "kernels/cpu/rows/rows.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

/// What each family does, in the order of kFamilies: forward of some rows, and backward of some key heads.
struct FamilyKernels {
  void (*forward)(const CsrArgs&, const ForwardResult&, Storage, const BundleRows&);
  void (*backward)(const CsrArgs&, const BackwardArgs&, Storage, const KeyHeads&, const Parallel&);
};

template <bool kSplit>
void forward_entries(const CsrArgs& args, const ForwardResult& result, Storage storage, const BundleRows& rows) {
  entries_forward(args, result, storage, rows, kSplit);
}
void forward_dense(const CsrArgs& args, const ForwardResult& result, Storage, const BundleRows& rows) {
  csr_dense_forward(args, result, rows);
}
void forward_by_rows(const CsrArgs& args, const ForwardResult& result, Storage, const BundleRows& rows) {
  const int64_t offset = offset_of(args, rows.bundle.b[0]);
  for (int e = 0; e < rows.bundle.samples; ++e) {
    csr_rows_forward(args, result, rows.bundle.b[e], rows.h, rows.begin - offset, rows.end - offset, rows.longest);
  }
}
void backward_dense(const CsrArgs& args, const BackwardArgs& grads, Storage, const KeyHeads& key_heads,
                    const Parallel& parallel) {
  csr_dense_backward(args, grads, key_heads, parallel);
}
void backward_by_rows(const CsrArgs& args, const BackwardArgs& grads, Storage, const KeyHeads& key_heads,
                      const Parallel& parallel) {
  csr_rows_backward(args, grads, key_heads, parallel);
}

constexpr FamilyKernels kFamilyKernels[kFamilyCount] = {{forward_entries<false>, entries_backward},
                                                        {forward_entries<true>, entries_backward},
                                                        {forward_dense, backward_dense},
                                                        {forward_by_rows, backward_by_rows}};

/// The family for each head of a call: the one that serves it at the least cost.
class FamilyChoice {
 public:
  /// For bundles of `samples` samples in `storage`. Where `by_rows`, the families over entries serve nothing.
  FamilyChoice(const CsrArgs& args, Storage storage, int64_t samples, bool by_rows)
      : args_(args), storage_(storage), samples_(static_cast<int>(samples)), wanted_(selected_family()) {
    const Isa machine = machine_isa();
    for (int i = 0; i < kFamilyCount; ++i) {
      const FamilyCosts& family = kFamilies[i];
      serves_[i] = args.plan.has(family.reads) && (family.takes_prior || args.prior == nullptr);
      rates_[i] = &csr_rates(kIsa, machine, i == kDense ? storage_of(kIsa, args.dtype) : storage);
    }
    serves_[kEntries] = serves_[kEntriesSliced] = serves_[kEntries] && !by_rows && wanted_ != kRows;
    serves_[kRows] = !serves_[kEntries];
  }

  /// What the call has of a head of the plan; without tiles where the dense family does not serve it.
  CsrHead shape(int64_t head) const {
    const PlanView& plan = args_.plan;
    const auto nnz = static_cast<double>(plan.first_entry(head + 1) - plan.first_entry(head));
    const double share = static_cast<double>(args_.queries) / static_cast<double>(larger(1, plan.num_queries));
    const double tiles = serves_[kDense] ? share * static_cast<double>(plan.tiles[head]) : 0.0;
    return {args_.queries, args_.keys, share * nnz, tiles, args_.head_dim, args_.value_dim, samples_, storage_, kLanes};
  }
  double forward_cost(int family, const CsrHead& head) const {
    return csr_cost(kFamilies[family].forward(head), rates_[family]->forward);
  }
  double backward_cost(int family, const CsrHead& head) const {
    return csr_cost(kFamilies[family].backward(head), rates_[family]->backward);
  }
  /// The family with the least cost(family), or the one that FIAK_CSR_KERNEL names.
  template <class Cost>
  int cheapest(Cost&& cost) const {
    if (wanted_ >= 0) return serves_[wanted_] ? wanted_ : serves_[kEntriesSliced] ? kEntriesSliced : kRows;
    int best = -1;
    double least = 0;
    for (int i = 0; i < kFamilyCount; ++i) {
      if (!serves_[i]) continue;
      const double found = cost(i);
      if (best < 0 || found < least) {
        best = i;
        least = found;
      }
    }
    return best;
  }

 private:
  const CsrArgs& args_;
  Storage storage_;
  int samples_, wanted_;
  bool serves_[kFamilyCount];
  const CsrRates* rates_[kFamilyCount];
};

/// Forward: the family for each query head of each group, and what it costs.
class HeadCosts {
 public:
  HeadCosts(const CsrArgs& args, int64_t samples, Storage storage)
      : args_(args),
        heads_(args.query_heads),
        groups_(args.groups()),
        memory_((groups_ * heads_ + 1) * (2 * sizeof(double) + 1)) {
    const int64_t heads = groups_ * heads_;
    bundles_ = static_cast<double*>(memory_.data());
    singles_ = bundles_ + heads + 1;
    families_ = reinterpret_cast<char*>(singles_ + heads + 1);
    const FamilyChoice choice(args, storage, samples, false);
    bundles_[0] = singles_[0] = 0;
    for (int64_t head = 0; head < heads; ++head) {
      CsrHead shape = choice.shape(args.plan_head(head / heads_, head % heads_));
      const int family = choice.cheapest([&](int i) { return choice.forward_cost(i, shape); });
      families_[head] = static_cast<char>(family);
      bundles_[head + 1] = bundles_[head] + choice.forward_cost(family, shape);
      shape.samples = 1;
      singles_[head + 1] = singles_[head] + choice.forward_cost(family, shape);
    }
  }
  int family(int64_t b, int64_t h) const { return families_[b % groups_ * heads_ + h]; }

  /// What comes before row `row` of head h in bundle k of a group, of which `full` come before those of one sample and
  /// `count` are all; groups follow each other. Rows of a head share its cost by their entries.
  double before(int64_t group, int64_t k, int64_t full, int64_t count, int64_t h, int64_t row) const {
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
  double *bundles_, *singles_;  // of the heads before, for a bundle and for a single sample
  char* families_;
};

int64_t longest_row(const PlanView& plan, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t row = begin; row < end; ++row) {
    const PlanRange entries = plan.row(row);
    longest = larger(longest, entries.end - entries.begin);
  }
  return longest;
}

/// compute(rows) over the pattern rows of all queries, split by `costs`. Bundles are outside: the heads of one sample
/// often lie side by side.
template <class Compute>
void for_bundle_rows(const CsrArgs& args, const Parallel& parallel, int64_t samples, const HeadCosts& costs,
                     Compute&& compute) {
  const PlanView& plan = args.plan;
  const SampleBundles bundles(args, samples);
  const int64_t heads = args.query_heads;
  // Rows that only some samples use are not worth a search for balance.
  const bool whole = args.query_offsets == nullptr && args.queries == plan.num_queries;
  const int64_t bundle_rows = heads * args.queries;
  const auto work = [&](int64_t row_index) {
    if (!whole) return row_index;
    const int64_t bundle = row_index / bundle_rows, row = row_index % bundle_rows;
    const int64_t of_group = bundles.count / bundles.groups;
    return static_cast<int64_t>(costs.before(bundle / of_group, bundle % of_group, bundles.full, of_group,
                                             row / args.queries, row % args.queries));
  };
  parallel_balanced(parallel, bundles.count * bundle_rows, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / args.queries, h = i % heads;
      const SampleBundle bundle = bundles.at(i / heads);
      const int64_t first = i * args.queries, stop = smaller(end, first + args.queries);
      const int64_t offset = offset_of(args, bundle.b[0]), from = begin - first + offset, to = stop - first + offset;
      const int64_t head_row = args.plan_head(bundle.b[0], h) * plan.num_queries;
      const bool last = stop >= end;
      compute(BundleRows{bundle, h, from, to, longest_row(plan, head_row + from, head_row + to),
                         last ? bundle : bundles.at((i + 1) / heads), last ? -1 : (i + 1) % heads});
      begin = stop;
    }
  });
}

}  // namespace

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  const bool by_rows = !args.plan.has(PlanSection::kColumns) || selected_family() == kRows;
  if (is_decoding(args) && !by_rows) return csr_decode(args, result, parallel);
  const Storage storage = entries_storage(args);
  const int64_t samples = bundled_samples(args, storage);
  const HeadCosts costs(args, samples, storage);
  for_bundle_rows(args, parallel, samples, costs, [&](const BundleRows& rows) {
    kFamilyKernels[costs.family(rows.bundle.b[0], rows.h)].forward(args, result, storage, rows);
  });
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  if (grads.grad_prior != nullptr) std::memset(grads.grad_prior, 0, args.plan.nnz * sizeof(float));
  if (args.batch == 0 || args.key_heads == 0) return;
  const Storage storage = entries_storage(args);
  const FamilyChoice choice(args, storage, bundled_samples(args, storage),
                            entries_leave_backward(args, grads, storage));
  const SharedScratch memory(args.key_heads * (sizeof(int64_t) + 1));
  auto* heads = static_cast<int64_t*>(memory.data());
  char* families = reinterpret_cast<char*>(heads + args.key_heads);
  for (int64_t key_head = 0; key_head < args.key_heads; ++key_head) {
    families[key_head] = static_cast<char>(choice.cheapest([&](int family) {
      double cost = 0;  // over all groups and the query heads that read the key head
      for (int64_t group = 0; group < args.groups(); ++group) {
        for (int64_t h = key_head * shared_heads(args); h < (key_head + 1) * shared_heads(args); ++h) {
          cost += choice.backward_cost(family, choice.shape(args.plan_head(group, h)));
        }
      }
      return cost;
    }));
  }
  for (int family = 0; family < kFamilyCount; ++family) {
    KeyHeads mine{heads, 0};
    for (int64_t key_head = 0; key_head < args.key_heads; ++key_head) {
      if (families[key_head] == family) heads[mine.count++] = key_head;
    }
    if (mine.count > 0) kFamilyKernels[family].backward(args, grads, storage, mine, parallel);
  }
  if (grads.grad_prior == nullptr || args.prior == nullptr || args.log_prior) return;
  parallel_range(parallel, args.plan.nnz, [&](int64_t begin, int64_t end) {
    scale_weight_gradients(static_cast<float*>(grads.grad_prior) + begin, static_cast<const float*>(args.prior) + begin,
                           end - begin);
  });
}

void csr_blocks(const CsrArgs& args, int64_t threads, BlockCounts& blocks) {
  csr_decode_blocks(args, blocks);
  csr_dense_blocks(args, threads, is_decoding(args), blocks);
  blocks.add(args.keys, kPlanShort);
  blocks.add(args.queries, kPlanShort);
  entries_blocks(args, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
