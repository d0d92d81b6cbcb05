#include "torch/operands.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

namespace fiak {
namespace {

using at::Tensor;

template <class Operand, class Pointer>
Operand operand(const Tensor& tensor, Pointer data) {
  Operand result;
  result.data = data;
  int64_t* const strides[] = {&result.row_stride, &result.head_stride, &result.batch_stride};
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) *strides[i] = tensor.stride(tensor.dim() - 2 - i);
  return result;
}

void run_parallel(int64_t tasks, void (*task)(void* context, int64_t index), void* context) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

}  // namespace

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:  // the checkers let no other through
      return DType::kFloat16;
  }
}

Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

Input readable(const Tensor& tensor) { return operand<Input>(tensor, tensor.const_data_ptr()); }

Output writable(const Tensor& tensor) {
  return tensor.defined() ? operand<Output>(tensor, tensor.mutable_data_ptr()) : Output{};
}

Tensor empty_like_sizes(c10::SymIntArrayRef sizes, const Tensor& options, at::ScalarType dtype) {
  return at::empty_symint(sizes, options.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
}

const cpu::Kernels& cpu_kernels(const Tensor& tensor) {
  return cpu::kernels(cpu::kernel_isa(kernel_dtype(tensor.scalar_type())));
}

Parallel cpu_parallel() { return {at::in_parallel_region() ? 1 : at::get_num_threads(), run_parallel}; }

Tensor checked_counts(const char* op, const char* name, const Tensor& tensor, int64_t maximum,
                      const char* maximum_name) {
  Tensor counts = tensor.to(at::kLong).contiguous();
  const int64_t* data = counts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < counts.numel(); ++i) {
    TORCH_CHECK(data[i] >= 0 && data[i] <= maximum, op, ": ", name, " must lie in 0..", maximum_name, " = ", maximum,
                " (got ", data[i], " for batch element ", i, ")");
  }
  return counts;
}

}  // namespace fiak
