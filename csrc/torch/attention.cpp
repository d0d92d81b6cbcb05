#include "torch/attention.h"

#include <ATen/autocast_mode.h>

namespace fiak {
namespace {

using at::Tensor;

/// [batch, heads, rows, columns] that lies in [batch, rows, heads, columns] memory order.
Tensor empty_rows_first(const Tensor& like, const c10::SymInt& columns) {
  return empty_like_sizes({like.sym_size(0), like.sym_size(2), like.sym_size(1), columns}, like, like.scalar_type())
      .transpose(1, 2);
}

}  // namespace

ForwardTensors empty_forward(const Tensor& query, const Tensor& value) {
  return {empty_rows_first(query, value.sym_size(3)),
          empty_like_sizes(query.sym_sizes().slice(0, 3), query, weight_dtype(query.scalar_type()))};
}

GradTensors empty_grads(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& weight,
                        const OutputMask& output_mask) {
  GradTensors grads;
  if (output_mask[0]) std::get<0>(grads) = empty_rows_first(query, query.sym_size(3));
  if (output_mask[1]) std::get<1>(grads) = empty_rows_first(key, key.sym_size(3));
  if (output_mask[2]) std::get<2>(grads) = empty_rows_first(value, value.sym_size(3));
  if (output_mask[3] && weight.has_value()) {
    std::get<3>(grads) = empty_like_sizes(weight->sym_sizes(), *weight, weight->scalar_type());
  }
  return grads;
}

bool has_pairs(const AttentionArgs& args) {
  return args.batch > 0 && args.query_heads > 0 && args.queries > 0 && args.keys > 0;
}

OutputMask wanted_grads(const torch::autograd::AutogradContext& context, bool has_weight) {
  return {context.needs_input_grad(0), context.needs_input_grad(1), context.needs_input_grad(2),
          has_weight && context.needs_input_grad(3)};
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

Tensor autocast(const Tensor& tensor) {
  const c10::DeviceType device = tensor.device().type();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace fiak
