#include "kernels/cpu/scalar/compact_linear_scalar.h"

#include "kernels/cpu/isa/list.h"

namespace fiak::cpu::scalar {

void compact_linear_forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::compact_linear_forward<decltype(x)>(args, output, parallel); });
}

void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::compact_linear_backward<decltype(x)>(args, grads, parallel); });
}

void compact_linear_blocks(const CompactLinearArgs&, BlockCounts&) {}

}  // namespace fiak::cpu::scalar
