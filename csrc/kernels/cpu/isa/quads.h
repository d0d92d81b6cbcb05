// Vectors as quads of lanes: a quad has the same four entries, or columns, of one sample, and a vector has quads of
// several samples (entries/bundle.h).
//
//   AVX-512, two samples:  | sample 0, quad 0 | sample 1, quad 0 | sample 0, quad 1 | sample 1, quad 1 |
#pragma once

#include "kernels/cpu/entries/packing.h"
#include "kernels/cpu/isa/vec.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kQuads = kLanes / kQuad;  // of a vector
constexpr int kMaxSamples = kQuads;
constexpr int64_t kVectorBytes = kLanes * 4;

FIAK_INLINE __m128 load_lanes(const float* p, __m128) { return _mm_loadu_ps(p); }
FIAK_INLINE __m256 load_lanes(const float* p, __m256) { return _mm256_loadu_ps(p); }
FIAK_INLINE void store_lanes(float* p, __m128 x) { _mm_storeu_ps(p, x); }
FIAK_INLINE void store_lanes(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
FIAK_INLINE __m128 max_lanes(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
FIAK_INLINE __m256 max_lanes(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
template <int kOrder>
FIAK_INLINE __m128 permute_quads(__m128 x) {
  return _mm_permute_ps(x, kOrder);
}
template <int kOrder>
FIAK_INLINE __m256 permute_quads(__m256 x) {
  return _mm256_permute_ps(x, kOrder);
}
#if defined(FIAK_ISA_AVX512)
FIAK_INLINE __m512 load_lanes(const float* p, __m512) { return _mm512_loadu_ps(p); }
FIAK_INLINE void store_lanes(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
FIAK_INLINE __m512 max_lanes(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
template <int kOrder>
FIAK_INLINE __m512 permute_quads(__m512 x) {
  return _mm512_permute_ps(x, kOrder);
}
#endif

/// The vector of kQuad lanes for each sample.
template <int kSamples>
struct QuadsOf {
#if defined(FIAK_ISA_AVX512)
  using Type = __m512;
#endif
};
template <>
struct QuadsOf<1> {
  using Type = __m128;
};
template <>
struct QuadsOf<2> {
  using Type = __m256;
};
template <int kSamples>
using Quads = typename QuadsOf<kSamples>::Type;

template <int kSamples>
FIAK_INLINE Quads<kSamples> load_quads(const float* p) {
  return load_lanes(p, Quads<kSamples>{});
}
template <int kSamples>
FIAK_INLINE Quads<kSamples> broadcast_quads(float x) {
  return x - Quads<kSamples>{};
}

/// The sums over a vector's quads of each sample.
template <int kSamples>
FIAK_INLINE Quads<kSamples> add_quads(Vec x) {
  if constexpr (kSamples == kQuads) {
    return x;
  } else {
#if defined(FIAK_ISA_AVX512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    const __m256 half = x;
#endif
    if constexpr (kSamples == 2) {
      return half;
    } else {
      return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
  }
}
/// A quad in all quads of a vector, each with its sample's.
template <int kSamples>
FIAK_INLINE Vec spread_quads(const float* p) {
  if constexpr (kSamples == kQuads) {
    return load(p);
  } else {
#if defined(FIAK_ISA_AVX512)
    if constexpr (kSamples == 2) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#else
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  }
}
/// The sum of each quad, or its largest number, in all of the quad's lanes.
template <class Lanes>
FIAK_INLINE Lanes sum_in_quads(Lanes x) {
  x = x + permute_quads<0xb1>(x);
  return x + permute_quads<0x4e>(x);
}
template <class Lanes>
FIAK_INLINE Lanes max_in_quads(Lanes x) {
  x = max_lanes(x, permute_quads<0xb1>(x));
  return max_lanes(x, permute_quads<0x4e>(x));
}
/// x in the first `count` lanes of every quad, y in the others.
FIAK_INLINE __m128 select_in_quads(__m128 x, __m128 y, int64_t count) {
  const __m128i number = _mm_setr_epi32(0, 1, 2, 3), counts = _mm_set1_epi32(static_cast<int32_t>(count));
  return _mm_blendv_ps(y, x, _mm_castsi128_ps(_mm_cmpgt_epi32(counts, number)));
}
FIAK_INLINE __m256 select_in_quads(__m256 x, __m256 y, int64_t count) {
  const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
  const __m256i counts = _mm256_set1_epi32(static_cast<int32_t>(count));
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(counts, number)));
}
#if defined(FIAK_ISA_AVX512)
FIAK_INLINE __m512 select_in_quads(__m512 x, __m512 y, int64_t count) {
  return _mm512_mask_mov_ps(y, static_cast<__mmask16>(((1u << count) - 1) * 0x1111), x);
}
#endif

/// Spreads each sample's number over a quad.
template <int kSamples>
FIAK_INLINE void spread_samples(const float* numbers, float* target) {
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) _mm_storeu_ps(target + e * kQuad, _mm_set1_ps(numbers[e]));
}
/// Stores a[k] and b[k], k < 4, side by side at targets[k] + offset.
FIAK_INLINE void store_side_by_side(const float* a, const float* b, float* const* targets, int64_t offset) {
  const __m128 x = _mm_loadu_ps(a), y = _mm_loadu_ps(b);
  const __m128 low = _mm_unpacklo_ps(x, y), high = _mm_unpackhi_ps(x, y);
  const auto target = [&](int k) { return reinterpret_cast<__m64*>(targets[k] + offset); };
  _mm_storel_pi(target(0), low);
  _mm_storeh_pi(target(1), low);
  _mm_storel_pi(target(2), high);
  _mm_storeh_pi(target(3), high);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packed rows

/// Vector v of the packed row of rows[0..samples), of whole vectors of float32 lanes.
template <int kSamples>
FIAK_INLINE Vec interleave(const float* const* rows, int64_t v) {
  constexpr int kTaken = kLanes / kSamples;
  const int64_t d = v * kTaken;
  if constexpr (kSamples == 1) {
    return load(rows[0] + d);
#if defined(FIAK_ISA_AVX512)
  } else if constexpr (kSamples == 2) {
    const __m512 pair = _mm512_castps256_ps512(_mm256_loadu_ps(rows[0] + d));
    const __m512 both = _mm512_insertf32x8(pair, _mm256_loadu_ps(rows[1] + d), 1);
    return _mm512_shuffle_f32x4(both, both, 0xd8);
  } else {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + d));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[1] + d), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows[2] + d), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(rows[3] + d), 3);
#else
  } else {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + d)), _mm_loadu_ps(rows[1] + d), 1);
#endif
  }
}

/// Columns [t * kLanes, (t + 1) * kLanes) of each sample, from a row of float32 sums: the inverse of interleave, where
/// a vector of bfloat16 rows has become two, of the low and of the high half of every quad.
template <Storage kStorage, int kSamples>
FIAK_INLINE void separate(const float* sums, int64_t t, Vec* samples) {
  if constexpr (kStorage == Storage::kFloat32 && kSamples == 1) {
    samples[0] = load(sums + t * kLanes);
    return;
  }
#if defined(FIAK_ISA_AVX512)
  if constexpr (kSamples == 4) {  // quad e of four vectors
    const float* first = sums + 4 * t * kLanes;
    const Vec a = load(first), b = load(first + kLanes), c = load(first + 2 * kLanes), d = load(first + 3 * kLanes);
    const Vec ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
    const Vec ab_high = _mm512_shuffle_f32x4(a, b, 0xee), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
    samples[0] = _mm512_shuffle_f32x4(ab, cd, 0x88);
    samples[1] = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    samples[2] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    samples[3] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
  } else if constexpr (kSamples == 2) {  // every other quad of two vectors; bfloat16's halves take turns
    const Vec a = load(sums + 2 * t * kLanes), b = load(sums + (2 * t + 1) * kLanes);
    samples[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    samples[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    if constexpr (kStorage == Storage::kFloat32) return;
    for (int e = 0; e < 2; ++e) samples[e] = _mm512_shuffle_f32x4(samples[e], samples[e], 0xd8);
  } else {  // two quads of each half
    const float* first = sums + t / 2 * 2 * kLanes + t % 2 * (kLanes / 2);
    const Vec halves =
        _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(first)), _mm256_load_ps(first + kLanes), 1);
    samples[0] = _mm512_shuffle_f32x4(halves, halves, 0xd8);
  }
#else
  if constexpr (kSamples == 2) {
    const Vec a = load(sums + 2 * t * kLanes), b = load(sums + (2 * t + 1) * kLanes);
    samples[0] = _mm256_permute2f128_ps(a, b, 0x20);
    samples[1] = _mm256_permute2f128_ps(a, b, 0x31);
  }
#endif
}

#if defined(FIAK_ISA_AVX512_BF16)
// ---------------------------------------------------------------------------------------------------------------------
// bfloat16 weights

/// The lanes 0, 2, ... of each quad of a, then of b; and the others.
FIAK_INLINE Vec even_lanes(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0x88); }
FIAK_INLINE Vec odd_lanes(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0xdd); }
/// Half a register: kLanes bfloat16 numbers.
using HalfVec = __m256i;
FIAK_INLINE HalfVec round_to_bfloat16(Vec x) { return reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(x)); }
/// A running sum of vectors rounded to bfloat16.
class RoundedTotal {
 public:
  __attribute__((always_inline)) void add(Vec x) {
    totals_ = _mm256_dpbf16_ps(totals_, _mm512_cvtneps_pbh(x), reinterpret_cast<__m256bh>(_mm256_set1_epi16(0x3f80)));
  }
  /// Sums of neighbouring lanes, each in one of its two lanes, 0 in the other.
  __attribute__((always_inline)) Vec vector() const {
    return _mm512_castsi512_ps(_mm512_cvtepu32_epi64(_mm256_castps_si256(totals_)));
  }

 private:
  __m256 totals_ = _mm256_setzero_ps();
};

/// Of a vector in bfloat16, each quad's entries 2 kPair and 2 kPair + 1 in all lanes of the quad.
template <int kPair>
FIAK_INLINE __m512i spread_pair(HalfVec halves) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  return _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(kPair)), _mm512_castsi256_si512(halves));
}

/// The same of a quad at p.
template <int kSamples, int kPair>
FIAK_INLINE __m512i spread_rounded_pair(const float* p) {
  if constexpr (kSamples == 1) {
    int64_t quad;
    std::memcpy(&quad, p, sizeof quad);
    return _mm512_castps_si512(permute_lanes<kPair * 0x55>(_mm512_castsi512_ps(_mm512_set1_epi64(quad))));
  } else if constexpr (kSamples == 2) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2);
    const __m128i quad = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(kPair)), _mm512_castsi128_si512(quad));
  } else {
    return spread_pair<kPair>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
}

template <int kVectors>
FIAK_INLINE void add_weighted_pair(__m512i weights, const char* row, const char* next, Vec* sums) {
  const auto w = reinterpret_cast<__m512bh>(weights);
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    const __m512i a = _mm512_loadu_si512(row + c * kVectorBytes), b = _mm512_loadu_si512(next + c * kVectorBytes);
    sums[2 * c] = _mm512_dpbf16_ps(sums[2 * c], w, reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)));
    sums[2 * c + 1] = _mm512_dpbf16_ps(sums[2 * c + 1], w, reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b)));
  }
}
#endif

}  // namespace fiak::cpu::FIAK_ISA
