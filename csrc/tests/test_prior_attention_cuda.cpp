// The device code of prior_attention, run on the CPU by simt, as one more implementation that must pass every test.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <cstdio>

#include "kernels/cuda/prior_attention.cuh"
#include "tests/attention_problem.h"
#include "tests/counts.h"
#include "tests/pairwise.h"
#include "tests/simt_checks.h"

namespace fiak::tests {
namespace {

bool has_pairs(const AttentionArgs& args) {
  return args.batch > 0 && args.query_heads > 0 && args.queries > 0 && args.keys > 0;
}

/// As the op does it: kernels are launched where there are pairs.
void forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  if (!has_pairs(args)) return cpu::kernels(cpu::Isa::kScalar).prior_forward(args, result, parallel);
  const auto seed = static_cast<int64_t>(args.seed);
  cuda::with_element_of(args, [&](auto element) { cuda::prior_forward(element, args, &seed, result, kLaunch); });
}

void backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  if (!has_pairs(args)) return cpu::kernels(cpu::Isa::kScalar).prior_backward(args, grads, parallel);
  const auto seed = static_cast<int64_t>(args.seed);
  std::vector<float> delta(args.batch * args.query_heads * args.queries);
  cuda::with_element_of(
      args, [&](auto element) { cuda::prior_backward(element, args, &seed, grads, delta.data(), kLaunch); });
}

const cpu::Kernels kCudaKernels = [] {
  cpu::Kernels kernels = cpu::kernels(cpu::Isa::kScalar);
  kernels.prior_forward = forward;
  kernels.prior_backward = backward;
  return kernels;
}();

class PriorAttentionCuda : public testing::TestWithParam<DType>, protected KernelChecks {
 protected:
  void SetUp() override { schedule = {}; }
  void TearDown() override {
    if (HasFailure()) print_seed();
  }
  DType dtype() const override { return GetParam(); }
  const cpu::Kernels& kernels() const override { return kCudaKernels; }
};

constexpr int kRounds = simt::kThreadSanitizer ? 2 : kSanitized ? 8 : 60;

TEST_P(PriorAttentionCuda, MatchesScalarFloat64) { matches_scalar_float64(random_prior_problem, kRounds); }
TEST_P(PriorAttentionCuda, MatchesScalarFloat64WithWeightsOfAnySize) {
  matches_scalar_float64(random_extreme_prior_problem, kRounds / 12 + 1);
}
TEST_P(PriorAttentionCuda, KeepsNanInItsPlaceWithWeightsOfAnySize) {
  keeps_nan_in_its_place(random_extreme_prior_problem, kRounds / 30 + 1);
}
TEST_P(PriorAttentionCuda, LeavesOutUnwantedGradients) {
  leaves_out_unwanted_gradients(random_prior_problem, kRounds / 8);
}
TEST_P(PriorAttentionCuda, KeepsNanInItsPlace) { keeps_nan_in_its_place(random_prior_problem, kRounds / 6 + 1); }
TEST_P(PriorAttentionCuda, IgnoresHugeScoresOutsideTheSupport) {
  ignores_huge_scores_outside_the_support(random_prior_problem, kRounds / 4 + 1);
}
TEST_P(PriorAttentionCuda, GivesTheSameBitsInAnyOrder) {  // with every number of threads comes another schedule
  gives_the_same_bits_on_any_number_of_threads(random_prior_problem, kRounds / 4 + 1);
}

INSTANTIATE_TEST_SUITE_P(Kernels, PriorAttentionCuda,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

// ---------------------------------------------------------------------------------------------------------------------
// Every pair of properties

constexpr int64_t kSizes[] = {0, 1, 15, 16, 17, 63, 64, 65, 197};
constexpr int64_t kHeadDims[] = {1, 16, 33, 48, 64, 80, 128, 256};
/// How many values each property of a case has, in make_case's order.
constexpr Choice<13> kValues = {3, 9, 9, 8, 8, 3, 2, 3, 2, 2, 2, 2, 5};

PriorCase make_case(const Choice<13>& choice) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  constexpr int64_t kHeads[][2] = {{1, 1}, {1, 3}, {2, 2}};  // of keys, and of queries for each
  constexpr double kScales[] = {1, 0, -1};
  PriorCase c;
  c.batch = 2;
  c.dtype = kDTypes[choice[0]];
  c.queries = kSizes[choice[1]];
  c.keys = kSizes[choice[2]];
  c.head_dim = kHeadDims[choice[3]];
  c.value_dim = kHeadDims[choice[4]];
  c.key_heads = kHeads[choice[5]][0];
  c.heads_per_key_head = kHeads[choice[5]][1];
  c.groups = 1 + choice[6];
  c.scale_factor = kScales[choice[7]];
  c.score = choice[8] == 0 ? Score::kDot : Score::kGaussian;
  c.dropout_p = choice[9] == 0 ? 0 : 0.3;
  c.is_causal = choice[10] != 0;
  c.has_kv_lens = choice[11] != 0;
  c.prior = static_cast<PriorCase::Prior>(choice[12]);
  return c;
}

class PriorAttentionCudaCases : public testing::Test, protected KernelChecks {
 protected:
  DType dtype() const override { return dtype_; }
  const cpu::Kernels& kernels() const override { return kCudaKernels; }
  DType dtype_ = DType::kFloat32;
};

TEST_F(PriorAttentionCudaCases, HaveEveryPairOfProperties) {
  Random random(20);
  int run = 0;
  for_choices(kValues, random, [&](const Choice<13>& choice) {
    const PriorCase properties = make_case(choice);
    const bool small = properties.queries * properties.keys <= 65 * 17 && properties.value_dim <= 80;
    if ((kSanitized && !small) || (simt::kThreadSanitizer && run >= 5)) return true;
    const Problem problem = prior_problem(random, properties);
    dtype_ = properties.dtype;
    schedule.seed = static_cast<uint64_t>(1000 * ++run);
    matches_scalar_float64(problem, problem.describe() + ", case " + std::to_string(run));
    return !HasFailure();
  });
  std::printf("%d cases\n", run);
}

// benchmarks/cuda_roofline.py takes these numbers, of one element and head, for more of them.
TEST(CudaCounts, OfPriorAttention) {
  Random random(22);
  simt::counts.clear();
  for (const int64_t head_dim : {48, 64}) {
    PriorCase properties{};
    properties.dtype = DType::kFloat16;
    properties.batch = properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
    properties.queries = properties.keys = 197;
    properties.head_dim = properties.value_dim = head_dim;
    properties.scale_factor = 1;
    properties.prior = PriorCase::Prior::kPairs;
    Problem problem = prior_problem(random, properties);
    for (Tensor* operand : {&problem.query, &problem.key, &problem.value, &problem.grad_output}) {
      *operand = Tensor(DType::kFloat64, 1, 1, operand->rows, operand->columns);  // all copies are asynchronous
      operand->fill(random);
    }
    Results results = problem.forward(kCudaKernels, properties.dtype, threads(1));
    problem.backward(kCudaKernels, threads(1), results);
    for (const auto& [kernel, counts] : simt::counts) {
      // Every kernel but that of delta does two products of all pairs or more; of 8 x 16 x 16 at once.
      if (counts.products == 0) continue;
      EXPECT_GE(counts.products * 8 * 16 * 16, 2 * 197 * 197 * head_dim) << kernel;
    }
    print_counts("prior_attention",
                 {{"batch", 1}, {"heads", 1}, {"queries", 197}, {"keys", 197}, {"head_dim", head_dim}});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults on purpose

class PriorAttentionCudaFaults : public testing::TestWithParam<DType> {};

TEST_P(PriorAttentionCudaFaults, AreNoticedAtEverySite) {
  if (kSanitized) GTEST_SKIP() << "the plain build does it";
  Random random(21);
  PriorCase properties{};
  properties.dtype = GetParam();
  properties.batch = properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
  properties.queries = 70;
  properties.keys = 300;
  properties.head_dim = properties.value_dim = 22;
  properties.score = Score::kGaussian;
  properties.scale_factor = 1;
  std::vector<Problem> problems;
  for (const auto prior : {PriorCase::Prior::kPairs, PriorCase::Prior::kKeys}) {
    properties.prior = prior;
    problems.push_back(prior_problem(random, properties));
    problems.back().lay_rows_apart(random);
  }
  expect_faults_noticed(5, [&] {
    Bytes all = problems[0].bytes(kCudaKernels, GetParam());
    for (auto& bytes : problems[1].bytes(kCudaKernels, GetParam())) all.push_back(std::move(bytes));
    return all;
  });
}

INSTANTIATE_TEST_SUITE_P(Kernels, PriorAttentionCudaFaults, testing::Values(DType::kFloat32, DType::kFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

}  // namespace
}  // namespace fiak::tests
