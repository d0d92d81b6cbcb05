// What this core can do at most, measured in the process: clock, multiply-adds, loads and memory bandwidth.
#pragma once

#include <cstddef>

#include "kernels/cpu/dispatch.h"

namespace fiak {

/// Cycles a second, from a chain of dependent multiplications of three cycles each; 0 where that is not known (only
/// x86-64 is).
double clock_hz();

/// Vector instructions a cycle in loops without any dependence, measured once; all 0 for scalar.
struct Rates {
  int vector_bytes = 0;
  double multiply_adds = 0;        ///< of float32 vectors (vfmadd231ps)
  double loads = 0;                ///< of whole vectors from L1
  double bfloat16_multiplies = 0;  ///< of vdpbf16ps, two bfloat16 multiply-adds a float32 lane; 0 where there is none
  double tile_multiply_adds = 0;   ///< of bfloat16 numbers by tdpbf16ps, not instructions; 0 where there are no tiles
};
const Rates& rates(cpu::Isa isa);

/// Bytes a second that one thread reads from memory, one after the other, beyond all caches.
double read_bandwidth();

/// Overwrites L1 and L2 with 8 MB of other data; L3 may keep what a call reads.
void evict_caches();

}  // namespace fiak
