// The parameters that the attention kernels take, made on the host. Pointers are the device's.
//
// Every kernel takes one plain struct: ForwardParams or BackwardParams of its op's Weights, which say what pairs there
// are and what they weigh (PriorWeights, CsrWeights). It is 160 bytes of AttentionParams, 48 or 56 of Weights, and the
// rest, without gaps: fields come in the order below, each aligned to its size. An Input or Output is 32 bytes: the
// address, and the strides of batch, head and row in elements (int64; the last dimension is contiguous).
//
// query is [batch, query_heads, queries, head_dim]; key and value are [batch, key_heads, keys, head_dim or
// value_dim]; output and grad_output are like query, with value_dim; each gradient is like what it is of. query_heads
// is a multiple of key_heads. Before any other kernel of backward, the one called delta must have run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/dtypes.h"
#include "kernels/philox.h"

namespace fiak::cuda {

struct AttentionParams {
  Input query, key, value;
  const int64_t* kv_lens;      ///< [batch], each in 0..keys, or null
  const int64_t* seed;         ///< one number; read where dropout_threshold is not 0
  uint64_t dropout_threshold;  ///< of 2^32: pairs whose random word is below it are dropped; 0 without dropout
  float dropout_kept;          ///< what the others are multiplied by
  float scale;
  int32_t batch, query_heads, key_heads, queries, keys, head_dim, value_dim;
  bool is_gaussian, log_prior;  ///< 1 byte each; 2 of padding; the latter: weights are given as ln w
};
static_assert(sizeof(Input) == 32 && sizeof(Output) == 32 && sizeof(AttentionParams) == 160, "as said above");

template <class Weights>
struct ForwardParams : AttentionParams {
  Weights weights;
  Output output;
  float* logsumexp;  ///< [batch, query_heads, queries]
};

template <class Weights>
struct BackwardParams : AttentionParams {
  Weights weights;
  Input grad_output, output;
  const float* logsumexp;  ///< [batch, query_heads, queries]
  float* delta;            ///< the same; the sums of grad_output * output, which the first kernel writes for the others
  Output grad_query, grad_key, grad_value;
  float* grad_prior;  ///< in the weights' own shape
};

/// The weights of prior_attention: w of [groups, heads, rows, keys], strides 0 where it is broadcast.
struct PriorWeights {
  const float* prior;  ///< null: all weights are 1
  int64_t group_stride, head_stride, row_stride;
  int32_t groups, heads, rows;
  bool is_causal;
};

/// The weights of csr_attention: its pattern, by the plan that csr_plan made, and their prior.
struct CsrWeights {
  const void* plan;
  int64_t plan_bytes, num_rows, nnz;  ///< of plan and pattern; the kernels trap where the plan is of another one
  const float* prior;                 ///< [nnz], or null: all weights are 1
  const int64_t* query_offsets;       ///< [batch]: query n is row n + offset of its head; or null for 0
  int32_t selected;                   ///< a CsrKernel
};

static_assert(sizeof(PriorWeights) == 48 && sizeof(CsrWeights) == 56, "as said above");
static_assert(sizeof(ForwardParams<CsrWeights>) == 160 + 56 + 32 + 8, "as said above");
static_assert(sizeof(BackwardParams<CsrWeights>) == 160 + 56 + 2 * 32 + 2 * 8 + 3 * 32 + 8, "as said above");

inline AttentionParams attention_params(const AttentionArgs& args, const int64_t* seed) {
  const Dropout dropout = make_dropout(args.dropout_p, 0);
  return {args.query,
          args.key,
          args.value,
          args.kv_lens,
          seed,
          dropout.threshold,
          static_cast<float>(dropout.kept),
          static_cast<float>(args.scale),
          static_cast<int32_t>(args.batch),
          static_cast<int32_t>(args.query_heads),
          static_cast<int32_t>(args.key_heads),
          static_cast<int32_t>(args.queries),
          static_cast<int32_t>(args.keys),
          static_cast<int32_t>(args.head_dim),
          static_cast<int32_t>(args.value_dim),
          args.score == Score::kGaussian,
          args.log_prior};
}

inline PriorWeights weights_of(const PriorArgs& args) {
  return {static_cast<const float*>(args.prior),
          args.prior_group_stride,
          args.prior_head_stride,
          args.prior_row_stride,
          static_cast<int32_t>(args.prior_groups),
          static_cast<int32_t>(args.prior_heads),
          static_cast<int32_t>(args.prior_rows),
          args.is_causal};
}

template <class Weights>
ForwardParams<Weights> forward_params(const AttentionArgs& args, const Weights& weights, const int64_t* seed,
                                      const ForwardResult& result) {
  return {attention_params(args, seed), weights, result.output, static_cast<float*>(result.logsumexp)};
}

/// `delta` is scratch, [batch, query_heads, queries].
template <class Weights>
BackwardParams<Weights> backward_params(const AttentionArgs& args, const Weights& weights, const int64_t* seed,
                                        const BackwardArgs& grads, float* delta) {
  return {attention_params(args, seed),
          weights,
          grads.grad_output,
          grads.output,
          static_cast<const float*>(grads.logsumexp),
          delta,
          grads.grad_query,
          grads.grad_key,
          grads.grad_value,
          static_cast<float*>(grads.grad_prior)};
}

/// How many tiles it takes to cover a size.
FIAK_HOST_DEVICE inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

/// A number as a type.
template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

/// call(Element{}) for the dtype of these arguments.
template <class Call>
void with_element_of(const AttentionArgs& args, Call&& call) {
  switch (args.dtype) {
    case DType::kFloat16:
      return call(Half{});
    case DType::kBFloat16:
      return call(BFloat16{});
    default:
      return call(float{});
  }
}

/// call(Constant<kHead>{}) for these arguments: kHead is the least of 64, 128 and 256 that neither head_dim nor
/// value_dim exceeds.
template <class Call>
void with_head_of(const AttentionArgs& args, Call&& call) {
  const int64_t size = std::max(args.head_dim, args.value_dim);
  if (size <= 64) return call(Constant<64>{});
  if (size <= 128) return call(Constant<128>{});
  call(Constant<256>{});
}

/// define(dtype's name, Element) for every dtype, and define(dtype's name, Element, kHead) for every head, too. A file
/// that is compiled once for each dtype (FIAK_CUDA_DTYPE_SOURCES in CMakeLists.txt) has the one that it is compiled
/// for, FIAK_DTYPE and FIAK_ELEMENT.
#ifdef FIAK_DTYPE
#define FIAK_APPLY(define, ...) define(__VA_ARGS__)  // whose arguments are expanded first
#define FIAK_FOR_ATTENTION_DTYPES(define) FIAK_APPLY(define, FIAK_DTYPE, FIAK_ELEMENT)
#define FIAK_FOR_ATTENTION_TYPES(define)           \
  FIAK_APPLY(define, FIAK_DTYPE, FIAK_ELEMENT, 64) \
  FIAK_APPLY(define, FIAK_DTYPE, FIAK_ELEMENT, 128) FIAK_APPLY(define, FIAK_DTYPE, FIAK_ELEMENT, 256)
#else
#define FIAK_FOR_ATTENTION_DTYPES(define) define(f32, float) define(f16, Half) define(bf16, BFloat16)
#define FIAK_FOR_ATTENTION_TYPES(define)                                                                              \
  define(f32, float, 64) define(f32, float, 128) define(f32, float, 256) define(f16, Half, 64) define(f16, Half, 128) \
      define(f16, Half, 256) define(bf16, BFloat16, 64) define(bf16, BFloat16, 128) define(bf16, BFloat16, 256)
#endif

/// visit(Element{}), and visit(Element{}, Constant<kHead>{}), likewise.
template <class Visit>
void for_each_attention_dtype(Visit&& visit) {
  visit(float{});
  visit(Half{});
  visit(BFloat16{});
}
template <class Visit>
void for_each_attention_type(Visit&& visit) {
  for_each_attention_dtype([&](auto element) {
    visit(element, Constant<64>{});
    visit(element, Constant<128>{});
    visit(element, Constant<256>{});
  });
}

}  // namespace fiak::cuda
