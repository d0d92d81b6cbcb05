// csr_attention of long or very sparse patterns: one query's or key's entries at a time, whose rows are read where they
// lie. Nothing is packed and no block of keys or queries is walked, so that work is in proportion to entries, rows and
// columns, however long the pattern is.
#pragma once

#include "kernels/cpu/attention_simd.h"

namespace fiak::cpu::FIAK_ISA {

/// Queries [begin, end) of head h of element b, whose rows of the pattern have at most `longest` entries.
void csr_rows_forward(const CsrArgs& args, const ForwardResult& result, int64_t b, int64_t h, int64_t begin,
                      int64_t end, int64_t longest);

/// Backward of these key heads and of what reads them; of all where the weights' gradient is wanted, which must be 0.
void csr_rows_backward(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                       const Parallel& parallel);

}  // namespace fiak::cpu::FIAK_ISA
