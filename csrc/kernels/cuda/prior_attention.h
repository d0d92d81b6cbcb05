// prior_attention on CUDA. Arguments as on the CPU (kernels/attention.h), with device pointers, but for the seed, which
// is one number on the device, read where dropout_p > 0; float32, bfloat16 and float16, head sizes up to
// kMaximumHeadDim; `stream` is a cudaStream_t of the current device. There must be pairs. Asynchronous. Errors throw
// std::runtime_error with the kernel's name; a value of kv_lens out of range traps on the device. Each dtype, which is
// the first argument's and that of `args` (with_element_of), is compiled by itself. `delta` is scratch of [batch,
// query_heads, queries].
#pragma once

#include "kernels/cuda/attention_params.h"

namespace fiak::cuda {

constexpr int64_t kMaximumHeadDim = 256;

#define FIAK_PRIOR_ATTENTION(dtype, Element)                                                                     \
  void prior_attention_forward(Element, const PriorArgs& args, const int64_t* seed, const ForwardResult& result, \
                               void* stream);                                                                    \
  void prior_attention_backward(Element, const PriorArgs& args, const int64_t* seed, const BackwardArgs& grads,  \
                                float* delta, void* stream);
FIAK_FOR_ATTENTION_DTYPES(FIAK_PRIOR_ATTENTION)
#undef FIAK_PRIOR_ATTENTION

}  // namespace fiak::cuda
