// Rows of any dtype as float32 rows of whole vectors, which is what the vector kernels read and write.
#pragma once

#include <cstring>

#include "kernels/attention.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/scratch.h"
#include "kernels/dtypes.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }  // float64 runs scalar

/// The address of a row, of the operand's own dtype.
FIAK_INLINE const char* row_address(const Input& x, DType dtype, int64_t b, int64_t h, int64_t n) {
  return static_cast<const char*>(x.data) +
         (b * x.batch_stride + h * x.head_stride + n * x.row_stride) * element_size(dtype);
}
FIAK_INLINE char* row_address(const Output& x, DType dtype, int64_t b, int64_t h, int64_t n) {
  return static_cast<char*>(x.data) + (b * x.batch_stride + h * x.head_stride + n * x.row_stride) * element_size(dtype);
}

/// Fetches a row into the L2 cache.
FIAK_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_to_l2(row + i);
}
FIAK_INLINE void prefetch_row_for_writing(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 1);
}

/// target[0, size) = source * factor, zero up to the next whole vector.
FIAK_INLINE void load_row(const char* source, DType dtype, int64_t size, float factor, float* target) {
  const Vec f = broadcast(factor);
  int64_t d = 0;
  switch (dtype) {
    case DType::kFloat32: {
      const auto* row = reinterpret_cast<const float*>(source);
      for (; d + kLanes <= size; d += kLanes) store(target + d, mul(load(row + d), f));
      for (; d < size; ++d) target[d] = row[d] * factor;
      break;
    }
    case DType::kBFloat16: {
      const auto* row = reinterpret_cast<const BFloat16*>(source);
      for (; d + kLanes <= size; d += kLanes) store(target + d, mul(load_bfloat16(row + d), f));
      for (; d < size; ++d) target[d] = to_float(row[d]) * factor;
      break;
    }
    default: {
      const auto* row = reinterpret_cast<const Half*>(source);
      for (; d + kLanes <= size; d += kLanes) store(target + d, mul(load_half(row + d), f));
      for (; d < size; ++d) target[d] = to_float(row[d]) * factor;
    }
  }
  for (; d < padded(size); ++d) target[d] = 0.0f;
}

/// target[0, size) = source * factor, in the operand's own dtype.
FIAK_INLINE void store_row(const float* source, DType dtype, int64_t size, float factor, char* target) {
  const Vec f = broadcast(factor);
  int64_t d = 0;
  switch (dtype) {
    case DType::kFloat32: {
      auto* row = reinterpret_cast<float*>(target);
      for (; d + kLanes <= size; d += kLanes) store(row + d, mul(load(source + d), f));
      for (; d < size; ++d) row[d] = source[d] * factor;
      break;
    }
    case DType::kBFloat16: {
      auto* row = reinterpret_cast<BFloat16*>(target);
      for (; d + kLanes <= size; d += kLanes) store_bfloat16(row + d, mul(load(source + d), f));
      for (; d < size; ++d) row[d] = to_bfloat16(source[d] * factor);
      break;
    }
    default: {
      auto* row = reinterpret_cast<Half*>(target);
      for (; d + kLanes <= size; d += kLanes) store_half(row + d, mul(load(source + d), f));
      for (; d < size; ++d) row[d] = to_half(source[d] * factor);
    }
  }
}

/// float32 rows of whole vectors, `stride` elements apart.
struct Panel {
  const float* rows;
  int64_t stride;
  __attribute__((always_inline)) const float* row(int64_t n) const { return rows + n * stride; }
};

/// Rows [0, count) of a batch element and head, converted into `target` (count * padded(size) elements). Sparse kernels
/// read them there: side by side and on whole cache lines they fill the L1 cache evenly, wherever they came from.
FIAK_INLINE Panel pack_panel(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size,
                             float* target) {
  const char* first = row_address(x, dtype, b, h, 0);
  const int64_t stride = padded(size);
  for (int64_t n = 0; n < count; ++n) {
    load_row(first + n * x.row_stride * element_size(dtype), dtype, size, 1.0f, target + n * stride);
  }
  return {target, stride};
}

/// The same rows for matrix products, which take them in order: in place where they are float32, whole vectors that
/// cross no cache line, and not apart by a large power of two, which would crowd them into few sets of the caches.
FIAK_INLINE Panel make_panel(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size,
                             float* scratch) {
  constexpr int64_t kBytes = kLanes * sizeof(float);
  const char* first = row_address(x, dtype, b, h, 0);
  const int64_t stride = x.row_stride * 4, row = size * 4;
  if (dtype == DType::kFloat32 && row % kBytes == 0 && stride % kBytes == 0 && (stride & -stride) <= 2 * row &&
      reinterpret_cast<uintptr_t>(first) % kBytes == 0) {
    return {reinterpret_cast<const float*>(first), x.row_stride};
  }
  return pack_panel(x, dtype, b, h, count, size, scratch);
}

/// Hands out pieces of memory, each on a cache line of its own.
class ScratchArena {
 public:
  explicit __attribute__((always_inline)) ScratchArena(ScratchRange& left) : left_(left) {}
  __attribute__((always_inline)) float* floats(int64_t count) {
    const int64_t bytes = (count * 4 + 63) / 64 * 64;
    if (__builtin_expect(left_.end - left_.next < bytes, 0)) extend_scratch(bytes);
    auto* piece = reinterpret_cast<float*>(left_.next);
    left_.next += bytes;
    return piece;
  }

 private:
  ScratchRange& left_;
};

/// A thread's own memory, which goes back to it at the end of the scope.
class ThreadArena : public ScratchArena {
 public:
  __attribute__((always_inline)) ThreadArena() : ThreadArena(borrow_scratch()) {}
  __attribute__((always_inline)) ~ThreadArena() { return_scratch(borrowed_); }
  ThreadArena(const ThreadArena&) = delete;
  ThreadArena& operator=(const ThreadArena&) = delete;

 private:
  explicit __attribute__((always_inline)) ThreadArena(ScratchRange& left) : ScratchArena(left), borrowed_(left) {}
  const ScratchRange borrowed_;
};

/// lay_out(arena) with pieces of `memory`, which must be as large as laid_out_bytes(lay_out) says.
template <class LayOut>
FIAK_INLINE auto lay_out_in(char* memory, LayOut&& lay_out) {
  ScratchRange range{memory, reinterpret_cast<char*>(INTPTR_MAX)};
  ScratchArena arena(range);
  return lay_out(arena);
}
/// The bytes that lay_out(arena), which must not touch its pieces, takes.
template <class LayOut>
FIAK_INLINE int64_t laid_out_bytes(LayOut&& lay_out) {
  auto* nowhere = reinterpret_cast<char*>(intptr_t{64});
  ScratchRange range{nowhere, reinterpret_cast<char*>(INTPTR_MAX)};
  ScratchArena arena(range);
  lay_out(arena);
  return range.next - nowhere;
}

}  // namespace fiak::cpu::FIAK_ISA
