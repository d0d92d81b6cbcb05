// Which of csr_attention's kernels is faster on a head: that over entries, a warp for a row, or that over the tiles
// that hold entries, on tensor cores where they multiply the dtype.
//
// Not measured: no GPU was there. From documented rates of an SM (A100: 128 float32 FMA, 1024 float16 FMA and 128 bytes
// from the L1 cache a cycle), for D = Dv = 64; wider and narrower heads change both sides alike.
//   An entry     reads a row of K and one of V: 256 bytes in 16 bits, 2 cycles; and 128 FMA with their conversions, 2
//                cycles of issue. Twice the bytes in float32.
//   A pair of a  takes 128 FMA: 0.125 cycles on tensor cores, of which 60% is what kernels of this kind reach; and
//   about tile         15 instructions of softmax, 0.12 cycles. In float32, by FMA: 1 cycle, and as much again to load
//                operands from shared memory.
#pragma once

#include "kernels/pattern/plan.h"
#include "kernels/types.h"

namespace fiak::cuda {

/// For tests and benchmarks: the kernel of all heads, where the plan has what it needs; kAuto: what the cost model
/// says.
enum class CsrKernel : int32_t { kAuto, kEntries, kTiles };

/// `tiles` are the plan's.
FIAK_HOST_DEVICE inline bool tiles_are_faster(float nnz, float tiles, bool tensor_cores) {
  const float entry = tensor_cores ? 2.0f : 4.0f;
  const float pair = tensor_cores ? 0.33f : 2.0f;
  return tiles * (kPlanTileRows * kPlanTileKeys) * pair < nnz * entry;
}

}  // namespace fiak::cuda
