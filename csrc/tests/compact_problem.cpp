#include "tests/compact_problem.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace fiak::tests {
namespace {

const cpu::Kernels& scalar() { return cpu::kernels(cpu::Isa::kScalar); }

}  // namespace

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

LinearSizes random_linear_sizes(Random& random) {
  const auto mostly_positive = [&](int64_t most) { return random.integer(random.chance(0.1) ? 0 : 1, most); };
  LinearSizes sizes;
  sizes.batch = mostly_positive(3);
  sizes.heads = random.integer(1, 4);
  sizes.rows = mostly_positive(40);
  sizes.kept = mostly_positive(40);
  sizes.in_features = random.integer(1, 140);
  sizes.head_dim = random.integer(1, 70);
  sizes.has_bias = random.chance(0.5);
  sizes.gap = random.chance(0.5) ? random.integer(1, 4) : 0;
  return sizes;
}

LinearCall linear_call(Random& random, const LinearSizes& sizes, DType dtype) {
  LinearCall call;
  CompactLinearArgs& args = call.args;
  args.batch = sizes.batch;
  args.heads = sizes.heads;
  args.rows = sizes.rows;
  args.kept = sizes.kept;
  args.in_features = sizes.in_features;
  args.head_dim = sizes.head_dim;
  call.keep = random_keep(random, args.heads, args.rows, args.kept);
  const auto operand = [&](int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    Tensor x(DType::kFloat64, batch, heads, rows, columns, false, sizes.gap);
    x.fill(random);
    return x.to(dtype).to(DType::kFloat64);
  };
  call.input = operand(args.batch, 1, args.rows, args.in_features);
  call.weight = operand(1, 1, args.heads * args.head_dim, args.in_features);
  call.bias = operand(1, 1, 1, args.heads * args.head_dim);
  call.grad_output = operand(args.batch, args.heads, args.kept, args.head_dim);
  call.has_bias = sizes.has_bias;
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t row = 0; row < args.rows; ++row) {
      if (std::find(call.keep.begin(), call.keep.end(), row) == call.keep.end()) {
        call.input.set_row(b, 0, row, std::nan(""));
      }
    }
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t k = 0; k < args.kept; ++k) {
        if (call.keep[h * args.kept + k] < 0) call.grad_output.set_row(b, h, k, std::nan(""));
      }
    }
  }
  std::ostringstream what;
  what << "B" << args.batch << " H" << args.heads << " M" << args.rows << " K" << args.kept << " Dx" << args.in_features
       << " D" << args.head_dim << " gap " << sizes.gap << (call.has_bias ? " bias" : "");
  call.what = what.str();
  return call;
}

LinearResults run(const LinearCall& call, const cpu::Kernels& kernels, DType dtype, const Parallel& parallel) {
  const Tensor input = call.input.to(dtype), weight = call.weight.to(dtype), bias = call.bias.to(dtype);
  const Tensor grad_output = call.grad_output.to(dtype);
  CompactLinearArgs args = call.args;
  args.dtype = dtype;
  args.keep = call.keep.data();
  args.input = input.input();
  args.weight = weight.data();
  args.weight_stride = weight.row_stride;
  args.bias = call.has_bias ? bias.data() : nullptr;
  LinearResults results{Tensor(dtype, args.batch, args.heads, args.kept, args.head_dim, true, 1),
                        Tensor(dtype, args.batch, 1, args.rows, args.in_features),
                        Tensor(dtype, 1, 1, args.heads * args.head_dim, args.in_features),
                        Tensor(dtype, 1, 1, 1, args.heads * args.head_dim)};
  kernels.compact_linear_forward(args, results.output.output(), parallel);
  kernels.compact_linear_backward(
      args, {grad_output.input(), results.grad_input.data(), results.grad_weight.data(), results.grad_bias.data()},
      parallel);
  for (const auto member : LinearResults::kMembers) record_bits(results.*member);
  return results;
}

void LinearChecks::linear_matches_scalar_float64(const LinearCall& call) const {
  const LinearResults exact = run(call, scalar(), DType::kFloat64, threads(1));
  const LinearResults yardstick = run(call, scalar(), dtype(), threads(1));
  const LinearResults actual = run(call, kernels(), dtype(), threads(1));
  for (const auto member : LinearResults::kMembers) {
    expect_close(actual.*member, exact.*member, yardstick.*member, call.what);
  }
  actual.output.expect_gaps_untouched(call.what);
}

void LinearChecks::linear_matches_scalar_float64(int rounds) const {
  Random random(31);
  for (int round = 0; round < rounds && !testing::Test::HasFailure(); ++round) {
    linear_matches_scalar_float64(linear_call(random, random_linear_sizes(random), dtype()));
  }
}

void LinearChecks::linear_gives_the_same_bits_on_any_number_of_threads(const LinearCall& call) const {
  const LinearResults one = run(call, kernels(), dtype(), threads(1));
  for (const int64_t count : {2, 3, 16}) {
    const LinearResults several = run(call, kernels(), dtype(), threads(count));
    for (const auto member : LinearResults::kMembers) expect_identical(several.*member, one.*member, call.what);
  }
}

void LinearChecks::linear_gives_the_same_bits_on_any_number_of_threads(int rounds) const {
  Random random(32);
  for (int round = 0; round < rounds && !testing::Test::HasFailure(); ++round) {
    linear_gives_the_same_bits_on_any_number_of_threads(linear_call(random, random_linear_sizes(random), dtype()));
  }
}

void LinearChecks::linear_sums_many_rows(int64_t rows) const {
  Random random(35);
  LinearCall call = linear_call(random, {2, 1, rows / 2, rows / 2, 3, 2, true, 0}, dtype());
  for (int64_t k = 0; k < rows / 2; ++k) call.keep[k] = k;
  // Of one sign: rounding errors then grow with the sums.
  for (Tensor* x : {&call.input, &call.grad_output}) {
    x->fill(random, 0.5, 1.5);
    *x = x->to(dtype()).to(DType::kFloat64);
  }
  const LinearResults exact = run(call, scalar(), DType::kFloat64, threads(1));
  const LinearResults actual = run(call, kernels(), dtype(), threads(2));
  for (const auto member : {&LinearResults::grad_weight, &LinearResults::grad_bias}) {
    const std::vector<double> a = (actual.*member).values(), e = (exact.*member).values();
    for (size_t i = 0; i < e.size(); ++i) {
      EXPECT_LE(std::abs(a[i] - e[i]), (rounding_unit(dtype()) + 1e-6) * e[i]) << call.what << " element " << i;
    }
  }
}

void LinearChecks::linear_keeps_nan_in_its_place(int rounds) const {
  Random random(33);
  for (int round = 0; round < rounds; ++round) {
    LinearCall call = linear_call(random, random_linear_sizes(random), dtype());
    if (call.args.batch == 0 || call.args.rows == 0) continue;
    const LinearResults clean = run(call, kernels(), dtype(), threads(1));
    const int64_t at_b = random.integer(0, call.args.batch - 1), at_row = random.integer(0, call.args.rows - 1);
    call.input.set(at_b, 0, at_row, random.integer(0, call.args.in_features - 1), std::nan(""));
    const LinearResults results = run(call, kernels(), dtype(), threads(1));
    for (int64_t b = 0; b < call.args.batch; ++b) {
      for (int64_t h = 0; h < call.args.heads; ++h) {
        for (int64_t k = 0; k < call.args.kept; ++k) {
          const bool nan = b == at_b && call.keep[h * call.args.kept + k] == at_row;
          for (int64_t d = 0; d < call.args.head_dim; ++d) {
            const double x = results.output.at(b, h, k, d);
            ASSERT_TRUE(nan ? std::isnan(x) : x == clean.output.at(b, h, k, d)) << call.what;
          }
        }
      }
    }
    expect_identical(results.grad_input, clean.grad_input, call.what);
  }
}

}  // namespace fiak::tests
