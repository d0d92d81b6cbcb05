// The device code of compact_kv, run on the CPU, against the CPU kernels, byte for byte; and that of compact_linear, as
// one more implementation that must pass every test.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cuda/compact_linear.cuh"
#include "kernels/cuda/compact_rows.cuh"
#include "tests/compact_problem.h"
#include "tests/counts.h"
#include "tests/pairwise.h"
#include "tests/simt_checks.h"

namespace fiak::tests {
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
    (expand ? cpu::expand_rows : cpu::compact_rows)(args, input, output(expected), threads(1));
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

// ---------------------------------------------------------------------------------------------------------------------
// compact_linear

const cpu::Kernels kCudaKernels = [] {
  cpu::Kernels kernels = cpu::kernels(cpu::Isa::kScalar);
  kernels.compact_linear_forward = [](const CompactLinearArgs& args, const Output& output, const Parallel&) {
    cuda::linear_forward(args, output, kLaunch);
  };
  kernels.compact_linear_backward = [](const CompactLinearArgs& args, const CompactLinearGrads& grads,
                                       const Parallel&) { cuda::linear_backward(args, grads, kLaunch); };
  return kernels;
}();

class CompactLinearCuda : public testing::TestWithParam<DType>, protected LinearChecks {
 protected:
  void SetUp() override { schedule = {}; }
  void TearDown() override {
    if (HasFailure()) print_seed();
    schedule = {};
  }
  DType dtype() const override { return GetParam(); }
  const cpu::Kernels& kernels() const override { return kCudaKernels; }
};

constexpr int kRounds = simt::kThreadSanitizer ? 1 : kSanitized ? 6 : 30;

TEST_P(CompactLinearCuda, MatchesScalarFloat64) { linear_matches_scalar_float64(kRounds); }
TEST_P(CompactLinearCuda, GivesTheSameBitsInAnyOrder) {  // with every number of threads comes another schedule
  linear_gives_the_same_bits_on_any_number_of_threads(kRounds / 4 + 1);
}
TEST_P(CompactLinearCuda, SumsManyRows) {
  if (kSanitized) GTEST_SKIP() << "the plain build does it";
  linear_sums_many_rows(10000);
}
TEST_P(CompactLinearCuda, KeepsNanInItsPlace) { linear_keeps_nan_in_its_place(kRounds / 4 + 1); }

TEST_P(CompactLinearCuda, HasEveryPairOfSizes) {
  constexpr int64_t kRows[] = {0, 1, 16, 63, 64, 65, 130};
  constexpr int64_t kKept[] = {0, 1, 15, 17, 64, 65};
  constexpr int64_t kFeatures[] = {1, 8, 31, 32, 33, 64, 65, 130};
  constexpr int64_t kHeadDims[] = {1, 16, 33, 48, 64, 65, 80, 128};
  constexpr int64_t kGaps[] = {0, 1, 8};
  Random random(34);
  int run = 0;
  for_choices<8>({7, 6, 8, 8, 3, 2, 3, 2}, random, [&](const Choice<8>& choice) {
    const LinearSizes sizes{1 + choice[6],        1 + 2 * choice[7],    kRows[choice[0]], kKept[choice[1]],
                            kFeatures[choice[2]], kHeadDims[choice[3]], choice[5] != 0,   kGaps[choice[4]]};
    const bool small = sizes.rows <= 65 && sizes.in_features <= 65 && sizes.head_dim <= 65 && sizes.heads == 1;
    if ((kSanitized && !small) || (simt::kThreadSanitizer && run >= 3)) return true;
    schedule.seed = static_cast<uint64_t>(1000 * ++run);
    linear_matches_scalar_float64(linear_call(random, sizes, dtype()));
    return !HasFailure();
  });
  std::printf("%d cases\n", run);
}

TEST_P(CompactLinearCuda, LeavesOutUnwantedGradients) {
  Random random(35);
  const LinearCall call = linear_call(random, {2, 2, 9, 5, 20, 12, true, 0}, dtype());
  const LinearResults all = run(call, kernels(), dtype(), threads(1));
  const Tensor input = call.input.to(dtype()), weight = call.weight.to(dtype()), grad = call.grad_output.to(dtype());
  CompactLinearArgs args = call.args;
  args.dtype = dtype();
  args.keep = call.keep.data();
  args.input = input.input();
  args.weight = weight.data();
  args.weight_stride = weight.row_stride;
  for (int wanted = 0; wanted < 8; ++wanted) {
    LinearResults some{Tensor(), all.grad_input, all.grad_weight, all.grad_bias};
    const auto data = [&](Tensor& result, int bit) -> void* {
      if ((wanted & bit) == 0) return nullptr;
      result.fill(random);
      return result.data();
    };
    kernels().compact_linear_backward(
        args, {grad.input(), data(some.grad_input, 1), data(some.grad_weight, 2), data(some.grad_bias, 4)}, threads(1));
    for (const auto member : {&LinearResults::grad_input, &LinearResults::grad_weight, &LinearResults::grad_bias}) {
      expect_identical(some.*member, all.*member, call.what);
    }
  }
}

TEST_P(CompactLinearCuda, CopiesAndMultipliesWhatItsTilesHold) {
  Random random(38);
  const int64_t batch = 2, heads = 1, rows = 100, kept = 70, features = 136, size = 48;
  LinearCall call = linear_call(random, {batch, heads, rows, kept, features, size, false, 0}, dtype());
  for (int64_t k = 0; k < kept; ++k) call.keep[k] = k;  // no padding
  call.input.fill(random);
  call.grad_output.fill(random);
  simt::counts.clear();
  run(call, kernels(), dtype(), threads(1));
  const int64_t bytes = element_size(dtype()), step = 128 / bytes;
  const auto tiles = [](int64_t x, int64_t of) { return (x + of - 1) / of; };
  const auto expect = [&](const auto& kernel, int64_t elements, int64_t tile_steps) {
    const simt::Counts& counts = simt::counts[kernel.name];
    EXPECT_EQ(counts.copied_bytes, elements * bytes) << kernel.name;
    // Of a tile's step, four warps multiply 16 x step by step x 64.
    EXPECT_EQ(counts.products, dtype() == DType::kFloat32 ? 0 : tile_steps * 4 * (step / 16) * 8) << kernel.name;
  };
  const auto kernel_counts = [&](auto element) {
    expect(cuda::linear_forward_kernel(element), batch * features * (kept * tiles(size, 64) + size * tiles(kept, 64)),
           batch * tiles(kept, 64) * tiles(size, 64) * tiles(features, step));
    expect(cuda::linear_grad_input_kernel(element),
           batch * size * (kept * tiles(features, 64) + features * tiles(rows, 64)),
           batch * tiles(rows, 64) * tiles(features, 64) * tiles(size, step));
    expect(cuda::linear_grad_weight_kernel(element),
           batch * kept * (size * tiles(features, 64) + features * tiles(size, 64)),
           tiles(size, 64) * tiles(features, 64) * tiles(batch * kept, step));
  };
  if (dtype() == DType::kFloat32) kernel_counts(float{});
  if (dtype() == DType::kFloat16) kernel_counts(Half{});
  if (dtype() == DType::kBFloat16) kernel_counts(BFloat16{});
}

// benchmarks/cuda_roofline.py takes these numbers, of one element and head, for more of them.
TEST(CudaCounts, OfCompactLinear) {
  Random random(39);
  simt::counts.clear();
  for (const int64_t features : {192, 768}) {
    LinearCall call = linear_call(random, {1, 1, 197, 59, features, 64, true, 0}, DType::kFloat16);
    for (int64_t k = 0; k < 59; ++k) call.keep[k] = 3 * k;
    call.input.fill(random);
    call.grad_output.fill(random);
    run(call, kCudaKernels, DType::kFloat16, threads(1));
    print_counts(
        "compact_linear",
        {{"batch", 1}, {"heads", 1}, {"rows", 197}, {"kept", 59}, {"in_features", features}, {"head_dim", 64}});
  }
}

TEST_P(CompactLinearCuda, TrapsOnARowOutOfRange) {
  Random random(36);
  LinearCall call = linear_call(random, {1, 1, 4, 2, 8, 8, false, 0}, dtype());
  call.keep = {1, 4};
  EXPECT_THROW(run(call, kernels(), dtype(), threads(1)), simt::Error);
}

TEST_P(CompactLinearCuda, FaultsAreNoticedAtEverySite) {
  if (kSanitized) GTEST_SKIP() << "the plain build does it";
  Random random(37);
  // Rows of 24 or 40 elements, 2 of them NaN: copied asynchronously, but for their end.
  std::vector<LinearCall> calls;
  for (const int64_t size : {22, 38}) calls.push_back(linear_call(random, {3, 2, 70, 66, 150, size, true, 2}, dtype()));
  expect_faults_noticed(6, [&] {
    Bytes all;
    for (const LinearCall& call : calls) {
      const LinearResults results = run(call, kernels(), dtype(), threads(1));
      for (const auto member : LinearResults::kMembers) all.push_back((results.*member).bytes());
    }
    return all;
  });
}

INSTANTIATE_TEST_SUITE_P(Kernels, CompactLinearCuda,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

}  // namespace
}  // namespace fiak::tests
