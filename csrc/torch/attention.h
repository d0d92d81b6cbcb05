// What the ops' registrations share, mostly those of prior_attention and csr_attention.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention.h"
#include "torch/inputs.h"
#include "torch/operands.h"

namespace fiak {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Kernel arguments, and the tensors whose memory they point into.
template <class Args>
struct Operands {
  Args args;
  std::vector<at::Tensor> tensors;

  at::Tensor own(at::Tensor tensor) { return tensors.emplace_back(std::move(tensor)); }
};

/// The arguments that both ops have, of tensors that passed the op's checker. The values of kv_lens and the seed are
/// looked at, and checked, on the CPU only: CUDA's kernels do it on the device, and get the seed's address.
template <class Args, class Inputs>
Operands<Args> attention_operands(const char* op, const Inputs& in) {
  Operands<Args> operands;
  AttentionArgs& args = operands.args;
  args.batch = in.query.size(0);
  args.query_heads = in.query.size(1);
  args.queries = in.query.size(2);
  args.head_dim = in.query.size(3);
  args.key_heads = in.key.size(1);
  args.keys = in.key.size(2);
  args.value_dim = in.value.size(3);
  args.dtype = kernel_dtype(in.query.scalar_type());
  args.score = in.score == "dot" ? Score::kDot : Score::kGaussian;
  args.scale = in.scale.value_or(1.0 / std::sqrt(static_cast<double>(args.head_dim)));
  args.dropout_p = in.dropout_p;
  args.log_prior = in.log_prior;
  const bool on_cpu = in.query.is_cpu();
  if (in.dropout_p > 0 && on_cpu) args.seed = static_cast<uint64_t>(*in.seed->template const_data_ptr<int64_t>());
  if (in.kv_lens.has_value()) {
    const at::Tensor counts = operands.own(on_cpu ? checked_counts(op, "kv_lens", *in.kv_lens, args.keys, "M")
                                                  : in.kv_lens->to(at::kLong).contiguous());
    args.kv_lens = counts.const_data_ptr<int64_t>();
  }
  args.query = readable(operands.own(contiguous_rows(in.query)));
  args.key = readable(operands.own(contiguous_rows(in.key)));
  args.value = readable(operands.own(contiguous_rows(in.value)));
  return operands;
}

/// Uninitialised results, for Meta and real tensors alike: the output in [B, N, Hq, Dv] memory order.
ForwardTensors empty_forward(const at::Tensor& query, const at::Tensor& value);

/// Uninitialised gradients where output_mask asks for them: query's, key's and value's in [B, rows, heads, columns]
/// memory order, the weight's in its own shape.
GradTensors empty_grads(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const OptionalTensor& weight, const OutputMask& output_mask);

/// False where every row is empty by its sizes: kernels are not called then.
bool has_pairs(const AttentionArgs& args);

/// kernel(args, result) into new tensors.
template <class Args, class Kernel>
ForwardTensors run_forward(const Args& args, const at::Tensor& query, const at::Tensor& value, Kernel&& kernel) {
  const auto [output, logsumexp] = empty_forward(query, value);
  if (has_pairs(args)) {
    kernel(args, ForwardResult{writable(output), logsumexp.mutable_data_ptr()});
  } else {
    output.zero_();
    logsumexp.fill_(-std::numeric_limits<double>::infinity());
  }
  return {output, logsumexp};
}

/// kernel(args, grads) into the given tensors.
template <class Args, class Kernel>
void run_backward(const Args& args, const at::Tensor& grad_output, const at::Tensor& output,
                  const at::Tensor& logsumexp, const GradTensors& grads, Kernel&& kernel) {
  const auto& [grad_query, grad_key, grad_value, grad_prior] = grads;
  if (!has_pairs(args)) {
    for (const at::Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_prior}) {
      if (grad->defined()) grad->zero_();
    }
    return;
  }
  const at::Tensor grad_rows = contiguous_rows(grad_output), output_rows = contiguous_rows(output);
  const at::Tensor lse = logsumexp.contiguous();
  BackwardArgs backward;
  backward.grad_output = readable(grad_rows);
  backward.output = readable(output_rows);
  backward.logsumexp = lse.const_data_ptr();
  backward.grad_query = writable(grad_query);
  backward.grad_key = writable(grad_key);
  backward.grad_value = writable(grad_value);
  backward.grad_prior = grad_prior.defined() ? grad_prior.mutable_data_ptr() : nullptr;
  kernel(args, backward);
}

/// A CPU kernel, on torch's threads.
template <class Args, class Target>
auto on_threads(void (*kernel)(const Args&, const Target&, const Parallel&)) {
  return [kernel](const Args& args, const Target& target) { kernel(args, target, cpu_parallel()); };
}

/// Which of query, key, value and the weight (which may be None) want a gradient.
OutputMask wanted_grads(const torch::autograd::AutogradContext& context, bool has_weight);

/// A saved tensor as an optional argument.
OptionalTensor if_defined(const at::Tensor& tensor);

/// `tensor` in autocast's dtype for its device, as scaled_dot_product_attention takes its inputs.
at::Tensor autocast(const at::Tensor& tensor);

/// The op under autocast, which leaves the weights alone.
template <class Inputs>
at::Tensor attention_autocast(Inputs in, at::Tensor (*attention)(const Inputs&)) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  in.query = autocast(in.query);
  in.key = autocast(in.key);
  in.value = autocast(in.value);
  return attention(in);
}

}  // namespace fiak
