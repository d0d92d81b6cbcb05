// Compiled once for each dtype.
#include "kernels/cuda/csr_on_stream.h"
#include "kernels/cuda/csr_tiles.cuh"

namespace fiak::cuda {

void csr_tiles_forward(FIAK_ELEMENT element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                       const ForwardResult& result, const LaunchOnStream& launch) {
  csr_tiles_forward<FIAK_ELEMENT, const LaunchOnStream&>(element, args, weights, seed, result, launch);
}

void csr_tiles_backward(FIAK_ELEMENT element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                        const BackwardArgs& grads, float* delta, const LaunchOnStream& launch) {
  csr_tiles_backward<FIAK_ELEMENT, const LaunchOnStream&>(element, args, weights, seed, grads, delta, launch);
}

}  // namespace fiak::cuda
