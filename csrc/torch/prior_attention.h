// What prior_attention's registrations for the CPU and for CUDA share.
#pragma once

#include "torch/attention.h"

namespace fiak {

/// The checks of shapes, dtypes and devices, and uninitialised results.
ForwardTensors prior_forward_meta(const PriorInputs& in);
GradTensors prior_backward_meta(const PriorGradInputs& in);

/// The kernels' arguments; `op` is for errors.
Operands<PriorArgs> prior_operands(const char* op, const PriorInputs& in);

}  // namespace fiak
