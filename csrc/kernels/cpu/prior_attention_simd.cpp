#include "kernels/cpu/simd.h"
#include "kernels/cpu/tables.h"

namespace fiak::cpu::FIAK_ISA {
void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) { scalar::prior_forward(args, result, parallel); }
void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) { scalar::prior_backward(args, grads, parallel); }
}  // namespace fiak::cpu::FIAK_ISA
