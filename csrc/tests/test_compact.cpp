// compact_kv's row copies against a plain loop, and compact_linear's kernels against the scalar float64 one.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "tests/attention_problem.h"

namespace fiak::tests {
namespace {

/// Ascending rows for each head, padded with -1.
std::vector<int64_t> random_keep(Random& random, int64_t heads, int64_t rows, int64_t kept) {
  std::vector<int64_t> keep(heads * kept, -1);
  for (int64_t h = 0; h < heads; ++h) {
    int64_t k = 0;
    const double share = random.real(0, 1);
    for (int64_t row = 0; row < rows && k < kept; ++row) {
      if (random.chance(share)) keep[h * kept + k++] = row;
    }
  }
  return keep;
}

TEST(CompactRows, CopiesKeptRowsAndItsAdjointReturnsThem) {
  Random random(30);
  for (int round = 0; round < 100; ++round) {
    const DType dtype = static_cast<DType>(random.integer(0, 3));
    CompactRowsArgs args;
    args.batch = random.integer(0, 3);
    args.heads = random.integer(1, 3);
    args.rows = random.integer(0, 20);
    args.kept = random.integer(0, 20);
    args.columns = random.integer(1, 9);
    args.element_size = element_size(dtype);
    const std::vector<int64_t> keep = random_keep(random, args.heads, args.rows, args.kept);
    args.keep = keep.data();
    Tensor source(dtype, args.batch, args.heads, args.rows, args.columns, random.chance(0.5), random.integer(0, 3));
    source.fill(random);
    Tensor compacted(dtype, args.batch, args.heads, args.kept, args.columns, random.chance(0.5), 1);
    Tensor expanded(dtype, args.batch, args.heads, args.rows, args.columns, random.chance(0.5), 1);
    cpu::compact_rows(args, source.input(), compacted.output(), threads(random.integer(1, 3)));
    cpu::expand_rows(args, compacted.input(), expanded.output(), threads(random.integer(1, 3)));
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t h = 0; h < args.heads; ++h) {
        for (int64_t d = 0; d < args.columns; ++d) {
          std::vector<double> back(args.rows, 0.0);
          for (int64_t k = 0; k < args.kept; ++k) {
            const int64_t row = keep[h * args.kept + k];
            ASSERT_EQ(compacted.at(b, h, k, d), row < 0 ? 0 : source.at(b, h, row, d));
            if (row >= 0) back[row] = source.at(b, h, row, d);
          }
          for (int64_t row = 0; row < args.rows; ++row) ASSERT_EQ(expanded.at(b, h, row, d), back[row]);
        }
      }
    }
    compacted.expect_gaps_untouched("compacted");
    expanded.expect_gaps_untouched("expanded");
  }
}

class CompactLinear : public KernelTest {
 protected:
  struct Call {
    CompactLinearArgs args;
    std::vector<int64_t> keep;
    Tensor input, weight, bias, grad_output;  // weight [1, 1, heads * head_size, in_features], bias one row of it
    bool has_bias;
    std::string what;
  };
  struct Results {
    Tensor output, grad_input, grad_weight, grad_bias;
  };

  Call random_call(Random& random) const {
    Call call;
    CompactLinearArgs& args = call.args;
    args.batch = random.integer(random.chance(0.1) ? 0 : 1, 3);
    args.heads = random.integer(1, 4);
    args.rows = random.integer(random.chance(0.1) ? 0 : 1, 40);
    args.kept = random.integer(random.chance(0.1) ? 0 : 1, 40);
    args.in_features = random.integer(1, 140);
    args.head_size = random.integer(1, 70);
    call.keep = random_keep(random, args.heads, args.rows, args.kept);
    const auto operand = [&](int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
      Tensor x(DType::kFloat64, batch, heads, rows, columns, false, random.chance(0.5) ? random.integer(1, 4) : 0);
      x.fill(random);
      return x.to(dtype()).to(DType::kFloat64);
    };
    call.input = operand(args.batch, 1, args.rows, args.in_features);
    call.weight = operand(1, 1, args.heads * args.head_size, args.in_features);
    call.bias = operand(1, 1, 1, args.heads * args.head_size);
    call.grad_output = operand(args.batch, args.heads, args.kept, args.head_size);
    call.has_bias = random.chance(0.5);
    // Rows that no head keeps are not read.
    for (int64_t row = 0; row < args.rows; ++row) {
      if (std::find(call.keep.begin(), call.keep.end(), row) != call.keep.end()) continue;
      for (int64_t b = 0; b < args.batch; ++b) call.input.set_row(b, 0, row, std::nan(""));
    }
    std::ostringstream what;
    what << "B" << args.batch << " H" << args.heads << " M" << args.rows << " K" << args.kept << " Dx"
         << args.in_features << " D" << args.head_size << (call.has_bias ? " bias" : "");
    call.what = what.str();
    return call;
  }

  static Results run(const Call& call, const cpu::Kernels& kernels, DType dtype, const Parallel& parallel) {
    const Tensor input = call.input.to(dtype), weight = call.weight.to(dtype), bias = call.bias.to(dtype);
    const Tensor grad_output = call.grad_output.to(dtype);
    CompactLinearArgs args = call.args;
    args.dtype = dtype;
    args.keep = call.keep.data();
    args.input = input.input();
    args.weight = weight.data();
    args.weight_stride = weight.row_stride;
    args.bias = call.has_bias ? bias.data() : nullptr;
    Results results{Tensor(dtype, args.batch, args.heads, args.kept, args.head_size, true, 1),
                    Tensor(dtype, args.batch, 1, args.rows, args.in_features),
                    Tensor(dtype, 1, 1, args.heads * args.head_size, args.in_features),
                    Tensor(dtype, 1, 1, 1, args.heads * args.head_size)};
    kernels.compact_linear_forward(args, results.output.output(), parallel);
    kernels.compact_linear_backward(
        args, {grad_output.input(), results.grad_input.data(), results.grad_weight.data(), results.grad_bias.data()},
        parallel);
    return results;
  }

  static constexpr Tensor Results::*kMembers[] = {&Results::output, &Results::grad_input, &Results::grad_weight,
                                                  &Results::grad_bias};
};

TEST_P(CompactLinear, MatchesScalarFloat64) {
  Random random(31);
  for (int round = 0; round < 100; ++round) {
    const Call call = random_call(random);
    const Results exact = run(call, scalar(), DType::kFloat64, threads(1));
    const Results yardstick = run(call, scalar(), dtype(), threads(1));
    const Results actual = run(call, kernels(), dtype(), threads(1));
    for (const auto member : kMembers) expect_close(actual.*member, exact.*member, yardstick.*member, call.what);
    actual.output.expect_gaps_untouched(call.what);
    if (HasFatalFailure()) return;
  }
}

TEST_P(CompactLinear, GivesTheSameBitsOnAnyNumberOfThreads) {
  Random random(32);
  for (int round = 0; round < 30; ++round) {
    const Call call = random_call(random);
    const Results one = run(call, kernels(), dtype(), threads(1));
    for (const int64_t count : {2, 3, 16}) {
      const Results several = run(call, kernels(), dtype(), threads(count));
      for (const auto member : kMembers) expect_identical(several.*member, one.*member, call.what);
    }
    if (HasFatalFailure()) return;
  }
}

TEST_P(CompactLinear, KeepsNanInItsPlace) {
  Random random(33);
  for (int round = 0; round < 30; ++round) {
    Call call = random_call(random);
    if (call.args.batch == 0 || call.args.rows == 0) continue;
    const Results clean = run(call, kernels(), dtype(), threads(1));
    const int64_t at_b = random.integer(0, call.args.batch - 1), at_row = random.integer(0, call.args.rows - 1);
    call.input.set(at_b, 0, at_row, random.integer(0, call.args.in_features - 1), std::nan(""));
    const Results results = run(call, kernels(), dtype(), threads(1));
    for (int64_t b = 0; b < call.args.batch; ++b) {
      for (int64_t h = 0; h < call.args.heads; ++h) {
        for (int64_t k = 0; k < call.args.kept; ++k) {
          const bool nan = b == at_b && call.keep[h * call.args.kept + k] == at_row;
          for (int64_t d = 0; d < call.args.head_size; ++d) {
            const double x = results.output.at(b, h, k, d);
            ASSERT_TRUE(nan ? std::isnan(x) : x == clean.output.at(b, h, k, d)) << call.what;
          }
        }
      }
    }
    expect_identical(results.grad_input, clean.grad_input, call.what);
  }
}

FIAK_FOR_ALL_KERNELS(CompactLinear);

}  // namespace
}  // namespace fiak::tests
