// Compiled once for each dtype.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prior_attention.cuh"
#include "kernels/cuda/prior_attention.h"

namespace fiak::cuda {

void prior_attention_forward(FIAK_ELEMENT element, const PriorArgs& args, const int64_t* seed,
                             const ForwardResult& result, void* stream) {
  prior_forward(element, args, seed, result, LaunchOnStream{stream});
}

void prior_attention_backward(FIAK_ELEMENT element, const PriorArgs& args, const int64_t* seed,
                              const BackwardArgs& grads, float* delta, void* stream) {
  prior_backward(element, args, seed, grads, delta, LaunchOnStream{stream});
}

}  // namespace fiak::cuda
