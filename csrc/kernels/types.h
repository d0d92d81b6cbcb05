// The plain types that every kernel takes: no torch, raw pointers, int64 sizes and strides.
#pragma once

#include <cstdint>

/// Of what device code calls, too.
#if defined(__CUDACC__)
#define FIAK_HOST_DEVICE __host__ __device__
#else
#define FIAK_HOST_DEVICE
#endif

namespace fiak {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

/// "dot": s = scale q.k.  "gaussian": s = -scale/2 |q-k|^2 without its |q|^2 term, which cancels in the normalisation.
enum class Score : int32_t { kDot, kGaussian };

/// A read-only [batch, heads, rows, columns] operand. Strides are in elements; columns are contiguous.
struct Input {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

/// A writable operand of the same form. `data == nullptr` means that this result is not wanted.
struct Output {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

/// How the caller runs work: task(context, i) for every i in [0, tasks), on at most `threads` threads, then returns.
/// Kernels ask for `threads` tasks and split their work among these themselves; no result depends on the split.
struct Parallel {
  int64_t threads = 1;
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context) = nullptr;
};

}  // namespace fiak
