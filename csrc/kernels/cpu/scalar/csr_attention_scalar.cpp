#include "kernels/cpu/scalar/csr_attention_scalar.h"

#include "kernels/cpu/isa/list.h"

namespace fiak::cpu::scalar {

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::csr_forward<decltype(x)>(args, result, parallel); });
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::csr_backward<decltype(x)>(args, grads, parallel); });
}

void csr_blocks(const CsrArgs&, int64_t, BlockCounts&) {}

}  // namespace fiak::cpu::scalar
