// Random calls of prior_attention and csr_attention, and the checks that both ops' kernels must pass.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "tests/support.h"

namespace fiak::tests {

struct Results {
  Tensor output, logsumexp;                             // logsumexp as [batch, heads, queries, 1]
  Tensor grad_query, grad_key, grad_value, grad_prior;  // grad_prior as [groups, heads, rows, keys] or [1, 1, 1, nnz]
};

/// Which results of backward are wanted.
enum Wanted : unsigned { kGradQuery = 1, kGradKey = 2, kGradValue = 4, kGradPrior = 8, kAllGrads = 15 };

/// One call. Operands are float64 numbers that `dtype` holds exactly, so that every kernel gets the same ones.
struct Problem {
  AttentionArgs args;
  bool is_causal = false;
  std::vector<int64_t> kv_lens, query_offsets;  // empty: none
  Tensor query, key, value, grad_output, weight;
  bool has_weight = false;           // where args.log_prior, `weight` holds logarithms
  std::shared_ptr<Pattern> pattern;  // null: prior_attention

  Results forward(const cpu::Kernels& kernels, DType dtype, const Parallel& parallel) const;
  /// Adds the gradients to the results of a forward pass, which it is given as saved.
  void backward(const cpu::Kernels& kernels, const Parallel& parallel, Results& results,
                unsigned wanted = kAllGrads) const;
  int64_t keys_of(int64_t b) const { return kv_lens.empty() ? args.keys : kv_lens[b]; }
  /// Whether query n of head h attends to key j.
  bool in_support(int64_t b, int64_t h, int64_t n, int64_t j) const;
  std::string describe() const;
  /// Gives operands new numbers, and rows that are a multiple of 8 numbers apart, NaN between them: what is copied
  /// asynchronously but for the end of a row.
  void lay_rows_apart(Random& random);
  /// All results of forward and backward.
  std::vector<std::vector<unsigned char>> bytes(const cpu::Kernels& kernels, DType dtype) const;

 private:
  template <class Call>
  void with_args(DType dtype, Call&& call) const;
};

/// Sizes from 0 upward, every option on or off. Keys behind kv_lens, and columns that nobody keeps, are NaN.
Problem random_prior_problem(Random& random, DType dtype);
Problem random_csr_problem(Random& random, DType dtype);
/// Without prior, of more queries and keys than kernels take at once; patterns of every density up to 100%, causal, in
/// bands and in blocks.
Problem random_long_csr_problem(Random& random, DType dtype);
/// Of more queries and keys than kernels take at once.
Problem random_long_prior_problem(Random& random, DType dtype);
/// Of few queries and up to thousands of keys.
Problem random_prior_decode_problem(Random& random, DType dtype);
Problem random_csr_decode_problem(Random& random, DType dtype);
/// Calls of all these kinds, with weights of extreme sizes: all of a row's, some or what is hidden; some as logarithms.
Problem random_extreme_prior_problem(Random& random, DType dtype);
Problem random_extreme_csr_problem(Random& random, DType dtype);
using MakeProblem = Problem (*)(Random&, DType);

/// A call of prior_attention whose every property is given.
struct PriorCase {
  enum class Prior { kNone, kPairs, kKeys, kPairsOfAllHeads, kBlocks };  ///< kBlocks: 0 in whole blocks of pairs

  DType dtype;
  int64_t batch, groups, key_heads, heads_per_key_head, queries, keys, head_dim, value_dim;
  Score score;
  double scale_factor, dropout_p;  ///< times 1 / sqrt(head_dim)
  bool is_causal, has_kv_lens;
  Prior prior;
};
Problem prior_problem(Random& random, const PriorCase& properties);

/// A call of csr_attention whose every property is given.
struct CsrCase {
  /// kThin, kSparse and kHalf: 2%, 15% and 50% of the pairs; kCausal: 50% of those with j <= i; kGaps: 30%, and empty
  /// rows, columns and whole blocks of pairs.
  enum class Kept { kNone, kThin, kSparse, kHalf, kAll, kCausal, kGaps };

  DType dtype;
  int64_t batch, groups, key_heads, heads_per_key_head, queries, keys, head_dim, value_dim;
  Score score;
  double scale_factor, dropout_p;  ///< times 1 / sqrt(head_dim)
  bool has_kv_lens, has_query_offsets, has_prior;
  Kept kept;
};
Problem csr_problem(Random& random, const CsrCase& properties);
/// The same with a pattern of groups * query heads, or of groups that all heads share, of at least `queries` rows and
/// `keys` columns each.
Problem csr_problem(Random& random, const CsrCase& properties, std::shared_ptr<Pattern> pattern);

/// What some implementation's kernels must do in one dtype.
class KernelChecks {
 protected:
  virtual ~KernelChecks() = default;
  virtual DType dtype() const = 0;
  virtual const cpu::Kernels& kernels() const = 0;
  /// Whether a query that is not finite, or whose output's gradient is not, leaves alone all keys that it does not
  /// attend to: tiles of tensor cores let it pass to those of its head.
  virtual bool only_support_gets_nan() const { return false; }
  /// Whether other rows of a key head with such a number keep their bits: AMX tiles leave that head to vectors, whose
  /// sums are rounded in another order.
  virtual bool keeps_bits_beside_nan() const { return true; }
  static const cpu::Kernels& scalar() { return cpu::kernels(cpu::Isa::kScalar); }

  /// What a problem's results are compared with: those of float64, and the scalar kernel's in the same dtype, which has
  /// `saved` from its forward pass.
  struct Reference {
    Results exact, yardstick, saved;
  };
  Reference reference_of(const Problem& problem) const;
  /// Within the error bound of float64, in all results.
  void matches_scalar_float64(const Problem& problem, const std::string& what) const;
  void matches(const Reference& reference, const Problem& problem, int64_t thread_count, const std::string& what) const;
  void forward_matches_scalar_float64(const Problem& problem, const std::string& what) const;
  void matches_scalar_float64(MakeProblem make, int rounds = 150) const;
  void gives_the_same_bits_on_any_number_of_threads(MakeProblem make, int rounds = 40) const;
  void leaves_out_unwanted_gradients(MakeProblem make, int rounds = 10) const;
  void keeps_nan_in_its_place(MakeProblem make, int rounds = 60) const;
  void ignores_huge_scores_outside_the_support(MakeProblem make, int rounds = 60) const;
};

/// A test of one instruction set's kernels in one dtype.
class KernelTest : public testing::TestWithParam<std::tuple<cpu::Isa, DType>>, protected KernelChecks {
 protected:
  void SetUp() override;
  cpu::Isa isa() const { return std::get<0>(GetParam()); }
  DType dtype() const override { return std::get<1>(GetParam()); }
  const cpu::Kernels& kernels() const override { return cpu::kernels(isa()); }
  bool only_support_gets_nan() const override { return true; }
  bool keeps_bits_beside_nan() const override { return isa() != cpu::Isa::kAmxBf16; }
};

std::string kernel_test_name(const testing::TestParamInfo<std::tuple<cpu::Isa, DType>>& info);

#define FIAK_FOR_ALL_KERNELS(Suite) \
  INSTANTIATE_TEST_SUITE_P(Kernels, Suite, testing::ValuesIn(all_kernels()), kernel_test_name)

}  // namespace fiak::tests
