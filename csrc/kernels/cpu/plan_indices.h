// Runs of a plan's indices, which ascend: where they pass a bound, and which of their weights are in the support.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/pattern/plan.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t kIndexPadding = 32;  // readable indices behind a run
static_assert(kIndexPadding <= kPlanPadding);

/// How many of ascending index[0, count) are below `bound`: they are few, and a search would wait at every step.
FIAK_INLINE int64_t count_below(const uint16_t* index, int64_t count, int64_t bound) {
  if (bound > 65535) return count;
  int64_t i = 0;
#if defined(FIAK_ISA_AVX512)
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(bound));
  for (; i < count; i += 32) {
    const uint32_t above = ~_mm512_cmplt_epu16_mask(_mm512_loadu_si512(index + i), limit);
    if (above != 0) return smaller(count, i + __builtin_ctz(above));
  }
#else
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(bound));
  for (; i < count; i += 16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i));
    const uint32_t above = _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
    if (above != 0) return smaller(count, i + __builtin_ctz(above) / 2);
  }
#endif
  return count;
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

FIAK_INLINE bool in_support(float w) { return !(w <= 0); }  // true for NaN, which must reach its row

/// Copies the entries of the support: a pruned weight's key and value rows must not be touched.
FIAK_INLINE int64_t pick_support(const float* values, const uint16_t* index, int64_t count, uint16_t* picked,
                                 float* weights) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    picked[kept] = index[i];
    weights[kept] = values[i];
    kept += in_support(values[i]);
  }
  return kept;
}

FIAK_INLINE bool all_in_support(const float* weights, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (!all_positive_or_nan(weights + i)) return false;
  }
  for (; i < count; ++i) {
    if (!in_support(weights[i])) return false;
  }
  return true;
}

}  // namespace fiak::cpu::FIAK_ISA
