// AMX tiles on processors that lack them: what kernels/cpu/isa/amx.h has of them, for tests.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulated/avx512.h"

namespace fiak::emulated {

constexpr int kTileRegisters = 8, kSide = 16;
static thread_local uint32_t tiles[kTileRegisters][kSide][kSide];

FIAK_EMULATED_CALL void load_tile(int tile, const void* p, int64_t row_bytes) {
  for (int r = 0; r < kSide; ++r) std::memcpy(tiles[tile][r], static_cast<const char*>(p) + r * row_bytes, 64);
}
FIAK_EMULATED_CALL void store_tile(int tile, void* p, int64_t row_bytes) {
  for (int r = 0; r < kSide; ++r) std::memcpy(static_cast<char*>(p) + r * row_bytes, tiles[tile][r], 64);
}
FIAK_EMULATED_CALL void clear_tile(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }
/// sums += left right, of pairs.
FIAK_EMULATED_CALL void multiply_tiles(int sums, int left, int right) {
  for (int r = 0; r < kSide; ++r) {
    float row[kSide];
    std::memcpy(row, tiles[sums][r], sizeof row);
    for (int k = 0; k < kSide; ++k) {
      for (int c = 0; c < kSide; ++c) row[c] = add_pair(row[c], tiles[left][r][k], tiles[right][k][c]);
    }
    std::memcpy(tiles[sums][r], row, sizeof row);
  }
}

}  // namespace fiak::emulated
