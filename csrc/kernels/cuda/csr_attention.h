// csr_attention on CUDA. Arguments as for prior_attention (prior_attention.h), and the weights. Asynchronous. Errors
// throw std::runtime_error with the kernel's name; a plan of another pattern, and values of kv_lens or query_offsets
// out of range, trap on the device.
#pragma once

#include "kernels/cuda/attention_params.h"

namespace fiak::cuda {

/// `summary`, on the host, is that of the plan or empty (csr_launches.h).
void csr_attention_forward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary,
                           const int64_t* seed, const ForwardResult& result, void* stream);

/// `delta` is scratch of [batch, query_heads, queries].
void csr_attention_backward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary,
                            const int64_t* seed, const BackwardArgs& grads, float* delta, void* stream);

}  // namespace fiak::cuda
