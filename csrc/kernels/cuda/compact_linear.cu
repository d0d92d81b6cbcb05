#include "kernels/cuda/compact_linear.cuh"
#include "kernels/cuda/compact_linear.h"
#include "kernels/cuda/launch.h"

namespace fiak::cuda {

void compact_linear_forward(const CompactLinearArgs& args, const Output& output, void* stream) {
  linear_forward(args, output, LaunchOnStream{stream});
}

void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, void* stream) {
  linear_backward(args, grads, LaunchOnStream{stream});
}

}  // namespace fiak::cuda
