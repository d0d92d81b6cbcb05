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

#if defined(FIAK_ISA_AVX512_BF16)
#define FIAK_ISA avx512_bf16
#define FIAK_ISA_AVX512
#elif defined(FIAK_ISA_AVX512)
#define FIAK_ISA avx512
#elif defined(FIAK_ISA_AVX2)
#define FIAK_ISA avx2
#else
#error "compile this file with FIAK_ISA_AVX2, FIAK_ISA_AVX512 or FIAK_ISA_AVX512_BF16"
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
/// The larger; b where either is NaN.
FIAK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FIAK_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
FIAK_INLINE float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
FIAK_INLINE float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
/// x * 2^n for whole n; overflows to infinity and underflows to 0.
FIAK_INLINE Vec scale_by_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
FIAK_INLINE Vec round_to_whole(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
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
/// x in the first `count` lanes of those numbered by `numbers`, y in the others.
FIAK_INLINE Vec select_first(Vec x, Vec y, const int32_t* numbers, int64_t count) {
  const __mmask16 mask =
      _mm512_cmplt_epi32_mask(_mm512_load_si512(numbers), _mm512_set1_epi32(static_cast<int32_t>(count)));
  return _mm512_mask_mov_ps(y, mask, x);
}
/// x = 2^exponent * result with 0.5 <= result < 1, for normal positive x; any for 0, infinity and NaN.
FIAK_INLINE Vec split_exponent(Vec x, Vec& exponent) {
  exponent = _mm512_add_ps(_mm512_getexp_ps(x), _mm512_set1_ps(1.0f));
  return _mm512_getmant_ps(x, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
}
/// yes where a < b, else no (also for NaN).
FIAK_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
FIAK_INLINE bool all_between(Vec x, float low, float high) {
  return (_mm512_cmp_ps_mask(x, broadcast(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, broadcast(high), _CMP_LT_OQ)) ==
         0xffff;
}
FIAK_INLINE bool all_positive_or_nan(const float* x) { return _mm512_cmp_ps_mask(load(x), zero(), _CMP_LE_OQ) == 0; }

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
/// x * 2^n for whole n in -252..252; overflows to infinity and underflows to 0. Two steps reach the subnormals.
FIAK_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vec second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return mul(mul(x, first), second);
}
FIAK_INLINE Vec round_to_whole(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
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
/// x in the first `count` lanes of those numbered by `numbers`, y in the others.
FIAK_INLINE Vec select_first(Vec x, Vec y, const int32_t* numbers, int64_t count) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)),
                                          _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers)));
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(mask));
}
/// x = 2^exponent * result with 0.5 <= result < 1, for normal positive x; any for 0, infinity and NaN.
FIAK_INLINE Vec split_exponent(Vec x, Vec& exponent) {
  const __m256i bits = _mm256_castps_si256(x);
  exponent = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
}
/// yes where a < b, else no (also for NaN).
FIAK_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FIAK_INLINE bool all_between(Vec x, float low, float high) {
  return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(x, broadcast(low), _CMP_GE_OQ),
                                          _mm256_cmp_ps(x, broadcast(high), _CMP_LT_OQ))) == 0xff;
}
FIAK_INLINE bool all_positive_or_nan(const float* x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(load(x), zero(), _CMP_LE_OQ)) == 0;
}

#endif

/// exp(x) to about one unit in the last place: Cody and Waite's reduction to |r| <= ln(2)/2 and the minimax polynomial
/// of Cephes' expf. exp(-inf) is 0; NaN stays NaN.
FIAK_INLINE Vec exp(Vec x) {
  // The order of the operands lets NaN through. Beyond the bounds the result is 0 or infinity anyway.
  x = min(broadcast(104.0f), max(broadcast(-104.0f), x));
  const Vec n = round_to_whole(mul(x, broadcast(1.44269504088896341f)));
  Vec r = fmadd(n, broadcast(-0.693359375f), x);
  r = fmadd(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fmadd(p, r, broadcast(1.3981999507e-3f));
  p = fmadd(p, r, broadcast(8.3334519073e-3f));
  p = fmadd(p, r, broadcast(4.1665795894e-2f));
  p = fmadd(p, r, broadcast(1.6666665459e-1f));
  p = fmadd(p, r, broadcast(5.0000001201e-1f));
  p = fmadd(p, mul(r, r), add(r, broadcast(1.0f)));
  return scale_by_power_of_two(p, n);
}

/// 2^x for x <= 0 to about one unit in the last place, by the polynomial of Cephes' exp2f: fewer steps than exp, for
/// those who can scale x beforehand. 2^-inf is 0; NaN stays NaN.
FIAK_INLINE Vec exp2_of_nonpositive(Vec x) {
  x = max(broadcast(-151.0f), x);
  const Vec n = round_to_whole(x), r = sub(x, n);
  Vec p = broadcast(1.535336188319500e-4f);
  p = fmadd(p, r, broadcast(1.339887440266574e-3f));
  p = fmadd(p, r, broadcast(9.618437357674640e-3f));
  p = fmadd(p, r, broadcast(5.550332471162809e-2f));
  p = fmadd(p, r, broadcast(2.402264791363012e-1f));
  p = fmadd(p, r, broadcast(6.931472028550421e-1f));
  p = fmadd(p, r, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

/// The natural logarithm of normal x > 0 to about one unit in the last place, by the polynomial of Cephes' logf.
FIAK_INLINE Vec log(Vec x) {
  Vec exponent;
  Vec m = split_exponent(x, exponent);
  const Vec low = broadcast(0.707106781186547524f), one = broadcast(1.0f);
  exponent = where_less(m, low, sub(exponent, one), exponent);
  m = sub(where_less(m, low, add(m, m), m), one);
  const Vec square = mul(m, m);
  Vec p = broadcast(7.0376836292e-2f);
  p = fmadd(p, m, broadcast(-1.1514610310e-1f));
  p = fmadd(p, m, broadcast(1.1676998740e-1f));
  p = fmadd(p, m, broadcast(-1.2420140846e-1f));
  p = fmadd(p, m, broadcast(1.4249322787e-1f));
  p = fmadd(p, m, broadcast(-1.6668057665e-1f));
  p = fmadd(p, m, broadcast(2.0000714765e-1f));
  p = fmadd(p, m, broadcast(-2.4999993993e-1f));
  p = fmadd(p, m, broadcast(3.3333331174e-1f));
  Vec y = mul(mul(p, m), square);
  y = fmadd(exponent, broadcast(-2.12194440e-4f), y);
  y = fmadd(square, broadcast(-0.5f), y);
  return fmadd(exponent, broadcast(0.693359375f), add(m, y));
}

FIAK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FIAK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
/// The next multiple of the vector length.
FIAK_INLINE int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

}  // namespace fiak::cpu::FIAK_ISA
