// fiak::csr_attention and fiak::csr_plan: CPU, Meta, Autograd and Autocast. Schemas and shapes are in library.cpp.
#include "torch/csr_attention.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "kernels/plan/plan.h"
#include "torch/checks.h"

namespace fiak {
namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kForward = "csr_attention";
constexpr const char* kBackward = "csr_attention_backward";
constexpr const char* kPlan = "csr_plan";
constexpr const char* kSummary = "csr_plan_summary";

ForwardTensors call_forward(const CsrInputs& in) {
  static const auto op = find_op<CsrInputs::Signature<ForwardTensors>>("fiak::csr_attention_forward");
  return op.call(in.query, in.key, in.value, in.crow_indices, in.col_indices, in.prior, in.plan, in.summary,
                 in.query_offsets, in.kv_lens, in.dropout_p, in.seed, in.scale, in.score, in.log_prior);
}

GradTensors call_backward(const CsrGradInputs& in) {
  static const auto op = find_op<CsrGradInputs::Signature>("fiak::csr_attention_backward");
  return op.call(in.grad_output, in.query, in.key, in.value, in.crow_indices, in.col_indices, in.prior, in.output,
                 in.logsumexp, in.plan, in.summary, in.query_offsets, in.kv_lens, in.dropout_p, in.seed, in.scale,
                 in.score, in.log_prior, in.output_mask);
}

Tensor attention(const CsrInputs& in) {
  TORCH_CHECK(in.plan.has_value() || !in.query.is_cuda(), kForward,
              ": plan must be given with CUDA tensors; torch.ops.fiak.csr_plan makes it (got None)");
  return std::get<0>(call_forward(in));
}

Tensor attention_in_autocast(const CsrInputs& in) { return attention_autocast(in, attention); }

struct CsrAttention : torch::autograd::Function<CsrAttention> {
  static variable_list forward(AutogradContext* context, const Tensor&, const Tensor&, const Tensor&,
                               const OptionalTensor&, const CsrInputs& in) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, logsumexp] = call_forward(in);
    context->save_for_backward({in.query, in.key, in.value, in.prior.value_or(Tensor()), output, logsumexp,
                                in.crow_indices, in.col_indices, in.plan.value_or(Tensor()),
                                in.query_offsets.value_or(Tensor()), in.kv_lens.value_or(Tensor()),
                                in.seed.value_or(Tensor()), in.summary.value_or(Tensor())});
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
    std::tie(grads[0], grads[1], grads[2], grads[3]) =
        call_backward({grad_outputs[0], saved[0], saved[1], saved[2], saved[6], saved[7], prior, saved[4], saved[5],
                       if_defined(saved[8]), if_defined(saved[12]), if_defined(saved[9]), if_defined(saved[10]),
                       data["dropout_p"].toDouble(), if_defined(saved[11]), data["scale"].toOptional<double>(), score,
                       data["log_prior"].toBool(), wanted_grads(*context, prior.has_value())});
    return grads;
  }
};

ForwardTensors forward_autograd(const CsrInputs& in) {
  const variable_list results = CsrAttention::apply(in.query, in.key, in.value, in.prior, in);
  return {results[0], results[1]};
}

CsrIndices csr_indices(const Tensor& crow_indices, const Tensor& col_indices) {
  return {crow_indices.const_data_ptr(), col_indices.const_data_ptr(), crow_indices.scalar_type() == at::kLong,
          crow_indices.numel() - 1, col_indices.numel()};
}

Tensor make_plan(const char* op, const CsrIndices& csr, int64_t num_queries, int64_t num_keys) {
  const Parallel parallel = cpu_parallel();
  const std::string error = check_csr(csr, num_queries, num_keys, parallel);  // sizes before anything else
  TORCH_CHECK(error.empty(), op, ": ", error);
  Tensor plan = at::empty({plan_layout(csr.num_rows, num_queries, num_keys, csr.nnz).bytes}, at::kByte);
  build_plan(csr, num_queries, num_keys, plan.mutable_data_ptr(), parallel);
  return plan;
}

void check_alignment(const char* op, const Tensor& plan) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(plan.const_data_ptr()) % alignof(int64_t) == 0, op,
              ": plan must be aligned to ", alignof(int64_t), " bytes");
}

void check_given_plan(const char* op, const Tensor& plan, const CsrIndices& csr) {
  const char* const wanted = std::getenv("FIAK_CHECK_PLANS");
  const bool deep = wanted != nullptr && std::string_view(wanted) == "1";
  const std::string error = check_plan(plan.const_data_ptr(), plan.numel(), csr, deep);
  TORCH_CHECK(error.empty(), op, ": ", error);
  check_alignment(op, plan);
}

/// The rules that only the plan's content decides: groups, a row for every query and a column for every key.
void check_rows(const char* op, const CsrArgs& args) {
  const PlanView& plan = args.plan;
  TORCH_CHECK(args.queries <= plan.num_queries, op, ": query must have at most the pattern's ", plan.num_queries,
              " rows (got ", args.queries, ")");
  TORCH_CHECK(args.keys <= plan.num_keys, op, ": key must have at most the pattern's ", plan.num_keys,
              " columns as rows (got ", args.keys, ")");
  if (plan.num_queries == 0) return;
  const bool fits = args.query_heads > 0 ? plan.heads > 0 && args.batch % args.groups() == 0 : plan.heads == 0;
  TORCH_CHECK(fits, op, ": crow_indices must have rows for G * Hq heads with Hq = ", args.query_heads,
              ", or for G that all share, and G a divisor of B = ", args.batch, " (got ", plan.heads, " heads of ",
              plan.num_queries, " rows)");
}

Operands<CsrArgs> csr_operands(const char* op, const CsrInputs& in) {
  auto operands = attention_operands<CsrArgs>(op, in);
  CsrArgs& args = operands.args;
  const Tensor crow_indices = operands.own(in.crow_indices.contiguous());
  const CsrIndices csr = csr_indices(crow_indices, operands.own(in.col_indices.contiguous()));
  const bool given = in.plan.has_value();
  const Tensor plan = operands.own(given ? in.plan->contiguous() : make_plan(op, csr, args.queries, args.keys));
  if (given) check_given_plan(op, plan, csr);
  args.plan = view_plan(plan.const_data_ptr());
  check_rows(op, args);
  if (in.query_offsets.has_value()) {
    const Tensor offsets = operands.own(checked_counts(op, "query_offsets", *in.query_offsets,
                                                       args.plan.num_queries - args.queries, "num_queries - N"));
    args.query_offsets = offsets.const_data_ptr<int64_t>();
  }
  if (in.prior.has_value()) args.prior = operands.own(in.prior->contiguous()).const_data_ptr();
  return operands;
}

ForwardTensors forward_cpu(const CsrInputs& in) {
  check_csr_attention(kForward, in);
  return run_forward(csr_operands(kForward, in).args, in.query, in.value,
                     on_threads(cpu_kernels(in.query).csr_forward));
}

GradTensors backward_cpu(const CsrGradInputs& in) {
  GradTensors grads = csr_backward_meta(in);  // the same checks and results
  run_backward(csr_operands(kBackward, in.inputs()).args, in.grad_output, in.output, in.logsumexp, grads,
               on_threads(cpu_kernels(in.query).csr_backward));
  return grads;
}

struct LargerSymInt {
  SymInt operator()(const SymInt& a, const SymInt& b) const { return a.max(b); }
};

Tensor plan_meta(const Tensor& crow_indices, const Tensor& col_indices, SymInt num_queries, SymInt num_keys) {
  check_csr_plan(crow_indices, col_indices, num_queries, num_keys);
  const auto layout =
      plan_layout<SymInt, LargerSymInt>(crow_indices.sym_numel() - 1, num_queries, num_keys, col_indices.sym_numel());
  return empty_like_sizes({layout.bytes}, crow_indices, at::kByte);
}

/// Traced code takes it for a tensor of the plan's device, whose host it is for: make it before.
Tensor summary_meta(const Tensor& plan, SymInt heads) {
  check_csr_plan_summary(plan, heads);
  return empty_like_sizes({heads, 2}, plan, at::kLong);
}

template <class Result, Result (*function)(const CsrInputs&)>
constexpr auto* forward_kernel = Kernel<function, CsrInputs::Signature<Result>>::call;

template <GradTensors (*function)(const CsrGradInputs&)>
constexpr auto* backward_kernel = Kernel<function, CsrGradInputs::Signature>::call;

}  // namespace

ForwardTensors csr_forward_meta(const CsrInputs& in) {
  check_csr_attention(kForward, in);
  return empty_forward(in.query, in.value);
}

GradTensors csr_backward_meta(const CsrGradInputs& in) {
  check_csr_attention(kBackward, in.inputs());
  check_attention_backward(kBackward, in.query, in.value, in.grad_output, in.output, in.logsumexp);
  return empty_grads(in.query, in.key, in.value, in.prior, in.output_mask);
}

Tensor csr_plan_cpu(const Tensor& crow_indices, const Tensor& col_indices, int64_t num_queries, int64_t num_keys) {
  check_csr_plan(crow_indices, col_indices, num_queries, num_keys);
  const Tensor crow = crow_indices.contiguous(), col = col_indices.contiguous();
  return make_plan(kPlan, csr_indices(crow, col), num_queries, num_keys);
}

Tensor csr_plan_summary_cpu(const Tensor& plan, int64_t heads) {
  check_csr_plan_summary(plan, heads);
  const Tensor bytes = plan.contiguous();
  const std::string error = check_plan_header(bytes.const_data_ptr(), bytes.numel());
  TORCH_CHECK(error.empty(), kSummary, ": ", error);
  check_alignment(kSummary, bytes);
  const PlanView view = view_plan(bytes.const_data_ptr());
  TORCH_CHECK(view.heads == heads, kSummary, ": heads must be the plan's ", view.heads, " (got ", heads, ")");
  Tensor summary = at::empty({heads, 2}, at::kLong);
  summarise_plan(view, static_cast<PlanHeadWork*>(summary.mutable_data_ptr()));
  return summary;
}

TORCH_LIBRARY_IMPL(fiak, CompositeImplicitAutograd, m) { m.impl("csr_attention", forward_kernel<Tensor, attention>); }

TORCH_LIBRARY_IMPL(fiak, AutocastCPU, m) { m.impl("csr_attention", forward_kernel<Tensor, attention_in_autocast>); }

TORCH_LIBRARY_IMPL(fiak, AutocastCUDA, m) { m.impl("csr_attention", forward_kernel<Tensor, attention_in_autocast>); }

TORCH_LIBRARY_IMPL(fiak, Autograd, m) {
  m.impl("csr_attention_forward", forward_kernel<ForwardTensors, forward_autograd>);
}

TORCH_LIBRARY_IMPL(fiak, CPU, m) {
  m.impl("csr_attention_forward", forward_kernel<ForwardTensors, forward_cpu>);
  m.impl("csr_attention_backward", backward_kernel<backward_cpu>);
  m.impl("csr_plan", csr_plan_cpu);
  m.impl("csr_plan_summary", csr_plan_summary_cpu);
}

TORCH_LIBRARY_IMPL(fiak, Meta, m) {
  m.impl("csr_attention_forward", forward_kernel<ForwardTensors, csr_forward_meta>);
  m.impl("csr_attention_backward", backward_kernel<csr_backward_meta>);
  m.impl("csr_plan", plan_meta);
  m.impl("csr_plan_summary", summary_meta);
}

}  // namespace fiak
