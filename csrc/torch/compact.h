// What the registrations for the CPU and for CUDA share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "kernels/compact.h"

namespace fiak {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

/// The copy of `tensor` [batch, heads, any, columns] along `keep`, whose values are not looked at; `rows` are those of
/// the uncompacted side.
CompactRowsArgs rows_args(const at::Tensor& tensor, int64_t rows, const at::Tensor& keep);

/// compact_kv's and compact_kv_backward's checks of shapes, dtypes and devices, and their uninitialised results.
TensorPair kv_meta(const at::Tensor& key, const at::Tensor& value, const at::Tensor& keep);
TensorPair kv_backward_meta(const std::optional<at::Tensor>& grad_key, const std::optional<at::Tensor>& grad_value,
                            const at::Tensor& keep, c10::SymInt num_keys);

using LinearGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  ///< of input, weight, bias
using LinearMask = std::array<bool, 3>;

/// compact_linear's arguments but for its bias. Rows of `input` and `weight` must be contiguous, and so must `keep`,
/// whose values are not looked at.
CompactLinearArgs linear_args(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& keep);

/// compact_linear's and compact_linear_backward's checks of shapes, dtypes and devices, and their uninitialised
/// results.
at::Tensor linear_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const at::Tensor& keep);
LinearGrads linear_backward_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                 const at::Tensor& keep, LinearMask output_mask);
/// The gradients' memory, with grad_output's rows, which must be contiguous.
CompactLinearGrads linear_grads(const at::Tensor& grad_output, const LinearGrads& grads);

}  // namespace fiak
