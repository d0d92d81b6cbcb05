// What all attention kernels share on the device: which keys there are, dropout, and what backward makes of a pair.
// Keeps to what both nvcc and csrc/simt compile.
//
// Everything is in powers of two: scores and logsumexp are times log2(e).
#pragma once

#include <cmath>

#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/ptx.cuh"

namespace fiak::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = INFINITY;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }

template <class Element>
__device__ __forceinline__ const Element* head_of(const Input& x, int64_t b, int64_t h) {
  return static_cast<const Element*>(x.data) + b * x.batch_stride + h * x.head_stride;
}

template <class Element>
__device__ __forceinline__ Element* head_of(const Output& x, int64_t b, int64_t h) {
  return static_cast<Element*>(x.data) + b * x.batch_stride + h * x.head_stride;
}

/// The keys that kv_lens leaves of a batch element.
__device__ __forceinline__ int keys_of(const AttentionParams& params, int b) {
  if (params.kv_lens == nullptr) return params.keys;
  const int64_t keys = params.kv_lens[b];
  if (keys < 0 || keys > params.keys) __trap();  // kv_lens' values are on the device; out of bounds must not be read
  return static_cast<int>(keys);
}

/// One query head of one batch element.
struct Head {
  int b, h, key_head;
  int keys;  ///< that kv_lens leaves

  __device__ Head(int b, int h, int key_head, int keys) : b(b), h(h), key_head(key_head), keys(keys) {}
  __device__ Head(const AttentionParams& params, int64_t batch_and_head)
      : b(static_cast<int>(batch_and_head / params.query_heads)),
        h(static_cast<int>(batch_and_head % params.query_heads)),
        key_head(h / (params.query_heads / params.key_heads)),
        keys(keys_of(params, b)) {}

  /// Where [batch, query_heads, queries] has a query.
  __device__ int64_t at(const AttentionParams& params, int query) const {
    return (int64_t{b} * params.query_heads + h) * params.queries + query;
  }
};

/// log2 of a weight, -inf outside the support; NaN stays NaN, which must reach its row. Of a logarithm that is given,
/// what is finite stays so, unless above 2e38.
__device__ __forceinline__ float log_weight(const AttentionParams& params, float w) {
  if (!params.log_prior) return w <= 0 ? -kInfinity : log2_approx(w);
  const float log = w * kLog2E;
  return log == -kInfinity && w > -kInfinity ? -3.4028234663852886e38f : log;
}

/// Whether dropout keeps a pair, by its word of Philox: times what.
__device__ __forceinline__ float dropout_factor(const AttentionParams& params, uint32_t word) {
  return word < params.dropout_threshold ? 0.0f : params.dropout_kept;
}

/// What the forward pass left of a query: its logsumexp in powers of two and its delta. Those that do not exist are
/// like empty rows.
struct RowState {
  float logsumexp = -kInfinity, delta = 0;

  RowState() = default;
  template <class Weights>
  __device__ RowState(const BackwardParams<Weights>& params, const Head& head, int query) : RowState() {
    if (query >= params.queries) return;
    const int64_t at = head.at(params, query);
    logsumexp = params.logsumexp[at] * kLog2E;
    delta = params.delta[at];
  }
};

/// The logarithm of a pair's w exp(s - logsumexp): -inf outside the support and in empty rows. What may be as large as
/// the other is subtracted first.
__device__ __forceinline__ float log_probability(float score, float log_weight, float logsumexp,
                                                 const AttentionParams& params) {
  if (log_weight == -kInfinity || logsumexp == -kInfinity) return -kInfinity;
  const float log = score + (log_weight - logsumexp);
  // No probability is more than 1, however the logarithm of a sum of such large ones was rounded.
  return params.log_prior && log > 0 ? 0 : log;
}

/// d w of a pair, which has a weight of 1 in `log_probability`, or d ln w. Infinite only where it leaves the range.
__device__ __forceinline__ float weight_gradient(float log_probability, float grad_probability, float delta) {
  const float root = exp2_approx(0.5f * log_probability);
  return root == 0 ? 0 : root * (grad_probability - delta) * root;
}

/// d s of a pair. Nothing reaches a pair that is not there.
__device__ __forceinline__ float score_gradient(float probability, float grad_probability, float delta) {
  return probability == 0 ? 0 : probability * (grad_probability - delta);
}

constexpr int kDeltaWarps = 4;

/// delta, a warp for each query. grid: ceil(batch * query_heads * queries / kDeltaWarps); block: 32 * kDeltaWarps.
template <class Element, class Weights>
__device__ __forceinline__ void compute_delta(const BackwardParams<Weights>& params) {
  const int64_t at = int64_t{blockIdx.x} * kDeltaWarps + warp_index();
  if (at >= int64_t{params.batch} * params.query_heads * params.queries) return;
  const int64_t query = at % params.queries, head = at / params.queries % params.query_heads;
  const int64_t b = at / params.queries / params.query_heads;
  const Element* grad = head_of<Element>(params.grad_output, b, head) + query * params.grad_output.row_stride;
  const Element* output = head_of<Element>(params.output, b, head) + query * params.output.row_stride;
  float sum = 0;
  for (int d = lane_index(); d < params.value_dim; d += 32) sum = fmaf(widen(grad[d]), widen(output[d]), sum);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane_index() == 0) params.delta[at] = sum;
}

}  // namespace fiak::cuda
