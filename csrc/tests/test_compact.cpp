// compact_kv's row copies against a plain loop, and compact_linear's kernels against the scalar float64 one.
#include "tests/attention_problem.h"
#include "tests/compact_problem.h"

namespace fiak::tests {
namespace {

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
    for (const Tensor* result : {&compacted, &expanded}) record_bits(*result);
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

class CompactLinear : public KernelTest, protected LinearChecks {
 protected:
  DType dtype() const override { return KernelTest::dtype(); }
  const cpu::Kernels& kernels() const override { return KernelTest::kernels(); }
};

TEST_P(CompactLinear, MatchesScalarFloat64) { linear_matches_scalar_float64(100); }
TEST_P(CompactLinear, GivesTheSameBitsOnAnyNumberOfThreads) { linear_gives_the_same_bits_on_any_number_of_threads(30); }
TEST_P(CompactLinear, TakesAFewHeadsAtATime) {
  Random random(34);
  for (const int64_t batch : {1, 3}) {
    // More weights than are packed at once, in every dtype.
    const LinearCall call = linear_call(random, {batch, 9, 60, 50, 200, 60, true, 0}, dtype());
    linear_matches_scalar_float64(call);
    linear_gives_the_same_bits_on_any_number_of_threads(call);
  }
}
TEST_P(CompactLinear, SumsManyRows) { linear_sums_many_rows(50000); }
TEST_P(CompactLinear, KeepsNanInItsPlace) { linear_keeps_nan_in_its_place(30); }

FIAK_FOR_ALL_KERNELS(CompactLinear);

}  // namespace
}  // namespace fiak::tests
