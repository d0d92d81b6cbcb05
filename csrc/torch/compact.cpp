// fiak::compact_kv and fiak::compact_linear: CPU, Meta, Autograd and Autocast. Schemas and shapes are in library.cpp.
#include "kernels/compact.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include "torch/attention.h"
#include "torch/checks.h"
#include "torch/compact.h"
#include "torch/operands.h"

namespace fiak {
namespace {

using at::Tensor;
using c10::SymInt;

/// `like` with another number of rows.
Tensor empty_rows(const Tensor& like, const SymInt& rows) {
  return empty_like_sizes({like.sym_size(0), like.sym_size(1), rows, like.sym_size(3)}, like, like.scalar_type());
}

}  // namespace

CompactRowsArgs rows_args(const Tensor& tensor, int64_t rows, const Tensor& keep) {
  CompactRowsArgs args;
  args.batch = tensor.size(0);
  args.heads = tensor.size(1);
  args.rows = rows;
  args.kept = keep.size(1);
  args.columns = tensor.size(3);
  args.element_size = static_cast<int64_t>(tensor.element_size());
  args.keep = keep.const_data_ptr<int64_t>();
  return args;
}

TensorPair kv_meta(const Tensor& key, const Tensor& value, const Tensor& keep) {
  check_compact_kv(key, value, keep);
  return {empty_rows(key, keep.sym_size(1)), empty_rows(value, keep.sym_size(1))};
}

TensorPair kv_backward_meta(const OptionalTensor& grad_key, const OptionalTensor& grad_value, const Tensor& keep,
                            SymInt num_keys) {
  check_compact_kv_backward(grad_key, grad_value, keep, num_keys);
  return {grad_key.has_value() ? empty_rows(*grad_key, num_keys) : Tensor(),
          grad_value.has_value() ? empty_rows(*grad_value, num_keys) : Tensor()};
}

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  check_compact_linear("compact_linear", input, weight, bias, keep);
  const SymInt heads = keep.sym_size(0);
  return empty_like_sizes({input.sym_size(0), heads, keep.sym_size(1), weight.sym_size(0) / heads.max(1)}, input,
                          input.scalar_type());
}

CompactLinearArgs linear_args(const Tensor& input, const Tensor& weight, const Tensor& keep) {
  CompactLinearArgs args;
  args.batch = input.size(0);
  args.heads = keep.size(0);
  args.rows = input.size(1);
  args.kept = keep.size(1);
  args.in_features = input.size(2);
  args.head_dim = weight.size(0) / std::max<int64_t>(args.heads, 1);
  args.dtype = kernel_dtype(input.scalar_type());
  args.keep = keep.const_data_ptr<int64_t>();
  args.input = {input.const_data_ptr(), input.stride(0), 0, input.stride(1)};
  args.weight = weight.const_data_ptr();
  args.weight_stride = weight.stride(0);
  return args;
}

LinearGrads linear_backward_meta(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                 const Tensor& keep, LinearMask output_mask) {
  check_compact_linear_backward(grad_output, input, weight, keep);
  const auto empty = [&](bool wanted, c10::SymIntArrayRef sizes) {
    return wanted ? empty_like_sizes(sizes, input, input.scalar_type()) : Tensor();
  };
  return {empty(output_mask[0], input.sym_sizes()), empty(output_mask[1], weight.sym_sizes()),
          empty(output_mask[2], weight.sym_sizes().slice(0, 1))};
}

CompactLinearGrads linear_grads(const Tensor& grad_output, const LinearGrads& grads) {
  const auto data = [](const Tensor& grad) { return grad.defined() ? grad.mutable_data_ptr() : nullptr; };
  return {readable(grad_output), data(std::get<0>(grads)), data(std::get<1>(grads)), data(std::get<2>(grads))};
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// keep, contiguous, with every row checked to ascend within 0..rows - 1 up to its padding of -1.
Tensor checked_keep(const char* op, const Tensor& keep, int64_t rows) {
  Tensor checked = keep.contiguous();
  const int64_t* row = checked.const_data_ptr<int64_t>();
  for (int64_t h = 0; h < keep.size(0); ++h) {
    for (int64_t k = 0; k < keep.size(1); ++k) {
      const int64_t kept = row[h * keep.size(1) + k];
      TORCH_CHECK(kept >= -1 && kept < rows, op, ": keep must lie in -1..M - 1 = ", rows - 1, " (got ", kept,
                  " for head ", h, ")");
      const int64_t previous = k > 0 ? row[h * keep.size(1) + k - 1] : -1;
      TORCH_CHECK(kept == -1 || k == 0 || (previous >= 0 && kept > previous), op,
                  ": keep must ascend in each row and be padded with -1 at its end only (got ", kept, " after ",
                  previous, " for head ", h, ")");
    }
  }
  return checked;
}

TensorPair kv_cpu(const Tensor& key, const Tensor& value, const Tensor& keep) {
  TensorPair kept = kv_meta(key, value, keep);  // the same checks and results
  const Tensor checked = checked_keep("compact_kv", keep, key.size(2));
  const auto copy = [&](const Tensor& source, const Tensor& target) {
    const Tensor rows = contiguous_rows(source);
    cpu::compact_rows(rows_args(rows, rows.size(2), checked), readable(rows), writable(target), cpu_parallel());
  };
  copy(key, std::get<0>(kept));
  copy(value, std::get<1>(kept));
  return kept;
}

TensorPair kv_backward_cpu(const OptionalTensor& grad_key, const OptionalTensor& grad_value, const Tensor& keep,
                           int64_t num_keys) {
  TensorPair grads = kv_backward_meta(grad_key, grad_value, keep, num_keys);
  const Tensor checked = checked_keep("compact_kv_backward", keep, num_keys);
  const auto scatter = [&](const OptionalTensor& source, const Tensor& target) {
    if (!source.has_value()) return;
    const Tensor rows = contiguous_rows(*source);
    cpu::expand_rows(rows_args(rows, num_keys, checked), readable(rows), writable(target), cpu_parallel());
  };
  scatter(grad_key, std::get<0>(grads));
  scatter(grad_value, std::get<1>(grads));
  return grads;
}

struct CompactKv : torch::autograd::Function<CompactKv> {
  static variable_list forward(AutogradContext* context, const Tensor& key, const Tensor& value, const Tensor& keep) {
    static const auto op = find_op<TensorPair(const Tensor&, const Tensor&, const Tensor&)>("fiak::compact_kv");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [kept_key, kept_value] = op.call(key, value, keep);
    context->save_for_backward({keep});
    context->saved_data["num_keys"] = key.sym_size(2);
    context->set_materialize_grads(false);
    variable_list constants;
    if (!key.requires_grad()) constants.push_back(kept_key);
    if (!value.requires_grad()) constants.push_back(kept_value);
    context->mark_non_differentiable(constants);
    return {kept_key, kept_value};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    static const auto op = find_op<TensorPair(const OptionalTensor&, const OptionalTensor&, const Tensor&, SymInt)>(
        "fiak::compact_kv_backward");
    const auto wanted = [&](size_t i) {
      return context->needs_input_grad(i) ? if_defined(grad_outputs[i]) : std::nullopt;
    };
    variable_list grads(3);
    std::tie(grads[0], grads[1]) =
        op.call(wanted(0), wanted(1), context->get_saved_variables()[0], context->saved_data["num_keys"].toSymInt());
    return grads;
  }
};

TensorPair kv_autograd(const Tensor& key, const Tensor& value, const Tensor& keep) {
  const variable_list kept = CompactKv::apply(key, value, keep);
  return {kept[0], kept[1]};
}

using LinearSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&);

Tensor call_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  static const auto op = find_op<LinearSignature>("fiak::compact_linear");
  return op.call(input, weight, bias, keep);
}

Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return call_linear(autocast(input), autocast(weight), bias.has_value() ? autocast(*bias) : bias, keep);
}

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  const Tensor output = linear_meta(input, weight, bias, keep);  // the same checks and result
  const Tensor checked = checked_keep("compact_linear", keep, input.size(1));
  const Tensor input_rows = contiguous_rows(input), weight_rows = contiguous_rows(weight);
  const Tensor bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  CompactLinearArgs args = linear_args(input_rows, weight_rows, checked);
  if (bias_row.defined()) args.bias = bias_row.const_data_ptr();
  cpu_kernels(input).compact_linear_forward(args, writable(output), cpu_parallel());
  return output;
}

LinearGrads linear_backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                const Tensor& keep, LinearMask output_mask) {
  LinearGrads result = linear_backward_meta(grad_output, input, weight, keep, output_mask);
  const Tensor checked = checked_keep("compact_linear_backward", keep, input.size(1));
  const Tensor input_rows = contiguous_rows(input), weight_rows = contiguous_rows(weight);
  const Tensor grad_rows = contiguous_rows(grad_output);
  cpu_kernels(input).compact_linear_backward(linear_args(input_rows, weight_rows, checked),
                                             linear_grads(grad_rows, result), cpu_parallel());
  return result;
}

struct CompactLinear : torch::autograd::Function<CompactLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& keep) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({input, weight, keep});
    context->saved_data["has_bias"] = bias.has_value();
    context->set_materialize_grads(false);
    return call_linear(input, weight, bias, keep);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    static const auto op = find_op<LinearGrads(const Tensor&, const Tensor&, const Tensor&, const Tensor&, LinearMask)>(
        "fiak::compact_linear_backward");
    variable_list grads(4);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const bool bias = context->saved_data["has_bias"].toBool();
    std::tie(grads[0], grads[1], grads[2]) =
        op.call(grad_outputs[0], saved[0], saved[1], saved[2],
                {context->needs_input_grad(0), context->needs_input_grad(1), bias && context->needs_input_grad(2)});
    return grads;
  }
};

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  return CompactLinear::apply(input, weight, bias, keep);
}

}  // namespace

TORCH_LIBRARY_IMPL(fiak, AutocastCPU, m) { m.impl("compact_linear", linear_autocast); }

TORCH_LIBRARY_IMPL(fiak, AutocastCUDA, m) { m.impl("compact_linear", linear_autocast); }

TORCH_LIBRARY_IMPL(fiak, Autograd, m) {
  m.impl("compact_kv", kv_autograd);
  m.impl("compact_linear", linear_autograd);
}

TORCH_LIBRARY_IMPL(fiak, CPU, m) {
  m.impl("compact_kv", kv_cpu);
  m.impl("compact_kv_backward", kv_backward_cpu);
  m.impl("compact_linear", linear_cpu);
  m.impl("compact_linear_backward", linear_backward_cpu);
}

TORCH_LIBRARY_IMPL(fiak, Meta, m) {
  m.impl("compact_kv", kv_meta);
  m.impl("compact_kv_backward", kv_backward_meta);
  m.impl("compact_linear", linear_meta);
  m.impl("compact_linear_backward", linear_backward_meta);
}

}  // namespace fiak
