// AVX-512, its BF16 part included, on processors that lack it: for tests. SIMDe has most intrinsics that the kernels
// use; this file adds the rest. It is included ahead of everything else.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#pragma GCC diagnostic ignored "-Wignored-attributes"  // vectors as arguments of templates
#pragma GCC diagnostic ignored "-Wpsabi"               // functions that take vectors are inlined

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fiak::emulated {

#define FIAK_EMULATED_INLINE static inline __attribute__((always_inline))
#define FIAK_EMULATED_CALL static __attribute__((noinline, unused))  // what is long, or compilers would take minutes

/// The lanes of a vector as numbers of another type.
template <class Lane, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Lane);
  Lane lane[kCount] = {};
  Lanes() = default;
  explicit Lanes(const Vector& x) { std::memcpy(lane, &x, sizeof x); }
  operator Vector() const {
    Vector x;
    std::memcpy(&x, lane, sizeof x);
    return x;
  }
};

FIAK_EMULATED_INLINE __m256 half(__m512 x, int i) {
  __m256 y;
  std::memcpy(&y, reinterpret_cast<const char*>(&x) + 32 * i, sizeof y);
  return y;
}
FIAK_EMULATED_INLINE __m512 join(__m256 low, __m256 high) {
  __m512 x;
  std::memcpy(&x, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&x) + 32, &high, sizeof high);
  return x;
}
FIAK_EMULATED_INLINE __m256i half(__m512i x, int i) { return _mm256_castps_si256(half(_mm512_castsi512_ps(x), i)); }
FIAK_EMULATED_INLINE __m512i join(__m256i low, __m256i high) {
  return _mm512_castps_si512(join(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)));
}

template <class Lane, class Vector>
FIAK_EMULATED_CALL Vector maskz_loadu(uint64_t mask, const void* p) {
  Lanes<Lane, Vector> x;
  for (int i = 0; i < x.kCount; ++i) {
    if (mask >> i & 1) std::memcpy(&x.lane[i], static_cast<const Lane*>(p) + i, sizeof(Lane));
  }
  return x;
}
FIAK_EMULATED_CALL void mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  const Lanes<float, __m512> from(x);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<float*>(p) + i, &from.lane[i], 4);
  }
}
FIAK_EMULATED_CALL __mmask32 cmplt_epu16_mask(__m512i a, __m512i b) {
  const Lanes<uint16_t, __m512i> x(a), y(b);
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>(x.lane[i] < y.lane[i]) << i;
  return mask;
}
FIAK_EMULATED_CALL __m256i cvtepi32_epi16(__m512i a) {
  const Lanes<int32_t, __m512i> x(a);
  Lanes<int16_t, __m256i> y;
  for (int i = 0; i < 16; ++i) y.lane[i] = static_cast<int16_t>(x.lane[i]);
  return y;
}
FIAK_EMULATED_INLINE __m512 cvtepi32_ps(__m512i x) {
  return join(_mm256_cvtepi32_ps(half(x, 0)), _mm256_cvtepi32_ps(half(x, 1)));
}
FIAK_EMULATED_INLINE __m512i cvtepu16_epi32(__m256i x) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}
FIAK_EMULATED_INLINE __m512i cvtepu32_epi64(__m256i x) {
  return join(_mm256_cvtepu32_epi64(_mm256_castsi256_si128(x)), _mm256_cvtepu32_epi64(_mm256_extracti128_si256(x, 1)));
}
FIAK_EMULATED_INLINE __m512 cvtph_ps(__m256i x) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
template <int kRounding>
FIAK_EMULATED_INLINE __m256i cvtps_ph(__m512 x) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(half(x, 0), kRounding)),
                                 _mm256_cvtps_ph(half(x, 1), kRounding), 1);
}
template <int kCount>
FIAK_EMULATED_INLINE __m512i srai_epi32(__m512i x) {
  return join(_mm256_srai_epi32(half(x, 0), kCount), _mm256_srai_epi32(half(x, 1), kCount));
}
template <int kOrder>
FIAK_EMULATED_INLINE __m512 permute_ps(__m512 x) {
  return join(_mm256_permute_ps(half(x, 0), kOrder), _mm256_permute_ps(half(x, 1), kOrder));
}
/// Four blocks of four lanes: two of a, two of b.
template <int kOrder>
FIAK_EMULATED_CALL __m512 shuffle_f32x4(__m512 a, __m512 b) {
  __m512 x;
  for (int i = 0; i < 4; ++i) {
    const __m512& from = i < 2 ? a : b;
    std::memcpy(reinterpret_cast<char*>(&x) + 16 * i, reinterpret_cast<const char*>(&from) + 16 * (kOrder >> 2 * i & 3),
                16);
  }
  return x;
}
FIAK_EMULATED_INLINE float reduce_add_ps(__m512 x) {
  const __m256 eight = half(x, 0) + half(x, 1);
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
FIAK_EMULATED_INLINE float reduce_max_ps(__m512 x) {
  const __m256 eight = _mm256_max_ps(half(x, 0), half(x, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
/// What the largest whole number that is not above leaves of x.
template <int kRounding>
FIAK_EMULATED_INLINE __m512 reduce_ps(__m512 x) {
  static_assert((kRounding & 0xf7) == _MM_FROUND_TO_NEG_INF, "no other rounding is emulated");
  return x - join(_mm256_floor_ps(half(x, 0)), _mm256_floor_ps(half(x, 1)));
}
/// x 2^floor(y).
FIAK_EMULATED_CALL __m512 scalef_ps(__m512 x, __m512 y) {
  Lanes<float, __m512> a(x);
  const Lanes<float, __m512> b(y);
  for (int i = 0; i < 16; ++i) {
    const float n = std::floor(b.lane[i]);
    if (n != n) {
      a.lane[i] = n;
    } else {
      a.lane[i] = std::ldexp(a.lane[i], static_cast<int>(std::fmin(std::fmax(n, -1000.0f), 1000.0f)));
    }
  }
  return a;
}

/// Rounded to nearest even; subnormal numbers become 0, NaN stays NaN.
FIAK_EMULATED_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
/// Subnormal numbers become 0.
FIAK_EMULATED_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>((x & 0x7f80) == 0 ? x & 0x8000 : x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
FIAK_EMULATED_CALL __m256i cvtneps_pbh(__m512 a) {
  const Lanes<float, __m512> x(a);
  Lanes<uint16_t, __m256i> y;
  for (int i = 0; i < 16; ++i) y.lane[i] = to_bfloat16(x.lane[i]);
  return y;
}
FIAK_EMULATED_CALL __m512i cvtne2ps_pbh(__m512 high, __m512 low) { return join(cvtneps_pbh(low), cvtneps_pbh(high)); }
/// c + a b of one unit: the second product is added first.
FIAK_EMULATED_INLINE float add_pair(float c, uint32_t a, uint32_t b) {
  c += from_bfloat16(static_cast<uint16_t>(a >> 16)) * from_bfloat16(static_cast<uint16_t>(b >> 16));
  return c + from_bfloat16(static_cast<uint16_t>(a)) * from_bfloat16(static_cast<uint16_t>(b));
}
FIAK_EMULATED_CALL __m512 dpbf16_ps(__m512 c, __m512i a, __m512i b) {
  Lanes<float, __m512> sum(c);
  const Lanes<uint32_t, __m512i> x(a), y(b);
  for (int i = 0; i < 16; ++i) sum.lane[i] = add_pair(sum.lane[i], x.lane[i], y.lane[i]);
  return sum;
}
FIAK_EMULATED_CALL __m256 dpbf16_ps(__m256 c, __m256i a, __m256i b) {
  Lanes<float, __m256> sum(c);
  const Lanes<uint32_t, __m256i> x(a), y(b);
  for (int i = 0; i < 8; ++i) sum.lane[i] = add_pair(sum.lane[i], x.lane[i], y.lane[i]);
  return sum;
}

/// The exponent of x, -inf for 0; inf and NaN as they are.
FIAK_EMULATED_CALL __m512 getexp_ps(__m512 x) {
  Lanes<float, __m512> a(x);
  for (float& lane : a.lane) {
    if (lane == 0) {
      lane = -INFINITY;
    } else {
      lane = std::isfinite(lane) ? static_cast<float>(std::ilogb(lane)) : lane * lane;
    }
  }
  return a;
}
/// x over 2^exponent, of 1 to 2; 1 for 0 and infinity.
FIAK_EMULATED_CALL __m512 getmant_ps(__m512 x) {
  Lanes<float, __m512> a(x);
  for (float& lane : a.lane) {
    if (lane == 0 || std::isinf(lane)) {
      lane = std::copysign(1.0f, lane);
    } else if (std::isfinite(lane)) {
      lane = std::scalbn(lane, -std::ilogb(lane));
    }
  }
  return a;
}

}  // namespace fiak::emulated

#undef __m512bh
#define __m512bh __m512i
#undef __m256bh
#define __m256bh __m256i

#undef _mm256_dpbf16_ps
#undef _mm512_getexp_ps
#undef _mm512_getmant_ps
#undef _mm512_scalef_ps
#undef _mm512_dpbf16_ps
#undef _mm512_shuffle_f32x4
#define _mm256_dpbf16_ps(c, a, b) fiak::emulated::dpbf16_ps(c, a, b)
#define _mm256_maskz_loadu_epi16(mask, p) (fiak::emulated::maskz_loadu<uint16_t, __m256i>(mask, p))
#define _mm512_cmplt_epu16_mask(a, b) fiak::emulated::cmplt_epu16_mask(a, b)
#define _mm512_cvtepi32_epi16(x) fiak::emulated::cvtepi32_epi16(x)
#define _mm512_cvtepi32_ps(x) fiak::emulated::cvtepi32_ps(x)
#define _mm512_cvtepu16_epi32(x) fiak::emulated::cvtepu16_epi32(x)
#define _mm512_cvtepu32_epi64(x) fiak::emulated::cvtepu32_epi64(x)
#define _mm512_cvtne2ps_pbh(high, low) fiak::emulated::cvtne2ps_pbh(high, low)
#define _mm512_cvtneps_pbh(x) fiak::emulated::cvtneps_pbh(x)
#define _mm512_cvtph_ps(x) fiak::emulated::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) fiak::emulated::cvtps_ph<rounding>(x)
#define _mm512_dpbf16_ps(c, a, b) fiak::emulated::dpbf16_ps(c, a, b)
#define _mm512_extractf32x8_ps(x, i) fiak::emulated::half(x, i)
#define _mm512_getexp_ps(x) fiak::emulated::getexp_ps(x)
#define _mm512_getmant_ps(x, interval, sign) fiak::emulated::getmant_ps(x)
#define _mm512_mask_cmp_ps_mask(mask, a, b, op) static_cast<__mmask16>((mask)&_mm512_cmp_ps_mask(a, b, op))
#define _mm512_mask_storeu_ps(p, mask, x) fiak::emulated::mask_storeu_ps(p, mask, x)
#define _mm512_maskz_loadu_epi16(mask, p) (fiak::emulated::maskz_loadu<uint16_t, __m512i>(mask, p))
#define _mm512_maskz_loadu_epi8(mask, p) (fiak::emulated::maskz_loadu<uint8_t, __m512i>(mask, p))
#define _mm512_maskz_loadu_ps(mask, p) (fiak::emulated::maskz_loadu<float, __m512>(mask, p))
#define _mm512_permute_ps(x, order) fiak::emulated::permute_ps<order>(x)
#define _mm512_reduce_add_ps(x) fiak::emulated::reduce_add_ps(x)
#define _mm512_reduce_max_ps(x) fiak::emulated::reduce_max_ps(x)
#define _mm512_reduce_ps(x, rounding) fiak::emulated::reduce_ps<rounding>(x)
#define _mm512_scalef_ps(x, y) fiak::emulated::scalef_ps(x, y)
#define _mm512_shuffle_f32x4(a, b, order) fiak::emulated::shuffle_f32x4<order>(a, b)
#define _mm512_srai_epi32(x, count) fiak::emulated::srai_epi32<count>(x)
