#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/dense/csr_dense.h"
#include "kernels/cpu/dense/dense_grads.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

/// What the queries of a head of a pattern without prior attend to (dense_forward, DenseBackward). The plan must have
/// bits.
class CsrPairs {
 public:
  static constexpr bool kMasked = true;
  __attribute__((always_inline)) CsrPairs(const CsrArgs& args, HeadPlace at)
      : plan_(args.plan),
        first_(offset_of(args, at.b)),
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
  __attribute__((always_inline)) int64_t spans(int64_t first, int64_t rows, int64_t from, int64_t keys,
                                               int64_t span_keys, KeySpan* spans) const {
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
    for (int64_t j = from; j < from + keys; j += span_keys) {
      const int64_t size = smaller(span_keys, from + keys - j);
      if (!has(j, size)) continue;
      if (found > 0 && spans[found - 1].from + spans[found - 1].keys == j) {
        spans[found - 1].keys += size;
      } else {
        spans[found++] = {j, size, at};
      }
      at += span_keys;
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

/// The heads that DenseBackward computes.
struct AllCsrPairs {
  const CsrArgs& args;
  CsrPairs operator()(int64_t b, int64_t h) const { return CsrPairs(args, {b, h}); }
};

}  // namespace

void csr_dense_forward(const CsrArgs& args, const ForwardResult& result, const BundleRows& rows) {
  const auto& [bundle, h, begin, end, longest, next, next_h] = rows;
  const int64_t offset = offset_of(args, bundle.b[0]);
  const auto block = [&](int64_t row) { return smaller(args.queries, row_blocks(row - offset) * kBlockRows); };
  if (block(begin) == block(end)) return;
  for (int e = 0; e < bundle.samples; ++e) {
    const HeadPlace at{bundle.b[e], h};
    const HeadPlace after = e + 1 < bundle.samples ? HeadPlace{bundle.b[e + 1], h}
                            : next_h >= 0          ? HeadPlace{next.b[0], next_h}
                                                   : HeadPlace{0, args.query_heads};
    dense_forward_rows(args, result, CsrPairs(args, at), at, block(begin), block(end), after);
  }
}

void csr_dense_backward(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                        const Parallel& parallel) {
  dense_backward(args, grads, key_heads, AllCsrPairs{args}, false, false, parallel);
}

void csr_dense_blocks(const CsrArgs& args, int64_t threads, bool decodes, BlockCounts& blocks) {
  dense_forward_blocks(args, !decodes, blocks);
  dense_backward_blocks(args, threads, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
