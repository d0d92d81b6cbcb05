#include "kernels/cpu/simd.h"
#include "kernels/cpu/tables.h"

namespace fiak::cpu::FIAK_ISA {
void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) { scalar::csr_forward(args, result, parallel); }
void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) { scalar::csr_backward(args, grads, parallel); }
}  // namespace fiak::cpu::FIAK_ISA
