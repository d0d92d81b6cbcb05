// Device code of compact_kv and its backward: whole rows are copied or zeroed, a warp for each, in units of up to 16
// bytes. No shared memory, no barriers. Keeps to what both nvcc and csrc/simt compile.
//
//   fiak_compact_rows_<unit>    target row k  = source row keep[h, k], zeros where that is -1
//   fiak_compact_expand_<unit>  target row r  = source row k with keep[h, k] == r, zeros where none
//
// <unit>: u8, u16, u32, u64 or u128. parameters: CopyRowsParams, 14 fields of 8 bytes in the order of copy_units.h;
// grid: any number of blocks (rows are dealt out in a grid-stride loop); block: kBlockThreads; shared memory: 0.
#pragma once

#include <cstdint>

#include "kernels/cuda/copy_units.h"
#include "kernels/cuda/keep.cuh"
#include "kernels/cuda/kernel.h"

namespace fiak::cuda {

constexpr int kBlockThreads = 128;
constexpr int kWarpThreads = 32;

/// Copies one row, or zeroes it where `source` is null; the warp's threads take turns.
template <class Unit>
__device__ inline void copy_row(const Unit* source, Unit* target, int64_t units, int lane) {
  for (int64_t i = lane; i < units; i += kWarpThreads) target[i] = source != nullptr ? source[i] : Unit{};
}

/// copy(batch, head, row of target) for this warp's share of all rows of the target.
template <class Copy>
__device__ inline void for_target_rows(const CopyRowsParams& params, int64_t target_rows, Copy&& copy) {
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpThreads;
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kWarpThreads;
  for (int64_t i = warp; i < params.batch * params.heads * target_rows; i += warps) {
    copy(i / target_rows / params.heads, i / target_rows % params.heads, i % target_rows);
  }
}

template <class Unit>
__device__ inline void copy_one(const CopyRowsParams& params, int64_t b, int64_t h, int64_t source_row,
                                int64_t target_row) {
  const Unit* source = static_cast<const Unit*>(params.source) + b * params.source_strides[0] +
                       h * params.source_strides[1] + source_row * params.source_strides[2];
  Unit* target = static_cast<Unit*>(params.target) + b * params.target_strides[0] + h * params.target_strides[1] +
                 target_row * params.target_strides[2];
  copy_row(source_row >= 0 ? source : nullptr, target, params.row_units, static_cast<int>(threadIdx.x % kWarpThreads));
}

template <class Unit>
__device__ inline void compact_rows(const CopyRowsParams& params) {
  for_target_rows(params, params.kept, [&](int64_t b, int64_t h, int64_t k) {
    copy_one<Unit>(params, b, h, kept_row(params.keep, params.kept, params.rows, h, k), k);
  });
}

template <class Unit>
__device__ inline void expand_rows(const CopyRowsParams& params) {
  for_target_rows(params, params.rows, [&](int64_t b, int64_t h, int64_t row) {
    copy_one<Unit>(params, b, h, find_row(params.keep, params.kept, h, row), row);
  });
}

#define FIAK_COPY_KERNELS(unit, Unit)                                                                \
  FIAK_KERNEL(fiak_compact_rows_##unit, compact_rows_kernel(Unit), CopyRowsParams, kBlockThreads, 0, \
              compact_rows<Unit>)                                                                    \
  FIAK_KERNEL(fiak_compact_expand_##unit, expand_rows_kernel(Unit), CopyRowsParams, kBlockThreads, 0, expand_rows<Unit>)
FIAK_COPY_KERNELS(u8, uint8_t)
FIAK_COPY_KERNELS(u16, uint16_t)
FIAK_COPY_KERNELS(u32, uint32_t)
FIAK_COPY_KERNELS(u64, uint64_t)
FIAK_COPY_KERNELS(u128, Unit16)
#undef FIAK_COPY_KERNELS

/// visit(Kernel) for all of them.
template <class Visit>
void for_each_compact_rows_kernel(Visit&& visit) {
  const auto both = [&](auto unit) {
    visit(compact_rows_kernel(unit));
    visit(expand_rows_kernel(unit));
  };
  both(uint8_t{});
  both(uint16_t{});
  both(uint32_t{});
  both(uint64_t{});
  both(Unit16{});
}

}  // namespace fiak::cuda
