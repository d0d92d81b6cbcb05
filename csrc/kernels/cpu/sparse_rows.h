// The two inner loops of sparse attention, over packed rows (bundle.h) that are picked by 16-bit indices: dot products
// with one row, and their weighted sum. Forward and backward, by rows and by columns, all consist of these.
//
// The kernels go through runs: the entries of one row of a pattern whose packed rows lie in one block. Four entries are
// a group, which is what an index load brings and what the loops take at once: with some 60 entries a row, larger steps
// would waste much of each row's last one. Scores, or whatever belongs to a pattern's entries, lie in memory as groups
// of E elements: entry k of element e of a run at offset_of_entry<E>(k, e) from where the run has its place. Places are
// whole vectors apart, so that what is done to every number alike goes by vectors.
//
// Cost for float32 with AVX-512: D/16 multiply-adds, as many loads and a decoded index a pair and loop; 8 shuffles and
// 5 additions for 4 dot products of one element, 7 and 4 for 8 of two, 6 and 3 for 16 of four.
#pragma once

#include "kernels/cpu/bundle.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kGroup = kBlock;  // entries, one in each lane of a block

struct Run {
  const uint16_t* index;  // of packed rows, ascending; kGroup - 1 behind the last can be read
  uint32_t row;           // of x and of the sums, counted from the first that a task has
  uint32_t count;
  int64_t place;  // of its first entry, in floats
};

template <int kElements>
FIAK_INLINE int64_t offset_of_entry(int64_t k, int64_t e) {
  return (k / kGroup * kElements + e) * kGroup + k % kGroup;
}
/// Where two numbers of an entry stand side by side: those of two entries, of every element, then those of the group's
/// other two.
template <int kElements>
FIAK_INLINE int64_t offset_of_pair(int64_t k, int64_t e) {
  return ((k / 2) * kElements + e) * kGroup + k % 2 * 2;
}
/// Floats of a run of `count` entries.
template <int kElements>
FIAK_INLINE int64_t run_floats(int64_t count) {
  return padded((count + kGroup - 1) / kGroup * kGroup * kElements);
}
/// Of `runs` runs that have `entries` entries together, at most.
template <int kElements>
FIAK_INLINE int64_t most_run_floats(int64_t runs, int64_t entries) {
  return entries * kElements + runs * ((kGroup - 1) * kElements + kLanes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Groups: a block of lanes for each element

FIAK_INLINE __m128 load_lanes(const float* p, __m128) { return _mm_loadu_ps(p); }
FIAK_INLINE __m256 load_lanes(const float* p, __m256) { return _mm256_loadu_ps(p); }
FIAK_INLINE void store_lanes(float* p, __m128 x) { _mm_storeu_ps(p, x); }
FIAK_INLINE void store_lanes(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
FIAK_INLINE __m128 max_lanes(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
FIAK_INLINE __m256 max_lanes(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
template <int kOrder>
FIAK_INLINE __m128 permute_blocks(__m128 x) {
  return _mm_permute_ps(x, kOrder);
}
template <int kOrder>
FIAK_INLINE __m256 permute_blocks(__m256 x) {
  return _mm256_permute_ps(x, kOrder);
}
#if defined(FIAK_ISA_AVX512)
FIAK_INLINE __m512 load_lanes(const float* p, __m512) { return _mm512_loadu_ps(p); }
FIAK_INLINE void store_lanes(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
FIAK_INLINE __m512 max_lanes(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
template <int kOrder>
FIAK_INLINE __m512 permute_blocks(__m512 x) {
  return _mm512_permute_ps(x, kOrder);
}
#endif

/// The vector of kGroup lanes for each element.
template <int kElements>
struct GroupOf {
#if defined(FIAK_ISA_AVX512)
  using Type = __m512;
#endif
};
template <>
struct GroupOf<1> {
  using Type = __m128;
};
template <>
struct GroupOf<2> {
  using Type = __m256;
};
template <int kElements>
using Group = typename GroupOf<kElements>::Type;

template <int kElements>
FIAK_INLINE Group<kElements> load_group(const float* p) {
  return load_lanes(p, Group<kElements>{});
}
template <int kElements>
FIAK_INLINE Group<kElements> broadcast_group(float x) {
  return x - Group<kElements>{};
}

/// The sums over a vector's blocks of each element.
template <int kElements>
FIAK_INLINE Group<kElements> add_blocks(Vec x) {
  if constexpr (kElements == kBlocks) {
    return x;
  } else {
#if defined(FIAK_ISA_AVX512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    const __m256 half = x;
#endif
    if constexpr (kElements == 2) {
      return half;
    } else {
      return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
  }
}
/// A group in all blocks of a vector, each with its element's.
template <int kElements>
FIAK_INLINE Vec spread_group(const float* p) {
  if constexpr (kElements == kBlocks) {
    return load(p);
  } else {
#if defined(FIAK_ISA_AVX512)
    if constexpr (kElements == 2) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#else
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  }
}
/// The sum of each block, or its largest number, in all of the block's lanes.
template <class Lanes>
FIAK_INLINE Lanes sum_in_blocks(Lanes x) {
  x = x + permute_blocks<0xb1>(x);
  return x + permute_blocks<0x4e>(x);
}
template <class Lanes>
FIAK_INLINE Lanes max_in_blocks(Lanes x) {
  x = max_lanes(x, permute_blocks<0xb1>(x));
  return max_lanes(x, permute_blocks<0x4e>(x));
}
/// x in the first `count` lanes of every block, y in the others.
FIAK_INLINE __m128 select_in_blocks(__m128 x, __m128 y, int64_t count) {
  const __m128i number = _mm_setr_epi32(0, 1, 2, 3), counts = _mm_set1_epi32(static_cast<int32_t>(count));
  return _mm_blendv_ps(y, x, _mm_castsi128_ps(_mm_cmpgt_epi32(counts, number)));
}
FIAK_INLINE __m256 select_in_blocks(__m256 x, __m256 y, int64_t count) {
  const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
  const __m256i counts = _mm256_set1_epi32(static_cast<int32_t>(count));
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(counts, number)));
}
#if defined(FIAK_ISA_AVX512)
FIAK_INLINE __m512 select_in_blocks(__m512 x, __m512 y, int64_t count) {
  return _mm512_mask_mov_ps(y, static_cast<__mmask16>(((1u << count) - 1) * 0x1111), x);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Indices

FIAK_INLINE uint64_t load_four(const uint16_t* index) {
  uint64_t four;
  std::memcpy(&four, index, sizeof four);
  return four;
}
/// The first `count` of four indices, 0 < count < 4, the first of them repeated in the rest: their rows may then be
/// read, and multiplied by 0, without touching any that the run lacks.
FIAK_INLINE uint64_t complete_four(uint64_t four, int64_t count) {
  const uint64_t kept = (uint64_t{1} << 16 * count) - 1;
  return (four & kept) | ((four & 0xffff) * 0x0001000100010001u & ~kept);
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

/// use(four indices, how many of them are of the run, the group's number) for every group of a run.
template <class Use>
FIAK_INLINE void for_groups(const Run& run, Use&& use) {
  const uint16_t* index = run.index;  // which no store can change
  const int64_t whole = run.count / kGroup, rest = run.count % kGroup;
  for (int64_t i = 0; i < whole; ++i) use(load_four(index + i * kGroup), kGroup, i);
  if (rest > 0) use(complete_four(load_four(index + whole * kGroup), rest), rest, whole);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fetching ahead

/// Rows that are wanted soon, of up to two operands of each element. A run fetches one of each: many at once would
/// fill the buffers that loads wait in.
class RowsAhead {
 public:
  /// Rows [begin, end) of x.
  template <class Operand>
  __attribute__((always_inline)) void add(const Operand& x, DType dtype, int64_t b, int64_t h, int64_t begin,
                                          int64_t end, int64_t size) {
    if (begin >= end) return;
    rows_[operands_++] = {row_address(x, dtype, b, h, begin), x.row_stride * element_size(dtype),
                          size * element_size(dtype), end - begin};
  }
  __attribute__((always_inline)) void fetch_one() {
    for (int i = 0; i < operands_; ++i) {
      Rows& x = rows_[i];
      if (--x.count < 0) continue;
      prefetch_row(x.next, x.bytes);
      x.next += x.step;
    }
  }

 private:
  struct Rows {
    const char* next;
    int64_t step, bytes, count;
  };
  Rows rows_[2 * kMaxElements];
  int operands_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Dot products

/// out[entry] = scale x[row] . panel[index], one part (bundle.h) of the vectors.
struct DotsTask {
  const char *x, *panel;  // row 0 of x, and the row with index 0 of the panel
  const Run *begin, *end;
  float* out;         // where place 0 is
  float scale, fill;  // `fill` stands behind a run's last entry
  bool first, last;   // of the parts
  float* maxima;      // [rows] groups, or null: running maxima, ignoring NaN, in the lanes that found them
  RowsAhead* ahead;   // or null
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

/// The products of a group's rows, to be added up.
struct GroupProducts {
  Vec a, b, c, d;
};
template <Storage kStorage, int kChunks>
FIAK_INLINE GroupProducts group_products(const Vec* x, const char* panel, uint64_t four) {
  constexpr int64_t kBytes = kChunks * kVectorBytes;
  return {row_products<kStorage, kChunks>(x, panel + row_offset<0, kBytes>(four)),
          row_products<kStorage, kChunks>(x, panel + row_offset<1, kBytes>(four)),
          row_products<kStorage, kChunks>(x, panel + row_offset<2, kBytes>(four)),
          row_products<kStorage, kChunks>(x, panel + row_offset<3, kBytes>(four))};
}
/// The group of dot products.
template <int kElements>
FIAK_INLINE Group<kElements> sum_products(const GroupProducts& p) {
  const Vec ab = add(unpack_low(p.a, p.b), unpack_high(p.a, p.b));
  const Vec cd = add(unpack_low(p.c, p.d), unpack_high(p.c, p.d));
  return add_blocks<kElements>(add(unpack_low_pairs(ab, cd), unpack_high_pairs(ab, cd)));
}

template <Storage kStorage, int kElements, int kChunks>
static void dots_pass(const DotsTask& shared) {
  const DotsTask task = shared;  // which no store can change
  constexpr bool kScaleRow = kStorage == Storage::kFloat32;
  const Vec row_scale = broadcast(task.scale);
  const auto fill = broadcast_group<kElements>(task.fill);
  const auto scale = broadcast_group<kElements>(task.last ? task.scale : 1.0f);
  for (const Run* run = task.begin; run < task.end; ++run) {
    if (task.ahead != nullptr) task.ahead->fetch_one();
    Vec x[kChunks];
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      x[c] = load(reinterpret_cast<const float*>(task.x + (run->row * kChunks + c) * kVectorBytes));
      if constexpr (kScaleRow) x[c] = mul(x[c], row_scale);
    }
    float* out = task.out + run->place;
    auto maximum = broadcast_group<kElements>(-kInfinity);
    if (task.first && kElements < kBlocks && run->count > 0) {
      store(out + run_floats<kElements>(run->count) - kLanes, broadcast(task.fill));
    }
    const auto finish = [&](const GroupProducts& products, int64_t count, int64_t i) __attribute__((always_inline)) {
      auto dots = sum_products<kElements>(products);
      float* target = out + i * kGroup * kElements;
      if (!task.first) dots = dots + load_group<kElements>(target);
      if constexpr (!kScaleRow) dots = dots * scale;
      if (count < kGroup) dots = select_in_blocks(dots, fill, count);
      maximum = max_lanes(dots, maximum);
      store_lanes(target, dots);
    };
    const auto products_of = [&](uint64_t four) __attribute__((always_inline)) {
      return group_products<kStorage, kChunks>(x, task.panel, four);
    };
    // With registers to spare, a group is added up after the next one's products: the additions, which wait for each
    // other, then take no room in the scheduler before they can start.
    if constexpr (kLanes == 16) {
      const uint16_t* index = run->index;
      const int64_t whole = run->count / kGroup, rest = run->count % kGroup;
      if (whole > 0) {
        GroupProducts behind = products_of(load_four(index));
        for (int64_t i = 1; i < whole; ++i) {
          const GroupProducts products = products_of(load_four(index + i * kGroup));
          finish(behind, kGroup, i - 1);
          behind = products;
        }
        finish(behind, kGroup, whole - 1);
      }
      if (rest > 0) finish(products_of(complete_four(load_four(index + whole * kGroup), rest)), rest, whole);
    } else {
      for_groups(
          *run, [&](uint64_t four, int64_t count, int64_t i)
                    __attribute__((always_inline)) { finish(products_of(four), count, i); });
    }
    if (task.last && task.maxima != nullptr) {
      float* target = task.maxima + run->row * kGroup * kElements;
      store_lanes(target, max_lanes(maximum, load_group<kElements>(target)));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weighted sums

/// What stands at a run's place: its weights; its weights in bfloat16, in half the room; or two numbers for each entry,
/// of which one is the weight.
enum class Weights { kAlone, kRounded, kFirstOfPairs, kSecondOfPairs };

/// sums[row] += sum_i weights[i] panel[index[i]] over the entries i of the runs, one part of the vectors. Behind a
/// run's last entry weights are 0.
struct SumsTask {
  const char* panel;
  const Run *begin, *end;
  const float* weights;  // where place 0 is
  float* sums;           // [rows], sums_stride floats apart: sum_vectors() vectors
  int64_t sums_stride;
  RowsAhead* ahead;  // or null
};

template <Storage kStorage, int kChunks>
FIAK_INLINE void add_weighted(Vec weight, const char* row, Vec* sums) {
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) {
    sums[c] = fmadd(weight, load(reinterpret_cast<const float*>(row + c * kVectorBytes)), sums[c]);
  }
}

#if defined(FIAK_ISA_AVX512_BF16)
/// Of a vector in bfloat16, each block's entries 2 kPair and 2 kPair + 1 in all lanes of the block.
template <int kPair>
FIAK_INLINE __m512i spread_pair(__m256i halves) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  return _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(kPair)), _mm512_castsi256_si512(halves));
}

/// The same of a group at p.
template <int kElements, int kPair>
FIAK_INLINE __m512i spread_rounded_pair(const float* p) {
  if constexpr (kElements == 1) {
    int64_t group;
    std::memcpy(&group, p, sizeof group);
    return _mm512_castps_si512(permute_lanes<kPair * 0x55>(_mm512_castsi512_ps(_mm512_set1_epi64(group))));
  } else if constexpr (kElements == 2) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2);
    const __m128i group = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(kPair)), _mm512_castsi128_si512(group));
  } else {
    return spread_pair<kPair>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
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

/// Adds a group of weighted rows.
template <Storage kStorage, int kElements, int kChunks, int kSets, Weights kWeights, class Sums>
FIAK_INLINE void add_group(const float* weights, const char* panel, uint64_t four, Sums& sums) {
  constexpr int64_t kBytes = kChunks * kVectorBytes;
  const char *a = panel + row_offset<0, kBytes>(four), *b = panel + row_offset<1, kBytes>(four);
  const char *c = panel + row_offset<2, kBytes>(four), *d = panel + row_offset<3, kBytes>(four);
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kWeights == Weights::kRounded) {
    add_weighted_pair<kChunks>(spread_rounded_pair<kElements, 0>(weights), a, b, sums[0]);
    add_weighted_pair<kChunks>(spread_rounded_pair<kElements, 1>(weights), c, d, sums[kSets - 1]);
    return;
  }
#endif
  constexpr bool kAlone = kWeights == Weights::kAlone;
  // Entries 0 to 3, or 0 and 1, and 2 and 3.
  const Vec group = spread_group<kElements>(weights);
  const Vec others = kAlone ? group : spread_group<kElements>(weights + kGroup * kElements);
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kStorage == Storage::kBFloat16) {
    const Vec all = kAlone                               ? group
                    : kWeights == Weights::kFirstOfPairs ? _mm512_shuffle_ps(group, others, 0x88)
                                                         : _mm512_shuffle_ps(group, others, 0xdd);
    const auto halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(all));
    add_weighted_pair<kChunks>(spread_pair<0>(halves), a, b, sums[0]);
    add_weighted_pair<kChunks>(spread_pair<1>(halves), c, d, sums[kSets - 1]);
    return;
  }
#endif
  constexpr int kLane[] = {0x00, 0x55, 0xaa, 0xff};
  constexpr int kSecond = kWeights == Weights::kSecondOfPairs ? 1 : 0;
  add_weighted<kStorage, kChunks>(permute_lanes<kLane[kAlone ? 0 : kSecond]>(group), a, sums[0]);
  add_weighted<kStorage, kChunks>(permute_lanes<kLane[kAlone ? 1 : 2 + kSecond]>(group), b, sums[1 % kSets]);
  add_weighted<kStorage, kChunks>(permute_lanes<kLane[kAlone ? 2 : kSecond]>(others), c, sums[2 % kSets]);
  add_weighted<kStorage, kChunks>(permute_lanes<kLane[kAlone ? 3 : 2 + kSecond]>(others), d, sums[3 % kSets]);
}

template <Storage kStorage, int kElements, Weights kWeights, int kChunks>
static void sums_pass(const SumsTask& shared) {
  const SumsTask task = shared;  // which no store can change
  constexpr int kVectors = kChunks * lane_elements(kStorage);
  // Several sets of sums hide the latency of the multiply-add, where the registers allow.
  constexpr int kRegisters = kLanes == 16 ? 16 : 12;
  constexpr int kSets = kVectors == 1 ? 4 : kVectors * 2 <= kRegisters ? 2 : 1;
  for (const Run* run = task.begin; run < task.end; ++run) {
    if (task.ahead != nullptr) task.ahead->fetch_one();
    Vec sums[kSets][kVectors];
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 16
      for (int c = 0; c < kVectors; ++c) sums[set][c] = zero();
    }
    const float* weights = task.weights + run->place;
    for_groups(
        *run, [&](uint64_t four, int64_t, int64_t i) __attribute__((always_inline)) {
          constexpr int64_t kNumbers = kGroup * kElements;
          constexpr int64_t kStep = kWeights == Weights::kAlone     ? kNumbers
                                    : kWeights == Weights::kRounded ? kNumbers / 2
                                                                    : 2 * kNumbers;
          add_group<kStorage, kElements, kChunks, kSets, kWeights>(weights + i * kStep, task.panel, four, sums);
        });
    float* target = task.sums + run->row * task.sums_stride;
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      Vec sum = sums[0][c];
      if constexpr (kSets > 1) sum = add(sum, sums[1][c]);
      if constexpr (kSets > 2) sum = add(sum, add(sums[2][c], sums[3][c]));
      store(target + c * kLanes, add(load(target + c * kLanes), sum));
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

template <Storage kStorage, int kElements, Weights kWeights>
FIAK_INLINE void run_sums(const SumsTask& task, int64_t chunks) {
  constexpr void (*kPasses[kMaxChunks])(const SumsTask&) = {
      sums_pass<kStorage, kElements, kWeights, 1>, sums_pass<kStorage, kElements, kWeights, 2>,
      sums_pass<kStorage, kElements, kWeights, 3>, sums_pass<kStorage, kElements, kWeights, 4>,
      sums_pass<kStorage, kElements, kWeights, 5>, sums_pass<kStorage, kElements, kWeights, 6>,
      sums_pass<kStorage, kElements, kWeights, 7>, sums_pass<kStorage, kElements, kWeights, 8>};
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
template <Storage kStorage, int kElements, Weights kWeights = Weights::kAlone>
FIAK_INLINE void weighted_sums(SumsTask task, const BundlePanel& panel, int64_t first) {
  float* sums = task.sums;
  for (int64_t part = 0; part < panel.parts(); ++part) {
    task.panel = panel.vector(first, part * kMaxChunks);
    task.sums = sums + part * kMaxChunks * lane_elements(kStorage) * kLanes;
    run_sums<kStorage, kElements, kWeights>(task, panel.part_chunks(part));
  }
}

/// How the weights of rows are left for their sums.
template <Storage kStorage>
constexpr Weights kLeftWeights = kStorage == Storage::kBFloat16 ? Weights::kRounded : Weights::kAlone;

/// scores = 2^(scores - maxima[row]) of the runs, as kWeights, and their sums over each row, still to be reduced within
/// blocks; with bfloat16 rows also the sums of what is left of them in bfloat16. Its long dependency chains overlap
/// with nothing that waits for them. Without kExp, the sums of what stands there already.
template <Storage kStorage, int kElements, bool kExp, Weights kWeights>
FIAK_INLINE void exp2_and_total(const Run* begin, const Run* end, float* scores, const float* maxima, float* totals,
                                [[maybe_unused]] float* rounded_totals) {
  for (const Run* run = begin; run < end; ++run) {
    const int64_t row = run->row * kGroup * kElements;
    const Vec maximum = spread_group<kElements>(maxima + row);
    float *p = scores + run->place, *last = p + run_floats<kElements>(run->count);
    Vec total = zero();
#if defined(FIAK_ISA_AVX512_BF16)
    __m256 pair_totals = _mm256_setzero_ps();
    float* rounded = p;
#endif
    for (; p < last; p += kLanes) {
      Vec x = load(p);
      if constexpr (kExp) x = exp2_below_128(sub(x, maximum));
      if constexpr (kExp && kWeights == Weights::kAlone) store(p, x);
      total = add(total, x);
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kStorage == Storage::kBFloat16) {
        const auto halves = _mm512_cvtneps_pbh(x);
        pair_totals =
            _mm256_dpbf16_ps(pair_totals, halves, reinterpret_cast<__m256bh>(_mm256_set1_epi16(0x3f80)));  // 1
        if constexpr (kWeights == Weights::kRounded) {
          store_bfloat16(rounded, x);
          rounded += kLanes / 2;
        }
      }
#endif
    }
    store_lanes(totals + row, add_blocks<kElements>(total) + load_group<kElements>(totals + row));
#if defined(FIAK_ISA_AVX512_BF16)
    if constexpr (kStorage == Storage::kBFloat16) {  // a pair's sum in one of its two lanes
      const Vec rounded_total = _mm512_castsi512_ps(_mm512_cvtepu32_epi64(_mm256_castps_si256(pair_totals)));
      store_lanes(rounded_totals + row,
                  add_blocks<kElements>(rounded_total) + load_group<kElements>(rounded_totals + row));
    }
#endif
  }
}

#if defined(FIAK_ISA_AVX512_BF16)
/// kAlone to kRounded.
template <int kElements>
FIAK_INLINE void round_weights(const Run* begin, const Run* end, float* weights) {
  for (const Run* run = begin; run < end; ++run) {
    float *p = weights + run->place, *last = p + run_floats<kElements>(run->count), *rounded = p;
    for (; p < last; p += kLanes, rounded += kLanes / 2) store_bfloat16(rounded, load(p));
  }
}
#endif

}  // namespace fiak::cpu::FIAK_ISA
