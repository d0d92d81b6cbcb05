// The vector type of the instruction set that this translation unit is compiled for, in a namespace of its own.
//
// Sources that include this are compiled once for each instruction set. They keep to plain C++ inside FIAK_ISA: no
// inline function or template of a library, which the linker could hand to code for lesser machines.
#pragma once

// GCC's own AVX-512 intrinsics trip this warning when inlined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#if defined(FIAK_ISA_AMX_BF16)
#define FIAK_ISA amx_bf16
#define FIAK_ISA_AVX512_BF16
#define FIAK_ISA_AVX512
#elif defined(FIAK_ISA_AVX512_BF16)
#define FIAK_ISA avx512_bf16
#define FIAK_ISA_AVX512
#elif defined(FIAK_ISA_AVX512)
#define FIAK_ISA avx512
#elif defined(FIAK_ISA_AVX2)
#define FIAK_ISA avx2
#else
#error "compile this file with FIAK_ISA_AVX2, FIAK_ISA_AVX512, FIAK_ISA_AVX512_BF16 or FIAK_ISA_AMX_BF16"
#endif

#define FIAK_INLINE static inline __attribute__((always_inline))

namespace fiak::cpu::FIAK_ISA {

#if defined(FIAK_ISA_AVX512)

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
FIAK_INLINE Vec fmadd_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
/// The numbers of `low`, then those of `high`, side by side as 16 pairs, rounded to nearest even.
FIAK_INLINE Vec pairs_in_order(Vec low, Vec high) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)); }
/// Pair i is number i and number 16 + i of `halves`.
FIAK_INLINE Vec pair_halves(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves));
}
/// Pair i is lane i of `first` and of `second`.
FIAK_INLINE Vec pairs_of(Vec first, Vec second) {
  return pair_halves(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
/// Pair i is element i of each row, for i < n; 0 in the other lanes, whose memory is not touched.
FIAK_INLINE Vec load_pairs_of(const void* first, const void* second, int64_t n) {
  const Mask lanes = first_lanes(n);
  const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(lanes, first));
  return pair_halves(_mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(lanes, second), 1));
}
/// n <= 2 kLanes bfloat16 numbers as pairs in order, 0 beyond.
FIAK_INLINE Vec load_pairs_in_order(const void* p, int64_t n) {
  const auto kept = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, p));
}
/// The pairs with a second number of 0.
FIAK_INLINE Vec low_half(Vec x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff))); }
/// The second numbers of the pairs.
FIAK_INLINE Vec second_of_pairs(Vec x) {
  return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
/// The first numbers of the pairs.
FIAK_INLINE Vec first_of_pairs(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
#endif

#else

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

#endif

/// 2^x for x <= 128 to about one unit in the last place, by the polynomial of Cephes' exp2f; infinite from 127.5 on.
/// What a subnormal number would stand for is 0, but for x within half of -126: a result that is subnormal, or too
/// small for one, takes processors of Intel 150 cycles. NaN stays NaN.
FIAK_INLINE Vec exp2_below_128(Vec x) {
  x = max(broadcast(-127.0f), x);
  // A sum this large has whole numbers for its last bits: those of n, the nearest to x, as an exponent has them.
  const Vec large = broadcast(0x1.8p23f + 127.0f);
  const Vec sum = add(x, large), r = sub(x, sub(sum, large));
  Vec p = broadcast(1.535336188319500e-4f);
  p = fmadd(p, r, broadcast(1.339887440266574e-3f));
  p = fmadd(p, r, broadcast(9.618437357674640e-3f));
  p = fmadd(p, r, broadcast(5.550332471162809e-2f));
  p = fmadd(p, r, broadcast(2.402264791363012e-1f));
  p = fmadd(p, r, broadcast(6.931472028550421e-1f));
  p = fmadd(p, r, broadcast(1.0f));
  return mul(p, shift_to_exponent(sum));
}
/// 2^x for any x; infinite from 127.5 on.
FIAK_INLINE Vec exp2(Vec x) { return exp2_below_128(min(broadcast(128.0f), x)); }
#if defined(FIAK_ISA_AMX_BF16)
/// 2^x to about one unit in the last place, 2^-125 for all that would be less; infinite from 128 on, NaN for NaN. By
/// the minimax polynomial of 2^r on [0, 1] and two instructions that are slow on processors of AMD.
FIAK_INLINE Vec exp2_above_125(Vec x) {
  x = max(broadcast(-125.0f), x);
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = broadcast(0x1.ec320ap-10f);
  p = fmadd(p, r, broadcast(0x1.26900cp-7f));
  p = fmadd(p, r, broadcast(0x1.c95446p-5f));
  p = fmadd(p, r, broadcast(0x1.ebd5a8p-3f));
  p = fmadd(p, r, broadcast(0x1.62e4f6p-1f));
  p = fmadd(p, r, broadcast(0x1.fffffep-1f));
  return _mm512_scalef_ps(p, x);  // by the whole number below x
}
#endif
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// Weights join the scores in the exponent, as powers of two, before anything is rounded away: only their ratios within
// a row matter then, however large or small they are.

/// A weight w > 0 as factor * 2^exponent, exactly. Exponents lie in -64..126, so that 2^-exponent is a number too, and
/// so do those of any other w, which has some finite exponent.
struct WeightParts {
  Vec weight, power;
  explicit __attribute__((always_inline)) WeightParts(Vec w)
      : weight(w), power(both(min(broadcast(0x1p126f), max(w, broadcast(0x1p-64f))), broadcast(kInfinity))) {}
  __attribute__((always_inline)) Vec exponent_minus(Vec shift) const {
    return fmsub(bits_as_numbers(subtract_bits(power, broadcast(1.0f))), broadcast(0x1p-23f), shift);
  }
  /// 2^-exponent
  __attribute__((always_inline)) Vec inverse() const { return subtract_bits(broadcast(0x1p127f), power); }
  __attribute__((always_inline)) Vec factor() const { return mul(weight, inverse()); }
};
#if defined(FIAK_ISA_AVX512)
/// s + log2(w) or up to 1 less, for w > 0.
FIAK_INLINE Vec add_log2(Vec s, Vec w) { return add(s, _mm512_getexp_ps(w)); }
/// The exponent of w > 0, minus `shift`, where the weight's factor is that below.
FIAK_INLINE Vec exponent_minus(Vec w, Vec shift) { return sub(_mm512_getexp_ps(w), shift); }
FIAK_INLINE Vec weight_factor(Vec w) { return _mm512_getmant_ps(w, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }
#else
/// s + log2(w) or about .1 more, for w > 0; up to 23 more where w is subnormal.
FIAK_INLINE Vec add_log2(Vec s, Vec w) {
  return fmadd(bits_as_numbers(subtract_bits(w, broadcast(1.0f))), broadcast(0x1p-23f), s);
}
/// The exponent of w > 0, minus `shift`, where the weight's factor is that below.
FIAK_INLINE Vec exponent_minus(Vec w, Vec shift) { return WeightParts(w).exponent_minus(shift); }
FIAK_INLINE Vec weight_factor(Vec w) { return WeightParts(w).factor(); }
#endif
/// The exponent of a weight whose logarithm is given, rounded. What is finite stays so, unless above 2e38.
FIAK_INLINE Vec exponent_of_log(Vec log_weight) {
  return max(broadcast(-3.4028234663852886e38f), mul(log_weight, broadcast(kLog2E)));
}

/// log(x) for finite x > 0 that are not subnormal, to about one unit in the last place: Cephes' logf.
FIAK_INLINE Vec log_of_normal(Vec x) {
  Vec m, n;
  split(x, m, n);
  const Vec f = sub(m, broadcast(1.0f)), square = mul(f, f);
  Vec p = broadcast(7.0376836292e-2f);
  p = fmadd(p, f, broadcast(-1.1514610310e-1f));
  p = fmadd(p, f, broadcast(1.1676998740e-1f));
  p = fmadd(p, f, broadcast(-1.2420140846e-1f));
  p = fmadd(p, f, broadcast(1.4249322787e-1f));
  p = fmadd(p, f, broadcast(-1.6668057665e-1f));
  p = fmadd(p, f, broadcast(2.0000714765e-1f));
  p = fmadd(p, f, broadcast(-2.4999993993e-1f));
  p = fmadd(p, f, broadcast(3.3333331174e-1f));
  p = mul(mul(p, f), square);
  p = fmadd(n, broadcast(-2.12194440e-4f), p);
  p = fmadd(square, broadcast(-0.5f), p);
  return fmadd(n, broadcast(0.693359375f), add(f, p));
}

FIAK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FIAK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
/// The next multiple of the vector length.
FIAK_INLINE int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

/// A number as a type.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

#if defined(FIAK_ISA_AVX512_BF16)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace fiak::cpu::FIAK_ISA
