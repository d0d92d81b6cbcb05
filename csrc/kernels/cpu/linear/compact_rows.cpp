#include <cstring>
#include <type_traits>

#include "kernels/compact.h"
#include "kernels/cpu/parallel.h"

namespace fiak::cpu {
namespace {

/// Row 0 of a batch element and head, in bytes.
template <class Tensor>
auto* head_of(const Tensor& x, int64_t b, int64_t h, int64_t element_size) {
  using Byte = std::conditional_t<std::is_same_v<Tensor, Input>, const char, char>;
  return static_cast<Byte*>(x.data) + (b * x.batch_stride + h * x.head_stride) * element_size;
}

}  // namespace

void compact_rows(const CompactRowsArgs& args, const Input& source, const Output& target, const Parallel& parallel) {
  const int64_t bytes = args.columns * args.element_size;
  parallel_range(parallel, args.batch * args.heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.heads, h = i % args.heads;
      const char* from = head_of(source, b, h, args.element_size);
      char* to = head_of(target, b, h, args.element_size);
      for (int64_t k = 0; k < args.kept; ++k) {
        const int64_t row = args.keep[h * args.kept + k];
        char* place = to + k * target.row_stride * args.element_size;
        if (row >= 0) {
          std::memcpy(place, from + row * source.row_stride * args.element_size, bytes);
        } else {
          std::memset(place, 0, bytes);
        }
      }
    }
  });
}

void expand_rows(const CompactRowsArgs& args, const Input& source, const Output& target, const Parallel& parallel) {
  const int64_t bytes = args.columns * args.element_size;
  parallel_range(parallel, args.batch * args.heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.heads, h = i % args.heads;
      const char* from = head_of(source, b, h, args.element_size);
      char* to = head_of(target, b, h, args.element_size);
      const int64_t* keep = args.keep + h * args.kept;
      int64_t k = 0;  // keep ascends: one pass over the rows
      for (int64_t row = 0; row < args.rows; ++row) {
        char* place = to + row * target.row_stride * args.element_size;
        if (k < args.kept && keep[k] == row) {
          std::memcpy(place, from + k++ * source.row_stride * args.element_size, bytes);
        } else {
          std::memset(place, 0, bytes);
        }
      }
    }
  });
}

}  // namespace fiak::cpu
