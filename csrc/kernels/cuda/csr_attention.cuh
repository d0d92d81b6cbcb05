// csr_attention on CUDA: which kernels a call launches. So far those over entries compute all heads.
#pragma once

#include "kernels/cuda/csr_entries.cuh"

namespace fiak::cuda {

inline CsrWeights by_entries(CsrWeights weights) {
  weights.selected = static_cast<int32_t>(CsrKernel::kEntries);
  return weights;
}

/// Does launch(kernel, blocks, params) of what computes `result`; there must be pairs.
template <class Launch>
void csr_forward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const ForwardResult& result,
                 Launch&& launch) {
  csr_entries_forward(args, by_entries(weights), seed, result, launch);
}

/// The same of the gradients that are wanted. `delta` is scratch, [batch, query_heads, queries].
template <class Launch>
void csr_backward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed, const BackwardArgs& grads,
                  float* delta, Launch&& launch) {
  csr_entries_backward(args, by_entries(weights), seed, grads, delta, launch);
}

}  // namespace fiak::cuda
