// Attention of few queries to many keys, as in cached decoding. Both ops' forward kernels hand such calls over.
#pragma once

#include "kernels/attention.h"
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/isa/vec.h"

namespace fiak::cpu::FIAK_ISA {

/// The most query rows, over all query heads that share a key head, that decode() is faster for than packing or
/// transposing the keys and values first.
constexpr int64_t kMostDecodedRows = 32;

FIAK_INLINE bool is_decoding(const AttentionArgs& args) {
  return args.key_heads > 0 && args.queries * (args.query_heads / args.key_heads) <= kMostDecodedRows;
}

void csr_decode(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel);
void prior_decode(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel);

/// Their counts, 0 for calls that they do not serve.
void csr_decode_blocks(const CsrArgs& args, BlockCounts& blocks);
void prior_decode_blocks(const PriorArgs& args, BlockCounts& blocks);

}  // namespace fiak::cpu::FIAK_ISA
