// The kernels of each instruction set, by name; dispatch.cpp makes tables of them.
#pragma once

#include "kernels/attention.h"
#include "kernels/compact.h"
#include "kernels/cpu/block_counts.h"

#define FIAK_DECLARE_KERNELS(isa)                                                                     \
  namespace fiak::cpu::isa {                                                                          \
  void prior_forward(const PriorArgs&, const ForwardResult&, const Parallel&);                        \
  void prior_backward(const PriorArgs&, const BackwardArgs&, const Parallel&);                        \
  void csr_forward(const CsrArgs&, const ForwardResult&, const Parallel&);                            \
  void csr_backward(const CsrArgs&, const BackwardArgs&, const Parallel&);                            \
  void compact_linear_forward(const CompactLinearArgs&, const Output&, const Parallel&);              \
  void compact_linear_backward(const CompactLinearArgs&, const CompactLinearGrads&, const Parallel&); \
  void prior_blocks(const PriorArgs&, int64_t threads, BlockCounts&);                                 \
  void csr_blocks(const CsrArgs&, int64_t threads, BlockCounts&);                                     \
  void compact_linear_blocks(const CompactLinearArgs&, BlockCounts&);                                 \
  }

FIAK_DECLARE_KERNELS(scalar)
#if defined(__x86_64__)
FIAK_DECLARE_KERNELS(avx2)
FIAK_DECLARE_KERNELS(avx512)
FIAK_DECLARE_KERNELS(avx512_bf16)
FIAK_DECLARE_KERNELS(amx_bf16)
#endif
