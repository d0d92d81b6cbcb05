// The two inner loops of sparse attention, over rows that are picked by 16-bit indices: dot products with one vector,
// and their weighted sum. Forward, backward by rows and backward by columns all consist of these.
//
// Cost: D/16 fused multiply-adds (and as many loads) a pair and loop; 30 shuffles and 15 additions for each 16 dot
// products with AVX-512.
#pragma once

#include "kernels/cpu/simd.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kOldMaxChunks = 8;  ///< vectors of a row that one pass handles: what fits into registers

template <int kLevel>
FIAK_INLINE Vec combine(Vec a, Vec b) {
  if constexpr (kLevel == 1)
    return add(unpack_low(a, b), unpack_high(a, b));
  else if constexpr (kLevel == 2)
    return add(unpack_low_pairs(a, b), unpack_high_pairs(a, b));
  else
    return combine_blocks<1, kLevel>(a, b);
}
constexpr int kLevels = kLanes == 16 ? 4 : 3;
template <int kChunks>
FIAK_INLINE Vec products(const Vec* x, const float* row) {
  Vec sum = mul(x[0], load(row));
#pragma GCC unroll 8
  for (int c = 1; c < kChunks; ++c) sum = fmadd(x[c], load(row + c * kLanes), sum);
  return sum;
}

/// Lane i holds the dot product of x with row index[i], computed depth first so that few partial sums are alive.
template <int kChunks, int kLevel>
FIAK_INLINE Vec dot_tree(const Vec* x, const float* rows, int64_t stride, const uint16_t* index) {
  if constexpr (kLevel == 0) {
    return products<kChunks>(x, rows + index[0] * stride);
  } else {
    const Vec first = dot_tree<kChunks, kLevel - 1>(x, rows, stride, index);
    const Vec second = dot_tree<kChunks, kLevel - 1>(x, rows, stride, index + (1 << (kLevel - 1)));
    return combine<kLevel>(first, second);
  }
}

/// out[i] (+)= x . rows[index[i]] over kChunks vectors, for i in [0, count). Writes whole vectors of out.
template <int kChunks, bool kAdd>
static void dots_pass(const float* x, const float* rows, int64_t stride, const uint16_t* index, int64_t count,
                      float* out) {
  Vec xs[kChunks];
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) xs[c] = load(x + c * kLanes);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec sums = dot_tree<kChunks, kLevels>(xs, rows, stride, index + i);
    if (kAdd) sums = add(sums, load(out + i));
    store(out + i, sums);
  }
  if (i < count) {
    uint16_t last[kLanes];  // repeats the last row: the indices behind it may be of another block
    for (int64_t k = 0; k < kLanes; ++k) last[k] = index[smaller(i + k, count - 1)];
    Vec sums = dot_tree<kChunks, kLevels>(xs, rows, stride, last);
    if (kAdd) sums = add(sums, load(out + i));
    store(out + i, sums);
  }
}

/// sums[c] (+)= sum_i weights[i] rows[index[i]] over kChunks vectors.
template <int kChunks>
static void weighted_sum_pass(const float* weights, const float* rows, int64_t stride, const uint16_t* index,
                              int64_t count, float* sum) {
  // Two sets of sums hide the latency of the multiply-add, where the registers allow.
  constexpr int kSets = kChunks * 2 * (kLanes / 8) <= 24 ? 2 : 1;
  Vec sums[kSets][kChunks];
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) {
    sums[0][c] = load(sum + c * kLanes);
    if (kSets == 2) sums[kSets - 1][c] = zero();
  }
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const float* row = rows + index[i + k] * stride;
      const Vec weight = broadcast(weights[i + k]);
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) {
        sums[k % kSets][c] = fmadd(weight, load(row + c * kLanes), sums[k % kSets][c]);
      }
    }
  }
  for (; i < count; ++i) {
    const float* row = rows + index[i] * stride;
    const Vec weight = broadcast(weights[i]);
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) sums[0][c] = fmadd(weight, load(row + c * kLanes), sums[0][c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c)
    store(sum + c * kLanes, kSets == 2 ? add(sums[0][c], sums[kSets - 1][c]) : sums[0][c]);
}

using DotsPass = void (*)(const float*, const float*, int64_t, const uint16_t*, int64_t, float*);
using SumPass = void (*)(const float*, const float*, int64_t, const uint16_t*, int64_t, float*);

constexpr DotsPass kDotsPasses[2][kOldMaxChunks] = {
    {dots_pass<1, false>, dots_pass<2, false>, dots_pass<3, false>, dots_pass<4, false>, dots_pass<5, false>,
     dots_pass<6, false>, dots_pass<7, false>, dots_pass<8, false>},
    {dots_pass<1, true>, dots_pass<2, true>, dots_pass<3, true>, dots_pass<4, true>, dots_pass<5, true>,
     dots_pass<6, true>, dots_pass<7, true>, dots_pass<8, true>}};
constexpr SumPass kSumPasses[kOldMaxChunks] = {weighted_sum_pass<1>, weighted_sum_pass<2>, weighted_sum_pass<3>,
                                               weighted_sum_pass<4>, weighted_sum_pass<5>, weighted_sum_pass<6>,
                                               weighted_sum_pass<7>, weighted_sum_pass<8>};

/// out[i] = x . rows[index[i]] for i in [0, count), both of `size` elements, a multiple of kLanes. Writes whole vectors
/// of out.
FIAK_INLINE void old_dots(const float* x, const float* rows, int64_t stride, int64_t size, const uint16_t* index,
                          int64_t count, float* out) {
  for (int64_t d = 0; d < size; d += kOldMaxChunks * kLanes) {
    const int64_t chunks = smaller((size - d) / kLanes, kOldMaxChunks);
    kDotsPasses[d > 0][chunks - 1](x + d, rows + d, stride, index, count, out);
  }
}

/// sum += sum_i weights[i] rows[index[i]], of `size` elements, a multiple of kLanes.
FIAK_INLINE void old_weighted_sum(const float* weights, const float* rows, int64_t stride, int64_t size,
                                  const uint16_t* index, int64_t count, float* sum) {
  for (int64_t d = 0; d < size; d += kOldMaxChunks * kLanes) {
    const int64_t chunks = smaller((size - d) / kLanes, kOldMaxChunks);
    kSumPasses[chunks - 1](weights, rows + d, stride, index, count, sum + d);
  }
}

/// The maximum of scores[0, padded(count)), ignoring NaN.
FIAK_INLINE float row_maximum(const float* scores, int64_t count) {
  Vec maximum = broadcast(-kInfinity);
  for (int64_t i = 0; i < count; i += kLanes) maximum = max(load(scores + i), maximum);
  return reduce_max(maximum);
}

/// scores[0, padded(count)) = exp(scores - shift); returns their sum.
FIAK_INLINE float exp_row(float* scores, int64_t count, float shift) {
  const Vec s = broadcast(shift);
  Vec sum = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec e = exp(sub(load(scores + i), s));
    store(scores + i, e);
    sum = add(sum, e);
  }
  return reduce_add(sum);
}

}  // namespace fiak::cpu::FIAK_ISA
