// fiak::compact_kv on CUDA. Schemas and shapes are in library.cpp; everything else of the op is in compact.cpp.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

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

}  // namespace

TORCH_LIBRARY_IMPL(fiak, CUDA, m) {
  m.impl("compact_kv", kv_cuda);
  m.impl("compact_kv_backward", kv_backward_cuda);
}

}  // namespace fiak
