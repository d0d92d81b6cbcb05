#include "tests/attention_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

namespace fiak::tests {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Mostly small, often next to a multiple of the vector length.
int64_t random_size(Random& random, int64_t low, int64_t high) {
  constexpr int64_t kEdges[] = {15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 130};
  const int64_t size =
      random.chance(0.4) ? kEdges[random.integer(0, 15)] : random.integer(low, std::min<int64_t>(high, 12));
  return std::clamp(size, low, high);
}

/// Values that `dtype` holds exactly.
Tensor random_operand(Random& random, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  Tensor x(DType::kFloat64, batch, heads, rows, columns, random.chance(0.5),
           random.chance(0.5) ? random.integer(1, 5) : 0);
  x.fill(random);
  return x.to(dtype).to(DType::kFloat64);
}

/// Operands for the arguments; keys behind kv_lens are NaN.
void fill_operands(Random& random, DType dtype, Problem& problem) {
  const AttentionArgs& args = problem.args;
  problem.query = random_operand(random, dtype, args.batch, args.query_heads, args.queries, args.head_dim);
  problem.key = random_operand(random, dtype, args.batch, args.key_heads, args.keys, args.head_dim);
  problem.value = random_operand(random, dtype, args.batch, args.key_heads, args.keys, args.value_dim);
  problem.grad_output = random_operand(random, dtype, args.batch, args.query_heads, args.queries, args.value_dim);
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t h = 0; h < args.key_heads; ++h) {
      for (int64_t j = problem.keys_of(b); j < args.keys; ++j) {
        problem.key.set_row(b, h, j, kNaN);
        problem.value.set_row(b, h, j, kNaN);
      }
    }
  }
}

/// Sizes that are drawn elsewhere than among the small ones.
struct Sizes {
  int64_t queries, keys, most_columns;
};

Problem random_problem(Random& random, DType dtype, const Sizes* sizes = nullptr) {
  Problem problem;
  AttentionArgs& args = problem.args;
  args.batch = random.integer(random.chance(0.1) ? 0 : 1, 3);
  args.key_heads = random.integer(1, 3);
  args.query_heads = args.key_heads * random.integer(1, 3);
  args.queries = sizes != nullptr ? sizes->queries : random_size(random, random.chance(0.1) ? 0 : 1, 50);
  args.keys = sizes != nullptr ? sizes->keys : random_size(random, random.chance(0.1) ? 0 : 1, 70);
  const int64_t columns = sizes != nullptr ? sizes->most_columns : 130;
  args.head_dim = random_size(random, 1, columns);
  args.value_dim = random.chance(0.5) ? args.head_dim : random_size(random, 1, columns);
  args.score = random.chance(0.5) ? Score::kDot : Score::kGaussian;
  args.scale = 1 / std::sqrt(static_cast<double>(args.head_dim));
  if (random.chance(0.2)) args.scale *= random.chance(0.3) ? 0 : random.real(-2, 2);
  if (random.chance(0.3)) {
    args.dropout_p = random.chance(0.1) ? 1 : random.real(0, 1);
    args.seed = static_cast<uint64_t>(random.integer(0, std::numeric_limits<int64_t>::max() - 1)) * 3;
  }
  if (random.chance(0.4)) {
    for (int64_t b = 0; b < args.batch; ++b) problem.kv_lens.push_back(random.integer(0, args.keys));
  }
  fill_operands(random, dtype, problem);
  return problem;
}

/// A divisor of the batch.
int64_t random_groups(Random& random, int64_t batch) {
  const int64_t groups = random.integer(1, std::max<int64_t>(batch, 1));
  return batch % groups == 0 ? groups : 1;
}

/// Weights of both signs, some 0 and some rows without a positive one, that float32 holds exactly. Positive ones are
/// not small, since their gradients grow with 1 / w.
void fill_weights(Random& random, Tensor& weight) {
  for (int64_t g = 0; g < weight.batch; ++g) {
    for (int64_t h = 0; h < weight.heads; ++h) {
      for (int64_t n = 0; n < weight.rows; ++n) {
        const double outside = random.chance(0.1) ? 1 : 0.2;
        for (int64_t j = 0; j < weight.columns; ++j) {
          const double w = random.chance(outside) ? std::min(0.0, random.real(-1, 0.5)) : random.real(0.25, 2);
          weight.set(g, h, n, j, static_cast<float>(w));
        }
      }
    }
  }
}

/// The weights' gradient where some weight is very small or large, each number in units of 1 / w: of its own weight or,
/// where that is outside the support, of the smallest of its row. Numbers that leave float32's range are 0 in all that
/// is compared.
void scale_weight_gradients(const Problem& problem, Results& actual, Results& exact, Results& yardstick) {
  const Tensor& weight = problem.weight;
  bool extreme = false;
  for (const double w : weight.values()) extreme |= w > 0 && (w < 1e-3 || w > 1e3);
  if (!extreme) return;
  constexpr double kLeast = 1e-20;  // below, a rounded (dA - delta) alone may leave the range
  for (int64_t g = 0; g < weight.batch; ++g) {
    for (int64_t h = 0; h < weight.heads; ++h) {
      for (int64_t n = 0; n < weight.rows; ++n) {
        double least = 1;
        for (int64_t j = 0; j < weight.columns; ++j) {
          if (weight.at(g, h, n, j) > 0) least = std::min(least, weight.at(g, h, n, j));
        }
        for (int64_t j = 0; j < weight.columns; ++j) {
          const double w = weight.at(g, h, n, j) > 0 ? weight.at(g, h, n, j) : least;
          const bool left = w < kLeast && std::isinf(actual.grad_prior.at(g, h, n, j));
          for (Results* results : {&actual, &exact, &yardstick}) {
            const double x = results->grad_prior.at(g, h, n, j);
            results->grad_prior.set(g, h, n, j, left ? 0 : x * w);
          }
        }
      }
    }
  }
}

void expect_all_close(const Results& actual, const Results& exact, const Results& yardstick, const std::string& what) {
  for (const auto& [member, name] :
       {std::pair(&Results::output, "output"), std::pair(&Results::logsumexp, "logsumexp"),
        std::pair(&Results::grad_query, "grad_query"), std::pair(&Results::grad_key, "grad_key"),
        std::pair(&Results::grad_value, "grad_value"), std::pair(&Results::grad_prior, "grad_prior")}) {
    expect_close(actual.*member, exact.*member, yardstick.*member, name + std::string(" of ") + what);
    (actual.*member).expect_gaps_untouched(name + std::string(" of ") + what);
  }
}

void expect_all_identical(const Results& actual, const Results& expected, unsigned wanted, const std::string& what) {
  expect_identical(actual.output, expected.output, "output of " + what);
  expect_identical(actual.logsumexp, expected.logsumexp, "logsumexp of " + what);
  if (wanted & kGradQuery) expect_identical(actual.grad_query, expected.grad_query, "grad_query of " + what);
  if (wanted & kGradKey) expect_identical(actual.grad_key, expected.grad_key, "grad_key of " + what);
  if (wanted & kGradValue) expect_identical(actual.grad_value, expected.grad_value, "grad_value of " + what);
  if (wanted & kGradPrior) expect_identical(actual.grad_prior, expected.grad_prior, "grad_prior of " + what);
}

/// The largest finite number of a head.
double largest_of_head(const Tensor& x, int64_t b, int64_t h) {
  double largest = 0;
  for (int64_t n = 0; n < x.rows; ++n) {
    for (int64_t d = 0; d < x.columns; ++d) {
      if (std::isfinite(x.at(b, h, n, d))) largest = std::max(largest, std::abs(x.at(b, h, n, d)));
    }
  }
  return largest;
}

/// Expects a row's numbers to be those of `expected`, bit for bit, or all NaN. `rounded` is how far off they may be, in
/// units of the largest number of the head; where it is not 0, what float32 leaves of terms of order 1 that cancel each
/// other, as in the gradient of a row of one key, may be left, too.
void expect_row(const Tensor& actual, const Tensor& expected, bool nan, int64_t b, int64_t h, int64_t n,
                const std::string& what, double rounded = 0) {
  for (int64_t d = 0; d < actual.columns; ++d) {
    const double x = actual.at(b, h, n, d), e = expected.at(b, h, n, d);
    if (nan ? std::isnan(x) : x == e || (std::isnan(x) && std::isnan(e))) continue;
    const double allowed = rounded == 0 ? 0 : rounded * largest_of_head(expected, b, h) + 0x1p-20;
    ASSERT_TRUE(!nan && std::abs(x - e) <= allowed)
        << what << ", row " << b << " " << h << " " << n << ": " << x << (nan ? " for NaN" : " for ") << e;
  }
}

}  // namespace

template <class Call>
void Problem::with_args(DType dtype, Call&& call) const {
  const Tensor q = query.to(dtype), k = key.to(dtype), v = value.to(dtype), w = weight.to(weight_dtype(dtype));
  AttentionArgs common = args;
  common.dtype = dtype;
  common.query = q.input();
  common.key = k.input();
  common.value = v.input();
  common.kv_lens = kv_lens.empty() ? nullptr : kv_lens.data();
  const void* weights = has_weight ? w.data() : nullptr;
  if (pattern != nullptr) {
    call(CsrArgs{common, pattern->plan(), weights, query_offsets.empty() ? nullptr : query_offsets.data()});
  } else {
    call(PriorArgs{common, is_causal, weights, weight.batch, weight.heads, weight.rows, weight.batch_stride,
                   weight.heads == 1 ? 0 : weight.head_stride, weight.rows == 1 ? 0 : weight.row_stride});
  }
}

Results Problem::forward(const cpu::Kernels& kernels, DType dtype, const Parallel& parallel) const {
  Results results;
  results.output = Tensor(dtype, args.batch, args.query_heads, args.queries, args.value_dim, true, 3);
  results.logsumexp = Tensor(weight_dtype(dtype), args.batch, args.query_heads, args.queries, 1);
  const ForwardResult target{results.output.output(), results.logsumexp.data()};
  with_args(dtype, [&](const auto& a) {
    if constexpr (std::is_same_v<decltype(a), const CsrArgs&>) {
      kernels.csr_forward(a, target, parallel);
    } else {
      kernels.prior_forward(a, target, parallel);
    }
  });
  for (const Tensor* result : {&results.output, &results.logsumexp}) record_bits(*result);
  return results;
}

void Problem::backward(const cpu::Kernels& kernels, const Parallel& parallel, Results& results, unsigned wanted) const {
  const DType dtype = results.output.dtype;
  const Tensor grad = grad_output.to(dtype);
  results.grad_query = Tensor(dtype, args.batch, args.query_heads, args.queries, args.head_dim, true, 1);
  results.grad_key = Tensor(dtype, args.batch, args.key_heads, args.keys, args.head_dim, false, 2);
  results.grad_value = Tensor(dtype, args.batch, args.key_heads, args.keys, args.value_dim, true, 0);
  results.grad_prior = Tensor(weight_dtype(dtype), weight.batch, weight.heads, weight.rows, weight.columns);
  BackwardArgs grads;
  grads.grad_output = grad.input();
  grads.output = results.output.input();
  grads.logsumexp = results.logsumexp.data();
  if (wanted & kGradQuery) grads.grad_query = results.grad_query.output();
  if (wanted & kGradKey) grads.grad_key = results.grad_key.output();
  if (wanted & kGradValue) grads.grad_value = results.grad_value.output();
  if (wanted & kGradPrior && has_weight) grads.grad_prior = results.grad_prior.data();
  with_args(dtype, [&](const auto& a) {
    if constexpr (std::is_same_v<decltype(a), const CsrArgs&>) {
      kernels.csr_backward(a, grads, parallel);
    } else {
      kernels.prior_backward(a, grads, parallel);
    }
  });
  for (const Tensor* result : {&results.grad_query, &results.grad_key, &results.grad_value, &results.grad_prior}) {
    record_bits(*result);
  }
}

bool Problem::in_support(int64_t b, int64_t h, int64_t n, int64_t j) const {
  if (j >= keys_of(b) || (is_causal && j > n)) return false;
  const double below = args.log_prior ? -std::numeric_limits<double>::infinity() : 0;
  if (pattern == nullptr) {
    return !has_weight || weight.at(b % weight.batch, weight.heads == 1 ? 0 : h, weight.rows == 1 ? 0 : n, j) > below;
  }
  const int64_t row = PatternHeads(pattern->heads, args.query_heads).head_of(b, h) * pattern->queries + n +
                      (query_offsets.empty() ? 0 : query_offsets[b]);
  for (int64_t entry = pattern->crow[row]; entry < pattern->crow[row + 1]; ++entry) {
    if (pattern->col[entry] == j) return !has_weight || weight.at(0, 0, 0, entry) > below;
  }
  return false;
}

std::string Problem::describe() const {
  std::ostringstream text;
  text << (pattern != nullptr ? "csr" : "prior") << " B" << args.batch << " Hq" << args.query_heads << " H"
       << args.key_heads << " N" << args.queries << " M" << args.keys << " D" << args.head_dim << " Dv"
       << args.value_dim << (args.score == Score::kGaussian ? " gaussian" : "") << (is_causal ? " causal" : "")
       << " scale " << args.scale << " dropout " << args.dropout_p << (kv_lens.empty() ? "" : " kv_lens");
  if (pattern != nullptr) {
    const PatternHeads heads(pattern->heads, args.query_heads);
    text << " rows " << pattern->queries << " keys " << pattern->keys << " nnz " << pattern->nnz() << " groups "
         << heads.groups << (heads.heads < args.query_heads ? " shared" : "")
         << (query_offsets.empty() ? "" : " offsets") << (has_weight ? " values" : "");
  } else if (has_weight) {
    text << " prior " << weight.batch << " " << weight.heads << " " << weight.rows;
  }
  if (has_weight && args.log_prior) text << " logarithms";
  return text.str();
}

void Problem::lay_rows_apart(Random& random) {
  for (Tensor* operand : {&query, &key, &value, &grad_output}) {
    const int64_t gap = (operand->columns + 7) / 8 * 8 - operand->columns;
    *operand = Tensor(DType::kFloat64, operand->batch, operand->heads, operand->rows, operand->columns, false, gap);
    operand->fill(random);
    *operand = operand->to(args.dtype).to(DType::kFloat64);
  }
}

std::vector<std::vector<unsigned char>> Problem::bytes(const cpu::Kernels& kernels, DType dtype) const {
  Results results = forward(kernels, dtype, threads(1));
  backward(kernels, threads(1), results);
  std::vector<std::vector<unsigned char>> all;
  for (const Tensor* result : {&results.output, &results.logsumexp, &results.grad_query, &results.grad_key,
                               &results.grad_value, &results.grad_prior}) {
    all.push_back(result->bytes());
  }
  return all;
}

namespace {

Problem with_prior(Random& random, Problem problem) {
  const AttentionArgs& args = problem.args;
  problem.is_causal = random.chance(0.4);
  problem.has_weight = random.chance(0.8);
  if (problem.has_weight) {
    problem.weight =
        Tensor(DType::kFloat64, random_groups(random, args.batch), random.chance(0.3) ? 1 : args.query_heads,
               random.chance(0.3) ? 1 : args.queries, args.keys, false, random.chance(0.3) ? 4 : 0);
    fill_weights(random, problem.weight);
  } else {
    problem.weight = Tensor(DType::kFloat64, 1, 1, 1, 0);
  }
  return problem;
}

}  // namespace

Problem random_prior_problem(Random& random, DType dtype) { return with_prior(random, random_problem(random, dtype)); }

Problem random_long_prior_problem(Random& random, DType dtype) {
  Sizes sizes{random.integer(90, 260), random.integer(380, 1300), 20};
  if (random.chance(0.3)) sizes.queries = random.integer(400, 700);  // so that causal ones see more than a block
  return with_prior(random, random_problem(random, dtype, &sizes));
}

namespace {

/// Makes 0 of some blocks, that tiles of all sizes fit into.
void clear_blocks(Random& random, Tensor& weight) {
  constexpr int64_t kBlock = 64;
  for (int64_t g = 0; g < weight.batch; ++g) {
    for (int64_t h = 0; h < weight.heads; ++h) {
      for (int64_t n = 0; n < weight.rows; n += kBlock) {
        for (int64_t j = 0; j < weight.columns; j += kBlock) {
          if (random.chance(0.5)) continue;
          for (int64_t row = n; row < std::min(n + kBlock, weight.rows); ++row) {
            for (int64_t column = j; column < std::min(j + kBlock, weight.columns); ++column) {
              weight.set(g, h, row, column, 0);
            }
          }
        }
      }
    }
  }
}

}  // namespace

namespace {

/// What the cases of both ops have in common.
template <class Case>
Problem problem_of(Random& random, const Case& p) {
  Problem problem;
  AttentionArgs& args = problem.args;
  args.batch = p.batch;
  args.key_heads = p.key_heads;
  args.query_heads = p.key_heads * p.heads_per_key_head;
  args.queries = p.queries;
  args.keys = p.keys;
  args.head_dim = p.head_dim;
  args.value_dim = p.value_dim;
  args.score = p.score;
  args.scale = p.scale_factor / std::sqrt(static_cast<double>(p.head_dim));
  args.dropout_p = p.dropout_p;
  args.seed = static_cast<uint64_t>(random.integer(0, std::numeric_limits<int64_t>::max() - 1)) * 3;
  for (int64_t b = 0; b < p.batch && p.has_kv_lens; ++b) problem.kv_lens.push_back(random.integer(0, p.keys));
  fill_operands(random, p.dtype, problem);
  return problem;
}

}  // namespace

Problem prior_problem(Random& random, const PriorCase& properties) {
  using Prior = PriorCase::Prior;
  const PriorCase& p = properties;
  Problem problem = problem_of(random, p);
  const AttentionArgs& args = problem.args;
  problem.is_causal = p.is_causal;
  problem.has_weight = p.prior != Prior::kNone;
  problem.weight = Tensor(DType::kFloat64, 1, 1, 1, 0);
  if (problem.has_weight) {
    problem.weight = Tensor(DType::kFloat64, p.groups, p.prior == Prior::kPairsOfAllHeads ? 1 : args.query_heads,
                            p.prior == Prior::kKeys ? 1 : p.queries, p.keys, false, random.integer(0, 3));
    fill_weights(random, problem.weight);
    if (p.prior == Prior::kBlocks) clear_blocks(random, problem.weight);
  }
  return problem;
}

namespace {

/// Few queries, on both sides of where kernels start to pack the keys, and up to several chunks of these.
Sizes decode_sizes(Random& random) {
  constexpr int64_t kEdges[] = {0, 1, 2, 127, 128, 129, 1023, 1024, 1025, 2049};
  const int64_t keys = random.chance(0.4) ? kEdges[random.integer(0, 9)] : random.integer(1000, 4500);
  return {random.chance(0.8) ? random.integer(1, 9) : random.integer(10, 17), keys, 40};
}

/// Makes NaN of the keys and values that no row of the pattern keeps: they are never read.
void hide_unseen_keys(Problem& problem) {
  const AttentionArgs& args = problem.args;
  const Pattern& pattern = *problem.pattern;
  const PatternHeads heads(pattern.heads, args.query_heads);
  const int64_t rows = pattern.queries;
  std::vector<bool> kept(args.batch * args.key_heads * args.keys, false);
  const int64_t shared = args.query_heads / args.key_heads;
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t h = 0; h < args.query_heads; ++h) {
      const int64_t first = heads.head_of(b, h) * rows;
      for (int64_t entry = pattern.crow[first]; entry < pattern.crow[first + rows]; ++entry) {
        if (pattern.col[entry] >= args.keys) continue;
        kept[(b * args.key_heads + h / shared) * args.keys + pattern.col[entry]] = true;
      }
    }
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    if (kept[i]) continue;
    problem.key.set_row(row / args.keys / args.key_heads, row / args.keys % args.key_heads, row % args.keys, kNaN);
    problem.value.set_row(row / args.keys / args.key_heads, row / args.keys % args.key_heads, row % args.keys, kNaN);
  }
}

/// Adds the rest of a call of csr_attention to a problem, with the pattern that make(heads, rows, keys) gives. Some
/// patterns have more columns than there are keys, and some are shared by all heads.
template <class MakePattern>
Problem with_pattern(Random& random, Problem problem, double prior, MakePattern&& make) {
  const AttentionArgs& args = problem.args;
  const int64_t groups = random_groups(random, args.batch);
  int64_t rows = std::max<int64_t>(args.queries, 1);  // a pattern without rows has no heads: the op calls no kernel
  if (random.chance(0.3)) {
    rows += random.integer(0, 20);
    for (int64_t b = 0; b < args.batch; ++b) problem.query_offsets.push_back(random.integer(0, rows - args.queries));
  }
  const bool shared = args.query_heads > 1 && groups % args.query_heads != 0 && random.chance(0.3);
  const int64_t keys = args.keys + (random.chance(0.2) ? random.integer(1, 70) : 0);
  problem.pattern = std::make_shared<Pattern>(make(groups * (shared ? 1 : args.query_heads), rows, keys));
  const Pattern& pattern = *problem.pattern;
  problem.has_weight = random.chance(prior);
  problem.weight = Tensor(DType::kFloat64, 1, 1, 1, problem.has_weight ? pattern.nnz() : 0);
  fill_weights(random, problem.weight);

  hide_unseen_keys(problem);
  return problem;
}

/// A pattern whose heads differ: some full, some random, causal, near the diagonal or in blocks, with empty rows.
Pattern structured_pattern(Random& random, int64_t heads, int64_t rows, int64_t keys) {
  std::vector<int64_t> crow{0}, col;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t kind = random.integer(0, 5), band = random.integer(1, 200), block = random.integer(8, 100);
    const double density = kind == 0 ? 1 : random.real(0, 1);
    std::vector<char> blocks((rows / block + 1) * (keys / block + 1));
    for (char& kept : blocks) kept = random.chance(0.4);
    for (int64_t row = 0; row < rows; ++row) {
      const bool empty = kind != 0 && random.chance(0.05);
      for (int64_t j = 0; j < keys && !empty; ++j) {
        if (kind == 1 && j > row) continue;
        if (kind == 2 && (j > row || j + band < row)) continue;
        if (kind >= 4 && blocks[row / block * (keys / block + 1) + j / block] == 0) continue;
        if (density == 1 || kind == 5 || random.chance(density)) col.push_back(j);
      }
      crow.push_back(static_cast<int64_t>(col.size()));
    }
  }
  return Pattern(heads, rows, keys, crow, col);
}

Problem with_random_pattern(Random& random, const Problem& problem) {
  return with_pattern(random, problem, 0.5, [&](int64_t heads, int64_t rows, int64_t keys) {
    const double density = random.chance(0.1) ? 0 : random.real(0, 1);
    return Pattern(random, heads, rows, keys, density, random.chance(0.3));
  });
}

}  // namespace

namespace {

/// A pattern as CsrCase describes it.
Pattern kept_pattern(Random& random, int64_t heads, int64_t rows, int64_t keys, CsrCase::Kept kept) {
  using Kept = CsrCase::Kept;
  constexpr double kDensities[] = {0, 0.02, 0.15, 0.5, 1, 0.5};
  if (kept != Kept::kGaps) {
    return Pattern(random, heads, rows, keys, kDensities[static_cast<int>(kept)], kept == Kept::kCausal);
  }
  constexpr int64_t kBlock = 50;
  std::vector<int64_t> crow{0}, col;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t odd = random.integer(0, 1);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < keys; ++j) {
        const bool is_kept = row % 5 != 1 && j % 7 != 2 && (row / kBlock + j / kBlock) % 2 == odd;
        if (is_kept && random.chance(0.3)) col.push_back(j);
      }
      crow.push_back(static_cast<int64_t>(col.size()));
    }
  }
  return Pattern(heads, rows, keys, crow, col);
}

}  // namespace

Problem csr_problem(Random& random, const CsrCase& properties, std::shared_ptr<Pattern> pattern) {
  Problem problem = problem_of(random, properties);
  const AttentionArgs& args = problem.args;
  problem.pattern = std::move(pattern);
  for (int64_t b = 0; b < args.batch && properties.has_query_offsets; ++b) {
    problem.query_offsets.push_back(random.integer(0, problem.pattern->queries - args.queries));
  }
  problem.has_weight = properties.has_prior;
  problem.weight = Tensor(DType::kFloat64, 1, 1, 1, problem.has_weight ? problem.pattern->nnz() : 0);
  fill_weights(random, problem.weight);
  hide_unseen_keys(problem);
  return problem;
}

Problem csr_problem(Random& random, const CsrCase& properties) {
  const CsrCase& p = properties;
  const int64_t heads = p.groups * p.key_heads * p.heads_per_key_head;
  // A pattern without rows has no heads: the op calls no kernel.
  const int64_t rows = std::max<int64_t>(p.queries, 1) + (p.has_query_offsets ? random.integer(0, 20) : 0);
  return csr_problem(random, p, std::make_shared<Pattern>(kept_pattern(random, heads, rows, p.keys, p.kept)));
}

Problem random_csr_problem(Random& random, DType dtype) {
  return with_random_pattern(random, random_problem(random, dtype));
}

Problem random_csr_decode_problem(Random& random, DType dtype) {
  const Sizes sizes = decode_sizes(random);
  return with_random_pattern(random, random_problem(random, dtype, &sizes));
}

Problem random_prior_decode_problem(Random& random, DType dtype) {
  const Sizes sizes = decode_sizes(random);
  return with_prior(random, random_problem(random, dtype, &sizes));
}

Problem random_long_csr_problem(Random& random, DType dtype) {
  const Sizes sizes{random.integer(1, 260), random.integer(40, random.chance(0.4) ? 1300 : 260), 20};
  const Problem problem = random_problem(random, dtype, &sizes);
  return with_pattern(random, problem, 0, [&](int64_t heads, int64_t rows, int64_t keys) {
    return structured_pattern(random, heads, rows, keys);
  });
}

namespace {

/// Gives a problem's weights sizes of the whole range of float32, or of logarithms far beyond. A row has one size for
/// all, weights of all sizes, or, where some keys of it are hidden, the largest by far among these.
void make_extreme(Random& random, Problem& problem) {
  if (!problem.has_weight) return;
  const bool logs = problem.args.log_prior = random.chance(0.5);
  // Beyond 60, sums of scores and logarithms, which CUDA takes, are rounded by more than these checks allow.
  const double most = logs ? 60 : 87;
  Tensor& weight = problem.weight;
  const auto keep = [&](double log) {
    return logs ? log : static_cast<float>(std::exp(std::clamp(log, -100.0, 88.0)));
  };
  const auto set = [&](int64_t g, int64_t h, int64_t n, int64_t j, double log) {
    const bool outside = weight.at(g, h, n, j) <= 0;
    const double none = logs ? -std::numeric_limits<double>::infinity() : weight.at(g, h, n, j);
    weight.set(g, h, n, j, outside ? none : static_cast<float>(keep(log)));
  };
  const int kind = static_cast<int>(random.integer(0, 3));
  for (int64_t g = 0; g < weight.batch; ++g) {
    for (int64_t h = 0; h < weight.heads; ++h) {
      for (int64_t n = 0; n < weight.rows; ++n) {
        const double size = random.real(-most, most);
        for (int64_t j = 0; j < weight.columns; ++j) {
          const int64_t last = weight.rows == 1 ? problem.args.queries - 1 : n;  // of the queries with these weights
          const bool hidden =
              problem.pattern == nullptr && (j >= problem.keys_of(g) || (problem.is_causal && j > last));
          double log = kind == 0 || kind == 3 ? size : random.real(-most, most);
          if (kind == 2) log = random.real(-2, 2);
          if (hidden && kind >= 2) log = logs ? 1000 : most;
          set(g, h, n, j, log);
        }
      }
    }
  }
}

Problem one_of(Random& random, DType dtype, std::initializer_list<MakeProblem> kinds) {
  const MakeProblem make = kinds.begin()[random.integer(0, static_cast<int64_t>(kinds.size()) - 1)];
  Problem problem = make(random, dtype);
  make_extreme(random, problem);
  return problem;
}

}  // namespace

Problem random_extreme_prior_problem(Random& random, DType dtype) {
  return one_of(random, dtype,
                {random_prior_problem, random_prior_problem, random_prior_problem, random_long_prior_problem,
                 random_prior_decode_problem});
}

Problem random_extreme_csr_problem(Random& random, DType dtype) {
  return one_of(random, dtype, {random_csr_problem, random_csr_problem, random_csr_problem, random_csr_decode_problem});
}

void KernelTest::SetUp() {
  if (!machine_has(isa())) GTEST_SKIP() << "hardware: no " << cpu::isa_name(isa());
}

KernelChecks::Reference KernelChecks::reference_of(const Problem& problem) const {
  Reference reference;
  reference.exact = problem.forward(scalar(), DType::kFloat64, threads(1));
  problem.backward(scalar(), threads(1), reference.exact);
  reference.saved = problem.forward(scalar(), dtype(), threads(1));
  reference.yardstick = reference.saved;
  problem.backward(scalar(), threads(1), reference.yardstick);
  return reference;
}

void KernelChecks::matches(const Reference& reference, const Problem& problem, int64_t thread_count,
                           const std::string& what) const {
  Results actual = problem.forward(kernels(), dtype(), threads(thread_count));
  // From here on the same saved results, so that only the backward kernels differ.
  Results grads = reference.saved;
  problem.backward(kernels(), threads(thread_count), grads);
  grads.output = actual.output;
  grads.logsumexp = actual.logsumexp;
  Reference scaled = reference;
  if (problem.has_weight && !problem.args.log_prior) {
    scale_weight_gradients(problem, grads, scaled.exact, scaled.yardstick);
  }
  expect_all_close(grads, scaled.exact, scaled.yardstick, what);
}

void KernelChecks::matches_scalar_float64(const Problem& problem, const std::string& what) const {
  matches(reference_of(problem), problem, 1, what);
}

void KernelChecks::forward_matches_scalar_float64(const Problem& problem, const std::string& what) const {
  const Results exact = problem.forward(scalar(), DType::kFloat64, threads(1));
  const Results yardstick = problem.forward(scalar(), dtype(), threads(1));
  const Results actual = problem.forward(kernels(), dtype(), threads(2));
  expect_close(actual.output, exact.output, yardstick.output, "output of " + what);
  expect_close(actual.logsumexp, exact.logsumexp, yardstick.logsumexp, "logsumexp of " + what);
  actual.output.expect_gaps_untouched("output of " + what);
}

void KernelChecks::matches_scalar_float64(MakeProblem make, int rounds) const {
  Random random(10);
  for (int round = 0; round < rounds; ++round) {
    const Problem problem = make(random, dtype());
    matches_scalar_float64(problem, problem.describe() + ", round " + std::to_string(round));
    if (testing::Test::HasFatalFailure()) return;
  }
}

void KernelChecks::gives_the_same_bits_on_any_number_of_threads(MakeProblem make, int rounds) const {
  Random random(11);
  for (int round = 0; round < rounds; ++round) {
    const Problem problem = make(random, dtype());
    Results one = problem.forward(kernels(), dtype(), threads(1));
    problem.backward(kernels(), threads(1), one);
    for (const int64_t count : {2, 3, 7, 16}) {
      Results several = problem.forward(kernels(), dtype(), threads(count));
      problem.backward(kernels(), threads(count), several);
      expect_all_identical(several, one, kAllGrads, problem.describe() + " on " + std::to_string(count) + " threads");
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

void KernelChecks::leaves_out_unwanted_gradients(MakeProblem make, int rounds) const {
  Random random(12);
  for (int round = 0; round < rounds; ++round) {
    const Problem problem = make(random, dtype());
    Results all = problem.forward(kernels(), dtype(), threads(1));
    Results some = all;
    problem.backward(kernels(), threads(1), all);
    for (unsigned wanted = 0; wanted < kAllGrads; ++wanted) {
      problem.backward(kernels(), threads(2), some, wanted);
      expect_all_identical(some, all, wanted, problem.describe() + ", wanted " + std::to_string(wanted));
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

void KernelChecks::keeps_nan_in_its_place(MakeProblem make, int rounds) const {
  Random random(13);
  for (int round = 0; round < rounds; ++round) {
    Problem problem = make(random, dtype());
    const AttentionArgs& args = problem.args;
    if (args.batch == 0 || args.queries == 0 || args.keys == 0) continue;
    Results clean = problem.forward(kernels(), dtype(), threads(1));
    problem.backward(kernels(), threads(1), clean);
    const int64_t shared = args.query_heads / args.key_heads;
    const int64_t at_b = random.integer(0, args.batch - 1), at_h = random.integer(0, args.query_heads - 1);
    const int64_t at_n = random.integer(0, args.queries - 1), at_j = random.integer(0, args.keys - 1);
    const std::string what = problem.describe() + ", round " + std::to_string(round);
    // A whole row or one number of it; infinity may give 0 * inf or a finite softmax, but only in the same place.
    const double poison = random.chance(0.7) ? kNaN : std::numeric_limits<double>::infinity();
    const auto poisoned = [&](const Tensor& x, int64_t h, int64_t row) {
      Tensor y = x;
      if (random.chance(0.5)) {
        y.set_row(at_b, h, row, poison);
      } else {
        y.set(at_b, h, row, random.integer(0, x.columns - 1), poison);
      }
      return y;
    };
    const auto run = [&] {
      Results results = problem.forward(kernels(), dtype(), threads(1));
      problem.backward(kernels(), threads(1), results);
      return results;
    };

    // In a query row, or the gradient of its output: that row, and the keys and values of its head or of its support.
    {
      for (Tensor* operand : {&problem.query, &problem.grad_output}) {
        const Tensor saved = *operand;
        *operand = poisoned(saved, at_h, at_n);
        const Results results = run();
        *operand = saved;
        for (int64_t b = 0; b < args.batch; ++b) {
          for (int64_t h = 0; h < args.query_heads; ++h) {
            for (int64_t n = 0; n < args.queries; ++n) {
              const bool here = b == at_b && h == at_h && n == at_n;
              const bool beside = b == at_b && h / shared == at_h / shared;
              const double rounded = beside && !keeps_bits_beside_nan() ? 0x1p-7 : 0;
              const bool empty = clean.logsumexp.at(b, h, n, 0) == -std::numeric_limits<double>::infinity();
              const bool nan = here && std::isnan(poison) && !empty && operand == &problem.query;
              if (!here || nan || empty) {
                expect_row(results.output, clean.output, nan, b, h, n, "output of " + what, rounded);
              }
              if (!here || empty) {
                expect_row(results.grad_query, clean.grad_query, false, b, h, n, "grad_query of " + what, rounded);
              }
            }
          }
          for (int64_t h = 0; h < args.key_heads; ++h) {
            for (int64_t j = 0; j < args.keys; ++j) {
              const bool reached = !only_support_gets_nan() || problem.in_support(b, at_h, at_n, j);
              const bool beside = b == at_b && h == at_h / shared;
              if (beside && reached) continue;
              const double rounded = beside && !keeps_bits_beside_nan() ? 0x1p-7 : 0;
              expect_row(results.grad_key, clean.grad_key, false, b, h, j, "grad_key of " + what, rounded);
              expect_row(results.grad_value, clean.grad_value, false, b, h, j, "grad_value of " + what, rounded);
            }
          }
        }
      }
    }
    {  // In a key or value row: that batch element and head.
      for (Tensor* operand : {&problem.key, &problem.value}) {
        const Tensor saved = *operand;
        *operand = poisoned(saved, at_h / shared, at_j);
        const Results results = run();
        *operand = saved;
        for (int64_t b = 0; b < args.batch; ++b) {
          for (int64_t h = 0; h < args.query_heads; ++h) {
            if (b == at_b && h / shared == at_h / shared) continue;
            for (int64_t n = 0; n < args.queries; ++n) {
              expect_row(results.output, clean.output, false, b, h, n, "output of " + what);
              expect_row(results.grad_query, clean.grad_query, false, b, h, n, "grad_query of " + what);
            }
            for (int64_t j = 0; j < args.keys; ++j) {
              expect_row(results.grad_key, clean.grad_key, false, b, h / shared, j, "grad_key of " + what);
              expect_row(results.grad_value, clean.grad_value, false, b, h / shared, j, "grad_value of " + what);
            }
          }
        }
      }
    }
    if (problem.has_weight && problem.weight.columns > 0 &&
        problem.weight.rows > 0) {  // A weight: the rows that use it.
      const int64_t at_g = random.integer(0, problem.weight.batch - 1),
                    at_wh = random.integer(0, problem.weight.heads - 1);
      const int64_t at_row = random.integer(0, problem.weight.rows - 1);
      const int64_t at_w = random.integer(0, problem.weight.columns - 1);
      const double saved = problem.weight.at(at_g, at_wh, at_row, at_w);
      problem.weight.set(at_g, at_wh, at_row, at_w, poison);
      const Results results = problem.forward(kernels(), dtype(), threads(1));
      problem.weight.set(at_g, at_wh, at_row, at_w, saved);
      for (int64_t b = 0; b < args.batch; ++b) {
        for (int64_t h = 0; h < args.query_heads; ++h) {
          for (int64_t n = 0; n < args.queries; ++n) {
            bool nan;
            if (problem.pattern != nullptr) {
              const Pattern& pattern = *problem.pattern;
              const PatternHeads heads(pattern.heads, args.query_heads);
              const int64_t row = heads.head_of(b, h) * pattern.queries + n +
                                  (problem.query_offsets.empty() ? 0 : problem.query_offsets[b]);
              nan = pattern.crow[row] <= at_w && at_w < pattern.crow[row + 1] && pattern.col[at_w] < problem.keys_of(b);
            } else {
              nan = b % problem.weight.batch == at_g && (problem.weight.heads == 1 || h == at_wh) &&
                    (problem.weight.rows == 1 || n == at_row) && at_w < problem.keys_of(b) &&
                    (!problem.is_causal || at_w <= n);
            }
            expect_row(results.output, clean.output, nan, b, h, n, "output of " + what + ", weight");
          }
        }
      }
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

void KernelChecks::ignores_huge_scores_outside_the_support(MakeProblem make, int rounds) const {
  Random random(14);
  for (int round = 0; round < rounds; ++round) {
    Problem problem = make(random, dtype());
    const AttentionArgs& args = problem.args;
    if (args.batch == 0 || args.queries == 0 || args.keys == 0) continue;
    Results small = problem.forward(kernels(), dtype(), threads(1));
    problem.backward(kernels(), threads(1), small);
    const int64_t j = random.integer(0, args.keys - 1);
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t h = 0; h < args.key_heads; ++h) {
        for (int64_t d = 0; d < args.head_dim; ++d) problem.key.set(b, h, j, d, 10000 * problem.key.at(b, h, j, d));
      }
    }
    Results huge = problem.forward(kernels(), dtype(), threads(1));
    problem.backward(kernels(), threads(1), huge);
    const std::string what = problem.describe() + ", round " + std::to_string(round);
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t h = 0; h < args.query_heads; ++h) {
        for (int64_t n = 0; n < args.queries; ++n) {
          if (problem.in_support(b, h, n, j)) continue;
          expect_row(huge.output, small.output, false, b, h, n, "output of " + what);
          expect_row(huge.logsumexp, small.logsumexp, false, b, h, n, "logsumexp of " + what);
          expect_row(huge.grad_query, small.grad_query, false, b, h, n, "grad_query of " + what);
        }
      }
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

std::string kernel_test_name(const testing::TestParamInfo<std::tuple<cpu::Isa, DType>>& info) {
  return std::string(cpu::isa_name(std::get<0>(info.param))) + "_" + dtype_name(std::get<1>(info.param));
}

}  // namespace fiak::tests
