#include "kernels/cuda/compact_rows.cuh"
#include "kernels/cuda/compact_rows.h"
#include "kernels/cuda/copy_units.h"
#include "kernels/cuda/launch.h"

namespace fiak::cuda {
namespace {

template <bool kExpand>
void launch(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream) {
  constexpr const char* kName = kExpand ? "expand_rows_kernel" : "compact_rows_kernel";
  const int64_t rows = args.batch * args.heads * (kExpand ? args.rows : args.kept);
  if (rows == 0 || args.columns == 0) return;
  const unsigned blocks = grid_stride_blocks(rows, kBlockThreads / kWarpThreads, kName);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  with_copy_unit(args, source, target, [&](auto unit, const CopyRowsParams& params) {
    using Unit = decltype(unit);
    if constexpr (kExpand) {
      expand_rows_kernel<Unit><<<blocks, kBlockThreads, 0, cuda_stream>>>(params);
    } else {
      compact_rows_kernel<Unit><<<blocks, kBlockThreads, 0, cuda_stream>>>(params);
    }
  });
  check(cudaGetLastError(), kName);
}

}  // namespace

void compact_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream) {
  launch<false>(args, source, target, stream);
}

void expand_rows(const CompactRowsArgs& args, const Input& source, const Output& target, void* stream) {
  launch<true>(args, source, target, stream);
}

}  // namespace fiak::cuda
