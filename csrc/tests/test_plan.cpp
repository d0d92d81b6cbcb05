// check_csr on malformed indices of every kind, and plans against a brute-force transpose.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "tests/support.h"

namespace fiak::tests {
namespace {

using Indices = std::vector<int64_t>;

/// check_csr of indices in both widths; the arrays have exactly their size, so that AddressSanitizer sees every excess.
std::string check(const Indices& crow, const Indices& col, int64_t queries, int64_t keys) {
  const auto rows = static_cast<int64_t>(crow.size()) - 1, nnz = static_cast<int64_t>(col.size());
  const std::string wide = check_csr({crow.data(), col.data(), true, rows, nnz}, queries, keys);
  const auto fits = [](int64_t x) { return x == static_cast<int32_t>(x); };
  if (std::all_of(crow.begin(), crow.end(), fits) && std::all_of(col.begin(), col.end(), fits)) {
    const std::vector<int32_t> crow32(crow.begin(), crow.end()), col32(col.begin(), col.end());
    EXPECT_EQ(check_csr({crow32.data(), col32.data(), false, rows, nnz}, queries, keys), wide);
  }
  return wide;
}

#define EXPECT_REFUSED(error, ...)                                                          \
  do {                                                                                      \
    const std::string found = error;                                                        \
    for (const char* part : {__VA_ARGS__}) {                                                \
      EXPECT_NE(found.find(part), std::string::npos) << "'" << found << "' lacks " << part; \
    }                                                                                       \
  } while (false)

TEST(CheckCsr, AcceptsWellFormedPatterns) {
  EXPECT_EQ(check({0, 2, 2, 5}, {0, 3, 1, 2, 3}, 3, 4), "");
  EXPECT_EQ(check({0, 2, 2, 5}, {0, 3, 1, 2, 3}, 1, 4), "");  // three heads
  EXPECT_EQ(check({0, 0, 0}, {}, 2, 4), "");
  EXPECT_EQ(check({0, 0, 0}, {}, 2, 0), "");
  EXPECT_EQ(check({0}, {}, 0, 4), "");
  EXPECT_EQ(check({0}, {}, 3, 4), "");  // no head
}

TEST(CheckCsr, RefusesMalformedOffsets) {
  EXPECT_REFUSED(check({1, 2, 2}, {0, 1}, 2, 4), "crow_indices must start with 0", "got 1");
  EXPECT_REFUSED(check({-1, 0, 2}, {0, 1}, 2, 4), "crow_indices must start with 0", "got -1");
  EXPECT_REFUSED(check({0, 2, 1, 3}, {0, 1, 2}, 3, 4), "crow_indices must not decrease", "got 1 after 2", "row 1");
  EXPECT_REFUSED(check({0, -5, 2}, {0, 1}, 2, 4), "crow_indices must not decrease", "got -5");
  EXPECT_REFUSED(check({0, 1, 1}, {0, 1}, 2, 4), "crow_indices must end with", "2 (got 1)");
  EXPECT_REFUSED(check({0, 1, 3}, {0, 1}, 2, 4), "crow_indices must end with", "2 (got 3)");
  EXPECT_REFUSED(check({0, 7, 2}, {0, 1}, 2, 4), "crow_indices must not decrease", "got 2 after 7");
  EXPECT_REFUSED(check({0, 1, std::numeric_limits<int64_t>::max()}, {0, 1}, 2, 4), "crow_indices must end with");
  EXPECT_REFUSED(check({0, std::numeric_limits<int64_t>::min(), 2}, {0, 1}, 2, 4), "crow_indices must not decrease");
  EXPECT_REFUSED(check({0, 0, 0, 0}, {}, 2, 4), "crow_indices must hold a multiple of num_queries", "got 3 rows");
  EXPECT_REFUSED(check({0, 0}, {}, 0, 4), "crow_indices must hold a multiple of num_queries", "got 1 rows");
}

TEST(CheckCsr, RefusesMalformedColumns) {
  EXPECT_REFUSED(check({0, 1, 2}, {0, 4}, 2, 4), "col_indices must lie in 0..3", "got 4 in row 1");
  EXPECT_REFUSED(check({0, 1, 2}, {-1, 0}, 2, 4), "col_indices must lie in 0..3", "got -1 in row 0");
  EXPECT_REFUSED(check({0, 1}, {0}, 1, 0), "col_indices", "got 0");
  EXPECT_REFUSED(check({0, 1}, {std::numeric_limits<int64_t>::max()}, 1, 4), "col_indices must lie in 0..3");
  EXPECT_REFUSED(check({0, 1}, {(int64_t{1} << 32) + 1}, 1, 4), "col_indices must lie in 0..3", "got 4294967297");
  EXPECT_REFUSED(check({0, 3}, {0, 2, 1}, 1, 4), "col_indices must ascend", "got 1 after 2");
  EXPECT_REFUSED(check({0, 3}, {0, 2, 2}, 1, 4), "col_indices must ascend", "duplicates", "got 2 after 2");
  EXPECT_EQ(check({0, 2, 4}, {2, 3, 0, 1}, 2, 4), "");  // a new row starts anew
}

TEST(CheckCsr, NeverAcceptsWhatItCannotRead) {
  // Whatever single number of a good pattern is changed, the result is refused or is itself well-formed and plannable.
  Random random(1);
  const int64_t strange[] = {std::numeric_limits<int64_t>::min(),
                             -2147483649,
                             -2147483648,
                             -1,
                             0,
                             1,
                             2,
                             3,
                             5,
                             6,
                             7,
                             64,
                             65536,
                             2147483647,
                             2147483648,
                             std::numeric_limits<int64_t>::max()};
  for (int round = 0; round < 20; ++round) {
    const Pattern pattern(random, 2, 3, 6, 0.5);
    for (const bool offsets : {true, false}) {
      for (size_t i = 0; i < (offsets ? pattern.crow : pattern.col).size(); ++i) {
        for (const int64_t value : strange) {
          Indices crow = pattern.crow, col = pattern.col;
          (offsets ? crow : col)[i] = value;
          if (check(crow, col, 3, 6).empty()) Pattern(2, 3, 6, crow, col);
        }
      }
    }
  }
}

/// Expects the view to hold the pattern and its transpose.
void expect_plan_of(const Pattern& pattern, const PlanView& plan) {
  ASSERT_EQ(plan.heads, pattern.queries > 0 ? pattern.heads : 0);
  ASSERT_EQ(plan.num_queries, pattern.queries);
  ASSERT_EQ(plan.num_keys, pattern.keys);
  ASSERT_EQ(plan.nnz, pattern.nnz());
  ASSERT_EQ(plan.columns != nullptr, pattern.keys <= 65536);
  std::map<std::pair<int64_t, int64_t>, Indices> columns;  // entries of every column, as row-major places
  for (int64_t row = 0; row < plan.heads * plan.num_queries; ++row) {
    const PlanRange entries = plan.row(row);
    ASSERT_EQ(entries.begin, pattern.crow[row]);
    ASSERT_EQ(entries.end, pattern.crow[row + 1]);
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      ASSERT_EQ(plan.column(entry), pattern.col[entry]);
      columns[{row / plan.num_queries, pattern.col[entry]}].push_back(entry);
    }
  }
  int64_t place = 0;
  for (const auto& [column, entries] : columns) {
    const auto& [head, key] = column;
    const int64_t first_row = head * plan.num_queries, first = pattern.crow[first_row];
    const PlanRange places = plan.places(head, key);
    ASSERT_EQ(places.begin, place);
    ASSERT_EQ(places.end, place + static_cast<int64_t>(entries.size()));
    for (const int64_t entry : entries) {
      const int64_t row = first_row + plan.query_of(head, place);
      ASSERT_EQ(first + plan.positions[place], entry);
      ASSERT_LE(pattern.crow[row], entry);
      ASSERT_GT(pattern.crow[row + 1], entry);
      ++place;
    }
  }
  ASSERT_EQ(place, pattern.nnz());
  for (int64_t head = 0; head < plan.heads; ++head) {  // columns without entries
    for (int64_t key = 0; key < plan.num_keys; key += plan.num_keys / 100 + 1) {
      if (columns.count({head, key}) != 0) continue;
      const PlanRange places = plan.places(head, key);
      ASSERT_EQ(places.begin, places.end);
    }
  }
}

/// What a plan may take: 2.5 times the pattern as int32, and what does not grow with it.
int64_t most_bytes(int64_t rows, int64_t nnz) { return 10 * (rows + 1 + nnz) + 1024; }

/// Expects the bits, where there are enough entries for them, to be the pattern's, and nothing behind a row's last key.
void expect_bits_of(const Pattern& pattern, const PlanView& plan) {
  const int64_t rows = plan.heads * plan.num_queries, words = (plan.num_keys + 63) / 64;
  const bool wanted = plan.num_keys > 0 && plan.num_keys <= 65536 && rows * words * 8 <= 2 * (rows + pattern.nnz());
  ASSERT_EQ(plan.bits != nullptr, wanted);
  ASSERT_EQ(plan.tiles != nullptr, wanted);
  if (!wanted) return;
  ASSERT_EQ(plan.row_words, (plan.num_keys + 63) / 64);
  for (int64_t head = 0; head < plan.heads; ++head) {
    std::set<std::pair<int64_t, int64_t>> tiles;
    for (int64_t query = 0; query < plan.num_queries; ++query) {
      const int64_t row = head * plan.num_queries + query;
      const std::set<int64_t> kept(&pattern.col[pattern.crow[row]], &pattern.col[pattern.crow[row + 1]]);
      for (int64_t j = 0; j < plan.row_words * 64; ++j) {
        ASSERT_EQ(plan.bits[row * plan.row_words + j / 64] >> j % 64 & 1, kept.count(j));
        if (kept.count(j) != 0) tiles.emplace(query / 24, j / 16);
      }
    }
    ASSERT_EQ(plan.tiles[head], static_cast<int64_t>(tiles.size()));
  }
}

TEST(Plan, HoldsThePatternAndItsTranspose) {
  Random random(2);
  for (int round = 0; round < 200; ++round) {
    const Pattern pattern(random, random.integer(0, 4), random.integer(0, 40), random.integer(0, 40), random.real(0, 1),
                          random.chance(0.3));
    expect_plan_of(pattern, pattern.plan());
    expect_bits_of(pattern, pattern.plan());
  }
}

TEST(Plan, HasBitsFromAboutOneInSixteenOn) {
  Random random(7);
  for (int round = 0; round < 50; ++round) {
    const Pattern pattern(random, random.integer(1, 3), random.integer(20, 60), random.integer(60, 200),
                          random.real(0.04, 0.09));
    expect_bits_of(pattern, pattern.plan());
  }
  for (const int64_t keys : {128, 192, 1024}) {
    EXPECT_NE(Pattern(random, 1, 64, keys, 0.08).plan().bits, nullptr) << keys;
    EXPECT_EQ(Pattern(random, 1, 64, keys, 0.04).plan().bits, nullptr) << keys;
  }
}

/// Sizes below, at and above what 16 bits tell apart, with rows, columns and heads without entries.
TEST(Plan, OfLongRowsAndColumns) {
  Random random(3);
  for (const int64_t side : {65535, 65536, 65537, 131072, 131077}) {
    for (const auto& [queries, keys] : {std::pair<int64_t, int64_t>(2, side), {side, 3}, {side, side}}) {
      const double density = queries == keys ? 2e-5 : 0.01;
      std::vector<int64_t> crow{0}, col;
      for (int64_t row = 0; row < 3 * queries; ++row) {
        std::set<int64_t> kept;
        for (int64_t i = 0; row / queries != 1 && i < density * static_cast<double>(keys) + 1; ++i) {
          if (random.chance(0.7)) kept.insert(random.chance(0.1) ? keys - 1 : random.integer(0, keys - 1));
        }
        col.insert(col.end(), kept.begin(), kept.end());
        crow.push_back(static_cast<int64_t>(col.size()));
      }
      const Pattern pattern(3, queries, keys, crow, col);
      expect_plan_of(pattern, pattern.plan());
      expect_bits_of(pattern, pattern.plan());
      EXPECT_LE(pattern.plan().header->bytes, most_bytes(3 * queries, pattern.nnz())) << queries << " " << keys;
      if (HasFatalFailure()) return;
    }
  }
  const Pattern edge(1, 1, 65537, {0, 3}, {0, 65535, 65536});
  expect_plan_of(edge, edge.plan());
}

/// Far more columns than entries: nothing is held of each.
TEST(Plan, OfColumnsThatAreMostlyEmpty) {
  Random random(9);
  for (const int64_t keys : {200, 40000, 100000000, 0x7fffffff}) {
    std::vector<int64_t> crow{0}, col;
    for (int64_t row = 0; row < 2 * 5; ++row) {
      std::set<int64_t> kept{keys - 1};
      for (int64_t i = 0; i < row; ++i) kept.insert(random.integer(0, keys - 1));
      col.insert(col.end(), kept.begin(), kept.end());
      crow.push_back(static_cast<int64_t>(col.size()));
    }
    const Pattern pattern(2, 5, keys, crow, col);
    EXPECT_EQ(pattern.plan().column_offsets.data, nullptr);
    EXPECT_LE(pattern.plan().header->bytes, most_bytes(10, pattern.nnz()));
    expect_plan_of(pattern, pattern.plan());
    if (HasFatalFailure()) return;
  }
}

TEST(CheckCsr, RefusesSizesThatOverflow) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  for (const int64_t size : {most, int64_t{1} << 62, int64_t{1} << 31}) {
    EXPECT_REFUSED(check({0, 1, 2}, {0, 1}, 2, size), "num_keys must lie in 0..2147483647 (got ");
    EXPECT_REFUSED(check({0}, {}, size, 2), "num_queries must lie in 0..2147483647");
  }
  EXPECT_REFUSED(check({0, 1}, {0}, 1, -1), "num_keys must lie in");
  const int64_t zero = 0;
  EXPECT_REFUSED(check_csr({&zero, &zero, true, most, 0}, 1, 2), "crow_indices must have at most 2^48");
  EXPECT_REFUSED(check_csr({&zero, &zero, true, 0, most}, 1, 2), "col_indices must have at most 2^48");
}

TEST(Plan, IsTheSameForBothIndexWidthsAnyMemoryAndAnyThreads) {
  Random random(4);
  for (const Pattern& pattern :
       {Pattern(random, 3, 17, 23, 0.4), Pattern(random, 3, 17, 23, 0.02), Pattern(random, 1, 3, 65539, 0.01),
        Pattern(random, 1, 3, 3000, 0.001), Pattern(random, 2, 5, 7, 0.0), Pattern(random, 0, 5, 7, 0.5),
        Pattern(random, 5, 0, 7, 0.5)}) {
    const int64_t queries = pattern.queries, keys = pattern.keys;
    const int64_t bytes = plan_layout(pattern.heads * queries, queries, keys, pattern.nnz()).bytes;
    std::vector<int64_t> expected(bytes / 8, -1);
    build_plan(pattern.indices(true), queries, keys, expected.data());
    EXPECT_EQ(check_plan(expected.data(), bytes, pattern.indices(false), true), "");
    for (const int64_t count : {1, 2, 5}) {
      std::vector<int64_t> plan(bytes / 8, 0);
      build_plan(pattern.indices(count == 2), queries, keys, plan.data(), threads(count));
      EXPECT_EQ(plan, expected);
    }
  }
}

TEST(CheckCsr, NamesTheFirstBrokenRowWhateverTheThreads) {
  Random random(7);
  Pattern pattern(random, 2, 20, 30, 0.5);
  for (const int64_t row : {7, 8, 33}) pattern.col[pattern.crow[row]] = -row;
  for (const int64_t count : {1, 2, 3, 40}) {
    EXPECT_REFUSED(check_csr(pattern.indices(true), 20, 30, threads(count)), "got -7 in row 7");
  }
}

TEST(CheckPlan, RefusesOtherPlans) {
  Random random(5);
  const Pattern pattern(random, 2, 9, 11, 0.5);
  const int64_t bytes = plan_layout<int64_t>(18, 9, 11, pattern.nnz()).bytes;
  std::vector<int64_t> plan(bytes / 8);
  build_plan(pattern.indices(true), 9, 11, plan.data());
  for (const bool deep : {false, true}) {
    const auto check = [&](const CsrIndices& csr, const std::vector<int64_t>& words) {
      return check_plan(words.data(), static_cast<int64_t>(words.size()) * 8, csr, deep);
    };
    EXPECT_EQ(check(pattern.indices(true), plan), "");
    EXPECT_REFUSED(check(Pattern(random, 2, 8, 11, 0.5).indices(true), plan), "plan must be made for this pattern");
    EXPECT_REFUSED(check(pattern.indices(true), {}), "plan must come from csr_plan");
    EXPECT_REFUSED(check(pattern.indices(true), std::vector<int64_t>(plan.begin(), plan.begin() + 8)), "plan must");
    EXPECT_REFUSED(check(pattern.indices(true), std::vector<int64_t>(plan.size(), 0)), "plan must come from csr_plan");
    std::vector<int64_t> longer = plan;
    longer.push_back(0);
    EXPECT_REFUSED(check(pattern.indices(true), longer), "plan must have the size");

    // The same number of entries, but other ones.
    Indices col = pattern.col;
    for (int64_t& j : col) j = 10 - j;
    for (int64_t row = 0; row < 18; ++row) std::reverse(&col[pattern.crow[row]], &col[pattern.crow[row + 1]]);
    const Pattern mirrored(2, 9, 11, pattern.crow, col);
    EXPECT_REFUSED(check(mirrored.indices(false), plan), "plan must be made for these col_indices");
  }
}

TEST(CheckPlan, ComparesTheBodyOnlyWhenAsked) {
  Random random(6);
  const Pattern pattern(random, 1, 8, 8, 0.6);
  const PlanLayout layout = plan_layout<int64_t>(8, 8, 8, pattern.nnz());
  std::vector<int64_t> plan(layout.bytes / 8);
  build_plan(pattern.indices(true), 8, 8, plan.data());
  for (const int64_t word : {layout.start(PlanSection::kColumnOffsets) / 8 + 3,
                             layout.start(PlanSection::kBits) / 8 + 2, layout.start(PlanSection::kTiles) / 8}) {
    ++plan[word];
    EXPECT_EQ(check_plan(plan.data(), layout.bytes, pattern.indices(true), false), "");
    EXPECT_REFUSED(check_plan(plan.data(), layout.bytes, pattern.indices(true), true),
                   "plan must be what csr_plan makes");
    --plan[word];
  }
}

TEST(PlanLayout, TakesAtMostTwoAndAHalfTimesThePattern) {
  Random random(10);
  for (int round = 0; round < 20000; ++round) {
    const auto size = [&] { return static_cast<int64_t>(std::exp2(random.real(0, 24))) - 1; };
    const int64_t queries = size(), keys = size(), heads = random.integer(1, 40), rows = heads * queries;
    const int64_t most = std::min(static_cast<double>(rows) * static_cast<double>(keys), 0x1p31 - 1);
    const int64_t nnz = std::min(most, static_cast<int64_t>(std::exp2(random.real(0, 31))));
    ASSERT_LE(plan_layout(rows, queries, keys, nnz).bytes, most_bytes(rows, nnz))
        << heads << " " << queries << " " << keys << " " << nnz;
  }
  // Those of 10 keys for each of a million rows, and a trained model's.
  EXPECT_LE(plan_layout<int64_t>(1000000, 1000000, 1000000, 10000000).bytes, 2.5 * 4 * (1000001 + 10000000));
  EXPECT_LE(plan_layout<int64_t>(4 * 197, 197, 197, 46000).bytes, 2.5 * 4 * (4 * 197 + 1 + 46000));
}

TEST(PlanLayout, HasWhatOverflowsNowhere) {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, kPlanMostEntries}) {
    for (const int64_t size : {int64_t{0}, int64_t{1}, kPlanMostSize}) {
      for (const int64_t nnz : {int64_t{0}, int64_t{1}, kPlanMostEntries}) {
        const PlanLayout layout = plan_layout(rows, size, kPlanMostSize, nnz);
        EXPECT_GT(layout.bytes, 0);
        EXPECT_LE(layout.bytes / 20, rows + nnz + 1024);  // offsets of 64 bits
      }
    }
  }
}

}  // namespace
}  // namespace fiak::tests
