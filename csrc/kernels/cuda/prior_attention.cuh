// Device code of prior_attention, a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij') (Eq. 12 of the paper). Keeps to what
// both nvcc and csrc/simt compile.
//
// Everything is in powers of two. A weight joins its score as log2(w), so that what is rounded for the tensor cores
// lies in 0..1 whatever the weights are; -inf stands for pairs outside the support: w <= 0, or hidden by is_causal or
// kv_lens.
//
//   prior_forward_kernel<Element, kHead>(PriorForwardParams)
//     A block computes ForwardTiling's kOwn queries of one head, a warp 16 of them; keys and values stream through
//     shared memory, kStreamed at a time, and the softmax runs online (Dao et al., FlashAttention). grid: batch *
//     query_heads * ceil(queries / kOwn) blocks, the queries of a head next to each other; block: kThreads; shared
//     memory: sizeof(ForwardShared<Element, kHead>)
//
// Element is Half, BFloat16 or float; kHead is 64, 128 or 256, at least head_size and value_size.
#pragma once

#include <cmath>

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/prior_params.h"

namespace fiak::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = INFINITY;

/// Tiles that fit into the 99 KiB of shared memory that every architecture from sm_80 on gives a block.
template <class Element, int kHead>
struct Tiling {
  static constexpr int kStride = kHead + 16 / sizeof(Element);  // rows start 4 banks apart
  static constexpr int kRowBytes = kStride * sizeof(Element);
  static constexpr int kStreamed = kRowBytes < 200 ? 64 : kRowBytes < 400 ? 32 : 16;
  static constexpr int kTiles = kStreamed / 8;
  static constexpr int kColumnTiles = kHead / 8;
};

template <class Element, int kHead>
struct ForwardTiling : Tiling<Element, kHead> {
  static constexpr int kWarps = Tiling<Element, kHead>::kRowBytes < 1000 ? 4 : 2;
  static constexpr int kOwn = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
};

template <class Element, int kHead, class T = ForwardTiling<Element, kHead>>
struct ForwardShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element key[2][T::kStreamed][T::kStride], value[2][T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
};

/// The keys that kv_lens leaves of a batch element.
__device__ __forceinline__ int keys_of(const PriorParams& params, int b) {
  if (params.kv_lens == nullptr) return params.keys;
  const int64_t keys = params.kv_lens[b];
  if (keys < 0 || keys > params.keys) __trap();  // kv_lens' values are on the device; out of bounds must not be read
  return static_cast<int>(keys);
}

/// One head of one batch element.
struct Head {
  int b, h, key_head;
  int keys;            // that kv_lens leaves
  const float* prior;  // its row 0, or null

  __device__ Head(const PriorParams& params, int64_t batch_and_head)
      : b(static_cast<int>(batch_and_head / params.query_heads)),
        h(static_cast<int>(batch_and_head % params.query_heads)),
        key_head(h / (params.query_heads / params.key_heads)),
        keys(keys_of(params, b)),
        prior(params.prior == nullptr
                  ? nullptr
                  : params.prior + b % params.prior_groups * params.prior_group_stride + h * params.prior_head_stride) {
  }
};

/// The pair of element e of a product's tile t, whose first query and key are n and j: queries by keys, or keys by
/// queries.
template <bool kKeysAreRows>
struct Pair {
  int query, key;

  __device__ __forceinline__ Pair(int n, int j, int t, int e) {
    const int row = group_row() + e / 2 * 8, column = 8 * t + group_column() + e % 2;
    query = n + (kKeysAreRows ? column : row);
    key = j + (kKeysAreRows ? row : column);
  }
};

/// log2 of the weights of a product's tiles; -inf outside the support. Whether any of the thread's lies inside.
template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ bool load_log_weights(float (&weights)[kTiles][4], const PriorParams& params,
                                                 const Head& head, int n, int j) {
  bool any = false;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Pair<kKeysAreRows> pair(n, j, t, e);
      float weight = -kInfinity;
      if (pair.query < params.queries && pair.key < head.keys && !(params.is_causal && pair.key > pair.query)) {
        const float w = head.prior == nullptr ? 1.0f : head.prior[pair.query * params.prior_row_stride + pair.key];
        weight = w <= 0 ? -kInfinity : log2_approx(w);
      }
      weights[t][e] = weight;
      any = any || !(weight == -kInfinity);  // NaN is inside: it must reach its row
    }
  }
  return any;
}

/// The Gaussian score's part that depends on the key alone, -scale / 2 |k|^2, in powers of two; a quad works together.
template <class Element>
__device__ __forceinline__ float key_bias_of(const Element* key, const PriorParams& params) {
  float sum = 0;
  for (int d = lane_index() % 4; d < params.head_size; d += 4) sum = fmaf(widen(key[d]), widen(key[d]), sum);
  return -0.5f * kLog2E * params.scale * quad_sum(sum);
}

/// That of all rows of a tile, by the whole block.
template <int kThreads, class Element, int kRows, int kStride>
__device__ __forceinline__ void compute_key_biases(float (&biases)[kRows], const Element (&keys)[kRows][kStride],
                                                   const PriorParams& params) {
  static_assert(kRows % 8 == 0, "a warp's quads must all have a row or none");
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = thread / 4; row < kRows; row += kThreads / 4) {
    const float bias = key_bias_of(keys[row], params);
    if (thread % 4 == 0) biases[row] = bias;
  }
}

/// Multiplies a product's tiles by dropout's factors.
template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ void apply_dropout(float (&tiles)[kTiles][4], const PriorParams& params, const Head& head,
                                              int n, int j) {
  const auto seed = static_cast<uint64_t>(*params.seed);
  const auto words_of = [&](const Pair<kKeysAreRows>& pair) {
    return philox_words(seed, head.b, head.h, pair.query, pair.key / 4);
  };
  const auto factor = [&](uint32_t word) { return word < params.dropout_threshold ? 0.0f : params.dropout_kept; };
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if constexpr (kKeysAreRows) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Pair<true> pair(n, j, t, e);
        const PhiloxWords words = words_of(pair);
        const uint32_t first = pair.key % 2 == 0 ? words.word[0] : words.word[1];
        const uint32_t second = pair.key % 2 == 0 ? words.word[2] : words.word[3];
        tiles[t][e] *= factor(pair.key % 4 < 2 ? first : second);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // two keys from an even one on share Philox's words
        const Pair<false> pair(n, j, t, 2 * r);
        const PhiloxWords words = words_of(pair);
        tiles[t][2 * r] *= factor(pair.key % 4 < 2 ? words.word[0] : words.word[2]);
        tiles[t][2 * r + 1] *= factor(pair.key % 4 < 2 ? words.word[1] : words.word[3]);
      }
    }
  }
}

template <class Element, int kHead>
__global__ void __launch_bounds__(ForwardTiling<Element, kHead>::kThreads, 1)
    prior_forward_kernel(PriorForwardParams params) {
  using T = ForwardTiling<Element, kHead>;
  auto& shared = shared_memory<ForwardShared<Element, kHead>>();
  const int64_t tiles = tiles_of(params.queries, T::kOwn);
  const Head head(params, blockIdx.x / tiles);
  const int first_query = static_cast<int>(blockIdx.x % tiles) * T::kOwn;
  const int warp_query = first_query + 16 * warp_index();
  const int end = params.is_causal ? min(head.keys, first_query + T::kOwn) : head.keys;
  const Element* key = head_of<Element>(params.key, head.b, head.key_head);
  const Element* value = head_of<Element>(params.value, head.b, head.key_head);
  load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, head.b, head.h), params.query.row_stride,
                         first_query, params.queries, params.head_size);

  float output[T::kColumnTiles][4] = {};
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // of rows group_row() and group_row() + 8
  stream<2>(
      static_cast<int>(tiles_of(end, T::kStreamed)),
      [&](int i, int stage) {
        load_rows<T::kThreads>(shared.key[stage], key, params.key.row_stride, i * T::kStreamed, end, params.head_size);
        load_rows<T::kThreads>(shared.value[stage], value, params.value.row_stride, i * T::kStreamed, end,
                               params.value_size);
      },
      [&](int i, int stage) {
        if (params.is_gaussian) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key[stage], params);
          __syncthreads();
        }
        const int first_key = i * T::kStreamed;
        float weights[T::kTiles][4];
        if (!__any_sync(kAllLanes, load_log_weights<false>(weights, params, head, warp_query, first_key))) return;
        float scores[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key[stage], params.head_size);

        float tile_maximum[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float s = params.scale * kLog2E * scores[t][e] + weights[t][e];
            if (params.is_gaussian) s += shared.key_bias[8 * t + group_column() + e % 2];
            scores[t][e] = weights[t][e] == -kInfinity ? -kInfinity : s;
            tile_maximum[e / 2] = fmaxf(tile_maximum[e / 2], scores[t][e]);
          }
        }
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float before = maximum[r];
          maximum[r] = fmaxf(before, quad_maximum(tile_maximum[r]));
          base[r] = maximum[r] == -kInfinity ? 0.0f : maximum[r];
          const float correction = exp2_approx(before - base[r]);
          sum[r] *= correction;
#pragma unroll
          for (int d = 0; d < T::kColumnTiles; ++d) {
            output[d][2 * r] *= correction;
            output[d][2 * r + 1] *= correction;
          }
        }
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[t][e] = exp2_approx(scores[t][e] - base[e / 2]);
            sum[e / 2] += scores[t][e];
          }
        }
        if (params.dropout_threshold != 0) apply_dropout<false>(scores, params, head, warp_query, first_key);
        multiply_by_columns(output, scores, shared.value[stage], params.value_size);
      });

  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = quad_sum(sum[r]);  // at least 1, its largest term, or 0 for an empty row, or NaN
    factors[r] = total == 0 ? 0.0f : 1 / total;
    const int query = warp_query + group_row() + 8 * r;
    if (lane_index() % 4 == 0 && query < params.queries) {
      params.logsumexp[(int64_t{head.b} * params.query_heads + head.h) * params.queries + query] =
          total == 0 ? -kInfinity : maximum[r] * kLn2 + logf(total);
    }
  }
  store_rows(output, factors, head_of<Element>(params.output, head.b, head.h), params.output.row_stride, warp_query,
             params.queries, params.value_size);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

constexpr int kDeltaWarps = 4;

template <class Element, int kHead>
struct BackwardTiling : Tiling<Element, kHead> {
  static constexpr int kWarps = Tiling<Element, kHead>::kRowBytes < 400 ? 4 : 2;
  static constexpr int kStages = Tiling<Element, kHead>::kRowBytes < 1000 ? 2 : 1;
  static constexpr int kOwn = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
};

template <class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradQueryShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element grad_output[T::kOwn][T::kStride];
  Element key[T::kStages][T::kStreamed][T::kStride], value[T::kStages][T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
};

template <class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradKeyValueShared {
  alignas(16) Element key[T::kOwn][T::kStride];
  Element value[T::kOwn][T::kStride];
  Element query[T::kStages][T::kStreamed][T::kStride], grad_output[T::kStages][T::kStreamed][T::kStride];
  float logsumexp[T::kStages][T::kStreamed], delta[T::kStages][T::kStreamed];
};

template <class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradPriorShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element grad_output[T::kOwn][T::kStride];
  Element key[T::kStreamed][T::kStride], value[T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
  float sums[T::kWarps][T::kStreamed];
};

/// What the forward pass left of a query: its logsumexp in powers of two and its delta. Those that do not exist are
/// like empty rows.
struct RowState {
  float logsumexp = -kInfinity, delta = 0;

  RowState() = default;
  __device__ RowState(const PriorBackwardParams& params, const Head& head, int query) : RowState() {
    if (query >= params.queries) return;
    const int64_t at = (int64_t{head.b} * params.query_heads + head.h) * params.queries + query;
    logsumexp = params.logsumexp[at] * kLog2E;
    delta = params.delta[at];
  }
};

/// Makes of a score its pair's w exp(s - logsumexp): 0 outside the support and in empty rows.
__device__ __forceinline__ float probability(float score, float log_weight, float key_bias, float logsumexp,
                                             const PriorParams& params) {
  if (log_weight == -kInfinity || logsumexp == -kInfinity) return 0;
  return exp2_approx(params.scale * kLog2E * score + log_weight + key_bias - logsumexp);
}

/// d s of a pair, or d w where `probability` is that over w. Nothing reaches a pair that is not there.
__device__ __forceinline__ float score_gradient(float probability, float grad_probability, float delta) {
  return probability == 0 ? 0 : probability * (grad_probability - delta);
}

template <class Element>
__global__ void __launch_bounds__(32 * kDeltaWarps) prior_delta_kernel(PriorBackwardParams params) {
  const int64_t at = int64_t{blockIdx.x} * kDeltaWarps + warp_index();
  if (at >= int64_t{params.batch} * params.query_heads * params.queries) return;
  const int64_t query = at % params.queries, head = at / params.queries % params.query_heads;
  const int64_t b = at / params.queries / params.query_heads;
  const Element* grad = head_of<Element>(params.grad_output, b, head) + query * params.grad_output.row_stride;
  const Element* output = head_of<Element>(params.output, b, head) + query * params.output.row_stride;
  float sum = 0;
  for (int d = lane_index(); d < params.value_size; d += 32) sum = fmaf(widen(grad[d]), widen(output[d]), sum);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane_index() == 0) params.delta[at] = sum;
}

template <class Element, int kHead>
__global__ void __launch_bounds__(BackwardTiling<Element, kHead>::kThreads, 1)
    prior_grad_query_kernel(PriorBackwardParams params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradQueryShared<Element, kHead>>();
  const int64_t tiles = tiles_of(params.queries, T::kOwn);
  const Head head(params, blockIdx.x / tiles);
  const int first_query = static_cast<int>(blockIdx.x % tiles) * T::kOwn;
  const int warp_query = first_query + 16 * warp_index();
  const int end = params.is_causal ? min(head.keys, first_query + T::kOwn) : head.keys;
  const Element* key = head_of<Element>(params.key, head.b, head.key_head);
  const Element* value = head_of<Element>(params.value, head.b, head.key_head);
  load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, head.b, head.h), params.query.row_stride,
                         first_query, params.queries, params.head_size);
  load_rows<T::kThreads>(shared.grad_output, head_of<Element>(params.grad_output, head.b, head.h),
                         params.grad_output.row_stride, first_query, params.queries, params.value_size);
  const RowState rows[2] = {{params, head, warp_query + group_row()}, {params, head, warp_query + group_row() + 8}};

  float grad_query[T::kColumnTiles][4] = {};
  stream<T::kStages>(
      static_cast<int>(tiles_of(end, T::kStreamed)),
      [&](int i, int stage) {
        load_rows<T::kThreads>(shared.key[stage], key, params.key.row_stride, i * T::kStreamed, end, params.head_size);
        load_rows<T::kThreads>(shared.value[stage], value, params.value.row_stride, i * T::kStreamed, end,
                               params.value_size);
      },
      [&](int i, int stage) {
        if (params.is_gaussian) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key[stage], params);
          __syncthreads();
        }
        const int first_key = i * T::kStreamed;
        float weights[T::kTiles][4];
        if (!__any_sync(kAllLanes, load_log_weights<false>(weights, params, head, warp_query, first_key))) return;
        float scores[T::kTiles][4] = {}, grads[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key[stage], params.head_size);
        multiply_by_rows(grads, &shared.grad_output[16 * warp_index()], shared.value[stage], params.value_size);
        if (params.dropout_threshold != 0) apply_dropout<false>(grads, params, head, warp_query, first_key);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float bias = params.is_gaussian ? shared.key_bias[8 * t + group_column() + e % 2] : 0.0f;
            const float p = probability(scores[t][e], weights[t][e], bias, rows[e / 2].logsumexp, params);
            scores[t][e] = score_gradient(p, grads[t][e], rows[e / 2].delta);
          }
        }
        multiply_by_columns(grad_query, scores, shared.key[stage], params.head_size);
      });

  const float factors[2] = {params.scale, params.scale};
  store_rows(grad_query, factors, head_of<Element>(params.grad_query, head.b, head.h), params.grad_query.row_stride,
             warp_query, params.queries, params.head_size);
}

template <class Element, int kHead, bool kGradKey>
__global__ void __launch_bounds__(BackwardTiling<Element, kHead>::kThreads, 1)
    prior_grad_key_value_kernel(PriorBackwardParams params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradKeyValueShared<Element, kHead>>();
  const int64_t tiles = tiles_of(params.keys, T::kOwn);
  const int b = static_cast<int>(blockIdx.x / tiles / params.key_heads);
  const int key_head = static_cast<int>(blockIdx.x / tiles % params.key_heads);
  const int keys = keys_of(params, b);
  const int first_key = static_cast<int>(blockIdx.x % tiles) * T::kOwn, warp_key = first_key + 16 * warp_index();
  load_rows<T::kThreads>(shared.key, head_of<Element>(params.key, b, key_head), params.key.row_stride, first_key, keys,
                         params.head_size);
  if (kGradKey) {
    load_rows<T::kThreads>(shared.value, head_of<Element>(params.value, b, key_head), params.value.row_stride,
                           first_key, keys, params.value_size);
  }
  // The tiles of queries of all heads, one head after the other; hidden ones are left out.
  const int shared_heads = params.query_heads / params.key_heads;
  const int first_tile = params.is_causal ? first_key / T::kStreamed : 0;
  const int head_tiles = static_cast<int>(tiles_of(params.queries, T::kStreamed)) - first_tile;
  const auto head_at = [&](int i) {
    return Head(params, int64_t{b} * params.query_heads + key_head * shared_heads + i / head_tiles);
  };
  const auto first_query_at = [&](int i) { return (first_tile + i % head_tiles) * T::kStreamed; };

  float sums[T::kColumnTiles][4] = {};
  float biases[2] = {}, sum[2] = {};  // of d s; of rows group_row() and group_row() + 8
  stream<T::kStages>(
      first_key < keys && head_tiles > 0 ? shared_heads * head_tiles : 0,
      [&](int i, int stage) {
        const Head head = head_at(i);
        const int first_query = first_query_at(i);
        load_rows<T::kThreads>(shared.query[stage], head_of<Element>(params.query, b, head.h), params.query.row_stride,
                               first_query, params.queries, params.head_size);
        load_rows<T::kThreads>(shared.grad_output[stage], head_of<Element>(params.grad_output, b, head.h),
                               params.grad_output.row_stride, first_query, params.queries, params.value_size);
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < T::kStreamed) {
          const RowState row(params, head, first_query + thread);
          shared.logsumexp[stage][thread] = row.logsumexp;
          shared.delta[stage][thread] = row.delta;
        }
      },
      [&](int i, int stage) {
        if (params.is_gaussian && i == 0) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            biases[r] = key_bias_of(shared.key[16 * warp_index() + group_row() + 8 * r], params);
          }
        }
        const Head head = head_at(i);
        const int first_query = first_query_at(i);
        float weights[T::kTiles][4];
        if (!__any_sync(kAllLanes, load_log_weights<true>(weights, params, head, first_query, warp_key))) return;
        float scores[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.key[16 * warp_index()], shared.query[stage], params.head_size);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[t][e] = probability(scores[t][e], weights[t][e], biases[e / 2],
                                       shared.logsumexp[stage][8 * t + group_column() + e % 2], params);
          }
        }
        if constexpr (kGradKey) {
          float grads[T::kTiles][4] = {};
          multiply_by_rows(grads, &shared.value[16 * warp_index()], shared.grad_output[stage], params.value_size);
          if (params.dropout_threshold != 0) apply_dropout<true>(grads, params, head, first_query, warp_key);
#pragma unroll
          for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              scores[t][e] =
                  score_gradient(scores[t][e], grads[t][e], shared.delta[stage][8 * t + group_column() + e % 2]);
              sum[e / 2] += scores[t][e];
            }
          }
          multiply_by_columns(sums, scores, shared.query[stage], params.head_size);
        } else {
          if (params.dropout_threshold != 0) apply_dropout<true>(scores, params, head, first_query, warp_key);
          multiply_by_columns(sums, scores, shared.grad_output[stage], params.value_size);
        }
      });

  if (kGradKey && params.is_gaussian) {  // d s_ij / d k_j = scale (q_i - k_j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      if (total == 0) continue;  // where nothing was streamed, the keys are not there either
      const Element* key = shared.key[16 * warp_index() + group_row() + 8 * r];
#pragma unroll
      for (int d = 0; d < T::kColumnTiles; ++d) {
        sums[d][2 * r] -= total * widen(key[8 * d + group_column()]);
        sums[d][2 * r + 1] -= total * widen(key[8 * d + group_column() + 1]);
      }
    }
  }
  const Output& target = kGradKey ? params.grad_key : params.grad_value;
  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factors[r] = warp_key + group_row() + 8 * r >= keys ? 0.0f : kGradKey ? params.scale : 1.0f;
  }
  store_rows(sums, factors, head_of<Element>(target, b, key_head), target.row_stride, warp_key, params.keys,
             kGradKey ? params.head_size : params.value_size);
}

template <class Element, int kHead>
__global__ void __launch_bounds__(BackwardTiling<Element, kHead>::kThreads, 1)
    prior_grad_prior_kernel(PriorBackwardParams params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradPriorShared<Element, kHead>>();
  const int64_t key_tiles = tiles_of(params.keys, T::kStreamed), row_tiles = tiles_of(params.prior_rows, T::kOwn);
  const int first_key = static_cast<int>(blockIdx.x % key_tiles) * T::kStreamed;
  const int first_row = static_cast<int>(blockIdx.x / key_tiles % row_tiles) * T::kOwn;
  const int64_t group_and_head = blockIdx.x / key_tiles / row_tiles;
  const int prior_head = static_cast<int>(group_and_head % params.prior_heads);
  const int group = static_cast<int>(group_and_head / params.prior_heads);
  const int heads = params.query_heads / params.prior_heads;  // that share a weight
  const bool shares_rows = params.prior_rows < params.queries;

  float sums[T::kTiles][4] = {};
  for (int h = prior_head * heads; h < (prior_head + 1) * heads; ++h) {
    for (int b = group; b < params.batch; b += params.prior_groups) {
      Head head(params, int64_t{b} * params.query_heads + h);
      head.prior = nullptr;  // pairs of weight 0 have a gradient, too
      const int end = shares_rows ? params.queries : min(params.queries, first_row + T::kOwn);
      for (int first_query = first_row; first_query < end; first_query += T::kOwn) {
        if (first_key >= head.keys || (params.is_causal && first_key >= first_query + T::kOwn)) continue;
        load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, b, h), params.query.row_stride, first_query,
                               params.queries, params.head_size);
        load_rows<T::kThreads>(shared.grad_output, head_of<Element>(params.grad_output, b, h),
                               params.grad_output.row_stride, first_query, params.queries, params.value_size);
        load_rows<T::kThreads>(shared.key, head_of<Element>(params.key, b, head.key_head), params.key.row_stride,
                               first_key, head.keys, params.head_size);
        load_rows<T::kThreads>(shared.value, head_of<Element>(params.value, b, head.key_head), params.value.row_stride,
                               first_key, head.keys, params.value_size);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (params.is_gaussian) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key, params);
          __syncthreads();
        }
        const int warp_query = first_query + 16 * warp_index();
        const RowState rows[2] = {{params, head, warp_query + group_row()},
                                  {params, head, warp_query + group_row() + 8}};
        float weights[T::kTiles][4], scores[T::kTiles][4] = {}, grads[T::kTiles][4] = {};
        load_log_weights<false>(weights, params, head, warp_query, first_key);
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key, params.head_size);
        multiply_by_rows(grads, &shared.grad_output[16 * warp_index()], shared.value, params.value_size);
        if (params.dropout_threshold != 0) apply_dropout<false>(grads, params, head, warp_query, first_key);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float bias = params.is_gaussian ? shared.key_bias[8 * t + group_column() + e % 2] : 0.0f;
            const float p = probability(scores[t][e], weights[t][e], bias, rows[e / 2].logsumexp, params);
            sums[t][e] += score_gradient(p, grads[t][e], rows[e / 2].delta);
          }
        }
        __syncthreads();  // all have read what is loaded next
      }
    }
  }

  float* target = params.grad_prior + group_and_head * params.prior_rows * params.keys;
  if (!shares_rows) {
#pragma unroll
    for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Pair<false> pair(first_row + 16 * warp_index(), first_key, t, e);
        if (pair.query < params.queries && pair.key < params.keys) {
          target[int64_t{pair.query} * params.keys + pair.key] = sums[t][e];
        }
      }
    }
    return;
  }
#pragma unroll
  for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sums[t][e] + sums[t][2 + e];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (group_row() == 0) shared.sums[warp_index()][8 * t + group_column() + e] = sum;
    }
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < T::kStreamed && first_key + thread < params.keys) {
    float sum = 0;
    for (int warp = 0; warp < T::kWarps; ++warp) sum += shared.sums[warp][thread];
    target[first_key + thread] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

/// Does launch(name, kernel, blocks, threads, shared_bytes, params) of what computes `result`; there must be pairs.
template <class Launch>
void prior_forward(const PriorArgs& args, const int64_t* seed, const ForwardResult& result, Launch&& launch) {
  with_kernel_of(args, [&](auto element, auto head) {
    using Element = decltype(element);
    constexpr int kHead = decltype(head)::value;
    using T = ForwardTiling<Element, kHead>;
    const PriorForwardParams params{prior_params(args, seed), result.output, static_cast<float*>(result.logsumexp)};
    launch("prior_forward_kernel", prior_forward_kernel<Element, kHead>,
           args.batch * args.query_heads * tiles_of(args.queries, T::kOwn), T::kThreads,
           sizeof(ForwardShared<Element, kHead>), params);
  });
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Launch>
void prior_backward(const PriorArgs& args, const int64_t* seed, const BackwardArgs& grads, float* delta,
                    Launch&& launch) {
  with_kernel_of(args, [&](auto element, auto head) {
    using Element = decltype(element);
    constexpr int kHead = decltype(head)::value;
    using T = BackwardTiling<Element, kHead>;
    const PriorBackwardParams params{prior_params(args, seed),
                                     grads.grad_output,
                                     grads.output,
                                     static_cast<const float*>(grads.logsumexp),
                                     delta,
                                     grads.grad_query,
                                     grads.grad_key,
                                     grads.grad_value,
                                     static_cast<float*>(grads.grad_weight)};
    const int64_t query_heads = args.batch * args.query_heads;
    const int64_t key_tiles = args.batch * args.key_heads * tiles_of(args.keys, T::kOwn);
    launch("prior_delta_kernel", prior_delta_kernel<Element>, tiles_of(query_heads * args.queries, kDeltaWarps),
           32 * kDeltaWarps, size_t{0}, params);
    if (grads.grad_query.data != nullptr) {
      launch("prior_grad_query_kernel", prior_grad_query_kernel<Element, kHead>,
             query_heads * tiles_of(args.queries, T::kOwn), T::kThreads, sizeof(GradQueryShared<Element, kHead>),
             params);
    }
    if (grads.grad_key.data != nullptr) {
      launch("prior_grad_key_kernel", prior_grad_key_value_kernel<Element, kHead, true>, key_tiles, T::kThreads,
             sizeof(GradKeyValueShared<Element, kHead>), params);
    }
    if (grads.grad_value.data != nullptr) {
      launch("prior_grad_value_kernel", prior_grad_key_value_kernel<Element, kHead, false>, key_tiles, T::kThreads,
             sizeof(GradKeyValueShared<Element, kHead>), params);
    }
    if (grads.grad_weight != nullptr) {
      launch(
          "prior_grad_prior_kernel", prior_grad_prior_kernel<Element, kHead>,
          args.prior_groups * args.prior_heads * tiles_of(args.prior_rows, T::kOwn) * tiles_of(args.keys, T::kStreamed),
          T::kThreads, sizeof(GradPriorShared<Element, kHead>), params);
    }
  });
}

}  // namespace fiak::cuda
