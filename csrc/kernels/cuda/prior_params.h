// The parameters of the kernels of prior_attention, made on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/philox.h"

namespace fiak::cuda {

/// What all kernels of prior_attention take. Pointers are the device's.
struct PriorParams {
  Input query, key, value;
  const float* prior;  ///< null: all weights are 1
  int64_t prior_group_stride, prior_head_stride, prior_row_stride;
  const int64_t* kv_lens;  ///< [batch], each in 0..keys, or null
  const int64_t* seed;     ///< one number; read where dropout_threshold is not 0
  uint64_t dropout_threshold;
  float dropout_kept;
  float scale;
  int batch, query_heads, key_heads, queries, keys, head_size, value_size, prior_groups, prior_heads, prior_rows;
  bool is_causal, is_gaussian;
};

struct PriorForwardParams : PriorParams {
  Output output;
  float* logsumexp;  ///< [batch, query_heads, queries]
};

struct PriorBackwardParams : PriorParams {
  Input grad_output, output;
  const float* logsumexp;  ///< [batch, query_heads, queries]
  float* delta;            ///< the same; written by the first kernel, read by the others
  Output grad_query, grad_key, grad_value;
  float* grad_prior;  ///< [prior_groups, prior_heads, prior_rows, keys]
};

inline PriorParams prior_params(const PriorArgs& args, const int64_t* seed) {
  const Dropout dropout = make_dropout(args.dropout_p, 0);
  return {args.query,
          args.key,
          args.value,
          static_cast<const float*>(args.prior),
          args.prior_group_stride,
          args.prior_head_stride,
          args.prior_row_stride,
          args.kv_lens,
          seed,
          dropout.threshold,
          static_cast<float>(dropout.kept),
          static_cast<float>(args.scale),
          static_cast<int>(args.batch),
          static_cast<int>(args.query_heads),
          static_cast<int>(args.key_heads),
          static_cast<int>(args.queries),
          static_cast<int>(args.keys),
          static_cast<int>(args.head_size),
          static_cast<int>(args.value_size),
          static_cast<int>(args.prior_groups),
          static_cast<int>(args.prior_heads),
          static_cast<int>(args.prior_rows),
          args.is_causal,
          args.score == Score::kGaussian};
}

/// How many tiles it takes to cover a size.
FIAK_HOST_DEVICE inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

/// A number as a type.
template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

/// call(Element{}, Constant<kHead>{}) for the kernels of these arguments: kHead is the least of 64, 128 and 256 that
/// neither head_size nor value_size exceeds.
template <class Call>
void with_kernel_of(const AttentionArgs& args, Call&& call) {
  const auto with_head = [&](auto element) {
    const int64_t size = std::max(args.head_size, args.value_size);
    if (size <= 64) return call(element, Constant<64>{});
    if (size <= 128) return call(element, Constant<128>{});
    call(element, Constant<256>{});
  };
  switch (args.dtype) {
    case DType::kFloat16:
      return with_head(Half{});
    case DType::kBFloat16:
      return with_head(BFloat16{});
    default:
      return with_head(float{});
  }
}

}  // namespace fiak::cuda
