// The device code of compact_kv, run on the CPU, against the CPU kernels, byte for byte.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/compact_rows.cuh"
#include "tests/support.h"

namespace fiak {
namespace {

struct Copy {
  CompactRowsArgs args;
  std::vector<int64_t> keep;
};

Copy random_copy(std::mt19937& random, int64_t element_size) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  Copy copy;
  copy.args = {pick(1, 3), pick(1, 3), pick(1, 9), pick(0, 9), pick(1, 70), element_size, nullptr};
  for (int64_t h = 0; h < copy.args.heads; ++h) {
    std::vector<int64_t> rows(copy.args.rows);
    std::iota(rows.begin(), rows.end(), 0);
    std::shuffle(rows.begin(), rows.end(), random);
    rows.resize(std::min<int64_t>({copy.args.rows, copy.args.kept, pick(0, copy.args.kept)}));
    std::sort(rows.begin(), rows.end());
    rows.resize(copy.args.kept, -1);
    copy.keep.insert(copy.keep.end(), rows.begin(), rows.end());
  }
  return copy;
}

TEST(CompactRowsCuda, EqualsTheCpuKernels) {
  std::mt19937 random(20230604);
  for (int trial = 0; trial < (simt::kThreadSanitizer ? 24 : 300); ++trial) {
    const int64_t element_size = int64_t{1} << trial % 4;
    Copy copy = random_copy(random, element_size == 1 ? 2 : element_size);
    CompactRowsArgs& args = copy.args;
    args.keep = copy.keep.data();
    const bool expand = trial % 2 == 1, aligned = trial % 3 != 0;
    const int64_t from_rows = expand ? args.kept : args.rows, to_rows = expand ? args.rows : args.kept;
    // Rows lie apart, so that a copy which is too long is seen; a column stride that is odd allows small units only.
    const int64_t row = aligned ? (args.columns + 15) / 16 * 16 : args.columns + 1;
    std::vector<unsigned char> source(args.batch * args.heads * from_rows * row * args.element_size + 16);
    for (auto& byte : source) byte = static_cast<unsigned char>(random());
    std::vector<unsigned char> expected(args.batch * args.heads * to_rows * row * args.element_size + 16, 0xee);
    std::vector<unsigned char> actual = expected;
    const Input input{source.data(), args.heads * from_rows * row, from_rows * row, row};
    const auto output = [&](std::vector<unsigned char>& bytes) {
      return Output{bytes.data(), args.heads * to_rows * row, to_rows * row, row};
    };
    (expand ? cpu::expand_rows : cpu::compact_rows)(args, input, output(expected), tests::threads(1));
    cuda::with_copy_unit(args, input, output(actual), [&](auto unit, const cuda::CopyRowsParams& params) {
      const auto kernel = expand ? cuda::expand_rows_kernel(unit) : cuda::compact_rows_kernel(unit);
      simt::run(kernel, 1 + trial % 3, {static_cast<uint64_t>(trial), {}}, params);
    });
    ASSERT_EQ(actual, expected) << "trial " << trial;
  }
}

TEST(CompactRowsCuda, TrapsOnARowOutOfRange) {
  const int64_t keep[] = {4};
  const float source[4] = {};
  float target[1];
  const cuda::CopyRowsParams params{source, target, keep, 1, 1, 4, 1, 1, {4, 4, 1}, {1, 1, 1}};
  EXPECT_THROW(simt::run(cuda::compact_rows_kernel(uint32_t{}), 1, {}, params), simt::Error);
}

}  // namespace
}  // namespace fiak
