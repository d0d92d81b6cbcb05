// What the attention ops' registrations for CUDA share.
#pragma once

#include "torch/inputs.h"

namespace fiak {

/// Refuses what the CUDA kernels do not do, of inputs that passed the op's checker.
void check_cuda_limits(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value);

/// The seed's address on the device, or null.
inline const int64_t* seed_address(const OptionalTensor& seed) {
  return seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
}

}  // namespace fiak
