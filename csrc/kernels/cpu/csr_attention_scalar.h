// The pairs of csr_attention: the entries of a plan.
#pragma once

#include "kernels/cpu/attention_scalar.h"

namespace fiak::cpu {

template <class Real>
class CsrPairs {
 public:
  const int64_t groups, weight_heads, weight_rows;
  const bool one_query = true;

  explicit CsrPairs(const CsrArgs& args)
      : groups(args.plan.heads / args.query_heads),
        weight_heads(args.query_heads),
        weight_rows(args.plan.num_queries),
        args_(args) {}

  int64_t row_of_query(int64_t b, int64_t n) const { return n + offset(b); }
  int64_t query_of_row(int64_t b, int64_t row) const {
    const int64_t n = row - offset(b);
    return n >= 0 && n < args_.queries ? n : -1;
  }
  int64_t row_size(int64_t g, int64_t wh, int64_t wr) const {
    return segments(g, wh, wr)[args_.plan.key_blocks] - segments(g, wh, wr)[0];
  }
  int64_t row_begin(int64_t g, int64_t wh, int64_t wr) const { return segments(g, wh, wr)[0]; }

  template <class Visit>
  void for_row(int64_t b, int64_t h, int64_t n, Visit&& visit) const {
    const int64_t* segment = segments(b % groups, h, row_of_query(b, n));
    for (int64_t block = 0; block < args_.plan.key_blocks; ++block) {
      for (int64_t entry = segment[block]; entry < segment[block + 1]; ++entry) {
        const int64_t j = block * kPlanBlock + args_.plan.columns[entry];
        if (j >= keys(b)) return;
        visit(j, weight(entry), entry - segment[0]);
      }
    }
  }

  template <class Visit>
  void for_column(int64_t b, int64_t h, int64_t j, Visit&& visit) const {
    if (j >= keys(b)) return;
    const PlanView& plan = args_.plan;
    const int64_t head = b % groups * args_.query_heads + h;
    const int64_t first = plan.row_segments[head * plan.num_queries * plan.key_blocks];
    const int64_t* segment = plan.column_segments + (head * plan.num_keys + j) * plan.query_blocks;
    for (int64_t block = 0; block < plan.query_blocks; ++block) {
      for (int64_t place = segment[block]; place < segment[block + 1]; ++place) {
        const int64_t n = query_of_row(b, block * kPlanBlock + plan.rows[place]);
        if (n >= 0) visit(n, weight(first + plan.positions[place]));
      }
    }
  }

 private:
  int64_t keys(int64_t b) const { return args_.kv_lens != nullptr ? args_.kv_lens[b] : args_.keys; }
  int64_t offset(int64_t b) const { return args_.query_offsets != nullptr ? args_.query_offsets[b] : 0; }
  Real weight(int64_t entry) const {
    return args_.values != nullptr ? static_cast<const Real*>(args_.values)[entry] : Real{1};
  }
  const int64_t* segments(int64_t g, int64_t h, int64_t row) const {
    const PlanView& plan = args_.plan;
    return plan.row_segments + ((g * args_.query_heads + h) * plan.num_queries + row) * plan.key_blocks;
  }

  const CsrArgs& args_;
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
