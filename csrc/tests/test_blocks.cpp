// Every kernel on both sides of the sizes from which on it takes another block, stage, tile or vector, which it is
// asked for (BlockCounts); every row of every result against the scalar float64 kernel.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>

#include "tests/attention_problem.h"
#include "tests/compact_problem.h"
#include "tests/pairwise.h"

namespace fiak::tests {
namespace {

/// Sizes in [2, most] that have a count which the next smaller size has not, by count.
std::vector<std::vector<int64_t>> block_starts(int64_t most, const std::function<cpu::BlockCounts(int64_t)>& count) {
  std::vector<std::vector<int64_t>> starts(cpu::BlockCounts::kMost);
  cpu::BlockCounts below = count(1);
  for (int64_t size = 2; size <= most; ++size) {
    const cpu::BlockCounts counts = count(size);
    for (int i = 0; i < counts.size; ++i) {
      if (counts.counts[i] != below.counts[i]) starts[i].push_back(size);
    }
    below = counts;
  }
  starts.erase(std::remove_if(starts.begin(), starts.end(), [](const auto& x) { return x.empty(); }), starts.end());
  return starts;
}

class KernelBlocks : public KernelTest {
 protected:
  cpu::BlockCounts blocks_of(const PriorCase& c, int64_t threads) const {
    PriorArgs args;
    fill(c, args);
    args.is_causal = c.is_causal;
    cpu::BlockCounts counts;
    kernels().prior_blocks(args, threads, counts);
    return counts;
  }
  cpu::BlockCounts blocks_of(const CsrCase& c, int64_t threads) const {
    CsrArgs args;
    fill(c, args);
    args.plan.num_queries = c.queries;
    args.plan.num_keys = c.keys;
    args.plan.heads = c.groups * args.query_heads;
    args.plan.nnz = args.plan.heads * c.queries * c.keys;
    cpu::BlockCounts counts;
    kernels().csr_blocks(args, threads, counts);
    return counts;
  }
  cpu::BlockCounts blocks_of(const LinearSizes& c, int64_t) const {
    CompactLinearArgs args;
    args.batch = c.batch;
    args.heads = c.heads;
    args.rows = c.rows;
    args.kept = c.kept;
    args.in_features = c.in_features;
    args.head_dim = c.head_dim;
    args.dtype = dtype();
    cpu::BlockCounts counts;
    kernels().compact_linear_blocks(args, counts);
    return counts;
  }

 private:
  template <class Case>
  static void fill(const Case& c, AttentionArgs& args) {
    args.batch = c.batch;
    args.key_heads = c.key_heads;
    args.query_heads = c.key_heads * c.heads_per_key_head;
    args.queries = c.queries;
    args.keys = c.keys;
    args.head_dim = c.head_dim;
    args.value_dim = c.value_dim;
    args.dtype = c.dtype;
    args.score = c.score;
  }
};

/// Of a test's cases, those that there is time for where code runs by emulation or sanitized.
bool is_drawn(Random& random) {
#if defined(FIAK_EMULATED) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return random.chance(0.1);
#else
  return random.chance(1);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding

constexpr int64_t kDecodedRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33};
constexpr int64_t kDecodedSizes[] = {16, 17, 24, 32, 48, 63, 64, 65, 80, 96, 127, 128};
enum class DecodedPairs { kAll, kAllWeighted, kWeights, kSome, kSomeWeighted };

class DecodeBlocks : public KernelBlocks {
 protected:
  /// Adds weights above 0, or of the given case as they are.
  static Problem weighted(Random& random, Problem problem, bool positive) {
    if (problem.has_weight && positive) {
      problem.weight.fill(random, 0.25, 2);
      problem.weight = problem.weight.to(DType::kFloat32).to(DType::kFloat64);
    }
    return problem;
  }

  /// A call with so many rows that share a key head, in the given pairs. `keys` chooses among the starts of blocks of
  /// keys, up to the second chunk, and `side` how far from the last key before it.
  template <class Case>
  Problem make(Random& random, Case c, int64_t rows, int64_t keys, int64_t side, int way) const {
    c.dtype = dtype();
    c.batch = c.groups = 1;
    c.key_heads = random.integer(1, 2);
    // One query of many heads, one head of many queries, or some of both.
    c.heads_per_key_head = way == 0 ? rows : way == 1 ? 1 : rows % 2 == 0 ? 2 : rows % 3 == 0 ? 3 : rows;
    c.queries = rows / c.heads_per_key_head;
    if (random.chance(0.3)) c.value_dim = kDecodedSizes[random.integer(0, 11)];
    c.score = random.chance(0.7) ? Score::kDot : Score::kGaussian;
    c.scale_factor = 3;  // so that scores differ
    c.dropout_p = random.chance(0.1) ? 0.3 : 0;
    const auto starts = block_starts(2100, [&](int64_t count) {
      c.keys = count;
      return blocks_of(c, 1);
    });
    c.keys = 1;
    if (!starts.empty()) {
      const auto& of_kind = starts[keys % starts.size()];
      const auto most = std::min<int64_t>(static_cast<int64_t>(of_kind.size()), 12);
      c.keys = std::max<int64_t>(1, of_kind[keys / static_cast<int64_t>(starts.size()) % most] - 1 + side);
    }
    // Sometimes the block ends where the padding starts.
    const int64_t padding = random.chance(0.2) ? random.integer(1, 20) : 0;
    const int64_t seen = c.keys;
    c.keys += padding;
    Problem problem = [&] {
      if constexpr (std::is_same_v<Case, PriorCase>) return prior_problem(random, c);
      if constexpr (std::is_same_v<Case, CsrCase>) return csr_problem(random, c);
    }();
    if (padding > 0) {
      problem.kv_lens = {seen};
      for (Tensor* x : {&problem.key, &problem.value}) {
        for (int64_t h = 0; h < c.key_heads; ++h) {
          for (int64_t j = seen; j < c.keys; ++j) x->set_row(0, h, j, std::nan(""));
        }
      }
    }
    return problem;
  }

  Problem make(Random& random, bool csr, int64_t rows, int64_t size, int64_t keys, int64_t side, DecodedPairs pairs,
               int way) const {
    const bool positive = pairs == DecodedPairs::kAllWeighted, some = pairs >= DecodedPairs::kSome;
    if (csr) {
      CsrCase c{};
      c.head_dim = c.value_dim = size;
      c.has_prior = pairs != DecodedPairs::kAll && pairs != DecodedPairs::kSome;
      c.kept = some ? CsrCase::Kept::kHalf : CsrCase::Kept::kAll;
      return weighted(random, make(random, c, rows, keys, side, way), positive);
    }
    PriorCase c{};
    c.head_dim = c.value_dim = size;
    c.is_causal = some;
    c.prior = pairs == DecodedPairs::kAll || pairs == DecodedPairs::kSome ? PriorCase::Prior::kNone
              : random.chance(0.5)                                        ? PriorCase::Prior::kPairs
                                                                          : PriorCase::Prior::kKeys;
    return weighted(random, make(random, c, rows, keys, side, way), positive);
  }
};

TEST_P(DecodeBlocks, MatchScalarFloat64OfEveryPairOfSizes) {
  Random random(50 + static_cast<uint64_t>(isa()));
  for_choices<7>({15, 12, 30, 3, 5, 3, 2}, random, [&](const Choice<7>& choice) {
    if (!is_drawn(random)) return true;
    const Problem problem = make(random, choice[6] != 0, kDecodedRows[choice[0]], kDecodedSizes[choice[1]], choice[2],
                                 choice[3] - 1, static_cast<DecodedPairs>(choice[4]), choice[5]);
    forward_matches_scalar_float64(problem, problem.describe());
    return !HasFailure();
  });
}

/// Splits for many tasks have a chunk each, unless there are more chunks than that.
TEST_P(DecodeBlocks, MatchScalarFloat64OfSeveralChunksInASplit) {
  Random random(51);
  PriorCase c{};
  c.dtype = dtype();
  c.batch = c.groups = 8;
  c.key_heads = 16;
  c.heads_per_key_head = 3;
  c.queries = 1;
  c.head_dim = 30;  // stages that are no multiples of 4
  c.value_dim = 5;
  c.scale_factor = 3;
  c.keys = 2500;
  for (const int64_t keys : {2047, 2050}) {
    c.keys = keys;
    const Problem problem = prior_problem(random, c);
    forward_matches_scalar_float64(problem, problem.describe());
  }
}

FIAK_FOR_ALL_KERNELS(DecodeBlocks);

// ---------------------------------------------------------------------------------------------------------------------
// All passes

constexpr int64_t kMostProducts = 6'000'000;  // of a case: pairs times head and value size

int64_t one_of(Random& random, std::initializer_list<int64_t> values) {
  return *(values.begin() + random.integer(0, static_cast<int64_t>(values.size()) - 1));
}

/// As long as there is time in make soak, else so many times.
template <class Use>
void for_rounds(int rounds, Use&& use) {
  const char* minutes = std::getenv("FIAK_SOAK");
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(minutes != nullptr ? 60 * std::atof(minutes) : 0);
  for (int round = 0; round < rounds || std::chrono::steady_clock::now() < end; ++round) {
    use();
    if (testing::Test::HasFailure()) return;
  }
}

class AllBlocks : public KernelBlocks, protected LinearChecks {
 protected:
  DType dtype() const override { return KernelTest::dtype(); }
  const cpu::Kernels& kernels() const override { return KernelTest::kernels(); }

  /// check(case) for what `size` is around one of the first starts of every kind of block up to `most`.
  template <class Case, class Check>
  void around_starts(Random& random, Case c, int64_t Case::*size, int64_t most, int64_t threads, Check&& check) const {
    const auto starts = block_starts(most, [&](int64_t count) {
      c.*size = count;
      return blocks_of(c, threads);
    });
    for (const auto& of_kind : starts) {
      const auto last = std::min<int64_t>(static_cast<int64_t>(of_kind.size()), 4) - 1;
      const int64_t start = of_kind[random.chance(0.5) ? last : random.integer(0, last)];
      for (c.*size = std::max<int64_t>(1, start - 2); c.*size <= start; ++(c.*size)) {
        if (!is_drawn(random)) continue;
        check(c);
        ++cases_;
        if (HasFatalFailure()) return;
      }
    }
  }

  /// The rest of a case, small enough for one size to be large.
  template <class Case>
  Case draw(Random& random) const {
    Case c{};
    c.dtype = dtype();
    c.key_heads = random.integer(1, 2);
    c.heads_per_key_head = random.integer(1, 2);
    c.queries = one_of(random, {1, 7, 24, 33, 50, 96, 100});
    c.keys = one_of(random, {5, 40, 100, 200});
    c.head_dim = one_of(random, {1, 3, 8, 16, 17, 64});
    c.value_dim = random.chance(0.5) ? c.head_dim : one_of(random, {1, 8, 24, 33});
    c.score = random.chance(0.6) ? Score::kDot : Score::kGaussian;
    c.scale_factor = 2;
    c.dropout_p = random.chance(0.2) ? 0.3 : 0;
    c.has_kv_lens = random.chance(0.2);
    return c;
  }
  template <class Case, class Check>
  void around_all_starts(Random& random, Case c, int64_t threads, Check&& check) const {
    const auto products = [](const Case& x) {
      return x.batch * x.key_heads * x.heads_per_key_head * x.queries * x.keys * (x.head_dim + x.value_dim);
    };
    for (const auto& [size, most] :
         {std::pair(&Case::queries, int64_t{800}), std::pair(&Case::keys, int64_t{6000}),
          std::pair(&Case::head_dim, int64_t{300}), std::pair(&Case::value_dim, int64_t{300})}) {
      Case one = c;
      one.*size = 1;
      around_starts(random, c, size, std::min(most, std::max<int64_t>(70, kMostProducts / products(one))), threads,
                    check);
      if (HasFatalFailure()) return;
    }
  }
  void TearDown() override { std::printf("%d cases\n", cases_); }

 private:
  mutable int cases_ = 0;
};

TEST_P(AllBlocks, PriorAttentionMatchesScalarFloat64AtEveryPairOfNeighbours) {
  Random random(60 + static_cast<uint64_t>(isa()));
  for_rounds(3, [&] {
    for (const int64_t count : {1, 2}) {
      auto c = draw<PriorCase>(random);
      c.batch = c.groups = random.integer(1, 2);
      c.prior = static_cast<PriorCase::Prior>(random.integer(0, 4));
      c.is_causal = random.chance(0.3);
      around_all_starts(random, c, count, [&](const PriorCase& x) {
        const Problem problem = prior_problem(random, x);
        matches(reference_of(problem), problem, count, problem.describe());
      });
    }
  });
}

TEST_P(AllBlocks, CsrAttentionMatchesScalarFloat64AtEveryPairOfNeighbours) {
  Random random(70 + static_cast<uint64_t>(isa()));
  const auto check = [&](const Problem& problem, int64_t count) {
    const Reference reference = reference_of(problem);
    for (const char* kernel : {"entries", "entries_sliced", "dense"}) {
      setenv("FIAK_CSR_KERNEL", kernel, 1);
      matches(reference, problem, count, problem.describe() + " " + kernel);
      unsetenv("FIAK_CSR_KERNEL");
    }
  };
  for_rounds(1, [&] {
    for (const int64_t count : {1, 2}) {
      auto c = draw<CsrCase>(random);
      c.groups = 1;
      c.batch = one_of(random, {1, 2, 4, 5});
      c.has_query_offsets = random.chance(0.2);
      c.has_prior = random.chance(0.3);
      c.kept = random.chance(0.6) ? CsrCase::Kept::kAll : CsrCase::Kept::kHalf;
      around_all_starts(random, c, count, [&](const CsrCase& x) { check(csr_problem(random, x), count); });
    }
  });
}

/// Where the plan starts another block of keys or queries.
TEST_P(AllBlocks, CsrAttentionMatchesScalarFloat64AroundBlocksOfThePlan) {
  Random random(80);
  CsrCase c{};
  c.dtype = dtype();
  c.batch = c.groups = c.key_heads = c.heads_per_key_head = 1;
  c.head_dim = 3;
  c.value_dim = 2;
  c.scale_factor = 2;
  c.has_prior = true;
  for (const int64_t size : {kPlanShort - 1, kPlanShort, kPlanShort + 1, 2 * kPlanShort, 2 * kPlanShort + 1}) {
    for (const auto& [queries, keys] :
         {std::pair(size, int64_t{2}), std::pair(int64_t{2}, size), std::pair(int64_t{40}, size)}) {
      if (!is_drawn(random)) continue;
      c.queries = queries;
      c.keys = keys;
      c.kept = keys == 2 ? CsrCase::Kept::kAll : CsrCase::Kept::kThin;
      const Problem problem = csr_problem(random, c);
      matches(reference_of(problem), problem, 2, problem.describe());
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(AllBlocks, CompactLinearMatchesScalarFloat64AtEveryPairOfNeighbours) {
  Random random(90 + static_cast<uint64_t>(isa()));
  const auto check = [&](LinearSizes sizes) {
    sizes.rows = sizes.kept + random.integer(0, 3);
    LinearCall call = linear_call(random, sizes, dtype());
    // All places are kept.
    for (int64_t i = 0; i < sizes.heads * sizes.kept; ++i) call.keep[i] = i % sizes.kept;
    for (Tensor* x : {&call.input, &call.grad_output}) {
      x->fill(random);
      *x = x->to(dtype()).to(DType::kFloat64);
    }
    linear_matches_scalar_float64(call);
  };
  for_rounds(4, [&] {
    LinearSizes sizes{};
    sizes.batch = random.integer(1, 3);
    sizes.heads = random.integer(1, 3);
    sizes.has_bias = random.chance(0.5);
    sizes.gap = random.integer(0, 2);
    sizes.kept = one_of(random, {1, 20, 48, 50, 100});
    sizes.in_features = one_of(random, {3, 16, 33, 64});
    sizes.head_dim = one_of(random, {3, 16, 33, 64});
    for (const auto& [size, most] :
         {std::pair(&LinearSizes::kept, int64_t{200}), std::pair(&LinearSizes::in_features, int64_t{150}),
          std::pair(&LinearSizes::head_dim, int64_t{150})}) {
      around_starts(random, sizes, size, most, 1, check);
    }
    // Heads whose packed weights no longer fit.
    sizes.in_features = one_of(random, {64, 100, 200});
    sizes.head_dim = one_of(random, {40, 64, 128});
    sizes.kept = 10;
    around_starts(random, sizes, &LinearSizes::heads, 40, 1, check);
  });
}

FIAK_FOR_ALL_KERNELS(AllBlocks);

}  // namespace
}  // namespace fiak::tests
