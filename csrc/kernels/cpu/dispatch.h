// Which CPU kernels a call gets: the best instruction set of this machine, or less if FIAK_CPU_ISA says so.
#pragma once

#include "kernels/cpu/isa/list.h"

namespace fiak::cpu {

/// One implementation of every op. The scalar table takes every dtype; the others take all but float64.
struct Kernels {
#define FIAK_MEMBER(name, parameters) void(*name) parameters;
  FIAK_FOR_KERNELS(FIAK_MEMBER)
#undef FIAK_MEMBER
};

const char* isa_name(Isa isa);

/// The best instruction set that this machine has.
Isa machine_isa();

/// machine_isa(), lowered by the environment variable FIAK_CPU_ISA, a name of kIsaNames, which is read at every call;
/// throws std::invalid_argument for another name.
Isa selected_isa();

/// The last instruction set that has something for this dtype: float64 runs scalar, and only bfloat16 uses more than
/// AVX-512.
Isa most_isa(DType dtype);

/// The instruction set of the kernels that a call with this dtype runs on.
Isa kernel_isa(DType dtype);

/// The kernels of kernel_isa(dtype); `isa` must be a value that kernel_isa returned.
const Kernels& kernels(Isa isa);

}  // namespace fiak::cpu
