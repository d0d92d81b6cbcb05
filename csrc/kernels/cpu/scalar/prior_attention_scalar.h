// The pairs of prior_attention: every (query, key) that neither is_causal nor kv_lens hides.
#pragma once

#include "kernels/cpu/scalar/attention_scalar.h"

namespace fiak::cpu {

template <class Real>
class PriorPairs {
 public:
  const int64_t groups, weight_heads, weight_rows;
  const bool one_query;

  explicit PriorPairs(const PriorArgs& args)
      : groups(args.prior_groups),
        weight_heads(args.prior_heads),
        weight_rows(args.prior_rows),
        one_query(args.prior_rows == args.queries),
        args_(args),
        one_(Weights<Real>(args).one()) {}

  int64_t row_of_query(int64_t, int64_t n) const { return n; }
  int64_t query_of_row(int64_t, int64_t row) const { return row; }
  int64_t row_size(int64_t, int64_t, int64_t) const { return args_.keys; }
  int64_t row_begin(int64_t g, int64_t wh, int64_t wr) const {
    return ((g * weight_heads + wh) * weight_rows + wr) * args_.keys;
  }

  template <class Visit>
  void for_row(int64_t b, int64_t h, int64_t n, Visit&& visit) const {
    const Real* weights = row(b, h, n);
    const int64_t end = args_.is_causal ? std::min(n + 1, keys_of(args_, b)) : keys_of(args_, b);
    for (int64_t j = 0; j < end; ++j) visit(j, weights != nullptr ? weights[j] : one_, j);
  }

  template <class Visit>
  void for_column(int64_t b, int64_t h, int64_t j, Visit&& visit) const {
    if (j >= keys_of(args_, b)) return;
    for (int64_t n = args_.is_causal ? j : 0; n < args_.queries; ++n) {
      const Real* weights = row(b, h, n);
      visit(n, weights != nullptr ? weights[j] : one_);
    }
  }

 private:
  const Real* row(int64_t b, int64_t h, int64_t n) const {
    if (args_.prior == nullptr) return nullptr;
    return static_cast<const Real*>(args_.prior) + b % groups * args_.prior_group_stride + h * args_.prior_head_stride +
           n * args_.prior_row_stride;
  }

  const PriorArgs& args_;
  const Real one_;
};

template <class T>
void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  attention_forward<T>(args, PriorPairs<typename Number<T>::Real>(args), result, parallel);
}

template <class T>
void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  attention_backward<T>(args, PriorPairs<typename Number<T>::Real>(args), grads, parallel);
}

}  // namespace fiak::cpu
