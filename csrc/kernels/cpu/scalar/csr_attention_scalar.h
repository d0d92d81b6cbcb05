// The pairs of csr_attention: the entries of a plan.
#pragma once

#include "kernels/cpu/scalar/attention_scalar.h"

namespace fiak::cpu {

template <class Real>
class CsrPairs {
 public:
  const int64_t groups, weight_heads, weight_rows;
  const bool one_query = true;

  explicit CsrPairs(const CsrArgs& args)
      : groups(args.groups()),
        weight_heads(args.pattern_heads()),
        weight_rows(args.plan.num_queries),
        args_(args),
        one_(Weights<Real>(args).one()) {}

  int64_t row_of_query(int64_t b, int64_t n) const { return n + offset_of(args_, b); }
  int64_t query_of_row(int64_t b, int64_t row) const {
    const int64_t n = row - offset_of(args_, b);
    return n >= 0 && n < args_.queries ? n : -1;
  }
  int64_t row_size(int64_t g, int64_t wh, int64_t wr) const {
    const PlanRange row = entries(g * weight_heads + wh, wr);
    return row.end - row.begin;
  }
  int64_t row_begin(int64_t g, int64_t wh, int64_t wr) const { return entries(g * weight_heads + wh, wr).begin; }

  template <class Visit>
  void for_row(int64_t b, int64_t h, int64_t n, Visit&& visit) const {
    const PlanRange row = entries(args_.plan_head(b, h), row_of_query(b, n));
    for (int64_t entry = row.begin; entry < row.end; ++entry) {
      const int64_t j = args_.plan.column(entry);
      if (j >= keys_of(args_, b)) return;
      visit(j, weight(entry), entry - row.begin);
    }
  }

  template <class Visit>
  void for_column(int64_t b, int64_t h, int64_t j, Visit&& visit) const {
    if (j >= keys_of(args_, b)) return;
    const PlanView& plan = args_.plan;
    const int64_t head = args_.plan_head(b, h), first = plan.first_entry(head);
    const PlanRange column = plan.places(head, j);
    for (int64_t place = column.begin; place < column.end; ++place) {
      const int64_t n = query_of_row(b, plan.query_of(head, place));
      if (n >= 0) visit(n, weight(first + plan.positions[place]));
    }
  }

 private:
  Real weight(int64_t entry) const {
    return args_.prior != nullptr ? static_cast<const Real*>(args_.prior)[entry] : one_;
  }
  PlanRange entries(int64_t head, int64_t row) const { return args_.plan.row(head * args_.plan.num_queries + row); }

  const CsrArgs& args_;
  const Real one_;
};

template <class T>
void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  attention_forward<T>(args, CsrPairs<typename Number<T>::Real>(args), result, parallel);
}

template <class T>
void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  attention_backward<T>(args, CsrPairs<typename Number<T>::Real>(args), grads, parallel);
}

}  // namespace fiak::cpu
