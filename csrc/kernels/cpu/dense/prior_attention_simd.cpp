// prior_attention, vectorised: dense attention (dense_rows.h, dense_grads.h) with weights.
#include "kernels/cpu/decode/decode.h"
#include "kernels/cpu/dense/dense_grads.h"
#include "kernels/cpu/isa/list.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

const float* weights_of(const PriorArgs& args, int64_t b, int64_t h, int64_t n) {
  if (args.prior == nullptr) return nullptr;
  return static_cast<const float*>(args.prior) + b % args.prior_groups * args.prior_group_stride +
         h * args.prior_head_stride + n * args.prior_row_stride;
}

/// Where the weights' gradient of a query is added up: a row for each query or, where all queries share their weights,
/// a partial sum for each kGradRows of them, so that no split among threads changes the order. Null: not wanted.
struct WeightRows {
  float* sums;
  int64_t groups, heads, rows, keys, queries_per_row;
  float* row(const PriorArgs& args, int64_t b, int64_t h, int64_t n) const {
    if (sums == nullptr) return nullptr;
    const int64_t head = h / (args.query_heads / heads);
    return sums + ((b % groups * heads + head) * rows + n / queries_per_row) * keys;
  }
};

/// What the queries of a head attend to (dense_forward, DenseBackward).
class PriorPairs {
 public:
  static constexpr bool kMasked = false;
  PriorPairs(const PriorArgs& args, int64_t b, int64_t h, WeightRows weight_rows = {})
      : args_(args), b_(b), h_(h), keys_(keys_of(args, b)), weight_rows_(weight_rows) {}
  __attribute__((always_inline)) int64_t end(int64_t n) const {
    return args_.is_causal ? smaller(keys_, n + 1) : keys_;
  }
  template <class Call>
  __attribute__((always_inline)) auto with(int64_t n, int64_t j, Call&& call) const {
    const float* weights = weights_of(args_, b_, h_, n);
    if (weights == nullptr) return call(AllKeys{});
    return args_.log_prior ? call(LogWeightedKeys{weights + j}) : call(WeightedKeys{weights + j});
  }
  __attribute__((always_inline)) int64_t spans(int64_t, int64_t, int64_t from, int64_t keys, int64_t,
                                               KeySpan* spans) const {
    spans[0] = {from, keys, 0};
    return 1;
  }
  __attribute__((always_inline)) void fetch(int64_t n, int64_t j, int64_t keys) const {
    if (args_.prior == nullptr || n + kRowsAhead >= args_.queries) return;
    prefetch_row(reinterpret_cast<const char*>(weights_of(args_, b_, h_, n + kRowsAhead) + j), keys * 4);
  }
  __attribute__((always_inline)) int64_t row(int64_t n) const { return n; }
  __attribute__((always_inline)) bool needs(int64_t first, int64_t rows, int64_t j, int64_t) const {
    return !args_.is_causal || j < first + rows;
  }
  __attribute__((always_inline)) float* grad_weights(int64_t n) const { return weight_rows_.row(args_, b_, h_, n); }
  __attribute__((always_inline)) void fetch_grads(int64_t n, int64_t j, int64_t keys) const {
    if (args_.prior_row_stride == 0 || n + kRowsAhead >= args_.queries) return;
    fetch(n, j, keys);
    if (const float* grad = grad_weights(n + kRowsAhead); grad != nullptr) {
      prefetch_row_for_writing(reinterpret_cast<const char*>(grad + j), keys * 4);
    }
  }

 private:
  const PriorArgs& args_;
  int64_t b_, h_, keys_;
  WeightRows weight_rows_;
};

}  // namespace

void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  if (is_decoding(args)) return prior_decode(args, result, parallel);
  // The batch runs inside the heads, so that a head's weights stay in the cache.
  parallel_blocks(parallel, args.query_heads * args.batch, args.queries, kBlockRows,
                  [&](int64_t i, int64_t begin, int64_t end) {
                    const int64_t h = i / args.batch, b = i % args.batch;
                    const PriorPairs pairs(args, b, h);
                    const HeadPlace next{(b + 1) % args.batch, h + (b + 1) / args.batch};
                    dense_forward_rows(args, result, pairs, {b, h}, begin, end, next);
                  });
}

void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  auto* grad_prior = static_cast<float*>(grads.grad_prior);
  const bool partial = grad_prior != nullptr && args.prior_rows != args.queries;
  const int64_t row_blocks = (args.queries + kGradRows - 1) / kGradRows, heads = args.prior_groups * args.prior_heads;
  const int64_t sum_rows = partial ? row_blocks : args.queries;
  const SharedScratch partial_memory(partial ? heads * sum_rows * args.keys * sizeof(float) : 0);
  float* sums = partial ? static_cast<float*>(partial_memory.data()) : grad_prior;
  if (sums != nullptr) {
    parallel_range(parallel, heads * sum_rows, [&](int64_t begin, int64_t end) {
      std::memset(sums + begin * args.keys, 0, (end - begin) * args.keys * sizeof(float));
    });
  }
  const WeightRows weight_rows{sums, args.prior_groups, args.prior_heads, sum_rows, args.keys, partial ? kGradRows : 1};
  const bool shared = sums != nullptr && args.prior_heads < args.query_heads;
  const auto pairs_of = [&](int64_t b, int64_t h) { return PriorPairs(args, b, h, weight_rows); };
  dense_backward(args, grads, {nullptr, args.key_heads}, pairs_of, sums != nullptr, shared, parallel);
  for (int64_t i = 0; partial && i < heads; ++i) {
    float* target = grad_prior + i * args.keys;
    std::memset(target, 0, args.keys * sizeof(float));
    for (int64_t block = 0; block < row_blocks; ++block) {
      const float* from = sums + (i * row_blocks + block) * args.keys;
      for (int64_t j = 0; j < args.keys; ++j) target[j] += from[j];
    }
  }
  if (grad_prior == nullptr || args.log_prior) return;
  const int64_t rows = args.prior_rows;
  parallel_range(parallel, heads * rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / rows / args.prior_heads, head = i / rows % args.prior_heads;
      const float* weights = static_cast<const float*>(args.prior) + group * args.prior_group_stride +
                             head * args.prior_head_stride + i % rows * args.prior_row_stride;
      scale_weight_gradients(grad_prior + i * args.keys, weights, args.keys);
    }
  });
}

void prior_blocks(const PriorArgs& args, int64_t threads, BlockCounts& blocks) {
  prior_decode_blocks(args, blocks);
  dense_forward_blocks(args, !is_decoding(args), blocks);
  dense_backward_blocks(args, threads, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
