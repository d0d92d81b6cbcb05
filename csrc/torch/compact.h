// What compact_kv's registrations for the CPU and for CUDA share.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace fiak
