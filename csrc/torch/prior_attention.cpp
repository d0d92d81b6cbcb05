// fiak::prior_attention: CPU, Meta, Autograd and Autocast. Schemas and shapes are in library.cpp.
#include "torch/prior_attention.h"

#include <torch/library.h>

#include <string>

#include "torch/checks.h"

namespace fiak {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kForward = "prior_attention";
constexpr const char* kBackward = "prior_attention_backward";

ForwardTensors call_forward(const PriorInputs& in) {
  static const auto op = find_op<PriorInputs::Signature<ForwardTensors>>("fiak::prior_attention_forward");
  return op.call(in.query, in.key, in.value, in.prior, in.is_causal, in.kv_lens, in.dropout_p, in.seed, in.scale,
                 in.score, in.log_prior);
}

GradTensors call_backward(const PriorGradInputs& in) {
  static const auto op = find_op<PriorGradInputs::Signature>("fiak::prior_attention_backward");
  return op.call(in.grad_output, in.query, in.key, in.value, in.prior, in.output, in.logsumexp, in.is_causal,
                 in.kv_lens, in.dropout_p, in.seed, in.scale, in.score, in.log_prior, in.output_mask);
}

Tensor attention(const PriorInputs& in) { return std::get<0>(call_forward(in)); }

Tensor attention_in_autocast(const PriorInputs& in) { return attention_autocast(in, attention); }

struct PriorAttention : torch::autograd::Function<PriorAttention> {
  static variable_list forward(AutogradContext* context, const Tensor&, const Tensor&, const Tensor&,
                               const OptionalTensor&, const PriorInputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, logsumexp] = call_forward(in);
    context->save_for_backward({in.query, in.key, in.value, in.prior.value_or(Tensor()), output, logsumexp,
                                in.kv_lens.value_or(Tensor()), in.seed.value_or(Tensor())});
    context->saved_data["is_causal"] = in.is_causal;
    context->saved_data["dropout_p"] = in.dropout_p;
    context->saved_data["scale"] = in.scale;
    context->saved_data["score"] = std::string(in.score);
    context->saved_data["log_prior"] = in.log_prior;
    context->mark_non_differentiable({logsumexp});
    context->set_materialize_grads(false);
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    variable_list grads(5);  // of the tensors that apply was called with, and none for the struct
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const std::string score = data["score"].toStringRef();
    const OptionalTensor prior = if_defined(saved[3]);
    std::tie(grads[0], grads[1], grads[2], grads[3]) = call_backward(
        {grad_outputs[0], saved[0], saved[1], saved[2], prior, saved[4], saved[5], data["is_causal"].toBool(),
         if_defined(saved[6]), data["dropout_p"].toDouble(), if_defined(saved[7]), data["scale"].toOptional<double>(),
         score, data["log_prior"].toBool(), wanted_grads(*context, prior.has_value())});
    return grads;
  }
};

ForwardTensors forward_autograd(const PriorInputs& in) {
  const variable_list results = PriorAttention::apply(in.query, in.key, in.value, in.prior, in);
  return {results[0], results[1]};
}

ForwardTensors forward_cpu(const PriorInputs& in) {
  check_prior_attention(kForward, in);
  return run_forward(prior_operands(kForward, in).args, in.query, in.value,
                     on_threads(cpu_kernels(in.query).prior_forward));
}

GradTensors backward_cpu(const PriorGradInputs& in) {
  GradTensors grads = prior_backward_meta(in);  // the same checks and results
  run_backward(prior_operands(kBackward, in.inputs()).args, in.grad_output, in.output, in.logsumexp, grads,
               on_threads(cpu_kernels(in.query).prior_backward));
  return grads;
}

template <class Result, Result (*function)(const PriorInputs&)>
constexpr auto* forward_kernel = Kernel<function, PriorInputs::Signature<Result>>::call;

template <GradTensors (*function)(const PriorGradInputs&)>
constexpr auto* backward_kernel = Kernel<function, PriorGradInputs::Signature>::call;

}  // namespace

ForwardTensors prior_forward_meta(const PriorInputs& in) {
  check_prior_attention(kForward, in);
  return empty_forward(in.query, in.value);
}

GradTensors prior_backward_meta(const PriorGradInputs& in) {
  check_prior_attention(kBackward, in.inputs());
  check_attention_backward(kBackward, in.query, in.value, in.grad_output, in.output, in.logsumexp);
  return empty_grads(in.query, in.key, in.value, in.prior, in.output_mask);
}

Operands<PriorArgs> prior_operands(const char* op, const PriorInputs& in) {
  auto operands = attention_operands<PriorArgs>(op, in);
  PriorArgs& args = operands.args;
  args.is_causal = in.is_causal;
  if (in.prior.has_value()) {
    const Tensor prior = operands.own(contiguous_rows(*in.prior));
    args.prior = prior.const_data_ptr();
    args.prior_groups = prior.size(0);
    args.prior_heads = prior.size(1);
    args.prior_rows = prior.size(2);
    args.prior_group_stride = prior.stride(0);
    args.prior_head_stride = args.prior_heads > 1 ? prior.stride(1) : 0;
    args.prior_row_stride = args.prior_rows > 1 ? prior.stride(2) : 0;
  }
  return operands;
}

TORCH_LIBRARY_IMPL(fiak, CompositeImplicitAutograd, m) { m.impl("prior_attention", forward_kernel<Tensor, attention>); }

TORCH_LIBRARY_IMPL(fiak, AutocastCPU, m) { m.impl("prior_attention", forward_kernel<Tensor, attention_in_autocast>); }

TORCH_LIBRARY_IMPL(fiak, AutocastCUDA, m) { m.impl("prior_attention", forward_kernel<Tensor, attention_in_autocast>); }

TORCH_LIBRARY_IMPL(fiak, Autograd, m) {
  m.impl("prior_attention_forward", forward_kernel<ForwardTensors, forward_autograd>);
}

TORCH_LIBRARY_IMPL(fiak, CPU, m) {
  m.impl("prior_attention_forward", forward_kernel<ForwardTensors, forward_cpu>);
  m.impl("prior_attention_backward", backward_kernel<backward_cpu>);
}

TORCH_LIBRARY_IMPL(fiak, Meta, m) {
  m.impl("prior_attention_forward", forward_kernel<ForwardTensors, prior_forward_meta>);
  m.impl("prior_attention_backward", backward_kernel<prior_backward_meta>);
}

}  // namespace fiak
