// From tensors to what kernels take: plain operands, element types, threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/types.h"
#include "torch/checks.h"

namespace fiak {

DType kernel_dtype(at::ScalarType dtype);

/// `tensor`, or a copy of it where its last dimension is not contiguous.
at::Tensor contiguous_rows(const at::Tensor& tensor);

/// A tensor [..., rows, columns] of up to four dimensions with contiguous rows; missing leading strides are 0.
Input readable(const at::Tensor& tensor);
Output writable(const at::Tensor& tensor);  ///< an undefined tensor is a result that is not wanted

/// Uninitialised, contiguous.
at::Tensor empty_like_sizes(c10::SymIntArrayRef sizes, const at::Tensor& options, at::ScalarType dtype);

/// The CPU kernels for this tensor's dtype, and torch's threads to run them on (one inside a parallel region).
const cpu::Kernels& cpu_kernels(const at::Tensor& tensor);
Parallel cpu_parallel();

/// An integer tensor as contiguous int64, with every element checked to lie in 0..maximum. CPU only.
at::Tensor checked_counts(const char* op, const char* name, const at::Tensor& tensor, int64_t maximum,
                          const char* maximum_name);

}  // namespace fiak
