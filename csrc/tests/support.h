// What the kernel tests share: seeded random patterns and operands, threads, and comparison by error bound.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/dispatch.h"

namespace fiak::tests {

/// Uniform draws that are the same on every platform, unlike those of <random>'s distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  /// An integer in [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  /// A number in [low, high).
  double real(double low = -1.0, double high = 1.0) {
    return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
  }
  bool chance(double probability) { return real(0, 1) < probability; }

 private:
  std::mt19937_64 engine_;
};

/// Runs every task on a thread of its own.
Parallel threads(int64_t count);

/// A CSR pattern of heads * queries rows, its plan, and both widths of its indices.
class Pattern {
 public:
  /// Each pair is kept with probability `density`; causal patterns keep no j > i.
  Pattern(Random& random, int64_t heads, int64_t queries, int64_t keys, double density, bool causal = false);
  /// From its indices, which must be well-formed.
  Pattern(int64_t heads, int64_t queries, int64_t keys, std::vector<int64_t> crow, std::vector<int64_t> col);

  int64_t heads, queries, keys;
  std::vector<int64_t> crow, col;
  std::vector<int32_t> crow32, col32;

  int64_t nnz() const { return static_cast<int64_t>(col.size()); }
  CsrIndices indices(bool wide) const;
  /// A view of the plan, which lives as long as the pattern.
  PlanView plan() const { return view_plan(plan_.data()); }

 private:
  void finish();
  std::vector<int64_t> plan_;  // 64-bit words: plans are aligned to those
};

/// A [batch, heads, rows, columns] operand in memory of exactly its size, with gaps between rows, heads and batch
/// elements that no kernel may write to, and that start NaN. Elements are set and read as doubles.
class Tensor {
 public:
  Tensor() = default;
  /// Filled with NaN. `rows_first` lays heads inside rows: [batch, rows, heads, columns]. `gap` elements follow each
  /// row.
  Tensor(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool rows_first = false,
         int64_t gap = 0);

  DType dtype = DType::kFloat64;
  int64_t batch = 0, heads = 0, rows = 0, columns = 0;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  void fill(Random& random, double low = -1.0, double high = 1.0);
  double at(int64_t b, int64_t h, int64_t n, int64_t d) const;
  void set(int64_t b, int64_t h, int64_t n, int64_t d, double value);
  void set_row(int64_t b, int64_t h, int64_t n, double value);
  /// The same layout and, as far as it can hold them, values in another type.
  Tensor to(DType other) const;
  Input input() const { return {data_.data(), batch_stride, head_stride, row_stride}; }
  Output output() { return {data_.data(), batch_stride, head_stride, row_stride}; }
  void* data() { return data_.data(); }
  const void* data() const { return data_.data(); }
  /// All elements in logical order.
  std::vector<double> values() const;
  const std::vector<unsigned char>& bytes() const { return data_; }
  /// Expects the gaps to be as they were made.
  void expect_gaps_untouched(const std::string& what) const;

 private:
  int64_t offset(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return b * batch_stride + h * head_stride + n * row_stride + d;
  }
  std::vector<unsigned char> data_;
};

int64_t element_size(DType dtype);
const char* dtype_name(DType dtype);
/// Half the distance from 1 to the next number.
double rounding_unit(DType dtype);
/// The type of priors and logsumexp that come with `dtype`.
DType weight_dtype(DType dtype);

/// Expects |actual - exact| <= 2 * max |yardstick - exact| + some rounding units of the largest |exact|, and NaN and
/// infinities in the same places. `yardstick` is a plain kernel's result in the same type.
void expect_close(const Tensor& actual, const Tensor& exact, const Tensor& yardstick, const std::string& what);

/// Expects equal bytes, gaps included.
void expect_identical(const Tensor& actual, const Tensor& expected, const std::string& what);

/// Adds the numbers to what FIAK_BITS, the name of a file, gets for the test that runs: a line with the test's name and
/// a hash of all that was added; every NaN counts as the same. Kernels that a change should leave as they are must give
/// the same lines (make bits).
void record_bits(const Tensor& result);

/// Each instruction set and dtype that calls may run on, float64 apart, which is what others are compared with. Those
/// that this machine lacks give skipped tests that name them.
std::vector<std::tuple<cpu::Isa, DType>> all_kernels();
bool machine_has(cpu::Isa isa);

}  // namespace fiak::tests
