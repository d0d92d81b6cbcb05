// Compiled once for each dtype.
#include "kernels/cuda/csr_entries.cuh"
#include "kernels/cuda/csr_on_stream.h"

namespace fiak::cuda {

void csr_entries_forward(FIAK_ELEMENT element, const AttentionArgs& args, const CsrWeights& weights,
                         const int64_t* seed, const ForwardResult& result, const LaunchOnStream& launch) {
  csr_entries_forward<FIAK_ELEMENT, const LaunchOnStream&>(element, args, weights, seed, result, launch);
}

void csr_entries_backward(FIAK_ELEMENT element, const AttentionArgs& args, const CsrWeights& weights,
                          const int64_t* seed, const BackwardArgs& grads, float* delta, bool has_heads,
                          const LaunchOnStream& launch) {
  csr_entries_backward<FIAK_ELEMENT, const LaunchOnStream&>(element, args, weights, seed, grads, delta, has_heads,
                                                            launch);
}

}  // namespace fiak::cuda
