// fiak::prior_attention on CUDA. Schemas and shapes are in library.cpp; everything else of the op is in
// prior_attention.cpp.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <utility>

#include "kernels/cuda/prior_attention.h"
#include "torch/checks.h"
#include "torch/prior_attention.h"

namespace fiak {
namespace {

using at::Tensor;

/// What the CUDA kernels do not do, of inputs that passed the op's checker.
void check_limits(const char* op, const PriorInputs& in) {
  TORCH_CHECK(in.query.scalar_type() != at::kDouble, op,
              ": query must be torch.float32, torch.bfloat16 or torch.float16 on CUDA (got torch.float64)");
  const auto check_head_size = [&](const char* name, const Tensor& tensor) {
    TORCH_CHECK(tensor.size(3) <= cuda::kMaximumHeadSize, op, ": ", name, " must have at most ", cuda::kMaximumHeadSize,
                " columns on CUDA (got ", tensor.sizes(), ")");
  };
  check_head_size("query", in.query);
  check_head_size("value", in.value);
  for (const auto& [name, tensor] : {std::pair("query", in.query), std::pair("key", in.key)}) {
    for (const int64_t size : tensor.sizes()) {
      TORCH_CHECK(size <= std::numeric_limits<int>::max() / 2, op, ": ", name,
                  " must have sizes below 2^30 on CUDA (got ", tensor.sizes(), ")");
    }
  }
}

const int64_t* seed_of(const PriorInputs& in) {
  return in.seed.has_value() ? in.seed->const_data_ptr<int64_t>() : nullptr;
}

ForwardTensors forward_cuda(const PriorInputs& in) {
  const char* op = "prior_attention";
  check_prior_attention(op, in);
  check_limits(op, in);
  const c10::cuda::CUDAGuard device(in.query.device());
  return run_forward(
      prior_operands(op, in).args, in.query, in.value, [&](const PriorArgs& args, const ForwardResult& result) {
        cuda::prior_attention_forward(args, seed_of(in), result, c10::cuda::getCurrentCUDAStream().stream());
      });
}

GradTensors backward_cuda(const PriorGradInputs& in) {
  GradTensors grads = prior_backward_meta(in);  // the same checks and results
  const char* op = "prior_attention_backward";
  const PriorInputs inputs = in.inputs();
  check_limits(op, inputs);
  const c10::cuda::CUDAGuard device(in.query.device());
  const Tensor delta = at::empty_like(in.logsumexp, at::MemoryFormat::Contiguous);
  run_backward(prior_operands(op, inputs).args, in.grad_output, in.output, in.logsumexp, grads,
               [&](const PriorArgs& args, const BackwardArgs& backward) {
                 cuda::prior_attention_backward(args, seed_of(inputs), backward, delta.mutable_data_ptr<float>(),
                                                c10::cuda::getCurrentCUDAStream().stream());
               });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fiak, CUDA, m) {
  m.impl("prior_attention_forward", Kernel<forward_cuda, PriorInputs::Signature<ForwardTensors>>::call);
  m.impl("prior_attention_backward", Kernel<backward_cuda, PriorGradInputs::Signature>::call);
}

}  // namespace fiak
