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
#include "kernels/cuda/prior_attention.h"

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

/// log2 of the weights of a product's tiles, whose first query and key are n and j; -inf outside the support. Whether
/// any of the thread's lies inside.
template <int kTiles>
__device__ __forceinline__ bool load_log_weights(float (&weights)[kTiles][4], const PriorParams& params,
                                                 const Head& head, int n, int j) {
  bool any = false;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = n + group_row() + e / 2 * 8, key = j + 8 * t + group_column() + e % 2;
      float weight = -kInfinity;
      if (query < params.queries && key < head.keys && !(params.is_causal && key > query)) {
        const float w = head.prior == nullptr ? 1.0f : head.prior[query * params.prior_row_stride + key];
        weight = w <= 0 ? -kInfinity : log2_approx(w);
      }
      weights[t][e] = weight;
      any = any || !(weight == -kInfinity);  // NaN is inside: it must reach its row
    }
  }
  return any;
}

/// The Gaussian score's part that depends on the key alone, -scale / 2 |k|^2, for each row of a tile, in powers of two.
template <int kThreads, class Element, int kRows, int kStride>
__device__ __forceinline__ void compute_key_biases(float (&biases)[kRows], const Element (&keys)[kRows][kStride],
                                                   float scale, int columns) {
  constexpr int kParts = kThreads / kRows;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kParts;
  float sum = 0;
  for (int d = thread % kParts; d < columns; d += kParts) {
    const float x = widen(keys[row][d]);
    sum = fmaf(x, x, sum);
  }
#pragma unroll
  for (int lanes = 1; lanes < kParts; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (thread % kParts == 0) biases[row] = -0.5f * kLog2E * scale * sum;
}

/// Multiplies the tiles, whose first query and key are n and j, by dropout's factors.
template <int kTiles>
__device__ __forceinline__ void apply_dropout(float (&tiles)[kTiles][4], const PriorParams& params, const Head& head,
                                              int n, int j) {
  const auto seed = static_cast<uint64_t>(*params.seed);
  const auto factor = [&](uint32_t word) { return word < params.dropout_threshold ? 0.0f : params.dropout_kept; };
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = n + group_row() + 8 * r, key = j + 8 * t + group_column();
      const PhiloxWords words = philox_words(seed, head.b, head.h, query, key / 4);
      const bool high = key % 4 != 0;
      tiles[t][2 * r] *= factor(high ? words.word[2] : words.word[0]);
      tiles[t][2 * r + 1] *= factor(high ? words.word[3] : words.word[1]);
    }
  }
}

template <class Element, int kHead>
__global__ void __launch_bounds__(ForwardTiling<Element, kHead>::kThreads, 2)
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
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key[stage], params.scale, params.head_size);
          __syncthreads();
        }
        const int first_key = i * T::kStreamed;
        float weights[T::kTiles][4];
        if (!__any_sync(kAllLanes, load_log_weights(weights, params, head, warp_query, first_key))) return;
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
        if (params.dropout_threshold != 0) apply_dropout(scores, params, head, warp_query, first_key);
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
  store_rows(output, factors,
             static_cast<Element*>(params.output.data) + head.b * params.output.batch_stride +
                 head.h * params.output.head_stride,
             params.output.row_stride, warp_query, params.queries, params.value_size);
}

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

}  // namespace fiak::cuda
