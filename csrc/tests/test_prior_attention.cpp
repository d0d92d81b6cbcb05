#include "tests/attention_problem.h"

namespace fiak::tests {
namespace {

class PriorAttention : public KernelTest {};

TEST_P(PriorAttention, MatchesScalarFloat64) { matches_scalar_float64(random_prior_problem); }
TEST_P(PriorAttention, GivesTheSameBitsOnAnyNumberOfThreads) {
  gives_the_same_bits_on_any_number_of_threads(random_prior_problem);
}
TEST_P(PriorAttention, LeavesOutUnwantedGradients) { leaves_out_unwanted_gradients(random_prior_problem); }
TEST_P(PriorAttention, KeepsNanInItsPlace) { keeps_nan_in_its_place(random_prior_problem); }
TEST_P(PriorAttention, IgnoresHugeScoresOutsideTheSupport) {
  ignores_huge_scores_outside_the_support(random_prior_problem);
}

TEST_P(PriorAttention, MatchesScalarFloat64OfFewQueries) { matches_scalar_float64(random_prior_decode_problem, 25); }
TEST_P(PriorAttention, GivesTheSameBitsOnAnyNumberOfThreadsOfFewQueries) {
  gives_the_same_bits_on_any_number_of_threads(random_prior_decode_problem, 10);
}
TEST_P(PriorAttention, KeepsNanInItsPlaceOfFewQueries) { keeps_nan_in_its_place(random_prior_decode_problem, 4); }
TEST_P(PriorAttention, IgnoresHugeScoresOutsideTheSupportOfFewQueries) {
  ignores_huge_scores_outside_the_support(random_prior_decode_problem, 6);
}

TEST_P(PriorAttention, MatchesScalarFloat64OverSeveralBlocks) { matches_scalar_float64(random_long_prior_problem, 4); }
TEST_P(PriorAttention, GivesTheSameBitsOnAnyNumberOfThreadsOverSeveralBlocks) {
  gives_the_same_bits_on_any_number_of_threads(random_long_prior_problem, 6);
}
TEST_P(PriorAttention, KeepsNanInItsPlaceOverSeveralBlocks) { keeps_nan_in_its_place(random_long_prior_problem, 2); }

TEST_P(PriorAttention, MatchesScalarFloat64WithWeightsOfAnySize) {
  matches_scalar_float64(random_extreme_prior_problem, 30);
}
TEST_P(PriorAttention, GivesTheSameBitsOnAnyNumberOfThreadsWithWeightsOfAnySize) {
  gives_the_same_bits_on_any_number_of_threads(random_extreme_prior_problem, 6);
}
TEST_P(PriorAttention, KeepsNanInItsPlaceWithWeightsOfAnySize) {
  keeps_nan_in_its_place(random_extreme_prior_problem, 5);
}
TEST_P(PriorAttention, IgnoresHugeScoresOutsideTheSupportWithWeightsOfAnySize) {
  ignores_huge_scores_outside_the_support(random_extreme_prior_problem, 8);
}

FIAK_FOR_ALL_KERNELS(PriorAttention);

}  // namespace
}  // namespace fiak::tests
