// prior_attention on CUDA. Arguments as on the CPU (kernels/attention.h), with device pointers, but for the seed, which
// is one number on the device, read where dropout_p > 0; float32, bfloat16 and float16, head sizes up to
// kMaximumHeadSize; `stream` is a cudaStream_t of the current device. There must be pairs. Asynchronous. Errors throw
// std::runtime_error with the kernel's name; a value of kv_lens out of range traps on the device.
#pragma once

#include "kernels/attention.h"

namespace fiak::cuda {

constexpr int64_t kMaximumHeadSize = 256;

void prior_attention_forward(const PriorArgs& args, const int64_t* seed, const ForwardResult& result, void* stream);

/// `delta` is scratch of [batch, query_heads, queries].
void prior_attention_backward(const PriorArgs& args, const int64_t* seed, const BackwardArgs& grads, float* delta,
                              void* stream);

}  // namespace fiak::cuda
