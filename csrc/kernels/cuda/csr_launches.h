// Which kernels a call of csr_attention launches. Which of them computes a head is decided on the device, where the
// plan is (CsrPattern::uses_tiles), and by the plan's summary also here, so that nothing is launched that no head
// needs.
//
// csr_entries_forward, csr_tiles_forward and their backwards are found by their arguments: templates of csr_entries.cuh
// and csr_tiles.cuh, or the functions of csr_on_stream.h.
#pragma once

#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/csr_cost.h"

namespace fiak::cuda {

/// Whether the plan may have what kernels over tiles read (plan.h); where not, those over entries compute all heads.
/// The plan may be of more keys than the call has, which only the device knows: then it has no bits that it would not
/// have for these.
inline bool may_use_tiles(const AttentionArgs& args, const CsrWeights& weights) {
  return plan_layout<int64_t>(weights.num_rows, 1, args.keys, weights.nnz).row_words > 0 &&
         weights.selected != static_cast<int32_t>(CsrKernel::kEntries);
}

/// Which kinds of kernels have heads to compute.
struct CsrKinds {
  bool entries, tiles;
};
inline CsrKinds kinds_of(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary) {
  const bool tiles_serve = may_use_tiles(args, weights);
  if (summary.heads == nullptr || args.key_heads == 0) return {true, tiles_serve};
  CsrKinds kinds{false, false};
  const PatternHeads heads(summary.count, args.query_heads);
  const int64_t readers = args.query_heads / args.key_heads, count = heads.heads == 1 ? 1 : readers;
  for (int64_t group = 0; group < heads.groups; ++group) {
    for (int64_t key_head = 0; key_head < args.key_heads; ++key_head) {
      const int64_t first = heads.head_of(group, key_head * readers);
      int64_t nnz = 0, tiles = 0;
      for (int64_t head = first; head < first + count; ++head) {
        nnz += summary.heads[head].entries;
        tiles += summary.heads[head].tiles;
      }
      // As CsrPattern::uses_tiles has it.
      const bool uses_tiles =
          tiles_serve && tiles >= 0 &&
          (weights.selected == static_cast<int32_t>(CsrKernel::kTiles) ||
           tiles_are_faster(static_cast<float>(nnz), static_cast<float>(tiles), args.dtype != DType::kFloat32));
      (uses_tiles ? kinds.tiles : kinds.entries) = true;
    }
  }
  return kinds;
}

/// Does launch(kernel, blocks, params) of what computes `result`; there must be pairs. All kinds of kernels are
/// launched unless `summary` has the plan's.
template <class Launch>
void csr_forward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary, const int64_t* seed,
                 const ForwardResult& result, Launch&& launch) {
  const CsrKinds kinds = kinds_of(args, weights, summary);
  with_element_of(args, [&](auto element) {
    if (kinds.entries) csr_entries_forward(element, args, weights, seed, result, launch);
    if (kinds.tiles) csr_tiles_forward(element, args, weights, seed, result, launch);
  });
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Launch>
void csr_backward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary, const int64_t* seed,
                  const BackwardArgs& grads, float* delta, Launch&& launch) {
  const CsrKinds kinds = kinds_of(args, weights, summary);
  with_element_of(args, [&](auto element) {
    csr_entries_backward(element, args, weights, seed, grads, delta, kinds.entries, launch);
    if (kinds.tiles) csr_tiles_backward(element, args, weights, seed, grads, delta, launch);
  });
}

}  // namespace fiak::cuda
