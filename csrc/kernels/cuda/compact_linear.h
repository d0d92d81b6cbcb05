// compact_linear on CUDA. Arguments as on the CPU (kernels/compact.h), with device pointers; float32, bfloat16 and
// float16; `stream` is a cudaStream_t of the current device. batch * kept must be below 2^30. Asynchronous. Errors
// throw std::runtime_error with the kernel's name; a row index out of range traps on the device.
#pragma once

#include "kernels/compact.h"

namespace fiak::cuda {

void compact_linear_forward(const CompactLinearArgs& args, const Output& output, void* stream);
void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, void* stream);

}  // namespace fiak::cuda
