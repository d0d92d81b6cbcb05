// compact_kv on CUDA. Arguments as on the CPU (kernels/compact.h), with device pointers; `stream` is a cudaStream_t of
// the current device. Asynchronous. Errors throw std::runtime_error with the kernel's name; a row index out of range
// traps on the device, as keep's values cannot be checked without synchronising.
#pragma once

#include "kernels/compact.h"

namespace fiak::cuda {

void compact_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream);
void expand_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream);

}  // namespace fiak::cuda
