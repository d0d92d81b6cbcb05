// Which kernels a call of csr_attention launches. Which of them computes a head is decided on the device, where the
// plan is (CsrPattern::uses_tiles); only what no head can need is left out here.
//
// csr_entries_forward, csr_tiles_forward and their backwards are found by their arguments: templates of csr_entries.cuh
// and csr_tiles.cuh, or the functions of csr_on_stream.h.
#pragma once

#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/csr_cost.h"

namespace fiak::cuda {

/// Whether the plan has what kernels over tiles read (plan.h); where not, those over entries compute all heads.
inline bool may_use_tiles(const AttentionArgs& args, const CsrWeights& weights) {
  return weights.nnz * kPlanBitsShare >= weights.num_rows * args.keys &&
         weights.selected != static_cast<int32_t>(CsrKernel::kEntries);
}
inline bool may_use_entries(const AttentionArgs& args, const CsrWeights& weights) {
  return !may_use_tiles(args, weights) || weights.selected != static_cast<int32_t>(CsrKernel::kTiles);
}

/// Does launch(kernel, blocks, params) of what computes `result`; there must be pairs.
template <class Launch>
void csr_forward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const ForwardResult& result,
                 Launch&& launch) {
  with_element_of(args, [&](auto element) {
    if (may_use_entries(args, weights)) csr_entries_forward(element, args, weights, seed, result, launch);
    if (may_use_tiles(args, weights)) csr_tiles_forward(element, args, weights, seed, result, launch);
  });
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Launch>
void csr_backward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const BackwardArgs& grads,
                  float* delta, Launch&& launch) {
  BackwardArgs by_entries = grads;  // what tiles do not compute: delta, and the gradient of values
  if (!may_use_entries(args, weights)) {
    by_entries.grad_query.data = by_entries.grad_key.data = by_entries.grad_value.data = nullptr;
  }
  with_element_of(args, [&](auto element) {
    csr_entries_backward(element, args, weights, seed, by_entries, delta, launch);
    if (may_use_tiles(args, weights)) csr_tiles_backward(element, args, weights, seed, grads, delta, launch);
  });
}

}  // namespace fiak::cuda
