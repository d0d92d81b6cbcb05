// Device code of prior_attention, a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij') (Eq. 12 of the paper). Keeps to what
// both nvcc and csrc/simt compile.
//
// Kernels, for each dtype (f32, f16, bf16) and head (d64, d128, d256: at least head_dim and value_dim). All take one
// struct, PriorForwardParams or PriorBackwardParams (attention_params.h), and run on one-dimensional grids. kOwn,
// kStreamed and kThreads are those of ForwardTiling or BackwardTiling (tile_attention.cuh); kOwn is half of kThreads.
// Numbers for each kernel: fiak_cuda_kernels prints them, benchmarks/results/cuda_resources.md holds them.
//
//   name                     blocks                                                  threads   dynamic shared memory
//   fiak_prior_forward_*     batch * query_heads * ceil(queries / kOwn)              kThreads  ForwardShared
//   fiak_prior_delta_<dtype> ceil(batch * query_heads * queries / kDeltaWarps)       128       none
//   fiak_prior_grad_query_*  batch * query_heads * ceil(queries / kOwn)              kThreads  GradQueryShared
//   fiak_prior_grad_key_*    batch * key_heads * ceil(keys / kOwn)                   kThreads  GradKeyValueShared
//   fiak_prior_grad_value_*  the same                                                kThreads  GradKeyValueShared
//   fiak_prior_grad_prior_*  weights.groups * weights.heads * ceil(weights.rows / kOwn) * ceil(keys / kStreamed),
//                                                                                    kThreads  GradPriorShared
//
// The last index of each product runs fastest over the blocks.
#pragma once

#include "kernels/cuda/tile_attention.cuh"

namespace fiak::cuda {

using PriorForwardParams = ForwardParams<PriorWeights>;
using PriorBackwardParams = BackwardParams<PriorWeights>;

struct PriorPairs {
  using Weights = PriorWeights;
  struct Shared {};

  const AttentionParams& params;
  const PriorWeights& weights;

  __device__ PriorPairs(const AttentionParams& params, const PriorWeights& weights, Shared&)
      : params(params), weights(weights) {}

  template <class Element>
  __device__ bool computes(int, int) const {
    return true;
  }
  __device__ int end_of_keys(const Head& head, int query) const {
    return weights.is_causal ? min(head.keys, query) : head.keys;
  }
  __device__ int first_query(int key) const { return weights.is_causal ? key : 0; }
  __device__ int offset(const Head&) const { return 0; }

  /// Row 0 of a head's weights, or null.
  __device__ const float* prior(const Head& head) const {
    if (weights.prior == nullptr) return nullptr;
    return weights.prior + head.b % weights.groups * weights.group_stride + head.h * weights.head_stride;
  }

  template <bool kKeysAreRows, int kTiles>
  __device__ __forceinline__ bool load(float (&tiles)[kTiles][4], const Head& head, const float* prior, int n,
                                       int j) const {
    bool any = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Pair<kKeysAreRows> pair(n, j, t, e);
        float weight = -kInfinity;
        if (pair.query < params.queries && pair.key < head.keys && !(weights.is_causal && pair.key > pair.query)) {
          weight = prior == nullptr ? 0.0f : log_weight(params, prior[pair.query * weights.row_stride + pair.key]);
        }
        tiles[t][e] = weight;
        any = any || !(weight == -kInfinity);
      }
    }
    return any;
  }

  template <int kRows>
  class QueryRows {
   public:
    __device__ QueryRows(const PriorPairs& support, const Head& head, int first_query)
        : support_(support), head_(head), prior_(support.prior(head)), warp_query_(first_query + 16 * warp_index()) {}

    template <int kKeys>
    __device__ int next(int i, int) const {
      return i;
    }
    __device__ uint64_t used() const { return ~uint64_t{0}; }
    template <int kTiles>
    __device__ __forceinline__ bool load(float (&tiles)[kTiles][4], int key) const {
      return support_.template load<false>(tiles, head_, prior_, warp_query_, key);
    }

   private:
    const PriorPairs& support_;
    const Head& head_;
    const float* prior_;
    int warp_query_;
  };

  template <int kRows>
  class KeyRows {
   public:
    template <int kQueries>
    struct Staged {};

    __device__ KeyRows(const PriorPairs& support, int first_key)
        : support_(support), warp_key_(first_key + 16 * warp_index()) {}

    template <int kQueries>
    __device__ bool has_pairs(const Head&, int) const {
      return true;
    }
    __device__ uint64_t used() const { return ~uint64_t{0}; }
    template <class Staged>
    __device__ void stage(Staged&, const Head&, int, int) const {}
    template <int kTiles, class Staged>
    __device__ __forceinline__ bool load(float (&tiles)[kTiles][4], const Staged&, const Head& head, int query) const {
      return support_.template load<true>(tiles, head, support_.prior(head), query, warp_key_);
    }

   private:
    const PriorPairs& support_;
    int warp_key_;
  };
};

template <class Element, int kHead, class T = BackwardTiling<Element, kHead>>
struct GradPriorShared {
  alignas(16) Element query[T::kOwn][T::kStride];
  Element grad_output[T::kOwn][T::kStride];
  Element key[T::kStreamed][T::kStride], value[T::kStreamed][T::kStride];
  float key_bias[T::kStreamed];
  float sums[T::kWarps][T::kStreamed];
  PriorPairs::Shared support;
};

/// A block computes the gradient of kOwn rows and kStreamed keys of one prior, summed over all pairs that share a
/// weight: heads, batch elements and, of a prior for each key, queries, in this order.
template <class Element, int kHead>
__device__ __forceinline__ void grad_prior(const PriorBackwardParams& params) {
  using T = BackwardTiling<Element, kHead>;
  auto& shared = shared_memory<GradPriorShared<Element, kHead>>();
  const PriorPairs support(params, params.weights, shared.support);
  const int64_t key_tiles = tiles_of(params.keys, T::kStreamed), row_tiles = tiles_of(params.weights.rows, T::kOwn);
  const int first_key = static_cast<int>(blockIdx.x % key_tiles) * T::kStreamed;
  const int first_row = static_cast<int>(blockIdx.x / key_tiles % row_tiles) * T::kOwn;
  const int64_t group_and_head = blockIdx.x / key_tiles / row_tiles;
  const int prior_head = static_cast<int>(group_and_head % params.weights.heads);
  const int group = static_cast<int>(group_and_head / params.weights.heads);
  const int heads = params.query_heads / params.weights.heads;  // that share a weight
  const bool shares_rows = params.weights.rows < params.queries;

  float sums[T::kTiles][4] = {};
  for (int h = prior_head * heads; h < (prior_head + 1) * heads; ++h) {
    for (int b = group; b < params.batch; b += params.weights.groups) {
      const Head head(params, int64_t{b} * params.query_heads + h);
      const int end = shares_rows ? params.queries : min(params.queries, first_row + T::kOwn);
      for (int first_query = first_row; first_query < end; first_query += T::kOwn) {
        if (first_key >= head.keys || (params.weights.is_causal && first_key >= first_query + T::kOwn)) continue;
        load_rows<T::kThreads>(shared.query, head_of<Element>(params.query, b, h), params.query.row_stride, first_query,
                               params.queries, params.head_dim);
        load_rows<T::kThreads>(shared.grad_output, head_of<Element>(params.grad_output, b, h),
                               params.grad_output.row_stride, first_query, params.queries, params.value_dim);
        load_rows<T::kThreads>(shared.key, head_of<Element>(params.key, b, head.key_head), params.key.row_stride,
                               first_key, head.keys, params.head_dim);
        load_rows<T::kThreads>(shared.value, head_of<Element>(params.value, b, head.key_head), params.value.row_stride,
                               first_key, head.keys, params.value_dim);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        if (params.is_gaussian) {
          compute_key_biases<T::kThreads>(shared.key_bias, shared.key, params);
          __syncthreads();
        }
        const int warp_query = first_query + 16 * warp_index();
        const RowState rows[2] = {{params, head, warp_query + fragment_row()},
                                  {params, head, warp_query + fragment_row() + 8}};
        float weights[T::kTiles][4], scores[T::kTiles][4] = {}, grads[T::kTiles][4] = {};
        // Pairs of weight 0 have a gradient, too, but not those of a logarithm of -inf.
        support.load<false>(weights, head, params.log_prior ? support.prior(head) : nullptr, warp_query, first_key);
        multiply_by_rows(scores, &shared.query[16 * warp_index()], shared.key, params.head_dim);
        multiply_by_rows(grads, &shared.grad_output[16 * warp_index()], shared.value, params.value_dim);
        if (params.dropout_threshold != 0) apply_dropout<false>(grads, params, head, warp_query, first_key);
#pragma unroll
        for (int t = 0; t < T::kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float bias = params.is_gaussian ? shared.key_bias[8 * t + fragment_column() + e % 2] : 0.0f;
            const float log = log_probability(params.scale * kLog2E * scores[t][e] + bias, weights[t][e],
                                              rows[e / 2].logsumexp, params);
            sums[t][e] += weight_gradient(log, grads[t][e], rows[e / 2].delta);
          }
        }
        __syncthreads();  // all have read what is loaded next
      }
    }
  }

  float* target = params.grad_prior + group_and_head * params.weights.rows * params.keys;
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
      if (fragment_row() == 0) shared.sums[warp_index()][8 * t + fragment_column() + e] = sum;
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
// Kernels

#define FIAK_PRIOR_KERNELS(dtype, Element, kHead)                                                               \
  FIAK_KERNEL(fiak_prior_forward_##dtype##_d##kHead, prior_forward_kernel(Element, Constant<kHead>),            \
              PriorForwardParams, (ForwardTiling<Element, kHead>::kThreads),                                    \
              sizeof(ForwardShared<PriorPairs, Element, kHead>), tile_forward<PriorPairs, Element, kHead>)      \
  FIAK_KERNEL(fiak_prior_grad_query_##dtype##_d##kHead, prior_grad_query_kernel(Element, Constant<kHead>),      \
              PriorBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                  \
              sizeof(GradQueryShared<PriorPairs, Element, kHead>), tile_grad_query<PriorPairs, Element, kHead>) \
  FIAK_KERNEL(fiak_prior_grad_key_##dtype##_d##kHead, prior_grad_key_kernel(Element, Constant<kHead>),          \
              PriorBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                  \
              sizeof(GradKeyValueShared<PriorPairs, Element, kHead>),                                           \
              tile_grad_key_value<PriorPairs, Element, kHead, true>)                                            \
  FIAK_KERNEL(fiak_prior_grad_value_##dtype##_d##kHead, prior_grad_value_kernel(Element, Constant<kHead>),      \
              PriorBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                  \
              sizeof(GradKeyValueShared<PriorPairs, Element, kHead>),                                           \
              tile_grad_key_value<PriorPairs, Element, kHead, false>)                                           \
  FIAK_KERNEL(fiak_prior_grad_prior_##dtype##_d##kHead, prior_grad_prior_kernel(Element, Constant<kHead>),      \
              PriorBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                  \
              sizeof(GradPriorShared<Element, kHead>), grad_prior<Element, kHead>)
FIAK_FOR_ATTENTION_TYPES(FIAK_PRIOR_KERNELS)
#undef FIAK_PRIOR_KERNELS

#define FIAK_PRIOR_DELTA_KERNEL(dtype, Element)                                                                \
  FIAK_KERNEL(fiak_prior_delta_##dtype, prior_delta_kernel(Element), PriorBackwardParams, 32 * kDeltaWarps, 0, \
              compute_delta<Element>)
FIAK_FOR_ATTENTION_DTYPES(FIAK_PRIOR_DELTA_KERNEL)
#undef FIAK_PRIOR_DELTA_KERNEL

/// visit(Kernel) for all of them.
template <class Visit>
void for_each_prior_kernel(Visit&& visit) {
  for_each_attention_dtype([&](auto element) { visit(prior_delta_kernel(element)); });
  for_each_attention_type([&](auto element, auto head) {
    visit(prior_forward_kernel(element, head));
    visit(prior_grad_query_kernel(element, head));
    visit(prior_grad_key_kernel(element, head));
    visit(prior_grad_value_kernel(element, head));
    visit(prior_grad_prior_kernel(element, head));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

/// Does launch(kernel, blocks, params) of what computes `result`; there must be pairs. The first argument, of any
/// value, is of the arguments' dtype.
template <class Element, class Launch>
void prior_forward(Element element, const PriorArgs& args, const int64_t* seed, const ForwardResult& result,
                   Launch&& launch) {
  with_head_of(args, [&](auto head) {
    using T = ForwardTiling<Element, decltype(head)::value>;
    launch(prior_forward_kernel(element, head), args.batch * args.query_heads * tiles_of(args.queries, T::kOwn),
           forward_params(args, weights_of(args), seed, result));
  });
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Element, class Launch>
void prior_backward(Element element, const PriorArgs& args, const int64_t* seed, const BackwardArgs& grads,
                    float* delta, Launch&& launch) {
  with_head_of(args, [&](auto head) {
    using T = BackwardTiling<Element, decltype(head)::value>;
    const PriorBackwardParams params = backward_params(args, weights_of(args), seed, grads, delta);
    const int64_t query_heads = args.batch * args.query_heads;
    const int64_t key_tiles = args.batch * args.key_heads * tiles_of(args.keys, T::kOwn);
    launch(prior_delta_kernel(element), tiles_of(query_heads * args.queries, kDeltaWarps), params);
    if (grads.grad_query.data != nullptr) {
      launch(prior_grad_query_kernel(element, head), query_heads * tiles_of(args.queries, T::kOwn), params);
    }
    if (grads.grad_key.data != nullptr) launch(prior_grad_key_kernel(element, head), key_tiles, params);
    if (grads.grad_value.data != nullptr) launch(prior_grad_value_kernel(element, head), key_tiles, params);
    if (grads.grad_prior != nullptr) {
      const int64_t rows = args.prior_groups * args.prior_heads * tiles_of(args.prior_rows, T::kOwn);
      launch(prior_grad_prior_kernel(element, head), rows * tiles_of(args.keys, T::kStreamed), params);
    }
  });
}

}  // namespace fiak::cuda
