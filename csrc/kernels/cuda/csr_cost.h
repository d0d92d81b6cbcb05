// Which of csr_attention's kernels is faster on a head: that over entries, a warp for a row, or that over the tiles
// that hold entries, on tensor cores where they multiply the dtype.
//
// Not measured: no GPU was there. From documented rates of an SM (A100: 128 float32 FMA, 1024 float16 FMA and 128 bytes
// from the L1 cache a cycle), for D = Dv = 64; wider and narrower heads change both sides alike.
//
// An entry reads a row of K and one of V, 256 bytes in 16 bits: 2 cycles. A warp issues about 90 instructions for eight
// entries, 2.8 cycles an entry, which is more. In float32 the bytes are twice as many, 4 cycles.
//
// A pair of a tile takes 128 FMA: 0.125 cycles on tensor cores, of which kernels of this kind reach 60%; and about 15
// instructions of softmax, 0.12 cycles. In float32, by FMA, it takes 1 cycle, and as much again to load operands from
// shared memory.
#pragma once

#include "kernels/plan/plan.h"
#include "kernels/types.h"

namespace fiak::cuda {

/// For tests and benchmarks: the kernel of all heads, where the plan has what it needs; kAuto: the cost model's choice.
enum class CsrKernel : int32_t { kAuto, kEntries, kTiles };

/// `tiles` are the plan's.
FIAK_HOST_DEVICE inline bool tiles_are_faster(float nnz, float tiles, bool tensor_cores) {
  const float entry = tensor_cores ? 2.8f : 4.0f;
  const float pair = tensor_cores ? 0.33f : 2.0f;
  return tiles * (kPlanTileRows * kPlanTileKeys) * pair < nnz * entry;
}

}  // namespace fiak::cuda
