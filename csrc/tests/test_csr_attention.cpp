#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <stdexcept>

#include "kernels/cpu/choose/cost_model.h"
#include "tests/attention_problem.h"

namespace fiak::tests {
namespace {

class CsrAttention : public KernelTest {
 protected:
  /// The check with each kernel wherever it can run, and with their choice.
  template <class Check>
  void with_each_kernel(Check&& check) {
    for (const char* kernel : {"entries", "entries_sliced", "dense", "rows", "auto"}) {
      setenv("FIAK_CSR_KERNEL", kernel, 1);
      SCOPED_TRACE(kernel);
      check();
      if (HasFatalFailure()) break;
    }
    unsetenv("FIAK_CSR_KERNEL");
  }
};

TEST_P(CsrAttention, MatchesScalarFloat64) {
  with_each_kernel([&] { matches_scalar_float64(random_csr_problem); });
}
TEST_P(CsrAttention, MatchesScalarFloat64OnLongPatterns) {
  with_each_kernel([&] { matches_scalar_float64(random_long_csr_problem, 8); });
}
TEST_P(CsrAttention, GivesTheSameBitsOnAnyNumberOfThreads) {
  with_each_kernel([&] {
    gives_the_same_bits_on_any_number_of_threads(random_csr_problem, 20);
    gives_the_same_bits_on_any_number_of_threads(random_long_csr_problem, 8);
  });
}
TEST_P(CsrAttention, LeavesOutUnwantedGradients) {
  with_each_kernel([&] {
    leaves_out_unwanted_gradients(random_csr_problem, 4);
    leaves_out_unwanted_gradients(random_long_csr_problem, 2);
  });
}
TEST_P(CsrAttention, KeepsNanInItsPlace) {
  with_each_kernel([&] {
    keeps_nan_in_its_place(random_csr_problem, 30);
    keeps_nan_in_its_place(random_long_csr_problem, 4);
  });
}
TEST_P(CsrAttention, IgnoresHugeScoresOutsideTheSupport) {
  with_each_kernel([&] { ignores_huge_scores_outside_the_support(random_csr_problem); });
}

/// Rows that attend to one key, or to two that are the same, by scores at which a logsumexp, rounded, is off by more
/// than any probability may be.
TEST_P(CsrAttention, MatchesScalarFloat64OfScoresOfTenThousands) {
  Random random(15);
  for (int round = 0; round < 12; ++round) {
    CsrCase c{};
    c.dtype = dtype();
    c.batch = random.integer(1, 5);
    c.groups = 1;
    c.key_heads = 2;
    c.heads_per_key_head = 1;
    c.queries = c.keys = random.integer(33, 70);
    c.head_dim = random.integer(16, 70);
    c.value_dim = 9;
    c.score = Score::kDot;
    c.scale_factor = 1;
    c.has_kv_lens = round % 4 == 1;
    c.has_prior = round % 4 > 1;
    c.kept = round % 5 == 0 ? CsrCase::Kept::kAll : CsrCase::Kept::kHalf;
    Problem problem = csr_problem(random, c);
    problem.args.scale = 6e4 / 35 / static_cast<double>(c.head_dim);
    std::vector<double> direction;
    for (int64_t d = 0; d < c.head_dim; ++d) direction.push_back(random.chance(0.5) ? 1 : -1);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.key_heads; ++h) {
        for (int64_t n = 0; n < c.queries; ++n) {
          const double sign = random.chance(0.5) ? 1 : -1;
          for (int64_t d = 0; d < c.head_dim; ++d) {
            problem.query.set(b, h, n, d, sign * direction[d]);
            problem.key.set(b, h, n, d, static_cast<double>(n / 2) * direction[d]);
          }
        }
      }
    }
    const Reference reference = reference_of(problem);
    for (const char* kernel : {"entries", "dense", "rows"}) {
      setenv("FIAK_CSR_KERNEL", kernel, 1);
      Results grads = reference.saved;
      problem.backward(kernels(), threads(2), grads, kGradValue);
      unsetenv("FIAK_CSR_KERNEL");
      expect_close(grads.grad_value, reference.exact.grad_value, reference.yardstick.grad_value,
                   kernel + (" of " + problem.describe()));
    }
  }
}

TEST_P(CsrAttention, MatchesScalarFloat64OfFewQueries) { matches_scalar_float64(random_csr_decode_problem, 25); }
TEST_P(CsrAttention, GivesTheSameBitsOnAnyNumberOfThreadsOfFewQueries) {
  gives_the_same_bits_on_any_number_of_threads(random_csr_decode_problem, 10);
}
TEST_P(CsrAttention, KeepsNanInItsPlaceOfFewQueries) { keeps_nan_in_its_place(random_csr_decode_problem, 4); }
TEST_P(CsrAttention, IgnoresHugeScoresOutsideTheSupportOfFewQueries) {
  ignores_huge_scores_outside_the_support(random_csr_decode_problem, 6);
}

TEST_P(CsrAttention, MatchesScalarFloat64WithWeightsOfAnySize) {
  matches_scalar_float64(random_extreme_csr_problem, 120);
}
TEST_P(CsrAttention, GivesTheSameBitsOnAnyNumberOfThreadsWithWeightsOfAnySize) {
  gives_the_same_bits_on_any_number_of_threads(random_extreme_csr_problem, 12);
}
TEST_P(CsrAttention, KeepsNanInItsPlaceWithWeightsOfAnySize) { keeps_nan_in_its_place(random_extreme_csr_problem, 12); }
TEST_P(CsrAttention, IgnoresHugeScoresOutsideTheSupportWithWeightsOfAnySize) {
  ignores_huge_scores_outside_the_support(random_extreme_csr_problem, 12);
}

/// A call whose pattern has rows and columns that 16 bits may not tell apart.
Problem long_problem(Random& random, DType dtype, int64_t queries, int64_t keys, double density) {
  Problem problem;
  problem.args.batch = 1;
  problem.args.query_heads = problem.args.key_heads = 2;
  problem.args.queries = queries;
  problem.args.keys = keys;
  problem.args.head_dim = 5;
  problem.args.value_dim = 3;
  for (auto [operand, rows, columns] :
       {std::tuple(&problem.query, queries, 5), std::tuple(&problem.key, keys, 5), std::tuple(&problem.value, keys, 3),
        std::tuple(&problem.grad_output, queries, 3)}) {
    *operand = Tensor(DType::kFloat64, 1, 2, rows, columns);
    operand->fill(random);
    *operand = operand->to(dtype).to(DType::kFloat64);
  }
  problem.kv_lens = {keys - 2};
  problem.pattern = std::make_shared<Pattern>(random, 2, queries, keys, density);
  problem.has_weight = true;
  problem.weight = Tensor(DType::kFloat64, 1, 1, 1, problem.pattern->nnz());
  problem.weight.fill(random, 0.5, 2);
  problem.weight = problem.weight.to(DType::kFloat32).to(DType::kFloat64);
  return problem;
}

TEST_P(CsrAttention, OfLongRowsAndColumns) {
  Random random(20);
  for (const auto& [queries, keys] :
       {std::pair<int64_t, int64_t>(2, 65536), {2, 65537}, {50, 70000}, {65537, 3}, {70000, 3}, {700, 650}}) {
    const Problem problem = long_problem(random, dtype(), queries, keys, 0.05);
    Results exact = problem.forward(scalar(), DType::kFloat64, threads(1));
    problem.backward(scalar(), threads(1), exact);
    Results yardstick = problem.forward(scalar(), dtype(), threads(1));
    problem.backward(scalar(), threads(1), yardstick);
    with_each_kernel([&] {
      const Results forward = problem.forward(kernels(), dtype(), threads(2));
      expect_close(forward.output, exact.output, yardstick.output, problem.describe());
      expect_close(forward.logsumexp, exact.logsumexp, yardstick.logsumexp, problem.describe());
    });
    Results actual = problem.forward(kernels(), dtype(), threads(2));
    problem.backward(kernels(), threads(2), actual);
    for (const auto member : {&Results::output, &Results::logsumexp, &Results::grad_query, &Results::grad_key,
                              &Results::grad_value, &Results::grad_prior}) {
      expect_close(actual.*member, exact.*member, yardstick.*member, problem.describe());
    }
    for (const int64_t count : {1, 3, 16}) {
      Results several = problem.forward(kernels(), dtype(), threads(count));
      problem.backward(kernels(), threads(count), several);
      for (const auto member : {&Results::output, &Results::logsumexp, &Results::grad_query, &Results::grad_key,
                                &Results::grad_value, &Results::grad_prior}) {
        expect_identical(several.*member, actual.*member, problem.describe() + " on " + std::to_string(count));
      }
    }
  }
}

/// How often the caller's threads are asked to work: three times for each tile of queries and keys that backward walks.
int64_t times_asked = 0;

/// Three entries a row: whatever tiles they are cut into, most of these are empty.
TEST_P(CsrAttention, BackwardOfFewEntriesWalksNoEmptyTiles) {
  Random random(27);
  for (const int64_t side : {4096, 8192, 16384, 65535, 65536, 65537, 131072}) {
    std::vector<int64_t> crow{0}, col;
    for (int64_t row = 0; row < side; ++row) {
      std::set<int64_t> kept;
      for (int i = 0; i < 3; ++i) kept.insert(random.integer(0, side - 1));
      col.insert(col.end(), kept.begin(), kept.end());
      crow.push_back(static_cast<int64_t>(col.size()));
    }
    CsrCase properties{};
    properties.dtype = dtype();
    properties.batch = properties.groups = properties.key_heads = properties.heads_per_key_head = 1;
    properties.queries = properties.keys = side;
    properties.head_dim = properties.value_dim = 4;
    properties.scale_factor = 1;
    const Problem problem = csr_problem(random, properties, std::make_shared<Pattern>(1, side, side, crow, col));
    Results results = problem.forward(kernels(), dtype(), threads(1));
    const Parallel counting = {2, [](int64_t tasks, void (*task)(void*, int64_t), void* context) {
                                 ++times_asked;
                                 for (int64_t i = 0; i < tasks; ++i) task(context, i);
                               }};
    times_asked = 0;
    problem.backward(kernels(), counting, results);
    EXPECT_LE(times_asked, side / 5) << side;  // in proportion to the entries; tiles are of up to 320 queries and keys
  }
}

FIAK_FOR_ALL_KERNELS(CsrAttention);

double forward_cost(cpu::Family family, const cpu::CsrHead& head, const cpu::CsrRates& rates) {
  return cpu::csr_cost(cpu::kFamilies[family].forward(head), rates.forward);
}
double backward_cost(cpu::Family family, const cpu::CsrHead& head, const cpu::CsrRates& rates) {
  return cpu::csr_cost(cpu::kFamilies[family].backward(head), rates.backward);
}

/// Instruction sets, with how they store the rows of the dtype that they are for.
constexpr std::pair<cpu::Isa, cpu::Storage> kStored[] = {{cpu::Isa::kAvx2, cpu::Storage::kFloat32},
                                                         {cpu::Isa::kAvx512, cpu::Storage::kFloat32},
                                                         {cpu::Isa::kAvx512Bf16, cpu::Storage::kBFloat16},
                                                         {cpu::Isa::kAmxBf16, cpu::Storage::kBFloat16}};

TEST(CsrFamilies, RefusesUnknownNames) {
  setenv("FIAK_CSR_KERNEL", "fast", 1);
  EXPECT_THROW(cpu::selected_family(), std::invalid_argument);
  unsetenv("FIAK_CSR_KERNEL");
  EXPECT_EQ(cpu::selected_family(), -1);
  for (int family = 0; family < cpu::kFamilyCount; ++family) {
    setenv("FIAK_CSR_KERNEL", cpu::kFamilies[family].name, 1);
    EXPECT_EQ(cpu::selected_family(), family);
    unsetenv("FIAK_CSR_KERNEL");
  }
}

TEST(CsrFamilies, TakesTheDenseKernelForFullHeadsOnly) {
  const auto entries = [](const cpu::CsrHead& head, const cpu::CsrRates& rates) {
    return std::min(forward_cost(cpu::kEntries, head, rates), forward_cost(cpu::kEntriesSliced, head, rates));
  };
  for (const auto& [isa, storage] : kStored) {
    const cpu::CsrRates& rates = cpu::csr_rates(isa, isa, storage);
    const double few = isa == cpu::Isa::kAmxBf16 ? 0.002 : 0.1;  // tiles are cheaper still
    for (const int64_t size : {16, 48, 64, 128}) {
      for (const int64_t length : {197, 1024, 4096}) {
        const auto pairs = static_cast<double>(length * length);
        const cpu::CsrHead full{length, length, pairs, pairs / (24 * 16), size, size, 1, storage, cpu::lanes_of(isa)};
        cpu::CsrHead sparse = full;
        sparse.nnz *= few;
        EXPECT_LT(forward_cost(cpu::kDense, full, rates), entries(full, rates)) << size << " " << length;
        EXPECT_GT(forward_cost(cpu::kDense, sparse, rates), entries(sparse, rates)) << size << " " << length;
      }
    }
    // One query of a long context: transposing its keys would cost more than its products.
    const cpu::CsrHead decode{1, 16384, 16384, 16384.0 / 16, 64, 64, 1, storage, cpu::lanes_of(isa)};
    EXPECT_GT(forward_cost(cpu::kDense, decode, rates), entries(decode, rates));
  }
}

TEST(CsrFamilies, TakesTheDenseKernelBackwardForFullHeadsOnly) {
  for (const auto& [isa, storage] : kStored) {
    const cpu::CsrRates& rates = cpu::csr_rates(isa, isa, storage);
    const int lanes = cpu::lanes_of(isa);
    for (const int64_t size : {16, 48, 64, 128}) {
      for (const int64_t length : {197, 1024, 4096}) {
        const auto all = static_cast<double>(length * length);
        const auto dense_saves = [&, stored = storage](double kept, double tiles) {
          const cpu::CsrHead head{length, length, kept * all, tiles * all / (24 * 16), size, size, 1, stored, lanes};
          return backward_cost(cpu::kDense, head, rates) < backward_cost(cpu::kEntries, head, rates);
        };
        const std::string what = std::string(cpu::isa_name(isa)) + " " + std::to_string(size);
        EXPECT_TRUE(dense_saves(1, 1)) << what << " " << length;
        EXPECT_FALSE(dense_saves(0.1, 1)) << what << " " << length;
        EXPECT_TRUE(dense_saves(0.3, 0.3)) << what << " " << length;  // in blocks, of which the others are skipped
      }
    }
  }
}

TEST(CsrFamilies, SplitsTheKeysOfLongSegmentsOnly) {
  for (const auto& [isa, storage] : kStored) {
    if (storage != cpu::Storage::kFloat32) continue;
    const cpu::CsrRates& rates = cpu::csr_rates(isa, isa, storage);
    const auto saved = [&, isa = isa, storage = storage](int64_t keys, double density) {
      const auto pairs = static_cast<double>(keys * keys);
      const cpu::CsrHead head{keys, keys, density * pairs, pairs / (24 * 16), 64, 64, 1, storage, cpu::lanes_of(isa)};
      return forward_cost(cpu::kEntries, head, rates) - forward_cost(cpu::kEntriesSliced, head, rates);
    };
    EXPECT_EQ(saved(128, 0.9), 0);  // 32 KB of rows are one slice
    EXPECT_GT(saved(2048, 0.9), 0);
    EXPECT_LT(saved(2048, 0.01), 0);
  }
}

TEST(CsrAttentionFloat64, EqualsPriorAttentionOfTheDenseWeights) {
  Random random(21);
  const cpu::Kernels& kernels = cpu::kernels(cpu::Isa::kScalar);
  for (int round = 0; round < 100; ++round) {
    Problem csr = random_csr_problem(random, DType::kFloat32);
    const AttentionArgs& args = csr.args;
    if (!csr.query_offsets.empty() || csr.pattern->keys != args.keys || csr.pattern->heads % args.query_heads != 0) {
      continue;
    }
    // Columns that nobody keeps are NaN, which weight 0 does not hide from a prior's own gradient.
    for (Tensor* operand : {&csr.key, &csr.value}) {
      operand->fill(random);
    }
    Problem prior = csr;
    const Pattern& pattern = *csr.pattern;
    prior.pattern = nullptr;
    prior.has_weight = true;
    prior.weight = Tensor(DType::kFloat64, pattern.heads / args.query_heads, args.query_heads, args.queries, args.keys);
    prior.weight.fill(random, 0, 0);
    for (int64_t row = 0; row < pattern.heads * pattern.queries; ++row) {
      for (int64_t entry = pattern.crow[row]; entry < pattern.crow[row + 1]; ++entry) {
        prior.weight.set(row / args.queries / args.query_heads, row / args.queries % args.query_heads,
                         row % args.queries, pattern.col[entry], csr.has_weight ? csr.weight.at(0, 0, 0, entry) : 1);
      }
    }
    Results sparse = csr.forward(kernels, DType::kFloat64, threads(1));
    Results dense = prior.forward(kernels, DType::kFloat64, threads(1));
    csr.backward(kernels, threads(1), sparse);
    prior.backward(kernels, threads(1), dense);
    for (const auto member :
         {&Results::output, &Results::logsumexp, &Results::grad_query, &Results::grad_key, &Results::grad_value}) {
      expect_close(sparse.*member, dense.*member, dense.*member, csr.describe());
    }
    if (csr.has_weight) {
      for (int64_t row = 0; row < pattern.heads * pattern.queries; ++row) {
        for (int64_t entry = pattern.crow[row]; entry < pattern.crow[row + 1]; ++entry) {
          ASSERT_NEAR(sparse.grad_prior.at(0, 0, 0, entry),
                      dense.grad_prior.at(row / args.queries / args.query_heads, row / args.queries % args.query_heads,
                                          row % args.queries, pattern.col[entry]),
                      1e-12);
        }
      }
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace fiak::tests
