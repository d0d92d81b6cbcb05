// Small matrix products from registers: the inner loops of dense attention and compact_linear.
//
// A tile of kTileRows x up to kTileVectors vectors of the result stays in registers; each step of the depth takes
// kTileVectors loads of b, kTileRows broadcasts of a and their product's multiply-adds: the adds bound it.
#pragma once

#include <cstring>

#include "kernels/cpu/panel.h"
#include "kernels/cpu/simd.h"

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
/// panel_stride, with rows row_stride apart.
struct Columns {
  const float* data;
  int64_t row_stride, panel_stride;
};

FIAK_INLINE Columns columns_of(const Panel& rows) { return {rows.rows, rows.stride, kTileWidth}; }

/// The transpose of rows [0, count) of `size` elements as `size` rows of tile_columns(count) columns, zero beyond
/// count; `target` holds size * tile_columns(count) elements.
FIAK_INLINE Columns transpose(const Panel& rows, int64_t count, int64_t size, float* target) {
  for (int64_t first = 0; first < count; first += kTileWidth) {
    float* panel = target + first * size;
    const int64_t width = smaller(kTileWidth, count - first);
    for (int64_t d = 0; d < size; ++d) {
      int64_t i = 0;
      for (; i < width; ++i) panel[d * kTileWidth + i] = rows.row(first + i)[d];
      for (; i < kTileWidth; ++i) panel[d * kTileWidth + i] = 0.0f;
    }
  }
  return {target, kTileWidth, size * kTileWidth};
}

template <int kVectors, bool kAdd>
static void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t depth,
                 float* out, int64_t out_row) {
  Vec sums[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = kAdd ? load(out + r * out_row + v * kLanes) : zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec factor = broadcast(a[r * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fmadd(factor, x[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes, sums[r][v]);
  }
}

/// out[rows, columns] (+)= a[rows, depth] b[depth, columns]. `rows` is a multiple of kTileRows, `columns` of kLanes;
/// a[r, k] stands at a[r * a_row + k * a_column].
template <bool kAdd>
static void matrix_product(const float* a, int64_t a_row, int64_t a_column, const Columns& b, int64_t rows,
                           int64_t columns, int64_t depth, float* out, int64_t out_row) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = (columns - c) / kLanes;
    // Four vectors are two and two rather than three and one, unless panels start at multiples of three.
    const bool split = kTileVectors == 3 && left == 4 && b.panel_stride == kTileWidth;
    const int64_t vectors = split ? 2 : smaller(left, kTileVectors);
    const float* panel = b.data + c / kTileWidth * b.panel_stride + c % kTileWidth;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const float* from = a + r * a_row;
      float* to = out + r * out_row + c;
      if (vectors == 1) tile<1, kAdd>(from, a_row, a_column, panel, b.row_stride, depth, to, out_row);
      if (vectors == 2) tile<2, kAdd>(from, a_row, a_column, panel, b.row_stride, depth, to, out_row);
      if (vectors == 3) tile<3, kAdd>(from, a_row, a_column, panel, b.row_stride, depth, to, out_row);
    }
    c += vectors * kLanes;
  }
}

}  // namespace fiak::cpu::FIAK_ISA
