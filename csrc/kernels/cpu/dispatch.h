// Which CPU kernels a call gets: the best instruction set of this machine, or less if FIAK_CPU_ISA says so.
#pragma once

#include "kernels/attention.h"
#include "kernels/compact.h"
#include "kernels/cpu/block_counts.h"

namespace fiak::cpu {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

/// One implementation of every op. The scalar table takes every dtype; the others take all but float64.
struct Kernels {
  void (*prior_forward)(const PriorArgs&, const ForwardResult&, const Parallel&);
  void (*prior_backward)(const PriorArgs&, const BackwardArgs&, const Parallel&);
  void (*csr_forward)(const CsrArgs&, const ForwardResult&, const Parallel&);
  void (*csr_backward)(const CsrArgs&, const BackwardArgs&, const Parallel&);
  void (*compact_linear_forward)(const CompactLinearArgs&, const Output& output, const Parallel&);
  void (*compact_linear_backward)(const CompactLinearArgs&, const CompactLinearGrads&, const Parallel&);
  // How they cut a call with these sizes on so many threads, csr_attention's where all pairs are kept; operands are not
  // read. Scalar kernels cut nothing.
  void (*prior_blocks)(const PriorArgs&, int64_t threads, BlockCounts&);
  void (*csr_blocks)(const CsrArgs&, int64_t threads, BlockCounts&);
  void (*compact_linear_blocks)(const CompactLinearArgs&, BlockCounts&);
};

const char* isa_name(Isa isa);

/// The best instruction set that this machine has.
Isa machine_isa();

/// machine_isa(), lowered by the environment variable FIAK_CPU_ISA (scalar, avx2, avx512, avx512_bf16,
/// amx_bf16), which is read at every call; throws std::invalid_argument for another name.
Isa selected_isa();

/// The last instruction set that has something for this dtype: float64 runs scalar, and only bfloat16 uses more than
/// AVX-512.
Isa most_isa(DType dtype);

/// The instruction set of the kernels that a call with this dtype runs on.
Isa kernel_isa(DType dtype);

/// The kernels of kernel_isa(dtype); `isa` must be a value that kernel_isa returned.
const Kernels& kernels(Isa isa);

}  // namespace fiak::cpu
