#include "kernels/cpu/simd.h"
#include "kernels/cpu/tables.h"

namespace fiak::cpu::FIAK_ISA {
void compact_linear_forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) { scalar::compact_linear_forward(args, output, parallel); }
void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) { scalar::compact_linear_backward(args, grads, parallel); }
}  // namespace fiak::cpu::FIAK_ISA
