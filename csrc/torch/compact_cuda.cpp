// fiak::compact_kv and fiak::compact_linear on CUDA. Schemas and shapes are in library.cpp; everything else of the ops
// is in compact.cpp.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "kernels/cuda/compact_linear.h"
#include "kernels/cuda/compact_rows.h"
#include "torch/compact.h"
#include "torch/operands.h"

namespace fiak {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using CopyRows = void (*)(const CompactRowsArgs&, const Input&, const Output&, void*);

/// Copies one tensor on the current stream of its device, which the caller has made current.
void copy_rows(CopyRows copy, const Tensor& source, const Tensor& target, int64_t rows, const Tensor& keep) {
  const Tensor readable_rows = contiguous_rows(source);
  copy(rows_args(readable_rows, rows, keep), readable(readable_rows), writable(target),
       c10::cuda::getCurrentCUDAStream().stream());
}

TensorPair kv_cuda(const Tensor& key, const Tensor& value, const Tensor& keep) {
  const c10::cuda::CUDAGuard device(key.device());
  const TensorPair kept = kv_meta(key, value, keep);
  const Tensor indices = keep.contiguous();
  copy_rows(cuda::compact_rows, key, std::get<0>(kept), key.size(2), indices);
  copy_rows(cuda::compact_rows, value, std::get<1>(kept), key.size(2), indices);
  return kept;
}

TensorPair kv_backward_cuda(const OptionalTensor& grad_key, const OptionalTensor& grad_value, const Tensor& keep,
                            int64_t num_keys) {
  const c10::cuda::CUDAGuard device(keep.device());
  const TensorPair grads = kv_backward_meta(grad_key, grad_value, keep, num_keys);
  const Tensor indices = keep.contiguous();
  if (grad_key.has_value()) copy_rows(cuda::expand_rows, *grad_key, std::get<0>(grads), num_keys, indices);
  if (grad_value.has_value()) copy_rows(cuda::expand_rows, *grad_value, std::get<1>(grads), num_keys, indices);
  return grads;
}

/// What the CUDA kernels do not do, of inputs that passed the op's checker.
void check_limits(const char* op, const Tensor& input, const Tensor& weight, const Tensor& keep) {
  TORCH_CHECK(input.scalar_type() != at::kDouble, op,
              ": input must be torch.float32, torch.bfloat16 or torch.float16 on CUDA (got torch.float64)");
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  for (const auto& [name, tensor] : {std::pair("input", input), std::pair("weight", weight), std::pair("keep", keep)}) {
    for (const int64_t size : tensor.sizes()) {
      TORCH_CHECK(size <= kMost, op, ": ", name, " must have sizes below 2^30 on CUDA (got ", tensor.sizes(), ")");
    }
  }
  TORCH_CHECK(input.size(0) * keep.size(1) <= kMost, op, ": keep must have B * K below 2^30 on CUDA (got ",
              input.size(0), " * ", keep.size(1), ")");
}

Tensor linear_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& keep) {
  const c10::cuda::CUDAGuard device(input.device());
  const Tensor output = linear_meta(input, weight, bias, keep);  // the same checks and result
  check_limits("compact_linear", input, weight, keep);
  const Tensor indices = keep.contiguous(), bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  const Tensor input_rows = contiguous_rows(input), weight_rows = contiguous_rows(weight);
  CompactLinearArgs args = linear_args(input_rows, weight_rows, indices);
  if (bias_row.defined()) args.bias = bias_row.const_data_ptr();
  cuda::compact_linear_forward(args, writable(output), c10::cuda::getCurrentCUDAStream().stream());
  return output;
}

LinearGrads linear_backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                 const Tensor& keep, LinearMask output_mask) {
  const c10::cuda::CUDAGuard device(input.device());
  const LinearGrads grads = linear_backward_meta(grad_output, input, weight, keep, output_mask);
  check_limits("compact_linear_backward", input, weight, keep);
  const Tensor indices = keep.contiguous(), grad_rows = contiguous_rows(grad_output);
  const Tensor input_rows = contiguous_rows(input), weight_rows = contiguous_rows(weight);
  cuda::compact_linear_backward(linear_args(input_rows, weight_rows, indices), linear_grads(grad_rows, grads),
                                c10::cuda::getCurrentCUDAStream().stream());
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fiak, CUDA, m) {
  m.impl("compact_kv", kv_cuda);
  m.impl("compact_kv_backward", kv_backward_cuda);
  m.impl("compact_linear", linear_cuda);
  m.impl("compact_linear_backward", linear_backward_cuda);
}

}  // namespace fiak
