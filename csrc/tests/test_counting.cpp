// The FLOP formulas against the kernels: a number that counts its multiplications and additions runs through the same
// scalar templates that compute attention. What they execute is exactly Table 1 of the paper (dense cost as printed,
// the savings in their exact form with sparse AV) and the pair counts behind the formulas of fiak_ext/flops.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/scalar/compact_linear_scalar.h"
#include "kernels/cpu/scalar/csr_attention_scalar.h"
#include "kernels/cpu/scalar/prior_attention_scalar.h"
#include "kernels/plan/plan.h"

namespace {

struct Operations {
  int64_t multiplications = 0, additions = 0;

  int64_t total() const { return multiplications + additions; }
  bool operator==(const Operations& other) const {
    return multiplications == other.multiplications && additions == other.additions;
  }
};

std::ostream& operator<<(std::ostream& stream, const Operations& x) {
  return stream << x.multiplications << " multiplications, " << x.additions << " additions";
}

Operations counted;

struct Counted {
  double value = 0;
};
Counted operator*(Counted x, Counted y) {
  ++counted.multiplications;
  return {x.value * y.value};
}
Counted operator+(Counted x, Counted y) {
  ++counted.additions;
  return {x.value + y.value};
}

}  // namespace

namespace fiak::cpu {

/// Products and sums are counted; scale, softmax and normalisation are done in plain doubles, as Table 1 has it.
template <>
struct Number<Counted> {
  using Acc = Counted;
  using Real = double;
  static Acc load(Counted x) { return x; }
  static Counted store(Real x) { return {x}; }
  static Real real(Acc x) { return x.value; }
  static Acc acc(Real x) { return {x}; }
};

namespace {

const Parallel kSerial{};

template <class Vector>
int64_t length(const Vector& x) {
  return static_cast<int64_t>(x.size());
}

/// A contiguous [batch, heads, rows, columns] array of random numbers.
class Array {
 public:
  Array(int64_t batch, int64_t heads, int64_t rows, int64_t columns)
      : heads_(heads), rows_(rows), columns_(columns), data_(batch * heads * rows * columns) {
    std::mt19937 random(static_cast<uint32_t>(data_.size()));
    std::normal_distribution<double> normal;
    for (Counted& x : data_) x.value = normal(random);
  }
  Input input() const { return {data_.data(), heads_ * rows_ * columns_, rows_ * columns_, columns_}; }
  Output output() { return {data_.data(), heads_ * rows_ * columns_, rows_ * columns_, columns_}; }
  Counted* data() { return data_.data(); }

 private:
  int64_t heads_, rows_, columns_;
  std::vector<Counted> data_;
};

/// The pairs that each head keeps, [heads * queries] rows of keys in ascending order.
struct Pattern {
  int64_t heads, queries, keys;
  std::vector<std::vector<int64_t>> rows;

  Pattern(int64_t heads_, int64_t queries_, int64_t keys_)
      : heads(heads_), queries(queries_), keys(keys_), rows(heads_ * queries_) {}

  int64_t pairs() const {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0},
                           [](int64_t sum, const std::vector<int64_t>& row) { return sum + length(row); });
  }
  int64_t filled_rows() const {
    return std::count_if(rows.begin(), rows.end(), [](const std::vector<int64_t>& row) { return !row.empty(); });
  }
  /// Keys of a head that some query keeps, ascending.
  std::vector<int64_t> kept_keys(int64_t head) const {
    std::vector<int64_t> kept;
    for (int64_t j = 0; j < keys; ++j) {
      const auto begin = rows.begin() + head * queries;
      const auto has = [j](const std::vector<int64_t>& row) { return std::binary_search(row.begin(), row.end(), j); };
      if (std::any_of(begin, begin + queries, has)) kept.push_back(j);
    }
    return kept;
  }
};

/// A plan and the memory that it lies in.
class Plan {
 public:
  explicit Plan(const Pattern& pattern) {
    std::vector<int64_t> crow{0}, col;
    for (const std::vector<int64_t>& row : pattern.rows) {
      col.insert(col.end(), row.begin(), row.end());
      crow.push_back(static_cast<int64_t>(col.size()));
    }
    const auto rows = static_cast<int64_t>(pattern.rows.size()), nnz = static_cast<int64_t>(col.size());
    const CsrIndices csr{crow.data(), col.data(), true, rows, nnz};
    memory_.resize(plan_layout(rows, pattern.queries, pattern.keys, nnz).bytes / sizeof(int64_t) + 1);
    build_plan(csr, pattern.queries, pattern.keys, memory_.data());
  }
  PlanView view() const { return view_plan(memory_.data()); }

 private:
  std::vector<int64_t> memory_;
};

// ------------------------------------------------------------------------------------------------ Table 1

/// One layer's attention as in Appendix D: H heads, N tokens, head size D, model size Dx.
struct Layer {
  int64_t heads, tokens, head_dim, model_size;
  bool is_causal;

  int64_t eligible(int64_t query) const { return is_causal ? query + 1 : tokens; }
  int64_t eligible_pairs() const { return heads * (is_causal ? tokens * (tokens + 1) / 2 : tokens * tokens); }

  /// N^2 H(4D-1) + NHD(6Dx-4), with the eligible pairs for N^2 H.
  int64_t dense_cost() const {
    return eligible_pairs() * (4 * head_dim - 1) + tokens * heads * head_dim * (6 * model_size - 4);
  }
  /// k1 H N^2 (4D-1) + (4Dx-2) k2 HDN: score pruning has k2 = 0, and key pruning k1 = k2.
  int64_t saving(int64_t pruned_pairs, int64_t pruned_keys) const {
    return pruned_pairs * (4 * head_dim - 1) + (4 * model_size - 2) * pruned_keys * head_dim;
  }
  /// The two kinds apart, for `pairs` in `filled_rows` rows and `keys` projected keys, over all heads.
  Operations operations(int64_t pairs, int64_t filled_rows, int64_t keys) const {
    const int64_t projected = (heads * tokens + 2 * keys) * head_dim;
    return {projected * model_size + 2 * pairs * head_dim,
            projected * (model_size - 1) + pairs * (head_dim - 1) + (pairs - filled_rows) * head_dim};
  }
};

/// The projections and attention of one batch element, keys and values computed for `keep` alone.
class Run {
 public:
  explicit Run(const Layer& layer)
      : layer_(layer), input_(1, 1, layer.tokens, layer.model_size), output_(head_array(layer.tokens)) {
    counted = {};
  }

  Array project(const std::vector<std::vector<int64_t>>& keep) {
    CompactLinearArgs args;
    args.batch = 1;
    args.heads = layer_.heads;
    args.rows = layer_.tokens;
    for (const std::vector<int64_t>& head : keep) args.kept = std::max(args.kept, length(head));
    args.in_features = layer_.model_size;
    args.head_dim = layer_.head_dim;
    std::vector<int64_t> padded(layer_.heads * args.kept, -1);
    for (size_t h = 0; h < keep.size(); ++h) std::copy(keep[h].begin(), keep[h].end(), &padded[h * args.kept]);
    args.keep = padded.data();
    args.input = input_.input();
    Array weight(1, layer_.heads, layer_.head_dim, layer_.model_size);
    args.weight = weight.data();
    args.weight_stride = layer_.model_size;
    Array projected = head_array(args.kept);
    compact_linear_forward<Counted>(args, projected.output(), kSerial);
    return projected;
  }

  Array project() {
    std::vector<int64_t> all(layer_.tokens);
    std::iota(all.begin(), all.end(), 0);
    return project(std::vector<std::vector<int64_t>>(layer_.heads, all));
  }

  template <class Args>
  Args arguments(const Array& query, const Array& key, const Array& value, int64_t keys) const {
    Args args;
    args.batch = 1;
    args.query_heads = args.key_heads = layer_.heads;
    args.queries = layer_.tokens;
    args.keys = keys;
    args.head_dim = args.value_dim = layer_.head_dim;
    args.query = query.input();
    args.key = key.input();
    args.value = value.input();
    return args;
  }

  ForwardResult result() {
    logsumexp_.resize(layer_.heads * layer_.tokens);
    return {output_.output(), logsumexp_.data()};
  }

 private:
  Array head_array(int64_t rows) const { return Array(1, layer_.heads, rows, layer_.head_dim); }

  Layer layer_;
  Array input_, output_;
  std::vector<double> logsumexp_;
};

Operations run_dense(const Layer& layer) {
  Run run(layer);
  const Array query = run.project(), key = run.project(), value = run.project();
  auto args = run.arguments<PriorArgs>(query, key, value, layer.tokens);
  args.is_causal = layer.is_causal;
  const std::vector<double> prior(layer.heads * layer.tokens * layer.tokens, 0.5);
  args.prior = prior.data();
  args.prior_heads = layer.heads;
  args.prior_rows = layer.tokens;
  args.prior_head_stride = layer.tokens * layer.tokens;
  args.prior_row_stride = layer.tokens;
  prior_forward<Counted>(args, run.result(), kSerial);
  return counted;
}

Operations run_score_pruned(const Layer& layer, const Pattern& pattern) {
  Run run(layer);
  const Array query = run.project(), key = run.project(), value = run.project();
  auto args = run.arguments<CsrArgs>(query, key, value, layer.tokens);
  const Plan plan(pattern);
  args.plan = plan.view();
  csr_forward<Counted>(args, run.result(), kSerial);
  return counted;
}

/// Keys and values of kept keys only; the pattern's columns are renumbered to match.
Operations run_compacted(const Layer& layer, const Pattern& pattern) {
  std::vector<std::vector<int64_t>> keep;
  size_t most = 0;
  for (int64_t h = 0; h < layer.heads; ++h) {
    keep.push_back(pattern.kept_keys(h));
    most = std::max(most, keep.back().size());
  }
  Pattern renumbered(layer.heads, layer.tokens, static_cast<int64_t>(most));
  for (size_t row = 0; row < pattern.rows.size(); ++row) {
    const std::vector<int64_t>& kept = keep[row / layer.tokens];
    for (const int64_t j : pattern.rows[row]) {
      renumbered.rows[row].push_back(std::lower_bound(kept.begin(), kept.end(), j) - kept.begin());
    }
  }
  Run run(layer);
  const Array query = run.project(), key = run.project(keep), value = run.project(keep);
  auto args = run.arguments<CsrArgs>(query, key, value, renumbered.keys);
  const Plan plan(renumbered);
  args.plan = plan.view();
  csr_forward<Counted>(args, run.result(), kSerial);
  return counted;
}

/// The paper's own assumption, which no kernel of ours makes: only kept scores are computed, but AV takes every
/// eligible kept key. Made of the kernels' own sums.
Operations run_dense_values(const Layer& layer, const Pattern& pattern, bool skip_keys) {
  Run run(layer);
  std::vector<int64_t> all(layer.tokens);
  std::iota(all.begin(), all.end(), 0);
  std::vector<std::vector<int64_t>> keep(layer.heads, all);
  for (int64_t h = 0; skip_keys && h < layer.heads; ++h) keep[h] = pattern.kept_keys(h);
  const Array query = run.project();
  run.project(keep);
  run.project(keep);
  const Array row(1, 1, 1, layer.head_dim);
  const auto* x = static_cast<const Counted*>(row.input().data);
  RowSum<Counted> sum(layer.head_dim);
  for (size_t i = 0; i < pattern.rows.size(); ++i) {
    for (size_t pair = 0; pair < pattern.rows[i].size(); ++pair) dot(x, x, layer.head_dim);
    sum.clear();
    for (const int64_t j : keep[i / layer.tokens]) {
      if (j < layer.eligible(static_cast<int64_t>(i) % layer.tokens)) sum.add(1, x);
    }
  }
  return counted;
}

class Table1 : public testing::TestWithParam<Layer> {
 protected:
  /// Every head without a random `pruned_keys` of its keys (never key 0, which keeps causal rows filled) and, of the
  /// pairs left, without each one with probability `pruned`; no row is emptied.
  Pattern random_pattern(int64_t pruned_keys, double pruned) const {
    const Layer& layer = GetParam();
    std::mt19937 random(7);
    Pattern pattern(layer.heads, layer.tokens, layer.tokens);
    for (int64_t h = 0; h < layer.heads; ++h) {
      std::vector<int64_t> keys(layer.tokens);
      std::iota(keys.begin(), keys.end(), 0);
      std::shuffle(keys.begin() + 1, keys.end(), random);
      keys.resize(layer.tokens - pruned_keys);
      std::sort(keys.begin(), keys.end());
      for (int64_t i = 0; i < layer.tokens; ++i) {
        std::vector<int64_t>& row = pattern.rows[h * layer.tokens + i];
        for (const int64_t j : keys) {
          if (j < layer.eligible(i) && (j == 0 || !std::bernoulli_distribution(pruned)(random))) row.push_back(j);
        }
      }
    }
    return pattern;
  }
  static int64_t kept_keys(const Pattern& pattern) {
    int64_t kept = 0;
    for (int64_t h = 0; h < pattern.heads; ++h) kept += length(pattern.kept_keys(h));
    return kept;
  }
};

TEST_P(Table1, DenseCost) {
  const Layer& layer = GetParam();
  const Operations executed = run_dense(layer);
  EXPECT_EQ(executed.total(), layer.dense_cost());
  const int64_t rows = layer.heads * layer.tokens;
  EXPECT_EQ(executed, layer.operations(layer.eligible_pairs(), rows, rows));
}

TEST_P(Table1, ScorePruning) {
  const Layer& layer = GetParam();
  const Pattern pattern = random_pattern(0, 0.6);
  const int64_t pruned = layer.eligible_pairs() - pattern.pairs(), rows = layer.heads * layer.tokens;
  const Operations executed = run_score_pruned(layer, pattern);
  EXPECT_EQ(executed.total(), layer.dense_cost() - layer.saving(pruned, 0));
  EXPECT_EQ(executed, layer.operations(pattern.pairs(), rows, rows));
  EXPECT_EQ(run_dense_values(layer, pattern, false).total(), layer.dense_cost() - pruned * (2 * layer.head_dim - 1));
}

TEST_P(Table1, MixedPruning) {
  const Layer& layer = GetParam();
  const Pattern pattern = random_pattern(2, 0.4);
  const int64_t pruned = layer.eligible_pairs() - pattern.pairs(), rows = layer.heads * layer.tokens;
  const int64_t keys = kept_keys(pattern);
  const Operations executed = run_compacted(layer, pattern);
  EXPECT_EQ(executed.total(), layer.dense_cost() - layer.saving(pruned, rows - keys));
  EXPECT_EQ(executed, layer.operations(pattern.pairs(), rows, keys));
  if (!layer.is_causal) {
    // [2(k1 + k2)D - k1] H N^2 + (4Dx-2) k2 HDN
    const int64_t pruned_keys = rows - keys, size = layer.head_dim;
    const int64_t saved =
        2 * (pruned + pruned_keys * layer.tokens) * size - pruned + (4 * layer.model_size - 2) * pruned_keys * size;
    EXPECT_EQ(run_dense_values(layer, pattern, true).total(), layer.dense_cost() - saved);
  }
}

TEST_P(Table1, KeyPruning) {
  const Layer& layer = GetParam();
  const Pattern pattern = random_pattern(3, 0.0);
  const int64_t pruned = layer.eligible_pairs() - pattern.pairs();
  const int64_t expected = layer.dense_cost() - layer.saving(pruned, 3 * layer.heads);
  EXPECT_EQ(run_compacted(layer, pattern).total(), expected);
  EXPECT_EQ(run_dense_values(layer, pattern, true).total(), expected);
  if (!layer.is_causal) {
    EXPECT_EQ(pruned, 3 * layer.heads * layer.tokens);
  }
}

INSTANTIATE_TEST_SUITE_P(Layers, Table1,
                         testing::Values(Layer{1, 4, 1, 1, false}, Layer{2, 10, 3, 7, false},
                                         Layer{3, 17, 16, 24, false}, Layer{2, 10, 3, 7, true},
                                         Layer{3, 17, 16, 24, true}),
                         [](const testing::TestParamInfo<Layer>& info) {
                           const Layer& x = info.param;
                           return "H" + std::to_string(x.heads) + "N" + std::to_string(x.tokens) + "D" +
                                  std::to_string(x.head_dim) + (x.is_causal ? "causal" : "");
                         });

TEST(Counting, DeitTinyLayer) { EXPECT_EQ(run_dense(Layer{4, 197, 48, 192, false}).total(), 73'072'028); }

// ------------------------------------------------------------------------------- the executed counts of the ops

/// Grouped queries, pattern groups, padding and rows without keys: what FlopCounterMode is told for csr_attention.
TEST(Counting, CsrForwardAndBackward) {
  const int64_t batch = 4, query_heads = 6, key_heads = 3, queries = 9, keys = 11, head_dim = 5, value_dim = 3;
  const int64_t groups = 2;
  const std::vector<int64_t> kv_lens{11, 0, 7, 10};
  std::mt19937 random(3);
  Pattern pattern(groups * query_heads, queries, keys);
  for (std::vector<int64_t>& row : pattern.rows) {
    for (int64_t j = 0; j < keys; ++j) {
      if (std::bernoulli_distribution(0.2)(random)) row.push_back(j);
    }
  }
  Pattern visible(batch * query_heads, queries, keys);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0; row < query_heads * queries; ++row) {
      for (const int64_t j : pattern.rows[b % groups * query_heads * queries + row]) {
        if (j < kv_lens[b]) visible.rows[b * query_heads * queries + row].push_back(j);
      }
    }
  }
  const int64_t pairs = visible.pairs(), rows = visible.filled_rows();
  ASSERT_LT(rows, length(visible.rows));

  Array query(batch, query_heads, queries, head_dim), key(batch, key_heads, keys, head_dim);
  Array value(batch, key_heads, keys, value_dim), output(batch, query_heads, queries, value_dim);
  Array grad_output(batch, query_heads, queries, value_dim);
  std::vector<double> logsumexp(batch * query_heads * queries);
  const Plan plan(pattern);
  CsrArgs args;
  args.batch = batch;
  args.query_heads = query_heads;
  args.key_heads = key_heads;
  args.queries = queries;
  args.keys = keys;
  args.head_dim = head_dim;
  args.value_dim = value_dim;
  args.query = query.input();
  args.key = key.input();
  args.value = value.input();
  args.kv_lens = kv_lens.data();
  args.plan = plan.view();

  counted = {};
  csr_forward<Counted>(args, {output.output(), logsumexp.data()}, kSerial);
  EXPECT_EQ(counted, (Operations{pairs * (head_dim + value_dim), pairs * (head_dim - 1) + (pairs - rows) * value_dim}));

  // delta_i = dO_i . O_i is a normalisation term of each query, which FLOP counts leave out.
  const Operations delta{batch * query_heads * queries * value_dim, batch * query_heads * queries * (value_dim - 1)};
  const int64_t by_rows = pairs * (2 * head_dim + value_dim), by_columns = pairs * 2 * (head_dim + value_dim);
  Array grad_query = query, grad_key = key, grad_value = value;
  BackwardArgs grads;
  grads.grad_output = grad_output.input();
  grads.output = output.input();
  grads.logsumexp = logsumexp.data();
  const auto executed = [&] {
    counted = {};
    csr_backward<Counted>(args, grads, kSerial);
    return counted.multiplications - delta.multiplications;
  };
  grads.grad_query = grad_query.output();
  EXPECT_EQ(executed(), by_rows);
  grads.grad_key = grad_key.output();
  grads.grad_value = grad_value.output();
  EXPECT_EQ(executed(), by_rows + by_columns);
  grads.grad_query = {};
  EXPECT_EQ(executed(), by_columns);
}

}  // namespace
}  // namespace fiak::cpu
