#include "kernels/cuda/launch.h"
#include "kernels/cuda/prior_attention.cuh"
#include "kernels/cuda/prior_attention.h"

namespace fiak::cuda {
namespace {

/// Launches on a stream.
struct Launcher {
  cudaStream_t stream;

  template <class Params>
  void operator()(const char* name, void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
                  const Params& params) const {
    prepare(reinterpret_cast<const void*>(kernel), blocks, shared_bytes, name);
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
    check(cudaGetLastError(), name);
  }
};

}  // namespace

void prior_attention_forward(const PriorArgs& args, const int64_t* seed, const ForwardResult& result, void* stream) {
  prior_forward(args, seed, result, Launcher{static_cast<cudaStream_t>(stream)});
}

void prior_attention_backward(const PriorArgs& args, const int64_t* seed, const BackwardArgs& grads, float* delta,
                              void* stream) {
  prior_backward(args, seed, grads, delta, Launcher{static_cast<cudaStream_t>(stream)});
}

}  // namespace fiak::cuda
