// The device code of csr_attention, run on the CPU by simt, as one more implementation that must pass every test.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <cstdio>
#include <vector>

#include "benchmarks/recorded.h"
#include "kernels/cuda/csr_attention.cuh"
#include "tests/attention_problem.h"
#include "tests/counts.h"
#include "tests/pairwise.h"
#include "tests/simt_checks.h"

namespace fiak::tests {
namespace {

using cuda::CsrKernel;

CsrKernel selected = CsrKernel::kAuto;

bool has_pairs(const AttentionArgs& args) {
  return args.batch > 0 && args.query_heads > 0 && args.queries > 0 && args.keys > 0;
}

cuda::CsrWeights weights_of(const CsrArgs& args) {
  const PlanHeader* plan = args.plan.header;
  return {plan,
          plan->bytes,
          plan->num_rows,
          plan->nnz,
          static_cast<const float*>(args.prior),
          args.query_offsets,
          static_cast<int32_t>(selected)};
}

/// About every other call has the plan's summary, whose work must then be all that there is.
PlanSummary summary_of(const CsrArgs& args) {
  static std::vector<PlanHeadWork> heads;
  if ((args.queries + args.head_dim) % 2 == 0) return {};
  heads.resize(args.plan.heads);
  summarise_plan(args.plan, heads.data());
  return {heads.data(), args.plan.heads};
}

/// As the op does it: kernels are launched where there are pairs.
void forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  if (!has_pairs(args)) return cpu::kernels(cpu::Isa::kScalar).csr_forward(args, result, parallel);
  const auto seed = static_cast<int64_t>(args.seed);
  cuda::csr_forward(args, weights_of(args), summary_of(args), &seed, result, kLaunch);
}

void backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  if (!has_pairs(args)) return cpu::kernels(cpu::Isa::kScalar).csr_backward(args, grads, parallel);
  const auto seed = static_cast<int64_t>(args.seed);
  std::vector<float> delta(args.batch * args.query_heads * args.queries);
  cuda::csr_backward(args, weights_of(args), summary_of(args), &seed, grads, delta.data(), kLaunch);
}

const cpu::Kernels kCudaKernels = [] {
  cpu::Kernels kernels = cpu::kernels(cpu::Isa::kScalar);
  kernels.csr_forward = forward;
  kernels.csr_backward = backward;
  return kernels;
}();

class CsrAttentionCuda : public testing::TestWithParam<DType>, protected KernelChecks {
 protected:
  void SetUp() override {
    schedule = {};
    selected = CsrKernel::kAuto;
  }
  void TearDown() override {
    if (HasFailure()) print_seed();
  }
  DType dtype() const override { return GetParam(); }
  const cpu::Kernels& kernels() const override { return kCudaKernels; }

  /// The check with each kernel wherever it can run, and with their choice.
  template <class Check>
  void with_each_kernel(Check&& check) {
    for (const CsrKernel kernel : {CsrKernel::kEntries, CsrKernel::kTiles, CsrKernel::kAuto}) {
      selected = kernel;
      SCOPED_TRACE(static_cast<int>(kernel));
      check();
      if (HasFatalFailure()) return;
    }
  }
};

constexpr int kRounds = simt::kThreadSanitizer ? 1 : kSanitized ? 2 : 6;

TEST_P(CsrAttentionCuda, MatchesScalarFloat64) {
  with_each_kernel([&] { matches_scalar_float64(random_csr_problem, kRounds); });
}
TEST_P(CsrAttentionCuda, MatchesScalarFloat64OnLongPatterns) {
  if (kSanitized) GTEST_SKIP() << "the plain build does it";
  with_each_kernel([&] { matches_scalar_float64(random_long_csr_problem, 1); });
}
TEST_P(CsrAttentionCuda, MatchesScalarFloat64WithWeightsOfAnySize) {
  with_each_kernel([&] { matches_scalar_float64(random_extreme_csr_problem, 2 * kRounds); });
}
TEST_P(CsrAttentionCuda, LeavesOutUnwantedGradients) { leaves_out_unwanted_gradients(random_csr_problem, 1); }
TEST_P(CsrAttentionCuda, KeepsNanInItsPlace) {
  with_each_kernel([&] { keeps_nan_in_its_place(random_csr_problem, kRounds / 6 + 1); });
}
TEST_P(CsrAttentionCuda, IgnoresHugeScoresOutsideTheSupport) {
  with_each_kernel([&] { ignores_huge_scores_outside_the_support(random_csr_problem, kRounds / 6 + 1); });
}
TEST_P(CsrAttentionCuda, GivesTheSameBitsInAnyOrder) {  // with every number of threads comes another schedule
  with_each_kernel([&] { gives_the_same_bits_on_any_number_of_threads(random_csr_problem, 1); });
}

TEST(CsrLaunches, AreOfTheKindsThatHeadsNeed) {
  Random random(5);
  selected = CsrKernel::kAuto;
  const auto kinds = [&](const Pattern& pattern, DType dtype, bool has_summary) {
    CsrArgs args;
    args.batch = 1;
    args.query_heads = args.key_heads = pattern.heads;
    args.queries = pattern.queries;
    args.keys = pattern.keys;
    args.dtype = dtype;
    args.plan = pattern.plan();
    std::vector<PlanHeadWork> heads(pattern.heads);
    summarise_plan(args.plan, heads.data());
    const PlanSummary summary{has_summary ? heads.data() : nullptr, pattern.heads};
    const cuda::CsrKinds found = cuda::kinds_of(args, weights_of(args), summary);
    return std::make_pair(found.entries, found.tiles);
  };
  const Pattern full(random, 2, 64, 64, 1.0), sparse(random, 2, 64, 64, 0.1), thin(random, 2, 200, 3000, 0.003);
  std::vector<int64_t> crow = full.crow, col = full.col;  // a full head and an empty one
  std::fill(crow.begin() + 64, crow.end(), crow[64]);
  col.resize(crow[64]);
  const Pattern mixed(2, 64, 64, crow, col);
  using Kinds = std::pair<bool, bool>;  // entries, tiles
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    EXPECT_EQ(kinds(full, dtype, true), Kinds(false, true));
    EXPECT_EQ(kinds(sparse, dtype, true), Kinds(true, false));
    EXPECT_EQ(kinds(mixed, dtype, true), Kinds(true, true));
    EXPECT_EQ(kinds(thin, dtype, true), Kinds(true, false));
    for (const Pattern* pattern : {&full, &sparse, &mixed}) EXPECT_EQ(kinds(*pattern, dtype, false), Kinds(true, true));
    EXPECT_EQ(kinds(thin, dtype, false), Kinds(true, false));  // no plan of these sizes has bits
  }
}

/// Rows and columns with more entries than 16 bits tell apart, and columns that the plan has no offsets of.
TEST_P(CsrAttentionCuda, OfLongRowsAndColumns) {
  if (simt::kThreadSanitizer) GTEST_SKIP() << "the plain build does it";
  CsrCase properties{};
  properties.dtype = dtype();
  properties.batch = properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
  properties.head_dim = 5;
  properties.value_dim = 3;
  properties.scale_factor = 1;
  properties.has_prior = true;
  Random random(22);
  const auto check = [&](const Problem& problem, unsigned wanted) {
    Results exact = problem.forward(scalar(), DType::kFloat64, threads(1));
    Results yardstick = problem.forward(scalar(), dtype(), threads(1));
    const Results actual = problem.forward(kernels(), dtype(), threads(1));
    Results grads = yardstick;
    problem.backward(scalar(), threads(1), exact, wanted);
    problem.backward(scalar(), threads(1), yardstick, wanted);
    problem.backward(kernels(), threads(1), grads, wanted);
    expect_close(actual.output, exact.output, yardstick.output, "output of " + problem.describe());
    for (const auto member : {&Results::grad_query, &Results::grad_key, &Results::grad_value, &Results::grad_prior}) {
      expect_close(grads.*member, exact.*member, yardstick.*member, problem.describe());
    }
  };
  properties.queries = 3;
  properties.keys = 66000;
  Problem wide = csr_problem(random, properties, std::make_shared<Pattern>(random, 1, 3, 66000, 0.01));
  wide.kv_lens = {65990};
  check(wide, kGradQuery | kGradPrior);
  properties.keys = 70;
  check(csr_problem(random, properties, std::make_shared<Pattern>(random, 1, 3, 66000, 0.01)), kAllGrads);
  properties.queries = 80;
  properties.keys = 3;
  properties.has_query_offsets = true;
  Problem high = csr_problem(random, properties, std::make_shared<Pattern>(random, 1, 65600, 3, 0.3));
  high.query_offsets[0] = 65500;
  check(high, kGradQuery | kGradKey | kGradValue);
}

INSTANTIATE_TEST_SUITE_P(Kernels, CsrAttentionCuda, testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

// ---------------------------------------------------------------------------------------------------------------------
// Every pair of properties

constexpr int64_t kSizes[] = {0, 1, 15, 16, 17, 63, 64, 65, 197};
constexpr int64_t kHeadDims[] = {1, 16, 33, 48, 64, 80, 128, 256};
/// How many values each property of a case has, in make_case's order.
constexpr Choice<16> kValues = {3, 9, 9, 8, 8, 3, 2, 3, 2, 2, 2, 2, 2, 7, 3, 2};

CsrCase make_case(const Choice<16>& choice) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  constexpr int64_t kHeads[][2] = {{1, 1}, {1, 2}, {2, 1}};  // of keys, and of queries for each
  constexpr double kScales[] = {1, 0, -1};
  CsrCase c;
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
  c.has_kv_lens = choice[10] != 0;
  c.has_query_offsets = choice[11] != 0;
  c.has_prior = choice[12] != 0;
  c.kept = static_cast<CsrCase::Kept>(choice[13]);
  c.batch = c.groups * (1 + 2 * choice[15]);  // one element of a group, or three
  return c;
}

class CsrAttentionCudaCases : public testing::Test, protected KernelChecks {
 protected:
  void TearDown() override { selected = CsrKernel::kAuto; }
  DType dtype() const override { return dtype_; }
  const cpu::Kernels& kernels() const override { return kCudaKernels; }
  DType dtype_ = DType::kFloat32;
};

TEST_F(CsrAttentionCudaCases, HaveEveryPairOfProperties) {
  constexpr CsrKernel kSelected[] = {CsrKernel::kEntries, CsrKernel::kTiles, CsrKernel::kAuto};
  Random random(20);
  int run = 0;
  for_choices(kValues, random, [&](const Choice<16>& choice) {
    const CsrCase properties = make_case(choice);
    const bool small = properties.queries * properties.keys <= 65 * 17 && properties.value_dim <= 80;
    if ((kSanitized && !small) || (simt::kThreadSanitizer && run >= 5)) return true;
    const Problem problem = csr_problem(random, properties);
    dtype_ = properties.dtype;
    selected = kSelected[choice[14]];
    schedule.seed = static_cast<uint64_t>(1000 * ++run);
    matches_scalar_float64(problem, problem.describe() + ", case " + std::to_string(run));
    return !HasFailure();
  });
  std::printf("%d cases\n", run);
}

/// The pattern that a trained model has kept, of some of the mask's heads.
std::shared_ptr<Pattern> recorded_pattern(const std::string& name, int64_t first, int64_t heads) {
  const benchmarks::RecordedMask mask(FIAK_BENCHMARKS "/masks/" + name + ".npy");
  std::vector<int64_t> crow{0}, col;
  for (int64_t row = 0; row < heads * mask.length; ++row) {
    for (int64_t j = 0; j < mask.length; ++j) {
      if (mask.at(first + row / mask.length, row % mask.length, j)) col.push_back(j);
    }
    crow.push_back(static_cast<int64_t>(col.size()));
  }
  return std::make_shared<Pattern>(heads, mask.length, mask.length, crow, col);
}

TEST_F(CsrAttentionCudaCases, OfRecordedLearnedMasks) {
  if (simt::kThreadSanitizer) GTEST_SKIP() << "the plain build does it";
  Random random(23);
  const std::vector<std::string> names = {"lm_kjv_n128_70", "minilm_n48_50", "vit_fashion_n197_90"};
  for (size_t i = 0; i < names.size(); ++i) {
    const auto pattern = recorded_pattern(names[i], 3, 2);
    if (kSanitized && pattern->queries > 50) continue;
    CsrCase properties{};
    properties.dtype = dtype_ = i % 2 == 0 ? DType::kFloat16 : DType::kFloat32;
    properties.batch = 2;
    properties.groups = properties.heads_per_key_head = 1;
    properties.key_heads = pattern->heads;
    properties.queries = properties.keys = pattern->queries;
    properties.head_dim = properties.value_dim = 48;
    properties.scale_factor = 1;
    properties.has_prior = true;
    for (const CsrKernel kernel : {CsrKernel::kEntries, CsrKernel::kTiles}) {
      selected = kernel;
      matches_scalar_float64(csr_problem(random, properties, pattern), names[i]);
    }
  }
}

/// What the kernels do for patterns of a trained model: over tiles as much as for all pairs, but for tiles without any,
/// and by entries for two batch elements, which share the indices.
TEST(CudaCounts, OfCsrAttention) {
  Random random(26);
  simt::counts.clear();
  for (const CsrKernel kernels : {CsrKernel::kTiles, CsrKernel::kEntries}) {
    selected = kernels;
    for (const int pruned : {50, 70, 90}) {
      const auto pattern = recorded_pattern("vit_fashion_n197_" + std::to_string(pruned), 0, 1);
      CsrCase properties{};
      properties.dtype = DType::kFloat16;
      properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
      properties.batch = kernels == CsrKernel::kTiles ? 1 : 2;
      properties.queries = properties.keys = 197;
      properties.head_dim = properties.value_dim = 48;
      properties.scale_factor = 1;
      Problem problem = csr_problem(random, properties, pattern);
      problem.lay_rows_apart(random);  // all copies are asynchronous, all loads of 16 bytes
      Results results = problem.forward(kCudaKernels, properties.dtype, threads(1));
      problem.backward(kCudaKernels, threads(1), results);
      const int64_t row_bytes = 48 * 2, rows = properties.batch * pattern->nnz();
      for (auto i = simt::counts.begin(); i != simt::counts.end();) {  // kernels that find no head end at once
        const bool is_idle = i->first.find("entries") != std::string::npos && i->second.loaded_bytes == 0;
        i = is_idle ? simt::counts.erase(i) : std::next(i);
      }
      for (const auto& [kernel, counts] : simt::counts) {
        const bool by_entries = kernel.find("entries") != std::string::npos;
        if (by_entries) {
          // Of an entry, rows of key and value, or, by columns, of query and grad_output, the first once more where the
          // scores are differentiated; of a warp its own row, in that case two, which each of its 8 groups loads.
          const bool differentiates =
              kernel.find("grad_query") != std::string::npos || kernel.find("grad_key") != std::string::npos;
          const int64_t of_entry = differentiates ? 3 : 2, of_warp = differentiates ? 2 : 1;
          EXPECT_EQ(counts.loaded_bytes, (of_entry * rows + of_warp * 8 * properties.batch * 197) * row_bytes)
              << kernel;
        } else if (counts.products > 0) {
          EXPECT_GE(counts.products * 8 * 16 * 16, 2 * pattern->nnz() * 48) << kernel;
        }
      }
      print_counts("csr_attention", {{"batch", properties.batch},
                                     {"heads", 1},
                                     {"queries", 197},
                                     {"keys", 197},
                                     {"head_dim", 48},
                                     {"nnz", pattern->nnz()}});
    }
  }
  selected = CsrKernel::kAuto;
}

// ---------------------------------------------------------------------------------------------------------------------
// What must not be trusted, and what there is to break

class CsrAttentionCudaChecks : public testing::Test {
 protected:
  CsrAttentionCudaChecks() {
    CsrCase properties{};
    properties.dtype = DType::kFloat32;
    properties.batch = properties.heads_per_key_head = 2;
    properties.groups = properties.key_heads = 1;
    properties.queries = properties.keys = 5;
    properties.head_dim = properties.value_dim = 4;
    properties.scale_factor = 1;
    properties.has_kv_lens = properties.has_query_offsets = properties.has_prior = true;
    properties.kept = CsrCase::Kept::kAll;
    Random random(24);
    problem_ = csr_problem(random, properties);
  }
  /// Whether forward traps with the weights that change() leaves.
  template <class Change>
  bool traps(Change&& change) {
    static Change* current;
    current = &change;
    cpu::Kernels kernels = kCudaKernels;
    kernels.csr_forward = [](const CsrArgs& args, const ForwardResult& result, const Parallel&) {
      cuda::CsrWeights weights = weights_of(args);
      (*current)(weights);
      cuda::csr_forward(args, weights, {}, nullptr, result, kLaunch);
    };
    try {
      problem_.forward(kernels, DType::kFloat32, threads(1));
    } catch (const simt::Error&) {
      return true;
    }
    return false;
  }
  Problem problem_;
};

TEST_F(CsrAttentionCudaChecks, TrapOnAPlanOfAnotherPattern) {
  EXPECT_FALSE(traps([](cuda::CsrWeights&) {}));
  EXPECT_TRUE(traps([](cuda::CsrWeights& weights) { ++weights.nnz; }));
  EXPECT_TRUE(traps([](cuda::CsrWeights& weights) { --weights.num_rows; }));
  problem_.args.keys = 6;  // more than the pattern has
  EXPECT_TRUE(traps([](cuda::CsrWeights&) {}));
  problem_.args.keys = 5;
  EXPECT_TRUE(traps([](cuda::CsrWeights& weights) { weights.plan_bytes -= 64; }));
  static PlanHeader other;
  EXPECT_TRUE(traps([](cuda::CsrWeights& weights) {
    other = *static_cast<const PlanHeader*>(weights.plan);
    other.magic += 1;
    weights.plan = &other;
  }));
}

TEST_F(CsrAttentionCudaChecks, TrapOnCountsOutOfRange) {
  const std::vector<int64_t> kv_lens = problem_.kv_lens, offsets = problem_.query_offsets;
  for (const int64_t count : {-1, 6}) {
    problem_.kv_lens[1] = count;
    EXPECT_TRUE(traps([](cuda::CsrWeights&) {}));
  }
  problem_.kv_lens = kv_lens;
  for (const int64_t offset : {int64_t{-1}, problem_.pattern->queries - 4}) {
    problem_.query_offsets[1] = offset;
    EXPECT_TRUE(traps([](cuda::CsrWeights&) {}));
  }
  problem_.query_offsets = offsets;
  EXPECT_FALSE(traps([](cuda::CsrWeights&) {}));
}

class CsrAttentionCudaFaults : public testing::TestWithParam<DType> {};

TEST_P(CsrAttentionCudaFaults, OfTilesAreNoticedAtEverySite) {
  if (kSanitized) GTEST_SKIP() << "the plain build does it";
  Random random(25);
  CsrCase properties{};
  properties.dtype = GetParam();
  properties.batch = properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
  properties.queries = 70;
  properties.keys = 300;
  properties.head_dim = properties.value_dim = 22;
  properties.score = Score::kGaussian;
  properties.scale_factor = 1;
  properties.has_prior = true;
  Problem problem = csr_problem(random, properties, std::make_shared<Pattern>(random, 1, 70, 300, 0.3));
  problem.lay_rows_apart(random);
  selected = CsrKernel::kTiles;
  expect_faults_noticed(5, [&] { return problem.bytes(kCudaKernels, GetParam()); });
  selected = CsrKernel::kAuto;
}

INSTANTIATE_TEST_SUITE_P(Kernels, CsrAttentionCudaFaults, testing::Values(DType::kFloat32, DType::kFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

/// The warps of the kernels over entries share nothing: no barriers, no atomics.
TEST_F(CsrAttentionCudaChecks, EntriesNeedNoOrder) {
  sites.clear();
  selected = CsrKernel::kEntries;
  Results results = problem_.forward(kCudaKernels, DType::kFloat32, threads(1));
  problem_.backward(kCudaKernels, threads(1), results);
  selected = CsrKernel::kAuto;
  EXPECT_TRUE(sites.empty()) << sites.begin()->text();
}

}  // namespace
}  // namespace fiak::tests
