// AVX2 with FMA and F16C: the operations that vec.h names. Included by it alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/types.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kLanes = 8;
using Vec = __m256;

FIAK_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FIAK_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
FIAK_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
FIAK_INLINE Vec zero() { return _mm256_setzero_ps(); }
FIAK_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
FIAK_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
FIAK_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
FIAK_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FIAK_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
/// The larger; b where either is NaN.
FIAK_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
FIAK_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
FIAK_INLINE float reduce_add(Vec x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
FIAK_INLINE float reduce_max(Vec x) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
/// The lowest bits of x in the place of the exponent.
FIAK_INLINE Vec shift_to_exponent(Vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
FIAK_INLINE Vec load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
FIAK_INLINE void store_half(void* p, Vec x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FIAK_INLINE Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
FIAK_INLINE Vec unpack_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
FIAK_INLINE Vec unpack_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
FIAK_INLINE Vec unpack_low_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
FIAK_INLINE Vec unpack_high_pairs(Vec a, Vec b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
/// Each block of four lanes permuted alike.
template <int kOrder>
FIAK_INLINE Vec permute_lanes(Vec x) {
  return _mm256_permute_ps(x, kOrder);
}
FIAK_INLINE bool all_between(Vec x, float low, float high) {
  return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(x, broadcast(low), _CMP_GE_OQ),
                                          _mm256_cmp_ps(x, broadcast(high), _CMP_LT_OQ))) == 0xff;
}
FIAK_INLINE bool all_above_or_nan(const float* x, float low) {
  return _mm256_movemask_ps(_mm256_cmp_ps(load(x), broadcast(low), _CMP_LE_OQ)) == 0;
}

/// Which lanes of a vector to keep.
using Mask = __m256;
/// The first n lanes, n in 0..kLanes.
FIAK_INLINE Mask first_lanes(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes));
}
/// Those of the first n lanes that are kept.
FIAK_INLINE Mask first_of(Mask kept, int64_t n) { return _mm256_and_ps(kept, first_lanes(n)); }
/// The lanes whose bits are set in the kLanes / 8 bytes at p.
FIAK_INLINE Mask bit_lanes(const void* p) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i bits = _mm256_set1_epi32(*static_cast<const uint8_t*>(p));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit));
}
/// The lanes of `kept` where !(x <= low): NaN stays.
FIAK_INLINE Mask above_or_nan(Mask kept, Vec x, Vec low) {
  return _mm256_and_ps(kept, _mm256_cmp_ps(x, low, _CMP_NLE_UQ));
}
/// x in the kept lanes, 0 in the others.
FIAK_INLINE Vec keep(Mask kept, Vec x) { return _mm256_and_ps(kept, x); }
/// max(x, y) in the kept lanes, y in the others and where x is NaN.
FIAK_INLINE Vec keep_max(Mask kept, Vec x, Vec y) { return _mm256_blendv_ps(y, max(x, y), kept); }
/// The first n elements, 0 in the other lanes, whose memory is not touched.
FIAK_INLINE Vec load_first(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n)));
}
/// Stores the first n lanes.
FIAK_INLINE void store_first(float* p, int64_t n, Vec x) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n)), x);
}
/// Splits x > 0, not subnormal, into m 2^n with m in [sqrt(1/2), sqrt(2)).
FIAK_INLINE void split(Vec x, Vec& m, Vec& n) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
  n = _mm256_cvtepi32_ps(exponent);
}
/// The bits that both have.
FIAK_INLINE Vec both(Vec x, Vec bits) { return _mm256_and_ps(x, bits); }
/// The difference of the bits as whole numbers.
FIAK_INLINE Vec subtract_bits(Vec x, Vec y) {
  return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
/// The bits as whole numbers, rounded.
FIAK_INLINE Vec bits_as_numbers(Vec x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
FIAK_INLINE Vec load_bfloat16(const void* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FIAK_INLINE void store_bfloat16(void* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // NaN stays NaN
  const __m256 kept =
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

/// The bfloat16 numbers at even, and at odd, places.
FIAK_INLINE Vec even_bfloat16(Vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
FIAK_INLINE Vec odd_bfloat16(Vec x) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
/// n numbers of kType at p, 0 behind them: kLanes of them, or 2 kLanes bfloat16 numbers. Other memory is not touched.
template <DType kType>
FIAK_INLINE Vec load_numbers(const char* p, int64_t n) {
  constexpr int kNumbers = kType == DType::kBFloat16 ? 2 * kLanes : kLanes;
  const auto whole = [](const char* x) __attribute__((always_inline)) {
    if constexpr (kType == DType::kFloat16) return load_half(x);
    return load(reinterpret_cast<const float*>(x));
  };
  if (n == kNumbers) return whole(p);
  if constexpr (kType == DType::kFloat32) return load_first(reinterpret_cast<const float*>(p), n);
  alignas(32) uint16_t copy[kNumbers] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = reinterpret_cast<const uint16_t*>(p)[i];
  return whole(reinterpret_cast<const char*>(copy));
}
/// Copies `bytes` bytes, fewer than a vector's, with zeros behind them.
FIAK_INLINE void copy_bytes(const char* p, int64_t bytes, char* target) {
  store(reinterpret_cast<float*>(target), zero());
  __builtin_memcpy(target, p, bytes);
}
/// Sums of neighbouring quads of lanes: those of a, then those of b.
FIAK_INLINE Vec add_neighbours(Vec a, Vec b) {
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
/// How many of ascending index[0, count) are below `bound`, at most 65,535; up to 15 behind them are read.
FIAK_INLINE int64_t count_indices_below(const uint16_t* index, int64_t count, int64_t bound) {
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(bound));
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i));
    const uint32_t above = _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
    if (above != 0) {
      const int64_t found = i + __builtin_ctz(above) / 2;
      return found < count ? found : count;
    }
  }
  return count;
}
FIAK_INLINE void prefetch_to_l2(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

/// Transposes a square of vectors: lane j of rows[i] becomes lane i of rows[j].
FIAK_INLINE void transpose_square(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes], quads[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m256d x = _mm256_castps_pd(pairs[i + k]), y = _mm256_castps_pd(pairs[i + 2 + k]);
      quads[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      quads[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    rows[k] = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x20);
    rows[4 + k] = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x31);
  }
}

}  // namespace fiak::cpu::FIAK_ISA
