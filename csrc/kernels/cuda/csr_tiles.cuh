// Device code of csr_attention over tiles, on tensor cores: the kernels of tile_attention.cuh, whose pairs are a bit
// each of the plan. Tiles without entries are skipped. Keeps to what both nvcc and csrc/simt compile.
//
// Kernels, for each dtype (f32, f16, bf16) and head (d64, d128, d256: at least head_dim and value_dim). All take one
// struct, CsrForwardParams or CsrBackwardParams (attention_params.h), and run on one-dimensional grids; blocks of key
// heads that CsrPattern::uses_tiles leaves to the kernels over entries (csr_entries.cuh) end at once. kOwn and kThreads
// are those of ForwardTiling or BackwardTiling (tile_attention.cuh); kOwn is half of kThreads. Numbers for each kernel:
// fiak_cuda_kernels prints them, benchmarks/results/cuda_resources.md holds them. fiak_csr_delta_* (csr_entries.cuh)
// comes before those of backward:
//
//   name                         blocks                                         threads   dynamic shared memory
//   fiak_csr_tiles_forward_*     batch * query_heads * ceil(queries / kOwn)     kThreads  ForwardShared
//   fiak_csr_tiles_grad_query_*  batch * query_heads * ceil(queries / kOwn)     kThreads  GradQueryShared
//   fiak_csr_tiles_grad_key_*    batch * key_heads * ceil(keys / kOwn)          kThreads  GradKeyValueShared
//   fiak_csr_tiles_grad_value_*  the same                                       kThreads  GradKeyValueShared
//
// The last index of each product runs fastest over the blocks.
#pragma once

#include "kernels/cuda/csr_pattern.cuh"
#include "kernels/cuda/kernel.h"
#include "kernels/cuda/tile_attention.cuh"

namespace fiak::cuda {

/// The lowest `count` bits, of 1..64.
__device__ __forceinline__ uint64_t low_bits(int count) { return ~uint64_t{0} >> (64 - count); }

struct CsrPairs {
  using Weights = CsrWeights;
  using Shared = CsrPattern;  // which would take many registers

  const AttentionParams& params;
  const CsrWeights& weights;
  const CsrPattern& pattern;

  __device__ CsrPairs(const AttentionParams& params, const CsrWeights& weights, Shared& shared)
      : params(params), weights(weights), pattern(shared) {
    if (threadIdx.x == 0) shared = CsrPattern(params, weights);
    __syncthreads();
  }

  template <class Element>
  __device__ bool computes(int b, int key_head) const {
    return pattern.uses_tiles(params, weights, b, key_head, sizeof(Element) == 2);
  }
  __device__ int end_of_keys(const Head& head, int) const { return head.keys; }
  __device__ int first_query(int) const { return 0; }
  __device__ int offset(const Head& head) const { return static_cast<int>(pattern.offset(params, weights, head.b)); }

  /// The pattern's row of a head's query 0.
  __device__ int64_t first_row(const Head& head) const {
    return pattern.first_row(params, head.b, head.h) + offset(head);
  }

  /// The bits of kKeys keys from `key` on, a multiple of kKeys.
  template <int kKeys>
  __device__ __forceinline__ uint64_t bits(int64_t row, int key) const {
    static_assert(64 % kKeys == 0, "they must lie in one word");
    return pattern.plan.bits[row * pattern.plan.row_words + key / 64] >> (key % 64) & low_bits(kKeys);
  }

  /// Which entry is the first of a row from `key` on.
  __device__ int64_t entry_from(int64_t row, int key) const {
    const uint64_t* words = pattern.plan.bits + row * pattern.plan.row_words;
    int64_t entry = pattern.plan.row_offsets[row];
    for (int word = 0; word < key / 64; ++word) entry += __popcll(words[word]);
    return key % 64 == 0 ? entry : entry + __popcll(words[key / 64] & low_bits(key % 64));
  }

  template <int kRows>
  class QueryRows {
   public:
    __device__ QueryRows(const CsrPairs& support, const Head& head, int first_query)
        : support_(support), first_row_(support.first_row(head)), first_query_(first_query), keys_(head.keys) {}

    template <int kKeys>
    __device__ int next(int i, int count) {
      for (; i < count; ++i) {
        uint64_t used = 0;
#pragma unroll
        for (int r = lane_index(); r < kRows; r += 32) {
          if (first_query_ + r < support_.params.queries) {
            used |= support_.template bits<kKeys>(first_row_ + first_query_ + r, i * kKeys);
          }
        }
        const unsigned low = __reduce_or_sync(kAllLanes, static_cast<unsigned>(used));
        const unsigned high = kKeys > 32 ? __reduce_or_sync(kAllLanes, static_cast<unsigned>(used >> 32)) : 0;
        used_ = uint64_t{high} << 32 | low;
        if (used_ != 0) break;
      }
      return i;
    }
    __device__ uint64_t used() const { return used_; }

    template <int kTiles>
    __device__ __forceinline__ bool load(float (&tiles)[kTiles][4], int key) {
      constexpr int kKeys = 8 * kTiles;
      bool any = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first_query_ + 16 * warp_index() + fragment_row() + 8 * r;
        const int64_t row = first_row_ + query;
        const uint64_t bits = query < support_.params.queries ? support_.template bits<kKeys>(row, key) : 0;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * t + fragment_column() + e;
            const bool inside = (bits >> column & 1) != 0 && key + column < keys_;
            tiles[t][2 * r + e] = inside ? 0 : -kInfinity;
          }
        }
        if (support_.weights.prior != nullptr) {
          if (bits != 0) load_prior(tiles, r, bits, support_.weights.prior + support_.entry_from(row, 0) + passed_[r]);
          passed_[r] += __popcll(bits);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          any = any || !(tiles[t][2 * r] == -kInfinity) || !(tiles[t][2 * r + 1] == -kInfinity);
        }
      }
      return any;
    }

   private:
    /// Replaces a row's weights by those of its entries; `prior` starts with the first of them.
    template <int kTiles>
    __device__ __forceinline__ void load_prior(float (&tiles)[kTiles][4], int r, uint64_t bits,
                                               const float* prior) const {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int before = __popcll(bits & ((uint64_t{1} << (8 * t + fragment_column() + e)) - 1));
          if (tiles[t][2 * r + e] == 0) tiles[t][2 * r + e] = log_weight(support_.params, prior[before]);
        }
      }
    }

    const CsrPairs& support_;
    int64_t first_row_;
    int first_query_, keys_;
    uint64_t used_ = 0;
    int passed_[2] =
        {};  // entries of rows fragment_row() and fragment_row() + 8 before the tile, where there is a prior
  };

  template <int kRows>
  class KeyRows {
   public:
    template <int kQueries>
    struct Staged {
      uint64_t bits[kQueries];  // of the block's keys
      int64_t entry[kQueries];  // the first of them, where there is a prior
    };

    __device__ KeyRows(const CsrPairs& support, int first_key) : support_(support), first_key_(first_key) {}

    template <int kQueries>
    __device__ bool has_pairs(const Head& head, int query) {
      const int64_t first_row = support_.first_row(head);
      used_ = 0;
#pragma unroll
      for (int first = 0; first < kQueries; first += 32) {
        const int r = first + lane_index();
        const bool any = r < kQueries && query + r < support_.params.queries &&
                         support_.template bits<kRows>(first_row + query + r, first_key_) != 0;
        used_ |= uint64_t{__ballot_sync(kAllLanes, any)} << first;
      }
      return used_ != 0;
    }
    __device__ uint64_t used() const { return used_; }

    template <class Staged>
    __device__ void stage(Staged& staged, const Head& head, int first_query, int thread) const {
      const int query = first_query + thread;
      const bool inside = query < support_.params.queries;
      const int64_t row = support_.first_row(head) + query;
      staged.bits[thread] = inside ? support_.template bits<kRows>(row, first_key_) : 0;
      if (support_.weights.prior != nullptr) {
        staged.entry[thread] = inside ? support_.entry_from(row, first_key_) : 0;
      }
    }

    template <int kTiles, class Staged>
    __device__ __forceinline__ bool load(float (&tiles)[kTiles][4], const Staged& staged, const Head& head, int) const {
      bool any = false;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = 8 * t + fragment_column() + e;
          const uint64_t bits = staged.bits[query];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int key = 16 * warp_index() + fragment_row() + 8 * r;
            float weight = -kInfinity;
            if ((bits >> key & 1) != 0 && first_key_ + key < head.keys) {
              const float* prior = support_.weights.prior;
              const int before = __popcll(bits & ((uint64_t{1} << key) - 1));
              weight = prior == nullptr ? 0 : log_weight(support_.params, prior[staged.entry[query] + before]);
            }
            tiles[t][2 * r + e] = weight;
            any = any || !(weight == -kInfinity);
          }
        }
      }
      return any;
    }

   private:
    const CsrPairs& support_;
    int first_key_;
    uint64_t used_ = 0;
  };
};

#define FIAK_CSR_TILES_KERNELS(dtype, Element, kHead)                                                              \
  FIAK_KERNEL(fiak_csr_tiles_forward_##dtype##_d##kHead, csr_tiles_forward_kernel(Element, Constant<kHead>),       \
              CsrForwardParams, (ForwardTiling<Element, kHead>::kThreads),                                         \
              sizeof(ForwardShared<CsrPairs, Element, kHead>), tile_forward<CsrPairs, Element, kHead>)             \
  FIAK_KERNEL(fiak_csr_tiles_grad_query_##dtype##_d##kHead, csr_tiles_grad_query_kernel(Element, Constant<kHead>), \
              CsrBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                       \
              sizeof(GradQueryShared<CsrPairs, Element, kHead>), tile_grad_query<CsrPairs, Element, kHead>)        \
  FIAK_KERNEL(fiak_csr_tiles_grad_key_##dtype##_d##kHead, csr_tiles_grad_key_kernel(Element, Constant<kHead>),     \
              CsrBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                       \
              sizeof(GradKeyValueShared<CsrPairs, Element, kHead>),                                                \
              tile_grad_key_value<CsrPairs, Element, kHead, true>)                                                 \
  FIAK_KERNEL(fiak_csr_tiles_grad_value_##dtype##_d##kHead, csr_tiles_grad_value_kernel(Element, Constant<kHead>), \
              CsrBackwardParams, (BackwardTiling<Element, kHead>::kThreads),                                       \
              sizeof(GradKeyValueShared<CsrPairs, Element, kHead>),                                                \
              tile_grad_key_value<CsrPairs, Element, kHead, false>)
FIAK_FOR_ATTENTION_TYPES(FIAK_CSR_TILES_KERNELS)
#undef FIAK_CSR_TILES_KERNELS

/// visit(Kernel) for all of them.
template <class Visit>
void for_each_csr_tiles_kernel(Visit&& visit) {
  for_each_attention_type([&](auto element, auto head) {
    visit(csr_tiles_forward_kernel(element, head));
    visit(csr_tiles_grad_query_kernel(element, head));
    visit(csr_tiles_grad_key_kernel(element, head));
    visit(csr_tiles_grad_value_kernel(element, head));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

/// Does launch(kernel, blocks, params) of what computes the heads that use tiles; there must be pairs. The first
/// argument, of any value, is of the arguments' dtype.
template <class Element, class Launch>
void csr_tiles_forward(Element element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                       const ForwardResult& result, Launch&& launch) {
  with_head_of(args, [&](auto head) {
    using T = ForwardTiling<Element, decltype(head)::value>;
    launch(csr_tiles_forward_kernel(element, head), args.batch * args.query_heads * tiles_of(args.queries, T::kOwn),
           forward_params(args, weights, seed, result));
  });
}

/// The same of the gradients of query, key and value that are wanted; `delta` is computed.
template <class Element, class Launch>
void csr_tiles_backward(Element element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                        const BackwardArgs& grads, float* delta, Launch&& launch) {
  with_head_of(args, [&](auto head) {
    using T = BackwardTiling<Element, decltype(head)::value>;
    const CsrBackwardParams params = backward_params(args, weights, seed, grads, delta);
    const int64_t query_tiles = args.batch * args.query_heads * tiles_of(args.queries, T::kOwn);
    const int64_t key_tiles = args.batch * args.key_heads * tiles_of(args.keys, T::kOwn);
    if (grads.grad_query.data != nullptr) launch(csr_tiles_grad_query_kernel(element, head), query_tiles, params);
    if (grads.grad_key.data != nullptr) launch(csr_tiles_grad_key_kernel(element, head), key_tiles, params);
    if (grads.grad_value.data != nullptr) launch(csr_tiles_grad_value_kernel(element, head), key_tiles, params);
  });
}

}  // namespace fiak::cuda
