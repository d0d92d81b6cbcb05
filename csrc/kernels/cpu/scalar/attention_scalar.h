// The scalar attention kernels: the reference that the others are tested against, the float64 path, and, with a
// counting number type, the validation of the FLOP formulas.
//
// Sums start with their first product, so that n terms take n - 1 additions. Products and sums are done in `Acc`;
// everything that Table 1 of the paper leaves out (scale, softmax, normalisation) in `Real`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/dtypes.h"
#include "kernels/pairs.h"
#include "kernels/philox.h"

namespace fiak::cpu {

/// How a stored element T is computed with.
template <class T>
struct Number {  // float, double
  using Acc = T;
  using Real = T;
  static Acc load(T x) { return x; }
  static T store(Real x) { return x; }
  static Real real(Acc x) { return x; }
  static Acc acc(Real x) { return x; }
};
template <class T>
struct LowPrecision {
  using Acc = float;
  using Real = float;
  static Acc load(T x) { return to_float(x); }
  static Real real(Acc x) { return x; }
  static Acc acc(Real x) { return x; }
};
template <>
struct Number<BFloat16> : LowPrecision<BFloat16> {
  static BFloat16 store(Real x) { return to_bfloat16(x); }
};
template <>
struct Number<Half> : LowPrecision<Half> {
  static Half store(Real x) { return to_half(x); }
};

/// x . y
template <class T>
typename Number<T>::Acc dot(const T* x, const T* y, int64_t size) {
  using N = Number<T>;
  if (size == 0) return N::acc(0);
  typename N::Acc sum = N::load(x[0]) * N::load(y[0]);
  for (int64_t d = 1; d < size; ++d) sum = sum + N::load(x[d]) * N::load(y[d]);
  return sum;
}

/// A sum of weighted rows.
template <class T>
class RowSum {
 public:
  using N = Number<T>;
  explicit RowSum(int64_t size) : sum_(size, N::acc(0)) {}
  void clear() {
    if (!empty_) std::fill(sum_.begin(), sum_.end(), N::acc(0));
    empty_ = true;
  }
  void add(typename N::Real weight, const T* row) {
    const typename N::Acc w = N::acc(weight);
    const int64_t size = static_cast<int64_t>(sum_.size());
    if (empty_) {
      for (int64_t d = 0; d < size; ++d) sum_[d] = w * N::load(row[d]);
    } else {
      for (int64_t d = 0; d < size; ++d) sum_[d] = sum_[d] + w * N::load(row[d]);
    }
    empty_ = false;
  }
  bool empty() const { return empty_; }
  void store(typename N::Real factor, T* row) const {
    for (size_t d = 0; d < sum_.size(); ++d) row[d] = N::store(N::real(sum_[d]) * factor);
  }

 private:
  std::vector<typename N::Acc> sum_;
  bool empty_ = true;
};

template <class T>
const T* row_of(const Input& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(x.data) + b * x.batch_stride + h * x.head_stride + n * x.row_stride;
}
template <class T>
T* row_of(const Output& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(x.data) + b * x.batch_stride + h * x.head_stride + n * x.row_stride;
}

/// Scores of one batch element and query head.
template <class T>
class Scores {
 public:
  using N = Number<T>;
  using Real = typename N::Real;
  Scores(const AttentionArgs& args, int64_t b, int64_t h)
      : args_(args), b_(b), h_(h), key_head_(h / (args.query_heads / args.key_heads)) {}
  const T* query(int64_t n) const { return row_of<T>(args_.query, b_, h_, n); }
  const T* key(int64_t j) const { return row_of<T>(args_.key, b_, key_head_, j); }
  const T* value(int64_t j) const { return row_of<T>(args_.value, b_, key_head_, j); }
  Real operator()(int64_t n, int64_t j) const {
    const Real scale = static_cast<Real>(args_.scale);
    const Real s = scale * N::real(dot(query(n), key(j), args_.head_dim));
    if (args_.score == Score::kDot) return s;
    return s - scale / 2 * N::real(dot(key(j), key(j), args_.head_dim));
  }

 private:
  const AttentionArgs& args_;
  int64_t b_, h_, key_head_;
};

// A `Pairs` says which pairs (n, j) an op has and what they weigh. Its weights form rows; one weight row serves
// `batch_of(group)` batch elements, `heads` query heads and one query (or all of them) of each:
//   int64_t groups, weight_heads, weight_rows       weight rows are (group, weight head, weight row)
//   bool one_query                                  a weight row serves one query of a head, else all
//   int64_t row_of_query(b, n), query_of_row(b, r)  dropout's row of a query and back; -1 where b has no such query
//   int64_t row_size(g, wh, wr)                     weights in a row
//   int64_t row_begin(g, wh, wr)                    where the row's gradient starts
//   for_row(b, h, n, visit(j, w, slot))             all pairs of a query with a gradient, slot in its weight row
//   for_column(b, h, j, visit(n, w))                all pairs of a key
// w <= 0 is outside the support. Prior weights there still have a gradient, so for_row visits them too. A visitor gets
// weights as they are given: w or, with log_prior, ln w.

/// What weights mean. They join the scores in the exponent, so that only their ratios within a row matter: a weight is
/// factor * exp(log), where the factor is in [1, 2), or 1 where the logarithm is given. Logarithms are in float64, and
/// two of them, or one and a maximum, are subtracted before anything is rounded.
template <class Real>
class Weights {
 public:
  struct Parts {
    Real factor;
    double log;
  };
  explicit Weights(const AttentionArgs& args) : logs_(args.log_prior), least_(logs_ ? -kInfinity : 0) {}
  bool are_logs() const { return logs_; }
  /// Of a weight that is left out: 1.
  Real one() const { return logs_ ? 0 : 1; }
  bool in_support(Real w) const { return !(w <= least_); }  // true for NaN, which must reach its row
  /// Of a weight in the support; NaN where it is NaN or infinite.
  Parts split(Real w) const {
    if (logs_) return {1, w};
    if (!(w < kInfinity)) return {w - w, 0};
    const int exponent = std::ilogb(w);
    return {std::scalbn(w, -exponent), exponent * 0.693147180559945309417};
  }
  /// The logarithm of w exp(s), without the factor's.
  static Real log_of(const Parts& w, Real s) { return static_cast<Real>(w.log + s); }
  /// w exp(s - shift).
  static Real exp_of(const Parts& w, Real s, Real shift) {
    return w.factor * std::exp(s + static_cast<Real>(w.log - shift));
  }

 private:
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  bool logs_;
  Real least_;
};

/// work(b, h, n) for every query of every weight row in [begin, end).
template <class Pairs, class Work>
void for_queries(const AttentionArgs& args, const Pairs& pairs, int64_t group, int64_t weight_head, int64_t weight_row,
                 Work&& work) {
  const int64_t shared_heads = args.query_heads / pairs.weight_heads;
  for (int64_t h = weight_head * shared_heads; h < (weight_head + 1) * shared_heads; ++h) {
    for (int64_t b = group; b < args.batch; b += pairs.groups) {
      if (pairs.one_query) {
        const int64_t n = pairs.query_of_row(b, weight_row);
        if (n >= 0) work(b, h, n);
      } else {
        for (int64_t n = 0; n < args.queries; ++n) work(b, h, n);
      }
    }
  }
}

template <class T, class Pairs>
void attention_forward(const AttentionArgs& args, const Pairs& pairs, const ForwardResult& result,
                       const Parallel& parallel) {
  using Real = typename Number<T>::Real;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const Weights<Real> weights(args);
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  parallel_range(parallel, pairs.groups * pairs.weight_heads * pairs.weight_rows, [&](int64_t begin, int64_t end) {
    struct Pair {
      int64_t j;
      typename Weights<Real>::Parts w;
      Real s;
    };
    std::vector<Pair> row;
    RowSum<T> sum(args.value_dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t wr = task % pairs.weight_rows, wh = task / pairs.weight_rows % pairs.weight_heads;
      const int64_t g = task / pairs.weight_rows / pairs.weight_heads;
      for_queries(args, pairs, g, wh, wr, [&](int64_t b, int64_t h, int64_t n) {
        const Scores<T> score(args, b, h);
        row.clear();
        Real maximum = -kInfinity;
        pairs.for_row(b, h, n, [&](int64_t j, Real w, int64_t) {
          if (!weights.in_support(w)) return;
          const Pair& pair = row.emplace_back(Pair{j, weights.split(w), score(n, j)});
          const Real weighted = weights.log_of(pair.w, pair.s);
          if (weighted > maximum) maximum = weighted;
        });
        sum.clear();
        Real total = 0;
        for (const Pair& pair : row) {
          const Real weighted = weights.exp_of(pair.w, pair.s, maximum);
          total += weighted;
          const Real dropout_factor =
              dropout.active() ? static_cast<Real>(dropout.factor(b, h, pairs.row_of_query(b, n), pair.j)) : Real{1};
          sum.add(weighted * dropout_factor, score.value(pair.j));
        }
        // A NaN or infinite weight makes its row NaN.
        if (!(total < kInfinity)) total = std::numeric_limits<Real>::quiet_NaN();
        sum.store(row.empty() ? Real{0} : 1 / total, row_of<T>(result.output, b, h, n));
        static_cast<Real*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] =
            row.empty() ? -kInfinity : maximum + std::log(total);
      });
    }
  });
}

template <class T, class Pairs>
void attention_backward(const AttentionArgs& args, const Pairs& pairs, const BackwardArgs& grads,
                        const Parallel& parallel) {
  using Real = typename Number<T>::Real;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const Weights<Real> weights(args);
  /// A pair's probability is w exp(s - shift) factor.
  struct Row {
    Real shift, factor;
    bool empty() const { return shift == -std::numeric_limits<Real>::infinity(); }
  };
  // No probability is more than 1, however the logarithm of a sum of such large ones was rounded.
  const auto probability = [&](Real w, Real s, const Row& row) {
    const Real a = weights.exp_of(weights.split(w), s, row.shift) * row.factor;
    return weights.are_logs() ? std::min(a, Real{1}) : a;
  };
  const auto* logsumexp = static_cast<const Real*>(grads.logsumexp);
  const Real scale = static_cast<Real>(args.scale);
  const auto index = [&](int64_t b, int64_t h, int64_t n) { return (b * args.query_heads + h) * args.queries + n; };
  const auto factor = [&](int64_t b, int64_t h, int64_t n, int64_t j) {
    return dropout.active() ? static_cast<Real>(dropout.factor(b, h, pairs.row_of_query(b, n), j)) : Real{1};
  };
  const auto grad_output = [&](int64_t b, int64_t h, int64_t n) { return row_of<T>(grads.grad_output, b, h, n); };

  // delta_i = sum_j a_ij dA_ij = dO_i . O_i
  std::vector<Real> delta(args.batch * args.query_heads * args.queries);
  std::vector<Row> rows(delta.size());
  parallel_range(parallel, args.batch * args.query_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.query_heads, h = i % args.query_heads;
      for (int64_t n = 0; n < args.queries; ++n) {
        delta[index(b, h, n)] =
            Number<T>::real(dot(grad_output(b, h, n), row_of<T>(grads.output, b, h, n), args.value_dim));
        Row& row = rows[index(b, h, n)];
        row = {logsumexp[index(b, h, n)], 1};
        if (!std::isfinite(row.shift) || std::abs(row.shift) <= kLargeLogsumexp) continue;
        const Scores<T> score(args, b, h);
        const auto for_support = [&](auto&& use) {
          pairs.for_row(b, h, n, [&](int64_t j, Real w, int64_t) {
            if (weights.in_support(w)) use(weights.split(w), score(n, j));
          });
        };
        Real maximum = -std::numeric_limits<Real>::infinity(), total = 0;
        for_support([&](const auto& w, Real s) { maximum = std::max(maximum, weights.log_of(w, s)); });
        for_support([&](const auto& w, Real s) { total += weights.exp_of(w, s, maximum); });
        row = {maximum, 1 / total};
      }
    }
  });

  // Rows: dQ and the weights' gradient, the batch inside, so that nothing is shared between threads.
  if (grads.grad_query.data != nullptr || grads.grad_prior != nullptr) {
    parallel_range(parallel, pairs.groups * pairs.weight_heads * pairs.weight_rows, [&](int64_t begin, int64_t end) {
      RowSum<T> sum(args.head_dim);
      std::vector<double> grad_prior;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t wr = task % pairs.weight_rows, wh = task / pairs.weight_rows % pairs.weight_heads;
        const int64_t g = task / pairs.weight_rows / pairs.weight_heads;
        const int64_t slots = pairs.row_size(g, wh, wr);
        grad_prior.assign(slots, 0.0);
        for_queries(args, pairs, g, wh, wr, [&](int64_t b, int64_t h, int64_t n) {
          const Scores<T> score(args, b, h);
          const Row& row = rows[index(b, h, n)];
          sum.clear();
          if (!row.empty()) {
            pairs.for_row(b, h, n, [&](int64_t j, Real w, int64_t slot) {
              const Real da =
                  factor(b, h, n, j) * Number<T>::real(dot(grad_output(b, h, n), score.value(j), args.value_dim));
              const Real s = score(n, j), da_minus_delta = da - delta[index(b, h, n)];
              const bool inside = weights.in_support(w);
              const Real ds = inside ? probability(w, s, row) * da_minus_delta : Real{0};
              // d L / d ln w = d L / d s; d L / d w is that over w, which may be 0.
              grad_prior[slot] += weights.are_logs() ? ds
                                                     : std::exp(static_cast<double>(s) - row.shift) * row.factor *
                                                           static_cast<double>(da_minus_delta);
              if (inside) sum.add(ds, score.key(j));
            });
          }
          if (grads.grad_query.data != nullptr) sum.store(scale, row_of<T>(grads.grad_query, b, h, n));
        });
        if (grads.grad_prior != nullptr) {
          auto* target = static_cast<Real*>(grads.grad_prior) + pairs.row_begin(g, wh, wr);
          for (int64_t slot = 0; slot < slots; ++slot) target[slot] = static_cast<Real>(grad_prior[slot]);
        }
      }
    });
  }

  // Columns: dK and dV.
  if (grads.grad_key.data != nullptr || grads.grad_value.data != nullptr) {
    const int64_t shared_heads = args.query_heads / args.key_heads;
    parallel_range(parallel, args.batch * args.key_heads * args.keys, [&](int64_t begin, int64_t end) {
      RowSum<T> key_sum(args.head_dim), value_sum(args.value_dim);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t j = task % args.keys, key_head = task / args.keys % args.key_heads;
        const int64_t b = task / args.keys / args.key_heads;
        key_sum.clear();
        value_sum.clear();
        Real score_sum = 0;
        for (int64_t h = key_head * shared_heads; h < (key_head + 1) * shared_heads; ++h) {
          const Scores<T> score(args, b, h);
          pairs.for_column(b, h, j, [&](int64_t n, Real w) {
            const Row& row = rows[index(b, h, n)];
            if (!weights.in_support(w) || row.empty()) return;
            const Real a = probability(w, score(n, j), row);
            const Real dropout_factor = factor(b, h, n, j);
            const Real da = dropout_factor * Number<T>::real(dot(grad_output(b, h, n), score.value(j), args.value_dim));
            const Real ds = a * (da - delta[index(b, h, n)]);
            value_sum.add(a * dropout_factor, grad_output(b, h, n));
            key_sum.add(ds, score.query(n));
            score_sum += ds;
          });
        }
        if (grads.grad_value.data != nullptr) value_sum.store(1, row_of<T>(grads.grad_value, b, key_head, j));
        if (grads.grad_key.data != nullptr) {
          // The Gaussian score has d s_ij / d k_j = scale (q_i - k_j).
          if (args.score == Score::kGaussian && !key_sum.empty())
            key_sum.add(-score_sum, row_of<T>(args.key, b, key_head, j));
          key_sum.store(scale, row_of<T>(grads.grad_key, b, key_head, j));
        }
      }
    });
  }
}

/// call(T{}) with the element type of `dtype`.
template <class Call>
void with_element_type(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kFloat64:
      return call(double{});
    case DType::kFloat32:
      return call(float{});
    case DType::kBFloat16:
      return call(BFloat16{});
    case DType::kFloat16:
      return call(Half{});
  }
}

}  // namespace fiak::cpu
