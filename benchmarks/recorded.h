// Recorded masks, for the benchmarks and the tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fiak::benchmarks {

/// A recorded mask (masks/README.md): uint8 [layers, heads, length, ceil(length / 8)], bits from the lowest.
struct RecordedMask {
  explicit RecordedMask(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const size_t shape = bytes.find("'shape': (");
    if (shape == std::string::npos || bytes.compare(1, 5, "NUMPY") != 0)
      throw std::runtime_error("cannot read " + path);
    int64_t layers = 0, layer_heads = 0;
    if (std::sscanf(bytes.c_str() + shape, "'shape': (%ld, %ld, %ld, %ld", &layers, &layer_heads, &length, &stride) !=
        4) {
      throw std::runtime_error(path + " must have four dimensions");
    }
    heads = layers * layer_heads;
    bits.assign(bytes.end() - heads * length * stride, bytes.end());
    is_causal = true;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t j = i + 1; j < length; ++j) is_causal = is_causal && !at(0, i, j);
    }
  }
  bool at(int64_t head, int64_t row, int64_t column) const {
    return bits[(head * length + row) * stride + column / 8] >> column % 8 & 1;
  }
  /// benchmarks.cases.recorded_heads: tiled, and mirrored below the diagonal of a causal mask.
  bool tiled(int64_t head, int64_t row, int64_t column) const {
    row %= length;
    column %= length;
    if (is_causal && column > row) std::swap(row, column);
    return at(head % heads, row, column);
  }

  int64_t heads = 0, length = 0, stride = 0;
  bool is_causal = false;
  std::vector<unsigned char> bits;
};

}  // namespace fiak::benchmarks
