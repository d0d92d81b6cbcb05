// Attention by tiles of queries and keys: device code that the kernels of prior_attention and csr_attention share.
// Keeps to what both nvcc and csrc/simt compile.
//
// An op's Pairs says which pairs there are and what they weigh. A weight joins its score as log2(w), so that what is
// rounded for the tensor cores lies in 0..1 whatever the weights are; -inf stands for pairs outside the support: w <=
// 0, or hidden, or not in the pattern. A Pairs has:
//
//   Weights                      the part of the kernels' parameters that it is made of
//   Shared                       what of it lies in shared memory
//   computes(b, key_head)        false where kernels of another kind compute this key head and its query heads
//   end_of_keys(head, query)     from which key on all are hidden from the queries before `query`
//   first_query(key)             the first query that may see a key
//   offset(head)                 what to add to a query for its row of the weights
//   QueryRows<kRows>             the weights of a block of queries, for products of queries by keys:
//     next<kKeys>(i, count)        the first of the tiles of kKeys keys from i on in which any of the queries has a
//     pair,
//                                  or `count`; the whole warp gets the same answer
//     load(weights, key)           a warp's log weights of the tile at `key`, -inf outside the support; whether any of
//                                  the thread's lies inside. Called once for every tile of `next`, in order
//   KeyRows<kRows>               the weights of a block of keys, for products of keys by queries:
//     Staged<kQueries>             what of a tile of queries lies in shared memory
//     has_pairs<kQueries>(head, query)             whether any of the keys has a pair in the tile, for the whole warp
//     used()                                       a bit for each of its queries, likewise
//     stage(staged, head, query)                   fills it; for the whole block
//     load(weights, staged, head, query)           as above
//
// Element is Half, BFloat16 or float; kHead is 64, 128 or 256, at least head_dim and value_dim.
#pragma once

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/kernel.h"

namespace fiak::cuda {

/// Tiles that fit into the 99 KiB of shared memory that every architecture from sm_80 on gives a block.
template <class Element, int kHead>
struct Tiling {
  static constexpr int kStride = kHead + 16 / sizeof(Element);  // rows start 4 banks apart
  static constexpr int kRowBytes = kStride * sizeof(Element);
  static constexpr int kStreamed = kRowBytes < 200 ? 64 : kRowBytes < 400 ? 32 : 16;
  static constexpr int kTiles = kStreamed / 8;
  static constexpr int kColumnTiles = kHead / 8;
};
static_assert(Tiling<Half, 64>::kStreamed == 64 && Tiling<Half, 128>::kStreamed == 32 &&
                  Tiling<Half, 256>::kStreamed == 16 && Tiling<float, 64>::kStreamed == 32 &&
                  Tiling<float, 128>::kStreamed == 16 && Tiling<float, 256>::kStreamed == 16,
              "for those who launch the kernels from their PTX");

/// The pair of element e of a product's tile t, whose first query and key are n and j: queries by keys, or keys by
/// queries.
template <bool kKeysAreRows>
struct Pair {
  int query, key;

  __device__ __forceinline__ Pair(int n, int j, int t, int e) {
    const int row = fragment_row() + e / 2 * 8, column = 8 * t + fragment_column() + e % 2;
    query = n + (kKeysAreRows ? column : row);
    key = j + (kKeysAreRows ? row : column);
  }
};

/// The Gaussian score's part that depends on the key alone, -scale / 2 |k|^2, in powers of two; a quad works together.
template <class Element>
__device__ __forceinline__ float key_bias_of(const Element* key, const AttentionParams& params) {
  float sum = 0;
  for (int d = lane_index() % 4; d < params.head_dim; d += 4) sum = fmaf(widen(key[d]), widen(key[d]), sum);
  return -0.5f * kLog2E * params.scale * quad_sum(sum);
}

/// That of all rows of a tile, by the whole block.
template <int kThreads, class Element, int kRows, int kStride>
__device__ __forceinline__ void compute_key_biases(float (&biases)[kRows], const Element (&keys)[kRows][kStride],
                                                   const AttentionParams& params) {
  static_assert(kRows % 8 == 0, "a warp's quads must all have a row or none");
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = thread / 4; row < kRows; row += kThreads / 4) {
    const float bias = key_bias_of(keys[row], params);
    if (thread % 4 == 0) biases[row] = bias;
  }
}

/// Multiplies a product's tiles by dropout's factors; n is the first query's row of the weights. One tile after the
/// other, so that the registers hold Philox's state for few pairs at a time, and a bit for each of the others.
template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ void apply_dropout(float (&tiles)[kTiles][4], const AttentionParams& params,
                                              const Head& head, int n, int j) {
  static_assert(4 * kTiles <= 32, "a bit for each pair of a thread");
  const auto seed = static_cast<uint64_t>(*params.seed);
  const auto words_of = [&](const Pair<kKeysAreRows>& pair) {
    return philox_words(seed, head.b, head.h, pair.query, pair.key / 4);
  };
  uint32_t dropped = 0;  // bit 4 t + e
  const auto draw = [&](int t, int e, uint32_t word) {
    dropped |= static_cast<uint32_t>(word < params.dropout_threshold) << (4 * t + e);
  };
#pragma unroll 1
  for (int t = 0; t < kTiles; ++t) {
    if constexpr (kKeysAreRows) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Pair<true> pair(n, j, t, e);
        const PhiloxWords words = words_of(pair);
        const uint32_t first = pair.key % 2 == 0 ? words.word[0] : words.word[1];
        const uint32_t second = pair.key % 2 == 0 ? words.word[2] : words.word[3];
        draw(t, e, pair.key % 4 < 2 ? first : second);
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {  // two keys from an even one on share Philox's words
        const Pair<false> pair(n, j, t, e);
        const PhiloxWords words = words_of(pair);
        draw(t, e, pair.key % 4 < 2 ? words.word[0] : words.word[2]);
        draw(t, e + 1, pair.key % 4 < 2 ? words.word[1] : words.word[3]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) tiles[t][e] *= (dropped >> (4 * t + e) & 1) != 0 ? 0.0f : params.dropout_kept;
  }
}

/// Streams the keys and values of a head through shared memory for the queries from first_query on, and does
/// consume(first key, stage, log weights) where the warp's queries have pairs.
template <class T, int kStages, class Element, class Pairs, class Shared, class Consume>
__device__ __forceinline__ void for_key_tiles(Shared& shared, const AttentionParams& params, const Pairs& support,
                                              const Head& head, int first_query, Consume&& consume) {
  const Element* key = head_of<Element>(params.key, head.b, head.key_head);
  const Element* value = head_of<Element>(params.value, head.b, head.key_head);
  const int end = support.end_of_keys(head, first_query + T::kOwn);
  const int count = static_cast<int>(tiles_of(end, T::kStreamed));
  typename Pairs::template QueryRows<T::kOwn> rows(support, head, first_query);
  stream<kStages>(
      count, [&](int i) { return rows.template next<T::kStreamed>(i, count); },
      [&](int i, int stage) {
        load_rows<T::kThreads>(shared.key[stage], key, params.key.row_stride, i * T::kStreamed, end, params.head_dim,
                               rows.used());
        load_rows<T::kThreads>(shared.value[stage], value, params.value.row_stride, i * T::kStreamed, end,
                               params.value_dim, rows.used());
      },
      [&](int i, int stage) {
        if (params.is_gaussian) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key[stage], params);
          __syncthreads();
        }
        float weights[T::kTiles][4];
        if (__any_sync(kAllLanes, rows.load(weights, i * T::kStreamed))) consume(i * T::kStreamed, stage, weights);
      });
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <class Element, int kHead>
struct ForwardTiling : Tiling<Element, kHead> {
  static constexpr int kWarps = Tiling<Element, kHead>::kRowBytes < 1000 ? 4 : 2;
  static constexpr int kOwn = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
};

template <class Pairs, class Element, int kHead, class T = ForwardTiling<Element, kHead>>
struct ForwardShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element key[2][T::kStreamed][T::kStride], value[2][T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
  typename Pairs::Shared support;
};

/// A block computes ForwardTiling's kOwn queries of one head, a warp 16 of them; keys and values stream through shared
/// memory, kStreamed at a time, and the softmax runs online (Dao et al., FlashAttention).
template <class Pairs, class Element, int kHead>
__device__ __forceinline__ void tile_forward(const ForwardParams<typename Pairs::Weights>& params) {
  using T = ForwardTiling<Element, kHead>;
  auto& shared = shared_memory<ForwardShared<Pairs, Element, kHead>>();
  const Pairs support(params, params.weights, shared.support);
  const int64_t tiles = tiles_of(params.queries, T::kOwn);
  const Head head(params, blockIdx.x / tiles);
  if (!support.template computes<Element>(head.b, head.key_head)) return;
  const int first_query = static_cast<int>(blockIdx.x % tiles) * T::kOwn;
  const int warp_query = first_query + 16 * warp_index();
  load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, head.b, head.h), params.query.row_stride,
                         first_query, params.queries, params.head_dim);

  float output[T::kColumnTiles][4] = {};
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // of rows fragment_row() and fragment_row() + 8
  for_key_tiles<T, 2, Element>(
      shared, params, support, head, first_query, [&](int first_key, int stage, const float(&weights)[T::kTiles][4]) {
        float scores[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key[stage], params.head_dim);

        float tile_maximum[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float s = params.scale * kLog2E * scores[t][e] + weights[t][e];
            if (params.is_gaussian) s += shared.key_bias[8 * t + fragment_column() + e % 2];
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
        if (params.dropout_threshold != 0)
          apply_dropout<false>(scores, params, head, warp_query + support.offset(head), first_key);
        multiply_by_columns(output, scores, shared.value[stage], params.value_dim);
      });

  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = quad_sum(sum[r]);  // at least 1, its largest term, or 0 for an empty row, or NaN
    factors[r] = total == 0 ? 0.0f : 1 / total;
    const int query = warp_query + fragment_row() + 8 * r;
    if (lane_index() % 4 == 0 && query < params.queries) {
      params.logsumexp[head.at(params, query)] = total == 0 ? -kInfinity : maximum[r] * kLn2 + logf(total);
    }
  }
  store_rows(output, factors, head_of<Element>(params.output, head.b, head.h), params.output.row_stride, warp_query,
             params.queries, params.value_dim);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <class Element, int kHead>
struct BackwardTiling : Tiling<Element, kHead> {
  static constexpr int kWarps = Tiling<Element, kHead>::kRowBytes < 400 ? 4 : 2;
  static constexpr int kStages = Tiling<Element, kHead>::kRowBytes < 1000 ? 2 : 1;
  static constexpr int kOwn = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
};

template <class Pairs, class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradQueryShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element grad_output[T::kOwn][T::kStride];
  Element key[T::kStages][T::kStreamed][T::kStride], value[T::kStages][T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
  typename Pairs::Shared support;
};

template <class Pairs, class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradKeyValueShared {
  alignas(16) Element key[T::kOwn][T::kStride];
  Element value[T::kOwn][T::kStride];
  Element query[T::kStages][T::kStreamed][T::kStride], grad_output[T::kStages][T::kStreamed][T::kStride];
  float logsumexp[T::kStages][T::kStreamed], delta[T::kStages][T::kStreamed];
  float key_bias[T::kOwn];
  typename Pairs::template KeyRows<T::kOwn>::template Staged<T::kStreamed> weights[T::kStages];
  typename Pairs::Shared support;
};

/// Makes of a score its pair's w exp(s - logsumexp): 0 outside the support and in empty rows.
__device__ __forceinline__ float probability(float score, float log_weight, float key_bias, float logsumexp,
                                             const AttentionParams& params) {
  return exp2_approx(log_probability(params.scale * kLog2E * score + key_bias, log_weight, logsumexp, params));
}

/// A block computes the gradients of BackwardTiling's kOwn queries of one head.
template <class Pairs, class Element, int kHead>
__device__ __forceinline__ void tile_grad_query(const BackwardParams<typename Pairs::Weights>& params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradQueryShared<Pairs, Element, kHead>>();
  const Pairs support(params, params.weights, shared.support);
  const int64_t tiles = tiles_of(params.queries, T::kOwn);
  const Head head(params, blockIdx.x / tiles);
  if (!support.template computes<Element>(head.b, head.key_head)) return;
  const int first_query = static_cast<int>(blockIdx.x % tiles) * T::kOwn;
  const int warp_query = first_query + 16 * warp_index();
  load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, head.b, head.h), params.query.row_stride,
                         first_query, params.queries, params.head_dim);
  load_rows<T::kThreads>(shared.grad_output, head_of<Element>(params.grad_output, head.b, head.h),
                         params.grad_output.row_stride, first_query, params.queries, params.value_dim);
  const RowState rows[2] = {{params, head, warp_query + fragment_row()},
                            {params, head, warp_query + fragment_row() + 8}};

  float grad_query[T::kColumnTiles][4] = {};
  for_key_tiles<T, T::kStages, Element>(
      shared, params, support, head, first_query, [&](int first_key, int stage, const float(&weights)[T::kTiles][4]) {
        float scores[T::kTiles][4] = {}, grads[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key[stage], params.head_dim);
        multiply_by_rows(grads, &shared.grad_output[16 * warp_index()], shared.value[stage], params.value_dim);
        if (params.dropout_threshold != 0)
          apply_dropout<false>(grads, params, head, warp_query + support.offset(head), first_key);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float bias = params.is_gaussian ? shared.key_bias[8 * t + fragment_column() + e % 2] : 0.0f;
            const float p = probability(scores[t][e], weights[t][e], bias, rows[e / 2].logsumexp, params);
            scores[t][e] = score_gradient(p, grads[t][e], rows[e / 2].delta);
          }
        }
        multiply_by_columns(grad_query, scores, shared.key[stage], params.head_dim);
      });

  const float factors[2] = {params.scale, params.scale};
  store_rows(grad_query, factors, head_of<Element>(params.grad_query, head.b, head.h), params.grad_query.row_stride,
             warp_query, params.queries, params.head_dim);
}

/// A block computes the gradients of BackwardTiling's kOwn keys, or values, of one key head: the queries of all its
/// query heads stream through shared memory, one head after the other.
template <class Pairs, class Element, int kHead, bool kGradKey>
__device__ __forceinline__ void tile_grad_key_value(const BackwardParams<typename Pairs::Weights>& params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradKeyValueShared<Pairs, Element, kHead>>();
  const Pairs support(params, params.weights, shared.support);
  const int64_t tiles = tiles_of(params.keys, T::kOwn);
  const int b = static_cast<int>(blockIdx.x / tiles / params.key_heads);
  const int key_head = static_cast<int>(blockIdx.x / tiles % params.key_heads);
  if (!support.template computes<Element>(b, key_head)) return;
  const int keys = keys_of(params, b);
  const int first_key = static_cast<int>(blockIdx.x % tiles) * T::kOwn, warp_key = first_key + 16 * warp_index();
  load_rows<T::kThreads>(shared.key, head_of<Element>(params.key, b, key_head), params.key.row_stride, first_key, keys,
                         params.head_dim);
  if (kGradKey) {
    load_rows<T::kThreads>(shared.value, head_of<Element>(params.value, b, key_head), params.value.row_stride,
                           first_key, keys, params.value_dim);
  }
  const int shared_heads = params.query_heads / params.key_heads;
  const int first_tile = support.first_query(first_key) / T::kStreamed;
  const int head_tiles = static_cast<int>(tiles_of(params.queries, T::kStreamed)) - first_tile;
  const int count = first_key < keys && head_tiles > 0 ? shared_heads * head_tiles : 0;
  const auto head_at = [&](int i) { return Head(b, key_head * shared_heads + i / head_tiles, key_head, keys); };
  const auto first_query_at = [&](int i) { return (first_tile + i % head_tiles) * T::kStreamed; };

  float sums[T::kColumnTiles][4] = {};
  float sum[2] = {};  // of d s; of rows fragment_row() and fragment_row() + 8
  bool has_biases = false;
  typename Pairs::template KeyRows<T::kOwn> rows(support, first_key);
  stream<T::kStages>(
      count,
      [&](int i) {
        while (i < count && !rows.template has_pairs<T::kStreamed>(head_at(i), first_query_at(i))) ++i;
        return i;
      },
      [&](int i, int stage) {
        const Head head = head_at(i);
        const int first_query = first_query_at(i);
        load_rows<T::kThreads>(shared.query[stage], head_of<Element>(params.query, b, head.h), params.query.row_stride,
                               first_query, params.queries, params.head_dim, rows.used());
        load_rows<T::kThreads>(shared.grad_output[stage], head_of<Element>(params.grad_output, b, head.h),
                               params.grad_output.row_stride, first_query, params.queries, params.value_dim,
                               rows.used());
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < T::kStreamed) {
          const RowState row(params, head, first_query + thread);
          shared.logsumexp[stage][thread] = row.logsumexp;
          shared.delta[stage][thread] = row.delta;
          rows.stage(shared.weights[stage], head, first_query, thread);
        }
      },
      [&](int i, int stage) {
        if (params.is_gaussian && !has_biases) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key, params);
          __syncthreads();
          has_biases = true;
        }
        const Head head = head_at(i);
        const int first_query = first_query_at(i);
        float weights[T::kTiles][4];
        if (!__any_sync(kAllLanes, rows.load(weights, shared.weights[stage], head, first_query))) return;
        float scores[T::kTiles][4] = {};
        multiply_by_rows(scores, &shared.key[16 * warp_index()], shared.query[stage], params.head_dim);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float bias =
                params.is_gaussian ? shared.key_bias[16 * warp_index() + fragment_row() + e / 2 * 8] : 0.0f;
            scores[t][e] = probability(scores[t][e], weights[t][e], bias,
                                       shared.logsumexp[stage][8 * t + fragment_column() + e % 2], params);
          }
        }
        if constexpr (kGradKey) {
          float grads[T::kTiles][4] = {};
          multiply_by_rows(grads, &shared.value[16 * warp_index()], shared.grad_output[stage], params.value_dim);
          if (params.dropout_threshold != 0)
            apply_dropout<true>(grads, params, head, first_query + support.offset(head), warp_key);
#pragma unroll
          for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              scores[t][e] =
                  score_gradient(scores[t][e], grads[t][e], shared.delta[stage][8 * t + fragment_column() + e % 2]);
              sum[e / 2] += scores[t][e];
            }
          }
          multiply_by_columns(sums, scores, shared.query[stage], params.head_dim);
        } else {
          if (params.dropout_threshold != 0)
            apply_dropout<true>(scores, params, head, first_query + support.offset(head), warp_key);
          multiply_by_columns(sums, scores, shared.grad_output[stage], params.value_dim);
        }
      });

  if (kGradKey && params.is_gaussian) {  // d s_ij / d k_j = scale (q_i - k_j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      if (total == 0) continue;  // where nothing was streamed, the keys are not there either
      const Element* key = shared.key[16 * warp_index() + fragment_row() + 8 * r];
#pragma unroll
      for (int d = 0; d < T::kColumnTiles; ++d) {
        sums[d][2 * r] -= total * widen(key[8 * d + fragment_column()]);
        sums[d][2 * r + 1] -= total * widen(key[8 * d + fragment_column() + 1]);
      }
    }
  }
  const Output& target = kGradKey ? params.grad_key : params.grad_value;
  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    factors[r] = warp_key + fragment_row() + 8 * r >= keys ? 0.0f : kGradKey ? params.scale : 1.0f;
  }
  store_rows(sums, factors, head_of<Element>(target, b, key_head), target.row_stride, warp_key, params.keys,
             kGradKey ? params.head_dim : params.value_dim);
}

}  // namespace fiak::cuda
