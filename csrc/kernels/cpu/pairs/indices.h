// Runs of a plan's indices, which ascend: where they pass a bound, which of their weights are in the support, and the
// parts of these.
#pragma once

#include "kernels/cpu/isa/vec.h"
#include "kernels/plan/plan.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t kIndexPadding = 32;  // readable indices behind a run
static_assert(kIndexPadding <= kPlanPadding);

/// How many of ascending index[0, count) are below `bound`: they are few, and a search would wait at every step.
FIAK_INLINE int64_t count_below(const uint16_t* index, int64_t count, int64_t bound) {
  return bound > 65535 ? count : count_indices_below(index, count, bound);
}

/// The same by bisection, of many.
FIAK_INLINE int64_t search_below(const uint16_t* index, int64_t count, int64_t bound) {
  const uint16_t* begin = index;
  while (count > 0) {
    const int64_t half = (count + 1) / 2;
    index += index[half - 1] < bound ? half : 0;
    count -= half;
  }
  return index - begin;
}

/// What weights of the support are above: they are given as such or as logarithms.
constexpr float below_support(bool log_prior) { return log_prior ? -kInfinity : 0.0f; }
FIAK_INLINE bool in_support(float w, float below) { return !(w <= below); }  // true for NaN, which must reach its row

/// Copies the entries of the support: a pruned weight's key and value rows must not be touched.
FIAK_INLINE int64_t pick_support(const float* prior, const uint16_t* index, int64_t count, float below,
                                 uint16_t* picked, float* weights) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    picked[kept] = index[i];
    weights[kept] = prior[i];
    kept += in_support(prior[i], below);
  }
  return kept;
}

FIAK_INLINE bool all_in_support(const float* weights, int64_t count, float below) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (!all_above_or_nan(weights + i, below)) return false;
  }
  for (; i < count; ++i) {
    if (!in_support(weights[i], below)) return false;
  }
  return true;
}

/// The parts of some weights (WeightParts), of which at most `most` are taken at once.
struct WeightArrays {
  float *exponents, *factors;

  static int64_t floats(int64_t most) { return 2 * padded(most); }
  WeightArrays(float* memory, int64_t most) : exponents(memory), factors(memory + padded(most)) {}
  /// Whatever is outside the support has some finite exponent; the factors of logarithms are 1.
  void take(const float* weights, int64_t count, bool log_prior) const {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec w = load_first(weights + i, smaller(kLanes, count - i));
      const WeightParts parts(w);
      store(exponents + i, log_prior ? exponent_of_log(w) : parts.exponent_minus(zero()));
      store(factors + i, log_prior ? broadcast(1.0f) : parts.factor());
    }
  }
};

}  // namespace fiak::cpu::FIAK_ISA
