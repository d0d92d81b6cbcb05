#include "kernels/cuda/compact_rows.cuh"
#include "kernels/cuda/compact_rows.h"
#include "kernels/cuda/copy_units.h"
#include "kernels/cuda/launch.h"

namespace fiak::cuda {
namespace {

/// Copies to `target_rows` rows of each head with the kernel that kernel_of(unit) describes.
template <class KernelOf>
void launch(const CompactRowsArgs& args, int64_t target_rows, const Input& source, const Output& target, void* stream,
            KernelOf&& kernel_of) {
  const int64_t rows = args.batch * args.heads * target_rows;
  if (rows == 0 || args.columns == 0) return;
  with_copy_unit(args, source, target, [&](auto unit, const CopyRowsParams& params) {
    const auto kernel = kernel_of(unit);
    LaunchOnStream{stream}(kernel, grid_stride_blocks(rows, kernel.threads / kWarpThreads, kernel.name), params);
  });
}

}  // namespace

void compact_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream) {
  launch(args, args.kept, source, target, stream, [](auto unit) { return compact_rows_kernel(unit); });
}

void expand_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream) {
  launch(args, args.rows, source, target, stream, [](auto unit) { return expand_rows_kernel(unit); });
}

}  // namespace fiak::cuda
