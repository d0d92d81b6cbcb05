#include "kernels/cpu/scalar/prior_attention_scalar.h"

#include "kernels/cpu/isa/list.h"

namespace fiak::cpu::scalar {

void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::prior_forward<decltype(x)>(args, result, parallel); });
}

void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  with_element_type(args.dtype, [&](auto x) { cpu::prior_backward<decltype(x)>(args, grads, parallel); });
}

void prior_blocks(const PriorArgs&, int64_t, BlockCounts&) {}

}  // namespace fiak::cpu::scalar
