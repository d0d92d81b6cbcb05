// The dense family for csr_attention: prior_attention's kernels with a bit for each pair. It reads bits and tiles of
// the plan, and takes no prior.
#pragma once

#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/entries/entries.h"

namespace fiak::cpu::FIAK_ISA {

/// Forward of these rows. The kernel's blocks of queries start at multiples of their size: of a block, whoever has its
/// first query computes all, so that no split among threads changes a bit.
void csr_dense_forward(const CsrArgs& args, const ForwardResult& result, const BundleRows& rows);

/// Backward of these key heads and of the query heads that read them.
void csr_dense_backward(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                        const Parallel& parallel);

/// See FIAK_FOR_KERNELS.
void csr_dense_blocks(const CsrArgs& args, int64_t threads, bool decodes, BlockCounts& blocks);

}  // namespace fiak::cpu::FIAK_ISA
