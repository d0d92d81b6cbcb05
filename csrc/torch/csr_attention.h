// What csr_attention's registrations for the CPU and for CUDA share.
#pragma once

#include "torch/attention.h"

namespace fiak {

/// The checks of shapes, dtypes and devices, and uninitialised results.
ForwardTensors csr_forward_meta(const CsrInputs& in);
GradTensors csr_backward_meta(const CsrGradInputs& in);

/// The plan of a pattern on the CPU, which is validated.
at::Tensor csr_plan_cpu(const at::Tensor& crow_indices, const at::Tensor& col_indices, int64_t num_queries,
                        int64_t num_keys);

/// What each of the `heads` heads of a plan on the CPU has to do.
at::Tensor csr_plan_summary_cpu(const at::Tensor& plan, int64_t heads);

}  // namespace fiak
