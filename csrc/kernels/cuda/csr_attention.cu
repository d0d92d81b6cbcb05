#include "kernels/cuda/csr_attention.h"
#include "kernels/cuda/csr_launches.h"
#include "kernels/cuda/csr_on_stream.h"

namespace fiak::cuda {

void csr_attention_forward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary,
                           const int64_t* seed, const ForwardResult& result, void* stream) {
  csr_forward(args, weights, summary, seed, result, LaunchOnStream{stream});
}

void csr_attention_backward(const AttentionArgs& args, const CsrWeights& weights, const PlanSummary& summary,
                            const int64_t* seed, const BackwardArgs& grads, float* delta, void* stream) {
  csr_backward(args, weights, summary, seed, grads, delta, LaunchOnStream{stream});
}

}  // namespace fiak::cuda
