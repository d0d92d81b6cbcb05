// The two inner loops of sparse attention, over packed rows (bundle.h) that are picked by 16-bit indices: dot products
// with one row, and their weighted sum. Forward and backward, by rows and by columns, all consist of these.
//
// The kernels go through segments: the entries of one row of a pattern whose packed rows lie in one block. Four entries
// are a quad, which is what an index load brings and what the loops take at once: with some 60 entries a row, larger
// steps would waste much of each row's last one. Scores, or whatever belongs to a pattern's entries, lie in memory as
// quads of E samples: entry k of sample e of a segment at offset_of_entry<E>(k, e) from where the segment has its
// place. Places are whole vectors apart, so that what is done to every number alike goes by vectors.
//
// Cost for float32 with AVX-512: D/16 multiply-adds, as many loads and a decoded index a pair and loop; 8 shuffles and
// 5 additions for 4 dot products of one sample, 7 and 4 for 8 of two, 6 and 3 for 16 of four.
#pragma once

#include "kernels/cpu/entries/bundle.h"

namespace fiak::cpu::FIAK_ISA {

struct RowSegment {
  const uint16_t* index;  // of packed rows, ascending; kQuad - 1 behind the last can be read
  uint32_t row;           // of x and of the sums, counted from the first that a task has
  uint32_t count;
  int64_t place;  // of its first entry, in floats
};

template <int kSamples>
FIAK_INLINE int64_t offset_of_entry(int64_t k, int64_t e) {
  return (k / kQuad * kSamples + e) * kQuad + k % kQuad;
}
/// Where two numbers of an entry stand side by side: those of two entries, of every sample, then those of the quad's
/// other two.
template <int kSamples>
FIAK_INLINE int64_t offset_of_two(int64_t k, int64_t e) {
  return ((k / 2) * kSamples + e) * kQuad + k % 2 * 2;
}
/// Floats of a segment of `count` entries.
template <int kSamples>
FIAK_INLINE int64_t segment_floats(int64_t count) {
  return padded((count + kQuad - 1) / kQuad * kQuad * kSamples);
}
/// Of `segments` segments that have `entries` entries together, at most.
template <int kSamples>
FIAK_INLINE int64_t most_segment_floats(int64_t segments, int64_t entries) {
  return entries * kSamples + segments * ((kQuad - 1) * kSamples + kLanes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Indices

FIAK_INLINE uint64_t load_four(const uint16_t* index) {
  uint64_t four;
  std::memcpy(&four, index, sizeof four);
  return four;
}
/// The first `count` of four indices, 0 < count < 4, the first of them repeated in the rest: their rows may then be
/// read, and multiplied by 0, without touching any that the segment lacks.
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

/// use(four indices, how many of them are of the segment, the quad's number) for every quad of a segment.
template <class Use>
FIAK_INLINE void for_quads(const RowSegment& segment, Use&& use) {
  const uint16_t* index = segment.index;  // which no store can change
  const int64_t whole = segment.count / kQuad, rest = segment.count % kQuad;
  for (int64_t i = 0; i < whole; ++i) use(load_four(index + i * kQuad), kQuad, i);
  if (rest > 0) use(complete_four(load_four(index + whole * kQuad), rest), rest, whole);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fetching ahead

/// Rows that are wanted soon, of up to two operands of each sample. A segment fetches one of each: many at once would
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
  Rows rows_[2 * kMaxSamples];
  int operands_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Dot products

/// out[entry] = scale x[row] . panel[index], one part (bundle.h) of the vectors.
struct DotsTask {
  const char *x, *panel;  // row 0 of x, and the row with index 0 of the panel
  const RowSegment *begin, *end;
  float* out;         // where place 0 is
  float scale, fill;  // `fill` stands behind a segment's last entry
  bool first, last;   // of the parts
  float* maxima;      // [rows] quads, or null: running maxima, ignoring NaN, in the lanes that found them
  RowsAhead* ahead;   // or null
};

template <Storage kStorage, int kVectors>
FIAK_INLINE Vec row_products(const Vec* x, const char* row) {
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kStorage == Storage::kBFloat16) {
    Vec sum = zero();
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      sum = fmadd_vnni(x[c], load(reinterpret_cast<const float*>(row + c * kVectorBytes)), sum);
    }
    return sum;
  }
#endif
  const auto* y = reinterpret_cast<const float*>(row);
  Vec sum = mul(x[0], load(y));
#pragma GCC unroll 8
  for (int c = 1; c < kVectors; ++c) sum = fmadd(x[c], load(y + c * kLanes), sum);
  return sum;
}

/// The products of a quad's rows, to be added up.
struct QuadProducts {
  Vec a, b, c, d;
};
template <Storage kStorage, int kVectors>
FIAK_INLINE QuadProducts quad_products(const Vec* x, const char* panel, uint64_t four) {
  constexpr int64_t kBytes = kVectors * kVectorBytes;
  return {row_products<kStorage, kVectors>(x, panel + row_offset<0, kBytes>(four)),
          row_products<kStorage, kVectors>(x, panel + row_offset<1, kBytes>(four)),
          row_products<kStorage, kVectors>(x, panel + row_offset<2, kBytes>(four)),
          row_products<kStorage, kVectors>(x, panel + row_offset<3, kBytes>(four))};
}
/// The quad of dot products.
template <int kSamples>
FIAK_INLINE Quads<kSamples> sum_products(const QuadProducts& p) {
  const Vec ab = add(unpack_low(p.a, p.b), unpack_high(p.a, p.b));
  const Vec cd = add(unpack_low(p.c, p.d), unpack_high(p.c, p.d));
  return add_quads<kSamples>(add(unpack_low_pairs(ab, cd), unpack_high_pairs(ab, cd)));
}

template <Storage kStorage, int kSamples, int kVectors>
static void dots_part(const DotsTask& shared) {
  const DotsTask task = shared;  // which no store can change
  constexpr bool kScaleRow = kStorage == Storage::kFloat32;
  const Vec row_scale = broadcast(task.scale);
  const auto fill = broadcast_quads<kSamples>(task.fill);
  const auto scale = broadcast_quads<kSamples>(task.last ? task.scale : 1.0f);
  for (const RowSegment* segment = task.begin; segment < task.end; ++segment) {
    if (task.ahead != nullptr) task.ahead->fetch_one();
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      x[c] = load(reinterpret_cast<const float*>(task.x + (segment->row * kVectors + c) * kVectorBytes));
      if constexpr (kScaleRow) x[c] = mul(x[c], row_scale);
    }
    float* out = task.out + segment->place;
    auto maximum = broadcast_quads<kSamples>(-kInfinity);
    if (task.first && kSamples < kQuads && segment->count > 0) {
      store(out + segment_floats<kSamples>(segment->count) - kLanes, broadcast(task.fill));
    }
    const auto finish = [&](const QuadProducts& products, int64_t count, int64_t i) __attribute__((always_inline)) {
      auto dots = sum_products<kSamples>(products);
      float* target = out + i * kQuad * kSamples;
      if (!task.first) dots = dots + load_quads<kSamples>(target);
      if constexpr (!kScaleRow) dots = dots * scale;
      if (count < kQuad) dots = select_in_quads(dots, fill, count);
      maximum = max_lanes(dots, maximum);
      store_lanes(target, dots);
    };
    const auto products_of = [&](uint64_t four) __attribute__((always_inline)) {
      return quad_products<kStorage, kVectors>(x, task.panel, four);
    };
    // With registers to spare, a quad is added up after the next one's products: the additions, which wait for each
    // other, then take no room in the scheduler before they can start.
    if constexpr (kLanes == 16) {
      const uint16_t* index = segment->index;
      const int64_t whole = segment->count / kQuad, rest = segment->count % kQuad;
      if (whole > 0) {
        QuadProducts behind = products_of(load_four(index));
        for (int64_t i = 1; i < whole; ++i) {
          const QuadProducts products = products_of(load_four(index + i * kQuad));
          finish(behind, kQuad, i - 1);
          behind = products;
        }
        finish(behind, kQuad, whole - 1);
      }
      if (rest > 0) finish(products_of(complete_four(load_four(index + whole * kQuad), rest)), rest, whole);
    } else {
      for_quads(
          *segment, [&](uint64_t four, int64_t count, int64_t i)
                        __attribute__((always_inline)) { finish(products_of(four), count, i); });
    }
    if (task.last && task.maxima != nullptr) {
      float* target = task.maxima + segment->row * kQuad * kSamples;
      store_lanes(target, max_lanes(maximum, load_quads<kSamples>(target)));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weighted sums

/// What stands at a segment's place: its weights; its weights in bfloat16, in half the room; or two numbers for each
/// entry, of which one is the weight.
enum class Weights { kAlone, kRounded, kFirstOfTwo, kSecondOfTwo };

/// sums[row] += sum_i weights[i] panel[index[i]] over the entries i of the segments, one part of the vectors. Behind a
/// segment's last entry weights are 0.
struct SumsTask {
  const char* panel;
  const RowSegment *begin, *end;
  const float* weights;  // where place 0 is
  float* sums;           // [rows], sums_stride floats apart: sum_vectors() vectors
  int64_t sums_stride;
  RowsAhead* ahead;  // or null
};

template <Storage kStorage, int kVectors>
FIAK_INLINE void add_weighted(Vec weight, const char* row, Vec* sums) {
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    sums[c] = fmadd(weight, load(reinterpret_cast<const float*>(row + c * kVectorBytes)), sums[c]);
  }
}

/// Adds a quad of weighted rows.
template <Storage kStorage, int kSamples, int kVectors, int kSets, Weights kWeights, class Sums>
FIAK_INLINE void add_quad(const float* weights, const char* panel, uint64_t four, Sums& sums) {
  constexpr int64_t kBytes = kVectors * kVectorBytes;
  const char *a = panel + row_offset<0, kBytes>(four), *b = panel + row_offset<1, kBytes>(four);
  const char *c = panel + row_offset<2, kBytes>(four), *d = panel + row_offset<3, kBytes>(four);
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kWeights == Weights::kRounded) {
    add_weighted_pair<kVectors>(spread_rounded_pair<kSamples, 0>(weights), a, b, sums[0]);
    add_weighted_pair<kVectors>(spread_rounded_pair<kSamples, 1>(weights), c, d, sums[kSets - 1]);
    return;
  }
#endif
  constexpr bool kAlone = kWeights == Weights::kAlone;
  // Entries 0 to 3, or 0 and 1, and 2 and 3.
  const Vec quad = spread_quads<kSamples>(weights);
  const Vec others = kAlone ? quad : spread_quads<kSamples>(weights + kQuad * kSamples);
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kStorage == Storage::kBFloat16) {
    const Vec all = kAlone                             ? quad
                    : kWeights == Weights::kFirstOfTwo ? even_lanes(quad, others)
                                                       : odd_lanes(quad, others);
    const HalfVec halves = round_to_bfloat16(all);
    add_weighted_pair<kVectors>(spread_pair<0>(halves), a, b, sums[0]);
    add_weighted_pair<kVectors>(spread_pair<1>(halves), c, d, sums[kSets - 1]);
    return;
  }
#endif
  constexpr int kLane[] = {0x00, 0x55, 0xaa, 0xff};
  constexpr int kSecond = kWeights == Weights::kSecondOfTwo ? 1 : 0;
  add_weighted<kStorage, kVectors>(permute_lanes<kLane[kAlone ? 0 : kSecond]>(quad), a, sums[0]);
  add_weighted<kStorage, kVectors>(permute_lanes<kLane[kAlone ? 1 : 2 + kSecond]>(quad), b, sums[1 % kSets]);
  add_weighted<kStorage, kVectors>(permute_lanes<kLane[kAlone ? 2 : kSecond]>(others), c, sums[2 % kSets]);
  add_weighted<kStorage, kVectors>(permute_lanes<kLane[kAlone ? 3 : 2 + kSecond]>(others), d, sums[3 % kSets]);
}

template <Storage kStorage, int kSamples, Weights kWeights, int kVectors>
static void sums_part(const SumsTask& shared) {
  const SumsTask task = shared;  // which no store can change
  constexpr int kSumVectors = kVectors * lane_numbers(kStorage);
  // Several sets of sums hide the latency of the multiply-add, where the registers allow.
  constexpr int kRegisters = kLanes == 16 ? 16 : 12;
  constexpr int kSets = kSumVectors == 1 ? 4 : kSumVectors * 2 <= kRegisters ? 2 : 1;
  for (const RowSegment* segment = task.begin; segment < task.end; ++segment) {
    if (task.ahead != nullptr) task.ahead->fetch_one();
    Vec sums[kSets][kSumVectors];
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 16
      for (int c = 0; c < kSumVectors; ++c) sums[set][c] = zero();
    }
    const float* weights = task.weights + segment->place;
    for_quads(
        *segment, [&](uint64_t four, int64_t, int64_t i) __attribute__((always_inline)) {
          constexpr int64_t kNumbers = kQuad * kSamples;
          constexpr int64_t kStep = kWeights == Weights::kAlone     ? kNumbers
                                    : kWeights == Weights::kRounded ? kNumbers / 2
                                                                    : 2 * kNumbers;
          add_quad<kStorage, kSamples, kVectors, kSets, kWeights>(weights + i * kStep, task.panel, four, sums);
        });
    float* target = task.sums + segment->row * task.sums_stride;
#pragma GCC unroll 16
    for (int c = 0; c < kSumVectors; ++c) {
      Vec sum = sums[0][c];
      if constexpr (kSets > 1) sum = add(sum, sums[1][c]);
      if constexpr (kSets > 2) sum = add(sum, add(sums[2][c], sums[3][c]));
      store(target + c * kLanes, add(load(target + c * kLanes), sum));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The passes by the number of vectors in a part

template <Storage kStorage, int kSamples>
FIAK_INLINE void run_dots(const DotsTask& task, int64_t vectors) {
  constexpr void (*kPasses[kMaxVectors])(const DotsTask&) = {
      dots_part<kStorage, kSamples, 1>, dots_part<kStorage, kSamples, 2>, dots_part<kStorage, kSamples, 3>,
      dots_part<kStorage, kSamples, 4>, dots_part<kStorage, kSamples, 5>, dots_part<kStorage, kSamples, 6>,
      dots_part<kStorage, kSamples, 7>, dots_part<kStorage, kSamples, 8>};
  kPasses[vectors - 1](task);
}

template <Storage kStorage, int kSamples, Weights kWeights>
FIAK_INLINE void run_sums(const SumsTask& task, int64_t vectors) {
  constexpr void (*kPasses[kMaxVectors])(const SumsTask&) = {
      sums_part<kStorage, kSamples, kWeights, 1>, sums_part<kStorage, kSamples, kWeights, 2>,
      sums_part<kStorage, kSamples, kWeights, 3>, sums_part<kStorage, kSamples, kWeights, 4>,
      sums_part<kStorage, kSamples, kWeights, 5>, sums_part<kStorage, kSamples, kWeights, 6>,
      sums_part<kStorage, kSamples, kWeights, 7>, sums_part<kStorage, kSamples, kWeights, 8>};
  kPasses[vectors - 1](task);
}

/// Dot products of rows of x with rows of `panel`, from its row `first` on, in all parts.
template <Storage kStorage, int kSamples>
FIAK_INLINE void dots(DotsTask task, const BundlePanel& x, const BundlePanel& panel, int64_t first) {
  for (int64_t part = 0; part < x.parts(); ++part) {
    task.x = x.vector(0, part * kMaxVectors);
    task.panel = panel.vector(first, part * kMaxVectors);
    task.first = part == 0;
    task.last = part + 1 == x.parts();
    run_dots<kStorage, kSamples>(task, x.part_vectors(part));
  }
}

/// Weighted sums of rows of `panel`, from its row `first` on, in all parts.
template <Storage kStorage, int kSamples, Weights kWeights = Weights::kAlone>
FIAK_INLINE void weighted_sums(SumsTask task, const BundlePanel& panel, int64_t first) {
  float* sums = task.sums;
  for (int64_t part = 0; part < panel.parts(); ++part) {
    task.panel = panel.vector(first, part * kMaxVectors);
    task.sums = sums + part * kMaxVectors * lane_numbers(kStorage) * kLanes;
    run_sums<kStorage, kSamples, kWeights>(task, panel.part_vectors(part));
  }
}

/// How the weights of rows are left for their sums.
template <Storage kStorage>
constexpr Weights kLeftWeights = kStorage == Storage::kBFloat16 ? Weights::kRounded : Weights::kAlone;

/// scores = 2^(scores - maxima[row]) of the segments, as kWeights, and their sums over each row, still to be reduced
/// within blocks; with bfloat16 rows also the sums of what is left of them in bfloat16. Its long dependency chains
/// overlap with nothing that waits for them. Without kExp, the sums of what stands there already.
template <Storage kStorage, int kSamples, bool kExp, Weights kWeights>
FIAK_INLINE void exp2_and_total(const RowSegment* begin, const RowSegment* end, float* scores, const float* maxima,
                                float* totals, [[maybe_unused]] float* rounded_totals) {
  for (const RowSegment* segment = begin; segment < end; ++segment) {
    const int64_t row = segment->row * kQuad * kSamples;
    const Vec maximum = spread_quads<kSamples>(maxima + row);
    float *p = scores + segment->place, *last = p + segment_floats<kSamples>(segment->count);
    Vec total = zero();
#if defined(FIAK_ISA_AVX512_BF16)
    RoundedTotal rounded_total;
    float* rounded = p;
#endif
    for (; p < last; p += kLanes) {
      Vec x = load(p);
      if constexpr (kExp) x = exp2_below_128(sub(x, maximum));
      if constexpr (kExp && kWeights == Weights::kAlone) store(p, x);
      total = add(total, x);
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kStorage == Storage::kBFloat16) {
        rounded_total.add(x);
        if constexpr (kWeights == Weights::kRounded) {
          store_bfloat16(rounded, x);
          rounded += kLanes / 2;
        }
      }
#endif
    }
    store_lanes(totals + row, add_quads<kSamples>(total) + load_quads<kSamples>(totals + row));
#if defined(FIAK_ISA_AVX512_BF16)
    if constexpr (kStorage == Storage::kBFloat16) {
      store_lanes(rounded_totals + row,
                  add_quads<kSamples>(rounded_total.vector()) + load_quads<kSamples>(rounded_totals + row));
    }
#endif
  }
}

#if defined(FIAK_ISA_AVX512_BF16)
/// kAlone to kRounded.
template <int kSamples>
FIAK_INLINE void round_weights(const RowSegment* begin, const RowSegment* end, float* weights) {
  for (const RowSegment* segment = begin; segment < end; ++segment) {
    float *p = weights + segment->place, *last = p + segment_floats<kSamples>(segment->count), *rounded = p;
    for (; p < last; p += kLanes, rounded += kLanes / 2) store_bfloat16(rounded, load(p));
  }
}
#endif

}  // namespace fiak::cpu::FIAK_ISA
