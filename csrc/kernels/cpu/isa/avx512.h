// AVX-512 (F, BW, DQ, VL), with AVX-512 BF16 where FIAK_ISA_AVX512_BF16 is defined: the operations that vec.h names.
// Included by it alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/types.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kLanes = 16;
using Vec = __m512;

FIAK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FIAK_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
FIAK_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
FIAK_INLINE Vec zero() { return _mm512_setzero_ps(); }
FIAK_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FIAK_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
FIAK_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FIAK_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FIAK_INLINE Vec fmsub(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
/// The larger; b where either is NaN.
FIAK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FIAK_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
FIAK_INLINE float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
FIAK_INLINE float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
/// The lowest bits of x in the place of the exponent.
FIAK_INLINE Vec shift_to_exponent(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
FIAK_INLINE Vec load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
FIAK_INLINE void store_half(void* p, Vec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FIAK_INLINE Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
FIAK_INLINE Vec unpack_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
FIAK_INLINE Vec unpack_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
FIAK_INLINE Vec unpack_low_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FIAK_INLINE Vec unpack_high_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
/// Each block of four lanes permuted alike.
template <int kOrder>
FIAK_INLINE Vec permute_lanes(Vec x) {
  return _mm512_permute_ps(x, kOrder);
}
FIAK_INLINE bool all_between(Vec x, float low, float high) {
  return (_mm512_cmp_ps_mask(x, broadcast(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, broadcast(high), _CMP_LT_OQ)) ==
         0xffff;
}
FIAK_INLINE bool all_above_or_nan(const float* x, float low) {
  return _mm512_cmp_ps_mask(load(x), broadcast(low), _CMP_LE_OQ) == 0;
}

/// Which lanes of a vector to keep.
using Mask = __mmask16;
/// The first n lanes, n in 0..kLanes.
FIAK_INLINE Mask first_lanes(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
/// Those of the first n lanes that are kept.
FIAK_INLINE Mask first_of(Mask kept, int64_t n) { return kept & first_lanes(n); }
/// The lanes whose bits are set in the kLanes / 8 bytes at p.
FIAK_INLINE Mask bit_lanes(const void* p) {
  Mask bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
/// The lanes of `kept` where !(x <= low): NaN stays.
FIAK_INLINE Mask above_or_nan(Mask kept, Vec x, Vec low) { return _mm512_mask_cmp_ps_mask(kept, x, low, _CMP_NLE_UQ); }
/// x in the kept lanes, 0 in the others.
FIAK_INLINE Vec keep(Mask kept, Vec x) { return _mm512_maskz_mov_ps(kept, x); }
/// max(x, y) in the kept lanes, y in the others and where x is NaN.
FIAK_INLINE Vec keep_max(Mask kept, Vec x, Vec y) { return _mm512_mask_max_ps(y, kept, x, y); }
/// The first n elements, 0 in the other lanes, whose memory is not touched.
FIAK_INLINE Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
/// Stores the first n lanes.
FIAK_INLINE void store_first(float* p, int64_t n, Vec x) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
/// Splits x > 0, not subnormal, into m 2^n with m in [sqrt(1/2), sqrt(2)).
FIAK_INLINE void split(Vec x, Vec& m, Vec& n) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
  n = _mm512_cvtepi32_ps(exponent);
}
/// The bits that both have.
FIAK_INLINE Vec both(Vec x, Vec bits) { return _mm512_and_ps(x, bits); }
/// The difference of the bits as whole numbers.
FIAK_INLINE Vec subtract_bits(Vec x, Vec y) {
  return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
}
/// The bits as whole numbers, rounded.
FIAK_INLINE Vec bits_as_numbers(Vec x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
FIAK_INLINE Vec load_bfloat16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#if defined(FIAK_ISA_AVX512_BF16)
/// Rounded to nearest even; subnormal numbers become 0.
FIAK_INLINE void store_bfloat16(void* p, Vec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#else
FIAK_INLINE void store_bfloat16(void* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // NaN stays NaN
  const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
#endif

/// What x is above the whole number below it, and p 2^n for the whole number n below x.
FIAK_INLINE Vec above_whole(Vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FIAK_INLINE Vec scale_by_exp2(Vec p, Vec x) { return _mm512_scalef_ps(p, x); }
/// w > 0 as mantissa 2^exponent with the mantissa in [1, 2).
FIAK_INLINE Vec exponent_of(Vec w) { return _mm512_getexp_ps(w); }
FIAK_INLINE Vec mantissa_of(Vec w) { return _mm512_getmant_ps(w, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }

/// The bfloat16 numbers at even, and at odd, places.
FIAK_INLINE Vec even_bfloat16(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
FIAK_INLINE Vec odd_bfloat16(Vec x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
/// n numbers of kType at p, 0 behind them: kLanes of them, or 2 kLanes bfloat16 numbers. Other memory is not touched.
template <DType kType>
FIAK_INLINE Vec load_numbers(const char* p, int64_t n) {
  const auto kept = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  if constexpr (kType == DType::kFloat32) return _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), p);
  if constexpr (kType == DType::kBFloat16) return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, p));
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(kept), p));
}
/// Copies `bytes` bytes, fewer than a vector's, with zeros behind them.
FIAK_INLINE void copy_bytes(const char* p, int64_t bytes, char* target) {
  const auto kept = static_cast<__mmask64>((uint64_t{1} << bytes) - 1);
  _mm512_storeu_si512(target, _mm512_maskz_loadu_epi8(kept, p));
}
/// Sums of neighbouring quads of lanes: those of a, then those of b.
FIAK_INLINE Vec add_neighbours(Vec a, Vec b) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
/// How many of ascending index[0, count) are below `bound`, at most 65,535; up to 31 behind them are read.
FIAK_INLINE int64_t count_indices_below(const uint16_t* index, int64_t count, int64_t bound) {
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(bound));
  for (int64_t i = 0; i < count; i += 32) {
    const uint32_t above = ~_mm512_cmplt_epu16_mask(_mm512_loadu_si512(index + i), limit);
    if (above != 0) {
      const int64_t found = i + __builtin_ctz(above);
      return found < count ? found : count;
    }
  }
  return count;
}
FIAK_INLINE void prefetch_to_l2(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

/// Transposes a square of vectors: lane j of rows[i] becomes lane i of rows[j].
FIAK_INLINE void transpose_square(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes], quads[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512d x = _mm512_castps_pd(pairs[i + k]), y = _mm512_castps_pd(pairs[i + 2 + k]);
      quads[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      quads[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  // quads[4 g + k] holds columns k, k + 4, k + 8, k + 12 of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Vec low = _mm512_shuffle_f32x4(quads[k], quads[4 + k], 0x88);
    const Vec high = _mm512_shuffle_f32x4(quads[8 + k], quads[12 + k], 0x88);
    const Vec low_odd = _mm512_shuffle_f32x4(quads[k], quads[4 + k], 0xdd);
    const Vec high_odd = _mm512_shuffle_f32x4(quads[8 + k], quads[12 + k], 0xdd);
    rows[k] = _mm512_shuffle_f32x4(low, high, 0x88);
    rows[4 + k] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[8 + k] = _mm512_shuffle_f32x4(low, high, 0xdd);
    rows[12 + k] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

#if defined(FIAK_ISA_AVX512_BF16)
// A vector of pairs has two bfloat16 numbers in each lane, the first in the lower half.

/// c + a b in each lane: the sum of both products, in float32; subnormal numbers count as 0.
FIAK_INLINE Vec fmadd_vnni(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
/// The numbers of `low`, then those of `high`, side by side as 16 pairs, rounded to nearest even.
FIAK_INLINE Vec vnni_in_order(Vec low, Vec high) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)); }
/// Pair i is number i and number 16 + i of `halves`.
FIAK_INLINE Vec vnni_halves(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves));
}
/// Pair i is lane i of `first` and of `second`.
FIAK_INLINE Vec vnni_of(Vec first, Vec second) {
  return vnni_halves(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
/// Pair i is element i of each row, for i < n; 0 in the other lanes, whose memory is not touched.
FIAK_INLINE Vec load_vnni_of(const void* first, const void* second, int64_t n) {
  const Mask lanes = first_lanes(n);
  const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, first));
  return vnni_halves(_mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(lanes, second), 1));
}
/// n <= 2 kLanes bfloat16 numbers as pairs in order, 0 beyond.
FIAK_INLINE Vec load_vnni_in_order(const void* p, int64_t n) {
  const auto kept = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, p));
}
/// The pairs with a second number of 0.
FIAK_INLINE Vec low_half(Vec x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff))); }
#endif

}  // namespace fiak::cpu::FIAK_ISA
