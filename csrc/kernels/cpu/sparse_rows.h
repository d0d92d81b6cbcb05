// The two inner loops of sparse attention, over packed rows (bundle.h) that are picked by 16-bit indices: dot products
// with one row, and their weighted sum. Forward and backward, by rows and by columns, all consist of these.
//
// Scores, or whatever belongs to a pattern's entries, stand in registers of kKeys<E> entries for each of the E elements
// of a bundle: entry k of element e in lane (k / 4 * E + e) * 4 + k % 4.
//
// The kernels go through a list of steps, one for each register: which row it belongs to and where its indices are. A
// step is the same work whatever its row, so that nothing in the loops depends on where rows end: with some 60 entries
// a row, waiting for the processor to notice the end of one would cost a quarter of the time.
//
// Cost for float32 with AVX-512: D/16 multiply-adds, as many loads and a decoded index a pair and loop; 30 shuffles and
// 15 additions for 16 dot products of one element, 21 for 16 of two.
#pragma once

#include "kernels/cpu/bundle.h"

namespace fiak::cpu::FIAK_ISA {

template <int kElements>
constexpr int kKeys = kLanes / kElements;

/// The lane of entry k, of element e, in its register.
template <int kElements>
FIAK_INLINE int64_t lane_of(int64_t k, int64_t e) {
  return (k / kBlock * kElements + e) * kBlock + k % kBlock;
}

/// The entries of a register: kKeys<E> indices of packed rows, of which the first `count` are of the run and the others
/// repeat one of those. Their rows may then be read, and multiplied by 0, without touching any that the run lacks.
struct Step {
  const uint16_t* index;
  uint16_t row, count;
};

/// The entry that each lane of a register belongs to.
template <int kElements>
FIAK_INLINE const int32_t* lane_numbers() {
  alignas(64) static constexpr int32_t kOne[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) static constexpr int32_t kTwo[16] = {0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7};
  alignas(64) static constexpr int32_t kFour[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  return kElements == 1 ? kOne : kElements == 2 ? kTwo : kFour;
}

/// Sums over the blocks of a and b that belong to the same element: those of a first.
template <int kElements, int kLevel>
FIAK_INLINE Vec combine_blocks(Vec a, Vec b) {
#if defined(FIAK_ISA_AVX512)
  if constexpr (kElements == 2) return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
#else
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#endif
}

/// The sum or maximum over an element's lanes, in all of its lanes.
template <int kElements, class Combine>
FIAK_INLINE Vec reduce_lanes(Vec x, Combine&& combine) {
  x = combine(x, permute_lanes<0xb1>(x));
  x = combine(x, permute_lanes<0x4e>(x));
#if defined(FIAK_ISA_AVX512)
  if constexpr (kElements <= 2) x = combine(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  if constexpr (kElements == 1) x = combine(x, _mm512_shuffle_f32x4(x, x, 0xb1));
#else
  if constexpr (kElements == 1) x = combine(x, _mm256_permute2f128_ps(x, x, 0x01));
#endif
  return x;
}

/// Of the entries 4 kGroup .. 4 kGroup + 3 of a register, repeated so that every vector lane of an element is in a
/// block with its own element's.
template <int kElements, int kGroup>
FIAK_INLINE Vec spread_group(Vec x) {
#if defined(FIAK_ISA_AVX512)
  if constexpr (kElements == 1) return _mm512_shuffle_f32x4(x, x, kGroup * 0x55);
  if constexpr (kElements == 2) return _mm512_shuffle_f32x4(x, x, kGroup == 0 ? 0x44 : 0xee);
#else
  if constexpr (kElements == 1) return _mm256_permute2f128_ps(x, x, kGroup * 0x11);
#endif
  return x;
}

/// The byte offset of index k of four that were loaded at once.
template <int k, int64_t kRowBytes>
FIAK_INLINE int64_t row_offset(uint64_t four) {
  const uint64_t index = k == 3 ? four >> 48 : (four >> 16 * k) & 0xffff;
  int64_t offset;
  // One instruction where the compiler would take three that are each faster alone.
  asm("imulq %2, %1, %0" : "=r"(offset) : "r"(index), "i"(kRowBytes) : "cc");
  return offset;
}

FIAK_INLINE uint64_t load_four(const uint16_t* index) {
  uint64_t four;
  std::memcpy(&four, index, sizeof four);
  return four;
}

/// The first `count` < kLanes of the indices, the last of them repeated in the rest.
FIAK_INLINE const uint16_t* complete(const uint16_t* index, int64_t count, uint16_t* copy) {
#if defined(FIAK_ISA_AVX512)
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(index[count - 1]));
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  _mm256_store_si256(reinterpret_cast<__m256i*>(copy),
                     _mm256_mask_mov_epi16(last, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))));
#else
  const __m128i number = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
  const __m128i last = _mm_set1_epi16(static_cast<int16_t>(index[count - 1]));
  const __m128i mask = _mm_cmpgt_epi16(_mm_set1_epi16(static_cast<int16_t>(count)), number);
  _mm_store_si128(reinterpret_cast<__m128i*>(copy),
                  _mm_blendv_epi8(last, _mm_loadu_si128(reinterpret_cast<const __m128i*>(index)), mask));
#endif
  return copy;
}

/// Appends the steps of a run of entries; `spare` receives the indices of the last one if it is not full.
template <int kElements>
FIAK_INLINE Step* append_steps(const uint16_t* index, int64_t count, int64_t row, Step* steps, uint16_t*& spare) {
  constexpr int kCount = kKeys<kElements>;
  for (; count >= kCount; count -= kCount, index += kCount) *steps++ = {index, static_cast<uint16_t>(row), kCount};
  if (count > 0) {
    *steps++ = {complete(index, count, spare), static_cast<uint16_t>(row), static_cast<uint16_t>(count)};
    spare += kLanes;
  }
  return steps;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dot products

/// out[step] = scale x[row] . panel[index], one part (bundle.h) of the vectors.
struct DotsTask {
  const char *x, *panel;  // row 0 of x, and the row with index 0 of the panel
  const Step *begin, *end;
  float* out;         // a register for each step
  float scale, fill;  // `fill` stands behind a run's last entry
  bool first, last;   // of the parts
  float* maxima;      // [rows] vectors, or null: running maxima, ignoring NaN, in the lanes that found them
};

template <Storage kStorage, int kChunks>
FIAK_INLINE Vec row_products(const Vec* x, const char* row) {
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kStorage == Storage::kBFloat16) {
    Vec sum = zero();
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x[c]),
                             reinterpret_cast<__m512bh>(_mm512_loadu_ps(row + c * kVectorBytes)));
    }
    return sum;
  }
#endif
  const auto* y = reinterpret_cast<const float*>(row);
  Vec sum = mul(x[0], load(y));
#pragma GCC unroll 8
  for (int c = 1; c < kChunks; ++c) sum = fmadd(x[c], load(y + c * kLanes), sum);
  return sum;
}

/// A register of dot products, depth first so that few partial sums are alive: 2^kLevel entries.
template <Storage kStorage, int kChunks, int kElements, int kLevel>
FIAK_INLINE Vec dot_tree(const Vec* x, const char* panel, const uint16_t* index) {
  if constexpr (kLevel == 2) {
    constexpr int64_t kBytes = kChunks * kVectorBytes;
    const uint64_t four = load_four(index);
    const Vec a = row_products<kStorage, kChunks>(x, panel + row_offset<0, kBytes>(four));
    const Vec b = row_products<kStorage, kChunks>(x, panel + row_offset<1, kBytes>(four));
    const Vec ab = add(unpack_low(a, b), unpack_high(a, b));
    const Vec c = row_products<kStorage, kChunks>(x, panel + row_offset<2, kBytes>(four));
    const Vec d = row_products<kStorage, kChunks>(x, panel + row_offset<3, kBytes>(four));
    const Vec cd = add(unpack_low(c, d), unpack_high(c, d));
    return add(unpack_low_pairs(ab, cd), unpack_high_pairs(ab, cd));
  } else {
    const Vec a = dot_tree<kStorage, kChunks, kElements, kLevel - 1>(x, panel, index);
    const Vec b = dot_tree<kStorage, kChunks, kElements, kLevel - 1>(x, panel, index + (1 << (kLevel - 1)));
    return combine_blocks<kElements, kLevel>(a, b);
  }
}
constexpr int tree_levels(int keys) { return keys == 16 ? 4 : keys == 8 ? 3 : 2; }

template <Storage kStorage, int kElements, int kChunks>
static void dots_pass(const DotsTask& shared) {
  const DotsTask task = shared;  // which no store can change
  constexpr int kLevels = tree_levels(kKeys<kElements>);
  const Vec scale = broadcast(task.scale), fill = broadcast(task.fill);
  float* out = task.out;
  for (const Step* step = task.begin; step < task.end; ++step, out += kLanes) {
    Vec x[kChunks];
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      x[c] = load(reinterpret_cast<const float*>(task.x + (step->row * kChunks + c) * kVectorBytes));
    }
    Vec dots = dot_tree<kStorage, kChunks, kElements, kLevels>(x, task.panel, step->index);
    if (!task.first) dots = add(dots, load(out));
    if (task.last) {
      dots = select_first(mul(dots, scale), fill, lane_numbers<kElements>(), step->count);
      if (task.maxima != nullptr) {
        float* maximum = task.maxima + step->row * kLanes;
        store(maximum, max(dots, load(maximum)));
      }
    }
    store(out, dots);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weighted sums

/// sums[row] += sum_i weights[i] panel[index[i]] over the entries i of the steps, one part of the vectors.
struct SumsTask {
  const char* panel;
  const Step *begin, *end;
  const float* weights;  // a register for each step
  float* sums;           // [rows], sums_stride floats apart: sum_vectors() vectors
  int64_t sums_stride;
  // [rows] vectors, or null: sums of the weights, and of the weights as bfloat16 where they multiply rows as such,
  // still to be reduced over an element's lanes.
  float *totals, *rounded_totals;
};

template <Storage kStorage, int kChunks>
FIAK_INLINE void add_weighted(Vec weight, const char* row, Vec* sums) {
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) {
    sums[c] = fmadd(weight, load(reinterpret_cast<const float*>(row + c * kVectorBytes)), sums[c]);
  }
}

#if defined(FIAK_ISA_AVX512_BF16)
/// Lane -> the pair of bfloat16 weights, of a register converted to 16 of them, that multiplies it: entries 4 group +
/// 2 pair and the next.
template <int kElements>
FIAK_INLINE __m512i pair_lanes(int group, int pair) {
  const auto at = [&](int block) { return 2 * (group * kElements + block % kElements) + pair; };
  return _mm512_setr_epi32(at(0), at(0), at(0), at(0), at(1), at(1), at(1), at(1), at(2), at(2), at(2), at(2), at(3),
                           at(3), at(3), at(3));
}

template <int kChunks>
FIAK_INLINE void add_weighted_pair(__m512i weights, const char* row, const char* next, Vec* sums) {
  const auto w = reinterpret_cast<__m512bh>(weights);
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) {
    const __m512i a = _mm512_loadu_si512(row + c * kVectorBytes), b = _mm512_loadu_si512(next + c * kVectorBytes);
    sums[2 * c] = _mm512_dpbf16_ps(sums[2 * c], w, reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)));
    sums[2 * c + 1] = _mm512_dpbf16_ps(sums[2 * c + 1], w, reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b)));
  }
}
#endif

/// The float32 numbers that are left of x in bfloat16.
FIAK_INLINE Vec rounded_to_bfloat16(Vec x) {
#if defined(FIAK_ISA_AVX512_BF16)
  const auto halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  return x;
#endif
}

/// Entries 4 kGroup .. 4 kGroup + 3 of a register.
template <Storage kStorage, int kElements, int kChunks, int kSets, int kGroup, class Sums>
FIAK_INLINE void add_group(Vec weights, const char* panel, const uint16_t* index, Sums& sums) {
  constexpr int64_t kBytes = kChunks * kVectorBytes;
  const uint64_t four = load_four(index + kBlock * kGroup);
  const char *a = panel + row_offset<0, kBytes>(four), *b = panel + row_offset<1, kBytes>(four);
  const char *c = panel + row_offset<2, kBytes>(four), *d = panel + row_offset<3, kBytes>(four);
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kStorage == Storage::kBFloat16) {
    const __m512i halves = _mm512_castsi256_si512(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights)));
    add_weighted_pair<kChunks>(_mm512_permutexvar_epi32(pair_lanes<kElements>(kGroup, 0), halves), a, b, sums[0]);
    add_weighted_pair<kChunks>(_mm512_permutexvar_epi32(pair_lanes<kElements>(kGroup, 1), halves), c, d,
                               sums[kSets - 1]);
    return;
  }
#endif
  const Vec group = spread_group<kElements, kGroup>(weights);
  add_weighted<kStorage, kChunks>(permute_lanes<0x00>(group), a, sums[0]);
  add_weighted<kStorage, kChunks>(permute_lanes<0x55>(group), b, sums[1 % kSets]);
  add_weighted<kStorage, kChunks>(permute_lanes<0xaa>(group), c, sums[2 % kSets]);
  add_weighted<kStorage, kChunks>(permute_lanes<0xff>(group), d, sums[3 % kSets]);
}

template <Storage kStorage, int kElements, int kChunks>
static void sums_pass(const SumsTask& shared) {
  const SumsTask task = shared;  // which no store can change
  constexpr int kGroups = kKeys<kElements> / kBlock;
  constexpr int kVectors = kChunks * lane_elements(kStorage);
  // Several sets of sums hide the latency of the multiply-add, where the registers allow.
  constexpr int kRegisters = kLanes == 16 ? 16 : 12;
  constexpr int kSets = kVectors == 1 ? 4 : kVectors * 2 <= kRegisters ? 2 : 1;
  const float* weights = task.weights;
  for (const Step* step = task.begin; step < task.end;) {
    Vec sums[kSets][kVectors];
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 16
      for (int c = 0; c < kVectors; ++c) sums[set][c] = zero();
    }
    Vec total = zero(), rounded_total = zero();
    const uint16_t row = step->row;
    do {
      const Vec w = load(weights);
      const uint16_t* index = step->index;
      total = add(total, w);
      if constexpr (kStorage == Storage::kBFloat16) rounded_total = add(rounded_total, rounded_to_bfloat16(w));
      add_group<kStorage, kElements, kChunks, kSets, 0>(w, task.panel, index, sums);
      if constexpr (kGroups > 1) {
        if (step->count > 4) add_group<kStorage, kElements, kChunks, kSets, 1>(w, task.panel, index, sums);
      }
      if constexpr (kGroups > 2) {
        if (step->count > 8) add_group<kStorage, kElements, kChunks, kSets, 2>(w, task.panel, index, sums);
        if (step->count > 12) add_group<kStorage, kElements, kChunks, kSets, 3>(w, task.panel, index, sums);
      }
      ++step;
      weights += kLanes;
    } while (step < task.end && step->row == row);
    float* target = task.sums + row * task.sums_stride;
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      Vec sum = sums[0][c];
      if constexpr (kSets > 1) sum = add(sum, sums[1][c]);
      if constexpr (kSets > 2) sum = add(sum, add(sums[2][c], sums[3][c]));
      store(target + c * kLanes, add(load(target + c * kLanes), sum));
    }
    if (task.totals != nullptr) {
      float* totals = task.totals + row * kLanes;
      store(totals, add(load(totals), total));
      if constexpr (kStorage == Storage::kBFloat16) {
        float* rounded = task.rounded_totals + row * kLanes;
        store(rounded, add(load(rounded), rounded_total));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The passes by the number of vectors in a part

template <Storage kStorage, int kElements>
FIAK_INLINE void run_dots(const DotsTask& task, int64_t chunks) {
  constexpr void (*kPasses[kMaxChunks])(const DotsTask&) = {
      dots_pass<kStorage, kElements, 1>, dots_pass<kStorage, kElements, 2>, dots_pass<kStorage, kElements, 3>,
      dots_pass<kStorage, kElements, 4>, dots_pass<kStorage, kElements, 5>, dots_pass<kStorage, kElements, 6>,
      dots_pass<kStorage, kElements, 7>, dots_pass<kStorage, kElements, 8>};
  kPasses[chunks - 1](task);
}

template <Storage kStorage, int kElements>
FIAK_INLINE void run_sums(const SumsTask& task, int64_t chunks) {
  constexpr void (*kPasses[kMaxChunks])(const SumsTask&) = {
      sums_pass<kStorage, kElements, 1>, sums_pass<kStorage, kElements, 2>, sums_pass<kStorage, kElements, 3>,
      sums_pass<kStorage, kElements, 4>, sums_pass<kStorage, kElements, 5>, sums_pass<kStorage, kElements, 6>,
      sums_pass<kStorage, kElements, 7>, sums_pass<kStorage, kElements, 8>};
  kPasses[chunks - 1](task);
}

/// Dot products of rows of x with rows of `panel`, from its row `first` on, in all parts.
template <Storage kStorage, int kElements>
FIAK_INLINE void dots(DotsTask task, const BundlePanel& x, const BundlePanel& panel, int64_t first) {
  for (int64_t part = 0; part < x.parts(); ++part) {
    task.x = x.vector(0, part * kMaxChunks);
    task.panel = panel.vector(first, part * kMaxChunks);
    task.first = part == 0;
    task.last = part + 1 == x.parts();
    run_dots<kStorage, kElements>(task, x.part_chunks(part));
  }
}

/// Weighted sums of rows of `panel`, from its row `first` on, in all parts.
template <Storage kStorage, int kElements>
FIAK_INLINE void weighted_sums(SumsTask task, const BundlePanel& panel, int64_t first) {
  float* totals = task.totals;
  float* sums = task.sums;
  for (int64_t part = 0; part < panel.parts(); ++part) {
    task.panel = panel.vector(first, part * kMaxChunks);
    task.sums = sums + part * kMaxChunks * lane_elements(kStorage) * kLanes;
    task.totals = part == 0 ? totals : nullptr;
    run_sums<kStorage, kElements>(task, panel.part_chunks(part));
  }
}

/// scores = 2^(scores - maxima[row]) in the registers of the steps, whatever their rows: its long dependency chains
/// overlap with nothing that waits for them.
FIAK_INLINE void exp2_steps(float* scores, const float* maxima, const Step* begin, const Step* end) {
  for (const Step* step = begin; step < end; ++step, scores += kLanes) {
    store(scores, exp2_below_128(sub(load(scores), load(maxima + step->row * kLanes))));
  }
}

}  // namespace fiak::cpu::FIAK_ISA
