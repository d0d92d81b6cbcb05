// Which (query, key) pairs an op computes, in which order, and what they weigh: one contract, which prior_attention and
// csr_attention each implement for every way to walk pairs. The classes are called PriorPairs and CsrPairs everywhere;
// a kernel is a template on one of them and knows no op.
//
//   by             pairs come as                                        classes
//   scalar code    a visit for each pair of a query, or of a key        cpu/scalar/{prior,csr}_attention_scalar.h
//   dense blocks   supports of vectors of keys, of blocks of queries    cpu/dense/{prior_attention,csr_dense}_simd.cpp
//   decoding       segments of a query's keys                           cpu/decode/decode_simd.cpp
//   entries        segments of a row, or of a column (csr only)         cpu/entries/segments.h, cpu/rows/rows_simd.cpp
//   CUDA tiles     log weights of 16 x 8 pairs                          cuda/{prior_attention,csr_tiles}.cuh
//   CUDA entries   a warp's entries of a row or column (csr only)       cuda/csr_entries.cuh
//
// What all of them keep to:
//
//   - Pairs of a query come with ascending keys, pairs of a key with ascending queries, those of the query heads that
//     share a key head head by head: so every sum has one order.
//   - A pair exists where all of these hold: key < keys_of(args, b); not is_causal or key <= query; and, of
//     csr_attention, the row offset_of(args, b) + query of head PatternHeads::head_of(b, h) has the key.
//   - A pair's weight is w, or ln w where log_prior; 1 without a prior. Outside the support, w <= 0 or ln w = -inf, no
//     row of query, key or value may be read for the pair but to find its weight's gradient.
//   - Dropout counts a query by its row of the pattern, offset_of(args, b) + query.
#pragma once

#include "kernels/attention.h"

namespace fiak {

/// How many keys of element b are visible; what lies behind them is never read.
static inline __attribute__((always_inline)) int64_t keys_of(const AttentionArgs& args, int64_t b) {
  return args.kv_lens != nullptr ? args.kv_lens[b] : args.keys;
}

/// The row of query 0 of element b among its head's rows of the pattern.
static inline __attribute__((always_inline)) int64_t offset_of(const CsrArgs& args, int64_t b) {
  return args.query_offsets != nullptr ? args.query_offsets[b] : 0;
}

}  // namespace fiak
