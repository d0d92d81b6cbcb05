// Arguments of the key/value compaction kernels.
#pragma once

#include "kernels/types.h"

namespace fiak {

/// keep: [heads, kept], the kept rows of each head in ascending order, padded at the end with -1 (rows of zeros).
struct CompactRowsArgs {
  int64_t batch = 0, heads = 0, rows = 0, kept = 0, columns = 0, element_size = 0;
  const int64_t* keep = nullptr;
};

/// input [batch, rows, in_features] (head_stride unused), weight [heads * head_dim, in_features] with rows
/// weight_stride apart, bias [heads * head_dim] or null; output [batch, heads, kept, head_dim].
struct CompactLinearArgs {
  int64_t batch = 0, heads = 0, rows = 0, kept = 0, in_features = 0, head_dim = 0;
  DType dtype = DType::kFloat32;
  const int64_t* keep = nullptr;
  Input input;
  const void* weight = nullptr;
  int64_t weight_stride = 0;
  const void* bias = nullptr;
};

/// Results are contiguous and in the inputs' own shapes and dtype; null: not wanted.
struct CompactLinearGrads {
  Input grad_output;
  void* grad_input = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
};

namespace cpu {

/// source [batch, heads, rows, columns] -> target [batch, heads, kept, columns]. Copies bytes: one code for all dtypes.
void compact_rows(const CompactRowsArgs& args, const Input& source, const Output& target, const Parallel& parallel);

/// Its adjoint: source [batch, heads, kept, columns] -> target [batch, heads, rows, columns], zero where not kept.
void expand_rows(const CompactRowsArgs& args, const Input& source, const Output& target, const Parallel& parallel);

}  // namespace cpu
}  // namespace fiak
