// Which kernels a call of csr_attention launches. Which of them computes a head is decided on the device, where the
// plan is (CsrPattern::uses_tiles); only what no head can need is left out here.
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

/// Does launch(kernel, blocks, params) of what computes `result`; there must be pairs.
template <class Launch>
void csr_forward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const ForwardResult& result,
                 Launch&& launch) {
  with_element_of(args, [&](auto element) {
    csr_entries_forward(element, args, weights, seed, result, launch);
    if (may_use_tiles(args, weights)) csr_tiles_forward(element, args, weights, seed, result, launch);
  });
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Launch>
void csr_backward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const BackwardArgs& grads,
                  float* delta, Launch&& launch) {
  with_element_of(args, [&](auto element) {
    csr_entries_backward(element, args, weights, seed, grads, delta, launch);
    if (may_use_tiles(args, weights)) csr_tiles_backward(element, args, weights, seed, grads, delta, launch);
  });
}

}  // namespace fiak::cuda
