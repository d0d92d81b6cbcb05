// The launches of csr_entries.cuh and csr_tiles.cuh on a stream, each compiled in a file of its own: they take nvcc
// minutes.
#pragma once

#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/launch.h"

namespace fiak::cuda {

void csr_entries_forward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                         const ForwardResult& result, const LaunchOnStream& launch);
void csr_entries_backward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                          const BackwardArgs& grads, float* delta, const LaunchOnStream& launch);
void csr_tiles_forward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                       const ForwardResult& result, const LaunchOnStream& launch);
void csr_tiles_backward(const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                        const BackwardArgs& grads, float* delta, const LaunchOnStream& launch);

}  // namespace fiak::cuda
