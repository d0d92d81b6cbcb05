// How the vector kernels cut a call, as numbers to compare.
#pragma once

#include <cstdint>

namespace fiak::cpu {

/// How many blocks of each kind a kernel's loops go through, in an order of its own. Where a count differs from that of
/// the next smaller size, a block starts. Tests find these places by asking, and go to both sides of each, wherever the
/// kernel's constants and the call's other sizes put it.
struct BlockCounts {
  static constexpr int kMost = 64;
  int64_t counts[kMost] = {};
  int size = 0;

  __attribute__((always_inline)) void add(int64_t count) {
    if (size == kMost) __builtin_trap();
    counts[size++] = count;
  }
  /// The blocks of `each` that `length` takes.
  __attribute__((always_inline)) void add(int64_t length, int64_t each) { add((length + each - 1) / each); }
};

}  // namespace fiak::cpu
