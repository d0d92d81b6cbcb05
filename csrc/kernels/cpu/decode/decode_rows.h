// The two inner loops of decoding: dot products with, and weighted sums of, rows of K or V where they lie, in their own
// dtype, picked by 16-bit indices. Few queries do not pay for packing: each row is read once or a few times.
//
// A row is read as vectors of kNumbers numbers; each stands for kParts vectors of float32: of bfloat16, the numbers at
// even and at odd places. Queries and sums are kept in that order.
#pragma once

#include "kernels/cpu/dense/panel.h"
#include "kernels/cpu/isa/vec.h"

namespace fiak::cpu::FIAK_ISA {

/// Reads rows of one dtype whose last vector has `tail` numbers, 1..kNumbers. Nothing behind a row is touched.
template <DType kType>
struct RowReader {
  static constexpr int kParts = kType == DType::kBFloat16 ? 2 : 1;
  static constexpr int kNumbers = kLanes * kParts;
  static constexpr int64_t kBytes = kNumbers * (kType == DType::kFloat32 ? 4 : 2);
  /// Vectors of a row that one pass of a loop handles: what fits into registers.
  static constexpr int kMostVectors = kLanes == 16 || kParts == 1 ? 8 : 4;

  int64_t tail;

  __attribute__((always_inline)) Vec vector(const char* p) const {
    if constexpr (kType == DType::kFloat16) return load_half(p);
    return load(reinterpret_cast<const float*>(p));
  }
  __attribute__((always_inline)) Vec last(const char* p) const { return load_numbers<kType>(p, tail); }
  template <int kPart>
  static __attribute__((always_inline)) Vec part(Vec x) {
    if constexpr (kParts == 1) return x;
    return kPart == 0 ? even_bfloat16(x) : odd_bfloat16(x);
  }
};

/// Rows base + index[i] * stride, i < count.
struct PickedRows {
  const char* base;
  int64_t stride, bytes;  // bytes: of a row
  const uint16_t* index;
  int64_t count;

  __attribute__((always_inline)) const char* row(int64_t i) const { return base + index[i] * stride; }
};

/// Fetches rows [begin, end) of those picked into the L2 cache. Inlined: GCC drops calls of what only prefetches.
FIAK_INLINE void prefetch_picked(const PickedRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < smaller(end, rows.count); ++i) prefetch_row(rows.row(i), rows.bytes);
}

/// The size of a copied row: whole vectors of every reader.
constexpr int64_t copied_bytes(int64_t bytes) { return (bytes + kLanes * 4 - 1) / (kLanes * 4) * (kLanes * 4); }
/// Copies a row, with zeros behind it.
FIAK_INLINE void copy_row(const char* row, int64_t bytes, char* target) {
  constexpr int64_t kVector = kLanes * 4;
  int64_t i = 0;
  for (; i + kVector <= bytes; i += kVector) {
    store(reinterpret_cast<float*>(target + i), load(reinterpret_cast<const float*>(row + i)));
  }
  if (i < bytes) copy_bytes(row + i, bytes - i, target + i);
}

/// The columns that a loop handles at once: where they start, the numbers in their last vector, and whether they are
/// the first of their row.
struct RowPart {
  int64_t offset_bytes, tail;
  bool first;
};

// ---------------------------------------------------------------------------------------------------------------------
// Dot products

/// Whether dot products multiply pairs of bfloat16 numbers.
template <DType kType, bool kGaussian>
constexpr bool kMultipliesVnni = kHasVnni&& kType == DType::kBFloat16 && !kGaussian;

/// A query row as dots() reads it: vectors * kParts vectors.
template <DType kType, bool kGaussian>
static void prepare_query(const char* row, int64_t size, float* query) {
  using Reader = RowReader<kType>;
  for (int64_t d = 0; d < size; d += Reader::kNumbers, row += Reader::kBytes, query += Reader::kParts * kLanes) {
    const Vec x = Reader{smaller(Reader::kNumbers, size - d)}.last(row);
    store(query, kMultipliesVnni<kType, kGaussian> ? x : Reader::template part<0>(x));
    if (Reader::kParts == 2) store(query + kLanes, Reader::template part<Reader::kParts - 1>(x));
  }
}

/// q.k or, for the Gaussian score, q.k - |k|^2/2 = (q - k/2).k, as partial sums.
template <DType kType, bool kGaussian, int kVectors>
FIAK_INLINE Vec row_product(const float* query, const char* row, const RowReader<kType>& reader) {
  using Reader = RowReader<kType>;
  Vec sum = zero();
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const char* p = row + v * Reader::kBytes;
    const Vec y = v + 1 < kVectors ? reader.vector(p) : reader.last(p);
    const float* q = query + v * Reader::kParts * kLanes;
    if constexpr (kMultipliesVnni<kType, kGaussian>) {
#if defined(FIAK_ISA_AVX512_BF16)
      sum = fmadd_vnni(load(q), y, sum);
#endif
    } else {
      const auto add_part = [&](Vec x, Vec k) __attribute__((always_inline)) {
        if (kGaussian) x = fmadd(broadcast(-0.5f), k, x);
        sum = fmadd(x, k, sum);
      };
      add_part(load(q), Reader::template part<0>(y));
      if constexpr (Reader::kParts == 2) add_part(load(q + kLanes), Reader::template part<1>(y));
    }
  }
  return sum;
}

/// Block-wise sums of four vectors: block b holds one partial sum of each.
FIAK_INLINE Vec sum_four(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = add(unpack_low(a, b), unpack_high(a, b)), cd = add(unpack_low(c, d), unpack_high(c, d));
  return add(unpack_low_pairs(ab, cd), unpack_high_pairs(ab, cd));
}
/// out[i] (+)= query . row i of `rows`, i < rows.count, one pass of columns; fetches as many of the rows of `next`
/// meanwhile. Nothing behind them is written: other rows' or stages' numbers may stand there.
template <DType kType, bool kGaussian, int kVectors>
static void dots(const float* query, const PickedRows& picked, const RowPart& pass, float* out,
                 const PickedRows& next) {
  const PickedRows rows = picked, ahead = next;  // which no store can change
  const RowReader<kType> reader{pass.tail};
  const bool first = pass.first;
  const char* base = rows.base + pass.offset_bytes;
  const auto four = [&](const uint16_t* index) __attribute__((always_inline)) {
    const auto product = [&](int64_t j) __attribute__((always_inline)) {
      return row_product<kType, kGaussian, kVectors>(query, base + j * rows.stride, reader);
    };
    return sum_four(product(index[0]), product(index[1]), product(index[2]), product(index[3]));
  };
  int64_t i = 0;
  for (; i + kLanes <= rows.count; i += kLanes) {
    prefetch_picked(ahead, i, i + kLanes);
    const uint16_t* index = rows.index + i;
    Vec sums = add_neighbours(four(index), four(index + 4));
    if constexpr (kLanes == 16) sums = add_neighbours(sums, add_neighbours(four(index + 8), four(index + 12)));
    store(out + i, first ? sums : add(sums, load(out + i)));
  }
  prefetch_picked(ahead, i, ahead.count);
  for (; i < rows.count; i += 4) {
    const int64_t left = smaller(4, rows.count - i);
    uint16_t index[4];
    for (int64_t k = 0; k < 4; ++k) index[k] = rows.index[i + smaller(k, left - 1)];
    Vec sums = four(index);
    sums = add_neighbours(sums, sums);
    if (kLanes == 16) sums = add_neighbours(sums, sums);
    if (!first) sums = add(sums, load_first(out + i, left));
    store_first(out + i, left, sums);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weighted sums

/// sums += sum_i weights[i] row i of `rows`, one pass of columns; fetches as many of the rows of `next` meanwhile.
template <DType kType, int kVectors>
static void weighted_sum(const float* weights, const PickedRows& picked, const RowPart& pass, float* sums,
                         const PickedRows& next) {
  using Reader = RowReader<kType>;
  constexpr int kSums = kVectors * Reader::kParts, kRegisters = kLanes == 16 ? 16 : 8;
  constexpr int kSets = kSums * 4 <= kRegisters ? 4 : kSums * 2 <= kRegisters ? 2 : 1;  // hide the latency of adding
  const PickedRows rows = picked, ahead = next;                                         // which no store can change
  const Reader reader{pass.tail};
  const char* base = rows.base + pass.offset_bytes;
  Vec totals[kSets][kSums];
#pragma GCC unroll 4
  for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 16
    for (int v = 0; v < kSums; ++v) totals[set][v] = zero();
  }
  const auto add_row = [&](int64_t i, Vec(&total)[kSums]) __attribute__((always_inline)) {
    const Vec weight = broadcast(weights[i]);
    const char* row = base + rows.index[i] * rows.stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const char* p = row + v * Reader::kBytes;
      const Vec y = v + 1 < kVectors ? reader.vector(p) : reader.last(p);
      Vec* sum = total + v * Reader::kParts;
      sum[0] = fmadd(weight, Reader::template part<0>(y), sum[0]);
      if constexpr (Reader::kParts == 2) sum[1] = fmadd(weight, Reader::template part<1>(y), sum[1]);
    }
  };
  constexpr int64_t kStep = 8;
  int64_t i = 0;
  for (; i + kStep <= rows.count; i += kStep) {
    prefetch_picked(ahead, i, i + kStep);
#pragma GCC unroll 8
    for (int k = 0; k < kStep; ++k) add_row(i + k, totals[k % kSets]);
  }
  prefetch_picked(ahead, i, ahead.count);
  for (; i < rows.count; ++i) add_row(i, totals[0]);
#pragma GCC unroll 16
  for (int v = 0; v < kSums; ++v) {
    Vec total = totals[0][v];
#pragma GCC unroll 4
    for (int set = 1; set < kSets; ++set) total = add(total, totals[set][v]);
    store(sums + v * kLanes, add(load(sums + v * kLanes), total));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// By dtype, score and vectors of a pass

/// The loops of a dtype and score.
struct RowLoops {
  int64_t parts, numbers, vector_bytes, most_vectors;
  void (*prepare_query)(const char* row, int64_t size, float* query);
  void (*dots[8])(const float*, const PickedRows&, const RowPart&, float*, const PickedRows&);
  void (*weighted_sum[8])(const float*, const PickedRows&, const RowPart&, float*, const PickedRows&);

  int64_t vectors(int64_t size) const { return (size + numbers - 1) / numbers; }
  /// Of a query or a sum, with whole vectors.
  int64_t floats(int64_t size) const { return vectors(size) * parts * kLanes; }

  /// use(vectors, pass, first float) over the columns of a row.
  template <class Use>
  __attribute__((always_inline)) void for_parts_of(int64_t size, Use&& use) const {
    const int64_t all = vectors(size);
    for (int64_t v = 0; v < all; v += most_vectors) {
      const int64_t count = smaller(most_vectors, all - v);
      const int64_t tail = v + count == all ? size - (all - 1) * numbers : numbers;
      use(count, RowPart{v * vector_bytes, tail, v == 0}, v * parts * kLanes);
    }
  }
};

template <DType kType, bool kGaussian>
constexpr RowLoops make_loops() {
  using Reader = RowReader<kType>;
  constexpr int kMost = Reader::kMostVectors;
  constexpr auto at_most = [](int vectors) { return vectors < kMost ? vectors : kMost; };
  return {Reader::kParts,
          Reader::kNumbers,
          Reader::kBytes,
          kMost,
          prepare_query<kType, kGaussian>,
          {dots<kType, kGaussian, 1>, dots<kType, kGaussian, 2>, dots<kType, kGaussian, 3>, dots<kType, kGaussian, 4>,
           dots<kType, kGaussian, at_most(5)>, dots<kType, kGaussian, at_most(6)>, dots<kType, kGaussian, at_most(7)>,
           dots<kType, kGaussian, at_most(8)>},
          {weighted_sum<kType, 1>, weighted_sum<kType, 2>, weighted_sum<kType, 3>, weighted_sum<kType, 4>,
           weighted_sum<kType, at_most(5)>, weighted_sum<kType, at_most(6)>, weighted_sum<kType, at_most(7)>,
           weighted_sum<kType, at_most(8)>}};
}

FIAK_INLINE const RowLoops& row_loops(DType dtype, bool gaussian) {
  static constexpr RowLoops kLoops[3][2] = {
      {make_loops<DType::kFloat32, false>(), make_loops<DType::kFloat32, true>()},
      {make_loops<DType::kBFloat16, false>(), make_loops<DType::kBFloat16, true>()},
      {make_loops<DType::kFloat16, false>(), make_loops<DType::kFloat16, true>()}};
  return kLoops[dtype == DType::kFloat32 ? 0 : dtype == DType::kBFloat16 ? 1 : 2][gaussian];
}

}  // namespace fiak::cpu::FIAK_ISA
