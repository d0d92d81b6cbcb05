// A pattern as csr_attention's kernels see it: the plan in device memory, checked by its header, and the choice between
// the kernel over entries and the kernel over tiles. Keeps to what both nvcc and csrc/simt compile.
#pragma once

#include "kernels/cuda/attention_common.cuh"
#include "kernels/cuda/csr_cost.h"

namespace fiak::cuda {

using CsrForwardParams = ForwardParams<CsrWeights>;
using CsrBackwardParams = BackwardParams<CsrWeights>;

struct CsrPattern {
  PlanView plan;
  int heads, groups;  ///< heads of a group: query_heads or 1 (PatternHeads)

  /// Traps where the plan or the pattern is not for the call: sizes known on the device alone must not be trusted.
  __device__ CsrPattern(const AttentionParams& params, const CsrWeights& weights) : plan(view(weights, params.keys)) {
    const PatternHeads pattern_heads(plan.heads, params.query_heads);
    heads = static_cast<int>(pattern_heads.heads);
    groups = static_cast<int>(pattern_heads.groups);
    if (groups < 1 || params.batch % groups != 0 || params.queries > plan.num_queries) __trap();
  }

  /// The row of query 0 among its head's.
  __device__ int64_t offset(const AttentionParams& params, const CsrWeights& weights, int b) const {
    const int64_t offset = weights.query_offsets == nullptr ? 0 : weights.query_offsets[b];
    if (offset < 0 || offset > plan.num_queries - params.queries) __trap();
    return offset;
  }

  /// PatternHeads::head_of in 32 bits: a division of 64 is a call, which keeps registers.
  __device__ int head_of(int b, int h) const { return heads == 1 ? b % groups : b % groups * heads + h; }

  /// The first of the pattern's rows that belongs to query head h of element b.
  __device__ int64_t first_row(const AttentionParams&, int b, int h) const { return head_of(b, h) * plan.num_queries; }

  /// Whether the kernels over tiles compute this key head of this element, with all its query heads, rather than those
  /// over entries.
  __device__ bool uses_tiles(const AttentionParams& params, const CsrWeights& weights, int b, int key_head,
                             bool tensor_cores) const {
    if (plan.tiles == nullptr) return false;
    const auto selected = static_cast<CsrKernel>(weights.selected);
    if (selected != CsrKernel::kAuto) return selected == CsrKernel::kTiles;
    const int readers = params.query_heads / params.key_heads;
    const int64_t first = head_of(b, key_head * readers), count = heads == 1 ? 1 : readers;
    int64_t tiles = 0;
    for (int64_t head = first; head < first + count; ++head) tiles += plan.tiles[head];
    const int64_t nnz = plan.first_entry(first + count) - plan.first_entry(first);
    return tiles_are_faster(static_cast<float>(nnz), static_cast<float>(tiles), tensor_cores);
  }

 private:
  static __device__ PlanView view(const CsrWeights& weights, int64_t keys) {
    const auto* header = static_cast<const PlanHeader*>(weights.plan);
    if (header->magic != kPlanMagic || header->bytes != weights.plan_bytes || header->num_rows != weights.num_rows ||
        header->nnz != weights.nnz || header->num_keys < keys) {
      __trap();
    }
    return view_plan(weights.plan);
  }
};

}  // namespace fiak::cuda
