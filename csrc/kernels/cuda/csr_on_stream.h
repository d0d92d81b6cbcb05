// The launches of csr_entries.cuh and csr_tiles.cuh on a stream, for each dtype, which is the first argument's: each
// kind and dtype is compiled by itself.
#pragma once

#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/launch.h"

namespace fiak::cuda {

#define FIAK_CSR_ON_STREAM(dtype, Element)                                                                          \
  void csr_entries_forward(Element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,      \
                           const ForwardResult& result, const LaunchOnStream& launch);                              \
  void csr_entries_backward(Element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,     \
                            const BackwardArgs& grads, float* delta, bool has_heads, const LaunchOnStream& launch); \
  void csr_tiles_forward(Element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,        \
                         const ForwardResult& result, const LaunchOnStream& launch);                                \
  void csr_tiles_backward(Element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,       \
                          const BackwardArgs& grads, float* delta, const LaunchOnStream& launch);
FIAK_FOR_ATTENTION_DTYPES(FIAK_CSR_ON_STREAM)
#undef FIAK_CSR_ON_STREAM

}  // namespace fiak::cuda
