// Calls of compact_linear, and what some implementation's kernels must do with them.
#pragma once

#include <string>
#include <vector>

#include "tests/support.h"

namespace fiak::tests {

/// Ascending rows for each head, padded with -1.
std::vector<int64_t> random_keep(Random& random, int64_t heads, int64_t rows, int64_t kept);

struct LinearSizes {
  int64_t batch, heads, rows, kept, in_features, head_dim;
  bool has_bias;
  int64_t gap;  ///< elements between rows of every operand
};
/// Small ones, some of them 0.
LinearSizes random_linear_sizes(Random& random);

struct LinearCall {
  CompactLinearArgs args;
  std::vector<int64_t> keep;
  Tensor input, weight, bias, grad_output;  ///< weight [1, 1, heads * head_dim, in_features], bias one row of it
  bool has_bias;
  std::string what;
};
struct LinearResults {
  Tensor output, grad_input, grad_weight, grad_bias;
  static constexpr Tensor LinearResults::*kMembers[] = {&LinearResults::output, &LinearResults::grad_input,
                                                        &LinearResults::grad_weight, &LinearResults::grad_bias};
};

/// Operands that `dtype` can hold, in float64; rows that no head keeps, and gradients of padding, are NaN.
LinearCall linear_call(Random& random, const LinearSizes& sizes, DType dtype);
LinearResults run(const LinearCall& call, const cpu::Kernels& kernels, DType dtype, const Parallel& parallel);

class LinearChecks {
 protected:
  virtual ~LinearChecks() = default;
  virtual DType dtype() const = 0;
  virtual const cpu::Kernels& kernels() const = 0;

  void linear_matches_scalar_float64(const LinearCall& call) const;
  void linear_matches_scalar_float64(int rounds) const;
  void linear_gives_the_same_bits_on_any_number_of_threads(const LinearCall& call) const;
  void linear_gives_the_same_bits_on_any_number_of_threads(int rounds) const;
  void linear_keeps_nan_in_its_place(int rounds) const;
  /// Gradients of weight and bias over so many rows, to a few units in the last place of float32.
  void linear_sums_many_rows(int64_t rows) const;
};

}  // namespace fiak::tests
