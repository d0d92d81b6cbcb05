// fiak::prior_attention on CUDA. Schemas and shapes are in library.cpp; everything else of the op is in
// prior_attention.cpp.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/cuda/prior_attention.h"
#include "torch/attention_cuda.h"
#include "torch/checks.h"
#include "torch/prior_attention.h"

namespace fiak {
namespace {

using at::Tensor;

ForwardTensors forward_cuda(const PriorInputs& in) {
  const char* op = "prior_attention";
  check_prior_attention(op, in);
  check_cuda_limits(op, in.query, in.key, in.value);
  const c10::cuda::CUDAGuard device(in.query.device());
  return run_forward(prior_operands(op, in).args, in.query, in.value,
                     [&](const PriorArgs& args, const ForwardResult& result) {
                       cuda::with_element_of(args, [&](auto element) {
                         cuda::prior_attention_forward(element, args, seed_address(in.seed), result,
                                                       c10::cuda::getCurrentCUDAStream().stream());
                       });
                     });
}

GradTensors backward_cuda(const PriorGradInputs& in) {
  GradTensors grads = prior_backward_meta(in);  // the same checks and results
  const char* op = "prior_attention_backward";
  const PriorInputs inputs = in.inputs();
  check_cuda_limits(op, in.query, in.key, in.value);
  const c10::cuda::CUDAGuard device(in.query.device());
  const Tensor delta = at::empty_like(in.logsumexp, at::MemoryFormat::Contiguous);
  run_backward(prior_operands(op, inputs).args, in.grad_output, in.output, in.logsumexp, grads,
               [&](const PriorArgs& args, const BackwardArgs& backward) {
                 cuda::with_element_of(args, [&](auto element) {
                   cuda::prior_attention_backward(element, args, seed_address(in.seed), backward,
                                                  delta.mutable_data_ptr<float>(),
                                                  c10::cuda::getCurrentCUDAStream().stream());
                 });
               });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fiak, CUDA, m) {
  m.impl("prior_attention_forward", Kernel<forward_cuda, PriorInputs::Signature<ForwardTensors>>::call);
  m.impl("prior_attention_backward", Kernel<backward_cuda, PriorGradInputs::Signature>::call);
}

}  // namespace fiak
