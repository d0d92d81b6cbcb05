// AMX tiles: 16 x 16 sums of float32, and products of 16 x 32 by 32 x 16 bfloat16 numbers that are added to them.
//
// A tile of an operand is 16 rows of 16 units of 32 bits, 1 KB side by side in memory; a unit is two numbers that
// follow each other along the depth, as in gemm.h. Of the left operand a tile has 16 rows and 32 steps of the depth, a
// chunk, of the right one these steps and 16 columns. Tiles of the same rows or columns follow each other along the
// depth; beyond an operand's end they hold zeros.
//
// Every sum is a chain in the order of the depth over what chunks sum up to. Subnormal numbers count as 0.
#pragma once

#if defined(FIAK_EMULATED)
#include "emulated/amx.h"
#endif
#include "kernels/cpu/isa/vec.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t kTileSide = 16;
constexpr int64_t kTileUnits = kTileSide * kTileSide;
constexpr int64_t kTileDepth = 2 * kTileSide;

constexpr int64_t sides(int64_t size) { return (size + kTileSide - 1) / kTileSide; }
constexpr int64_t chunks(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }
/// Units of a row or column of tiles.
constexpr int64_t tile_units(int64_t depth) { return chunks(depth) * kTileUnits; }

#if defined(FIAK_EMULATED)
class Tiles {
 public:
  Tiles() {}
  Tiles(const Tiles&) = delete;
};
template <int kTile>
FIAK_INLINE void load_tile(const float* p, int64_t row_bytes = 64) {
  emulated::load_tile(kTile, p, row_bytes);
}
template <int kTile>
FIAK_INLINE void store_tile(float* p, int64_t row_bytes) {
  emulated::store_tile(kTile, p, row_bytes);
}
template <int kTile>
FIAK_INLINE void clear_tile() {
  emulated::clear_tile(kTile);
}
template <int kSums, int kLeft, int kRight>
FIAK_INLINE void multiply_tiles() {
  emulated::multiply_tiles(kSums, kLeft, kRight);
}
#else
/// While it lives, the thread's tiles are 16 rows of 64 bytes.
class Tiles {
 public:
  __attribute__((always_inline)) Tiles() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } const all{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  __attribute__((always_inline)) ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tile registers by number. They are not renamed: a load waits for the products that read its register, and a store for
// those that add to it, so that what shall overlap needs registers of its own.

template <int kTile>
FIAK_INLINE void load_tile(const float* p, int64_t row_bytes = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FIAK_INLINE void store_tile(float* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FIAK_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSums, int kLeft, int kRight>
FIAK_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}
#endif

/// Where vectors alone work for about a thousand cycles, the multiplier of tiles is switched off, and the next product
/// waits as long for it. Any product, here one whose sums nobody needs, prevents that for some 60 cycles.
FIAK_INLINE void keep_awake() { multiply_tiles<1, 2, 3>(); }

/// Up to 2 x 2 tiles of sums, in registers 0 to 3; 4 and 5 are for the left operand, 6 and 7 for the right one.
template <int kRows, int kColumns>
struct TileSums {
  template <class Use>
  FIAK_INLINE void for_all(Use&& use) {
    use(Constant<0>(), Constant<0>());
    if constexpr (kColumns > 1) use(Constant<0>(), Constant<1>());
    if constexpr (kRows > 1) use(Constant<1>(), Constant<0>());
    if constexpr (kRows > 1 && kColumns > 1) use(Constant<1>(), Constant<1>());
  }
  FIAK_INLINE void clear() {
    for_all([](auto r, auto c) __attribute__((always_inline)) { clear_tile<2 * r.value + c.value>(); });
  }
  /// From and to rows of numbers, `row` apart.
  FIAK_INLINE void load(const float* p, int64_t row) { load(p, row, kTileSide * row, kTileSide); }
  FIAK_INLINE void store(float* p, int64_t row) { store(p, row, kTileSide * row, kTileSide); }
  /// The tiles of the second row and column start `second_row` and `second_column` behind.
  FIAK_INLINE void load(const float* p, int64_t row, int64_t second_row, int64_t second_column) {
    for_all([&](auto r, auto c) __attribute__((always_inline)) {
      load_tile<2 * r.value + c.value>(p + r.value * second_row + c.value * second_column, row * 4);
    });
  }
  FIAK_INLINE void store(float* p, int64_t row, int64_t second_row, int64_t second_column) {
    for_all([&](auto r, auto c) __attribute__((always_inline)) {
      store_tile<2 * r.value + c.value>(p + r.value * second_row + c.value * second_column, row * 4);
    });
  }
  /// Adds the products of `count` chunks; the operands' tiles of the second row and column start `left_row` and
  /// `right_column` behind.
  FIAK_INLINE void add(const float* left, int64_t left_row, const float* right, int64_t right_column, int64_t count) {
    for (int64_t i = 0; i < count; ++i, left += kTileUnits, right += kTileUnits) {
      load_tile<4>(left);
      load_tile<6>(right);
      if constexpr (kColumns > 1) load_tile<7>(right + right_column);
      if constexpr (kRows > 1) load_tile<5>(left + left_row);
      for_all([](auto r, auto c) __attribute__((always_inline)) {
        multiply_tiles<2 * r.value + c.value, 4 + r.value, 6 + c.value>();
      });
    }
  }
};

/// use(TileSums, row, column) for all `rows` x `columns` tiles, as many at once as the registers hold.
template <class Use>
FIAK_INLINE void for_tiles(int64_t rows, int64_t columns, Use&& use) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < columns; c += 2) {
      if (r + 1 < rows) {
        c + 1 < columns ? use(TileSums<2, 2>(), r, c) : use(TileSums<2, 1>(), r, c);
      } else {
        c + 1 < columns ? use(TileSums<1, 2>(), r, c) : use(TileSums<1, 1>(), r, c);
      }
    }
  }
}

/// Loads chunk c of rows of `size` bfloat16 numbers, 0 beyond.
class ChunkLoad {
 public:
  __attribute__((always_inline)) ChunkLoad(int64_t c, int64_t size)
      : offset_(2 * c * kTileDepth), numbers_(smaller(kTileDepth, size - c * kTileDepth)) {}
  __attribute__((always_inline)) Vec operator()(const char* row) const {
    return load_vnni_in_order(row + offset_, numbers_);
  }

 private:
  int64_t offset_, numbers_;
};

/// Rows [0, count) as the left operand; row(i) is the address of row i.
template <class Row>
FIAK_INLINE void pack_left(Row&& row, int64_t count, int64_t size, float* target) {
  for (int64_t side = 0; side < sides(count); ++side) {
    for (int64_t c = 0; c < chunks(size); ++c, target += kTileUnits) {
      const ChunkLoad load_chunk(c, size);
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t n = side * kTileSide + i;
        store(target + i * kTileSide, n < count ? load_chunk(row(n)) : zero());
      }
    }
  }
}
/// Rows [0, count) as the columns of the right operand.
template <class Row>
FIAK_INLINE void pack_right(Row&& row, int64_t count, int64_t size, float* target) {
  for (int64_t side = 0; side < sides(count); ++side) {
    const int64_t first = side * kTileSide, some = smaller(kTileSide, count - first);
    for (int64_t c = 0; c < chunks(size); ++c, target += kTileUnits) {
      const ChunkLoad load_chunk(c, size);
      Vec square[kTileSide];
      if (some == kTileSide) {
#pragma GCC unroll 16
        for (int i = 0; i < kTileSide; ++i) square[i] = load_chunk(row(first + i));
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kTileSide; ++i) square[i] = i < some ? load_chunk(row(first + i)) : zero();
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) store(target + i * kTileSide, square[i]);
    }
  }
}

/// Whether bfloat16 numbers that go through `operator()` are all finite.
class FiniteCheck {
 public:
  __attribute__((always_inline)) void operator()(Vec pairs) {
    largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi16(0x7fff)));
  }
  __attribute__((always_inline)) bool passed() const {
    return _mm512_cmpge_epu16_mask(largest_, _mm512_set1_epi16(0x7f80)) == 0;  // what is not finite is beyond all
  }

 private:
  __m512i largest_ = _mm512_setzero_si512();  // without the sign
};

/// Rows [0, count) as the depth of the right operand, whose columns are theirs; a column of tiles is tile_units(room)
/// long. Returns whether every number is finite.
template <class Row>
FIAK_INLINE bool pack_depth(Row&& row, int64_t count, int64_t size, int64_t room, float* target) {
  FiniteCheck finite;
  for (int64_t j = 0; j < chunks(count) * kTileDepth; j += 2) {
    float* to = target + j / kTileDepth * kTileUnits + j % kTileDepth / 2 * kTileSide;
    for (int64_t d = 0; d < size; d += kLanes, to += tile_units(room)) {
      const int64_t width = smaller(kLanes, size - d);
      Vec x = zero();
      if (j + 1 < count) {
        x = load_vnni_of(row(j) + 2 * d, row(j + 1) + 2 * d, width);
      } else if (j < count) {
        x = low_half(load_vnni_of(row(j) + 2 * d, row(j) + 2 * d, width));
      }
      finite(x);
      store(to, x);
    }
  }
  return finite.passed();
}

/// Transposes `count` tiles of units, which lie side by side.
FIAK_INLINE void transpose_tiles(float* tiles, int64_t count) {
  for (int64_t i = 0; i < count; ++i, tiles += kTileUnits) {
    Vec square[kTileSide];
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) square[r] = load(tiles + r * kTileSide);
    transpose_square(square);
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) store(tiles + r * kTileSide, square[r]);
  }
}

}  // namespace fiak::cpu::FIAK_ISA
