// What the vector kernels of both attention ops share.
#pragma once

#include "kernels/cpu/dense/panel.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/pairs.h"

namespace fiak::cpu::FIAK_ISA {

FIAK_INLINE int64_t shared_heads(const AttentionArgs& args) { return args.query_heads / args.key_heads; }

/// Some key heads, ascending; `heads` is null where these are all.
struct KeyHeads {
  const int64_t* heads;
  int64_t count;
  __attribute__((always_inline)) int64_t at(int64_t i) const { return heads != nullptr ? heads[i] : i; }
};

/// sum_d x[d] y[d] over whole vectors.
FIAK_INLINE float dot(const float* x, const float* y, int64_t size) {
  Vec sum = zero();
  for (int64_t d = 0; d < size; d += kLanes) sum = fmadd(load(x + d), load(y + d), sum);
  return reduce_add(sum);
}

/// body(begin, end) over parts of [0, count) of about equal work, where work(i) is what the units before i take.
template <class Work, class Body>
FIAK_INLINE void parallel_balanced(const Parallel& parallel, int64_t count, Work&& work, Body&& body) {
  const int64_t parts = larger(1, smaller(parallel.threads, count));
  const auto boundary = [&](int64_t part) {
    if (part == 0) return int64_t{0};
    if (part == parts) return count;
    const int64_t total = work(count);
    const int64_t wanted = total / parts * part + total % parts * part / parts;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (work(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_range(parallel, parts, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) body(boundary(part), boundary(part + 1));
  });
}

/// See kLargeLogsumexp.
FIAK_INLINE bool is_large_logsumexp(float logsumexp) {
  return (logsumexp > kLargeLogsumexp && logsumexp < kInfinity) ||
         (logsumexp < -kLargeLogsumexp && logsumexp > -kInfinity);
}

/// Turns sums of 2^(score + exponent - logsumexp) (dA - delta) into the gradients of `count` weights, which may leave
/// the range of float: only then, so that no partial sum does.
FIAK_INLINE void scale_weight_gradients(float* grads, const float* weights, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(kLanes, count - i);
    store_first(grads + i, n, mul(load_first(grads + i, n), WeightParts(load_first(weights + i, n)).inverse()));
  }
}

}  // namespace fiak::cpu::FIAK_ISA
