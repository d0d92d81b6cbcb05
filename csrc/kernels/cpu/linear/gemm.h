// Small matrix products from registers: the inner loops of dense attention and compact_linear.
//
// A tile of the result stays in registers; each step of the depth takes a load for each of its vectors, a broadcast for
// each of its rows and their products' multiply-adds, which bound it. Operands are float32, or, where the instruction
// set multiplies them, pairs of bfloat16 numbers that follow each other along the depth: both are 32-bit units.
#pragma once

#include <cstring>

#include "kernels/cpu/dense/panel.h"
#include "kernels/cpu/isa/vec.h"

namespace fiak::cpu::FIAK_ISA {

#if defined(FIAK_ISA_AVX512)
constexpr int kTileRows = 8, kTileVectors = 3;  // 24 of 32 registers
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers
#endif
constexpr int64_t kTileWidth = kTileVectors * kLanes;

/// The next multiple of the tile's rows: how many rows an operand `a` or a result must have.
FIAK_INLINE int64_t tile_rows(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }
/// The next multiple of the tile's columns.
FIAK_INLINE int64_t tile_columns(int64_t columns) { return (columns + kTileWidth - 1) / kTileWidth * kTileWidth; }

/// A matrix [depth, columns], whole vectors wide: columns [kTileWidth p, kTileWidth (p + 1)) start at data + p *
/// strip_stride, with rows row_stride apart.
struct Columns {
  const float* data;
  int64_t row_stride, strip_stride;
};

FIAK_INLINE Columns columns_of(const Panel& rows) { return {rows.rows, rows.stride, kTileWidth}; }

/// The transpose of rows [0, count) of `size` units as `size` rows of tile_columns(count) columns, zero beyond count;
/// `target` holds size * tile_columns(count) units. Reads no more than the rows.
static Columns transpose(const Panel& rows, int64_t count, int64_t size, float* target) {
  for (int64_t first = 0; first < tile_columns(count); first += kLanes) {
    float* panel = target + first / kTileWidth * kTileWidth * size + first % kTileWidth;
    for (int64_t d = 0; d < size; d += kLanes) {
      const int64_t width = smaller(kLanes, size - d);
      Vec square[kLanes];
      if (width == kLanes && first + kLanes <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(rows.row(first + i) + d);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          square[i] = first + i < count ? load_first(rows.row(first + i) + d, width) : zero();
        }
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < width) store(panel + (d + i) * kTileWidth, square[i]);
      }
    }
  }
  return {target, kTileWidth, size * kTileWidth};
}

/// c + a b of numbers or of pairs.
template <bool kVnni>
FIAK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kVnni) return fmadd_vnni(a, b, c);
#endif
  static_assert(!kVnni || kHasVnni);
  return fmadd(a, b, c);
}

/// A left operand in memory: number [r, k] stands at data[r * row + k * column].
struct StridedRows {
  static constexpr int kMaxRows = kTileRows * kTileVectors;
  const float* data;
  int64_t row, column;

  __attribute__((always_inline)) StridedRows from(int64_t r) const { return {data + r * row, row, column}; }
  template <int kRows>
  __attribute__((always_inline)) StridedRows first() const {
    return *this;
  }
  __attribute__((always_inline)) float at(int64_t r, int64_t k) const { return data[r * row + k * column]; }
  __attribute__((always_inline)) void fetch_next() const {}
};

/// A left operand whose rows, of `bytes`, lie anywhere. A tile keeps their addresses in registers, which suffice for
/// kTileRows, and fetches as many beyond its own, so that there must be addresses for those.
struct ScatteredRows {
  static constexpr int kMaxRows = kTileRows;
  const float* const* rows;
  int64_t bytes;

  template <int kRows>
  struct First {
    const float* rows[kRows];
    __attribute__((always_inline)) float at(int64_t r, int64_t k) const { return rows[r][k]; }
  };
  __attribute__((always_inline)) ScatteredRows from(int64_t r) const { return {rows + r, bytes}; }
  __attribute__((always_inline)) void fetch_next() const {
    for (int r = 0; r < kTileRows; ++r) prefetch_row(reinterpret_cast<const char*>(rows[kTileRows + r]), bytes);
  }
  template <int kRows>
  __attribute__((always_inline)) First<kRows> first() const {
    First<kRows> first;
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) first.rows[r] = rows[r];
    return first;
  }
};

template <int kRows, int kVectors, bool kAdd, bool kVnni, class Rows>
static void tile(const Rows& a, const float* b, int64_t b_row, int64_t depth, float factor, float* out,
                 int64_t out_row) {
  const auto rows = a.template first<kRows>();
  Vec sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = kAdd ? load(out + r * out_row + v * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const Vec y = broadcast(rows.at(r, k));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<kVnni>(y, x[v], sums[r][v]);
    }
  }
  const Vec f = broadcast(factor);
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes, kAdd ? sums[r][v] : mul(sums[r][v], f));
  }
}

constexpr int64_t kNoDiagonal = int64_t{1} << 62;

/// out[rows, columns] = factor a[rows, depth] b[depth, columns], or, with kAdd, += a b. `rows` is a multiple of
/// kTileRows, `columns` of kLanes. Results right of the diagonal, in columns beyond r + `diagonal`, are not wanted:
/// whole vectors of them are left out.
///
/// Every element is one chain of multiply-adds in the order of the depth, wherever a tile starts: cutting the rows,
/// the columns or, with kAdd, the depth differently changes no bit.
template <bool kAdd, bool kVnni = false, class Rows>
static void matrix_product(const Rows& a, const Columns& b, int64_t rows, int64_t columns, int64_t depth, float* out,
                           int64_t out_row, int64_t diagonal = kNoDiagonal, float factor = 1.0f) {
  // Narrow results take taller tiles where they can: a tile of few sums would wait for their adds.
  constexpr int kTall = kTileRows * kTileVectors;  // rows that tiles of every height divide
  for (int64_t c = 0; c < columns;) {
    const int64_t left = (columns - c) / kLanes;
    // Four vectors are two and two rather than three and one, unless panels start at multiples of three.
    const bool split = kTileVectors == 3 && left == 4 && b.strip_stride == kTileWidth;
    const int64_t vectors = split ? 2 : smaller(left, kTileVectors);
    const float* panel = b.data + c / kTileWidth * b.strip_stride + c % kTileWidth;
    for (int64_t r = 0; r < rows;) {
      const Rows from = a.from(r);
      if (c == 0) from.fetch_next();
      float* to = out + r * out_row + c;
      // The last row of a tile sees the columns up to r + kTileRows - 1 + diagonal.
      const int64_t seen = r + kTileRows - 1 + diagonal - c;
      const int64_t wanted = seen < 0 ? 0 : smaller(vectors, seen / kLanes + 1);
      const bool tall =
          Rows::kMaxRows >= kTall && wanted == vectors && (rows - r >= kTall || (rows - r) % (kTall / wanted) == 0);
      const auto run = [&](auto height, auto width) {
        tile<height.value, width.value, kAdd, kVnni>(from, panel, b.row_stride, depth, factor, to, out_row);
      };
      r += tall ? kTall / wanted : kTileRows;
      if (wanted == 3) run(Constant<kTileRows>(), Constant<kTileVectors>());
      if (wanted == 2 && !tall) run(Constant<kTileRows>(), Constant<2>());
      if (wanted == 1 && !tall) run(Constant<kTileRows>(), Constant<1>());
      if constexpr (Rows::kMaxRows >= kTall) {
        if (wanted == 2 && tall) run(Constant<kTall / 2>(), Constant<2>());
        if (wanted == 1 && tall) run(Constant<kTall>(), Constant<1>());
      }
    }
    c += vectors * kLanes;
  }
}

/// out[rows, columns] += a b as above, without the terms whose factor in a is 0 (either number of a pair): for rows of
/// b that are not finite, which such a factor must not let through. Bit for bit the same where they are finite.
template <bool kVnni = false>
static void product_of_nonzeros(const float* a, int64_t a_row, int64_t a_column, const Panel& b, int64_t rows,
                                int64_t columns, int64_t depth, float* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) {
      const float y = a[r * a_row + k * a_column];
      uint32_t bits = float_to_bits(y);
      if constexpr (kVnni) {
        bits = ((bits & 0x7fffu) != 0 ? 0xffffu : 0) | ((bits & 0x7fff0000u) != 0 ? 0xffff0000u : 0);
      } else {
        bits = y != 0 ? ~uint32_t{0} : 0;
      }
      if (bits == 0) continue;
      const Vec mask = broadcast(bits_to_float(bits));
      for (int64_t c = 0; c < columns; c += kLanes) {
        float* to = out + r * out_row + c;
        store(to, multiply_add<kVnni>(broadcast(y), both(mask, load(b.row(k) + c)), load(to)));
      }
    }
  }
}

}  // namespace fiak::cpu::FIAK_ISA
