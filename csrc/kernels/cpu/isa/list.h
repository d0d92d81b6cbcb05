// The instruction sets that kernels are compiled for, and the kernels of each: what all lists and tables of them are
// made of. CMakeLists.txt has the compiler's flags for each.
#pragma once

#include "kernels/attention.h"
#include "kernels/compact.h"
#include "kernels/cpu/block_counts.h"

/// X(name, value of Isa), each a namespace and a superset of the one before.
#define FIAK_FOR_SIMD_ISAS(X) X(avx2, kAvx2) X(avx512, kAvx512) X(avx512_bf16, kAvx512Bf16) X(amx_bf16, kAmxBf16)
#define FIAK_FOR_ISAS(X) X(scalar, kScalar) FIAK_FOR_SIMD_ISAS(X)
/// Those that this build has kernels of.
#if defined(__x86_64__)
#define FIAK_FOR_BUILT_ISAS(X) FIAK_FOR_ISAS(X)
#else
#define FIAK_FOR_BUILT_ISAS(X) X(scalar, kScalar)
#endif

/// X(name, parameters) of the functions that every instruction set has. X_blocks says how a kernel cuts a call with
/// these sizes on so many threads, csr_attention's where all pairs are kept; operands are not read. Scalar kernels cut
/// nothing.
#define FIAK_FOR_KERNELS(X)                                                                          \
  X(prior_forward, (const PriorArgs&, const ForwardResult&, const Parallel&))                        \
  X(prior_backward, (const PriorArgs&, const BackwardArgs&, const Parallel&))                        \
  X(csr_forward, (const CsrArgs&, const ForwardResult&, const Parallel&))                            \
  X(csr_backward, (const CsrArgs&, const BackwardArgs&, const Parallel&))                            \
  X(compact_linear_forward, (const CompactLinearArgs&, const Output&, const Parallel&))              \
  X(compact_linear_backward, (const CompactLinearArgs&, const CompactLinearGrads&, const Parallel&)) \
  X(prior_blocks, (const PriorArgs&, int64_t threads, BlockCounts&))                                 \
  X(csr_blocks, (const CsrArgs&, int64_t threads, BlockCounts&))                                     \
  X(compact_linear_blocks, (const CompactLinearArgs&, BlockCounts&))

namespace fiak::cpu {

#define FIAK_ENUMERATE(name, value) value,
enum class Isa : int { FIAK_FOR_ISAS(FIAK_ENUMERATE) };
#undef FIAK_ENUMERATE

#define FIAK_NAME(name, value) #name,
constexpr const char* kIsaNames[] = {FIAK_FOR_ISAS(FIAK_NAME)};
constexpr const char* kBuiltIsaNames[] = {FIAK_FOR_BUILT_ISAS(FIAK_NAME)};
#undef FIAK_NAME

#define FIAK_DECLARE_KERNEL(name, parameters) void name parameters;
#define FIAK_DECLARE_KERNELS(isa, value) \
  namespace isa {                        \
  constexpr Isa kIsa = Isa::value;       \
  FIAK_FOR_KERNELS(FIAK_DECLARE_KERNEL)  \
  }
FIAK_FOR_ISAS(FIAK_DECLARE_KERNELS)
#undef FIAK_DECLARE_KERNELS
#undef FIAK_DECLARE_KERNEL

}  // namespace fiak::cpu
