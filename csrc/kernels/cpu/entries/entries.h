// The kernel family over entries: one query's entries at a time, on the packed rows of K and V that they name; backward
// by rows for dQ and by columns for dK and dV. It reads columns, and backward the transpose, of the plan.
#pragma once

#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/entries/bundle.h"

namespace fiak::cpu::FIAK_ISA {

/// Rows of a pattern to compute forward.
struct BundleRows {
  const SampleBundle& bundle;
  int64_t h, begin, end;  ///< query head, and its rows of the pattern
  int64_t longest;        ///< entries of the longest of these
  const SampleBundle& next;
  int64_t next_h;  ///< what the caller comes to next; -1 where nothing is
};

/// How samples are bundled, and stored while they are.
Storage entries_storage(const CsrArgs& args);
/// How many samples to bundle (packing.h).
int64_t bundled_samples(const CsrArgs& args, Storage storage);

/// Forward of these rows, with all keys at once or, where `split`, in slices that fit into the L1 cache.
void entries_forward(const CsrArgs& args, const ForwardResult& result, Storage storage, const BundleRows& rows,
                     bool split);

/// Backward of these key heads and of the query heads that read them. The gradient of the prior must be 0.
void entries_backward(const CsrArgs& args, const BackwardArgs& grads, Storage storage, const KeyHeads& key_heads,
                      const Parallel& parallel);

/// Whether backward is better left to the family by rows: where the segments of all waves, empty or not, are many more
/// than the entries and what they belong to; where indices are not of 16 bits or a column takes a search to find; and
/// where query heads share weights, whose gradient sums over them.
bool entries_leave_backward(const CsrArgs& args, const BackwardArgs& grads, Storage storage);

/// See FIAK_FOR_KERNELS.
void entries_blocks(const CsrArgs& args, BlockCounts& blocks);

}  // namespace fiak::cpu::FIAK_ISA
