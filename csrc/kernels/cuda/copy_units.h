// The parameters of the row copying kernels, and the largest unit that rows can be copied in.
#pragma once

#include <cstdint>

#include "kernels/compact.h"

namespace fiak::cuda {

struct alignas(16) Unit16 {
  uint64_t low, high;
};

/// Strides (batch, head, row) and the rows' length are in units of the kernel's Unit.
struct CopyRowsParams {
  const void* source;
  void* target;
  const int64_t* keep;  ///< [heads, kept], ascending, padded at the end with -1
  int64_t batch, heads, rows, kept, row_units;
  int64_t source_strides[3], target_strides[3];
};

/// call(Unit{}, params) with the largest Unit of 16, 8, 4, 2 or 1 bytes that divides the rows' length, every stride and
/// both addresses.
template <class Call>
void with_copy_unit(const CompactRowsArgs& args, const Input& source, const Output& target, Call&& call) {
  const int64_t bytes = args.element_size;
  const uint64_t all =
      reinterpret_cast<uintptr_t>(source.data) | reinterpret_cast<uintptr_t>(target.data) |
      static_cast<uint64_t>((args.columns | source.batch_stride | source.head_stride | source.row_stride |
                             target.batch_stride | target.head_stride | target.row_stride) *
                            bytes);
  const auto run = [&](auto unit) {
    const int64_t size = sizeof(unit);
    const auto units = [&](int64_t elements) { return elements * bytes / size; };
    call(unit, CopyRowsParams{source.data,
                              target.data,
                              args.keep,
                              args.batch,
                              args.heads,
                              args.rows,
                              args.kept,
                              units(args.columns),
                              {units(source.batch_stride), units(source.head_stride), units(source.row_stride)},
                              {units(target.batch_stride), units(target.head_stride), units(target.row_stride)}});
  };
  if (all % 16 == 0) return run(Unit16{});
  if (all % 8 == 0) return run(uint64_t{});
  if (all % 4 == 0) return run(uint32_t{});
  if (all % 2 == 0) return run(uint16_t{});
  run(uint8_t{});
}

}  // namespace fiak::cuda
