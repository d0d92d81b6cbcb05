// Cases made of independent properties: every pair of values of two properties at least once, or, where there is time
// (make soak), every combination.
#pragma once

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <set>
#include <vector>

#include "tests/support.h"

namespace fiak::tests {

/// The value of each property, by its number.
template <size_t kProperties>
using Choice = std::array<int, kProperties>;

/// Choices that contain every pair of values of two properties, which have values[i] values each.
template <size_t kProperties>
std::vector<Choice<kProperties>> pairwise_choices(const Choice<kProperties>& values, Random& random) {
  const auto for_pairs = [](auto&& use) {
    for (size_t p = 0; p < kProperties; ++p) {
      for (size_t q = p + 1; q < kProperties; ++q) use(p, q);
    }
  };
  std::set<std::array<size_t, 4>> uncovered;  // two properties and their values
  for_pairs([&](size_t p, size_t q) {
    for (int v = 0; v < values[p]; ++v) {
      for (int w = 0; w < values[q]; ++w) uncovered.insert({p, q, static_cast<size_t>(v), static_cast<size_t>(w)});
    }
  });
  std::vector<Choice<kProperties>> choices;
  while (!uncovered.empty()) {
    const auto [p, q, v, w] = *uncovered.begin();
    Choice<kProperties> best{};
    size_t least = uncovered.size();
    for (int attempt = 0; attempt < 40; ++attempt) {
      Choice<kProperties> choice;
      for (size_t i = 0; i < kProperties; ++i) choice[i] = static_cast<int>(random.integer(0, values[i] - 1));
      choice[p] = static_cast<int>(v);
      choice[q] = static_cast<int>(w);
      size_t left = uncovered.size();
      for_pairs([&](size_t a, size_t b) {
        left -= uncovered.count({a, b, static_cast<size_t>(choice[a]), static_cast<size_t>(choice[b])});
      });
      if (left < least) {
        least = left;
        best = choice;
      }
    }
    for_pairs([&](size_t a, size_t b) {
      uncovered.erase({a, b, static_cast<size_t>(best[a]), static_cast<size_t>(best[b])});
    });
    choices.push_back(best);
  }
  return choices;
}

/// All choices, each once, in an order in which neighbours differ in most properties.
template <size_t kProperties>
class AllChoices {
 public:
  explicit AllChoices(const Choice<kProperties>& values) : values_(values) {
    for (const int count : values) size_ *= count;
    step_ = size_ * 618 / 1000 + 1;
    while (std::gcd(step_, size_) != 1) ++step_;
  }
  int64_t size() const { return size_; }
  Choice<kProperties> at(int64_t index) const {
    auto rest = static_cast<int64_t>(static_cast<unsigned __int128>(index) * step_ % size_);
    Choice<kProperties> choice;
    for (size_t i = 0; i < kProperties; ++i) {
      choice[i] = static_cast<int>(rest % values_[i]);
      rest /= values_[i];
    }
    return choice;
  }

 private:
  const Choice<kProperties> values_;
  int64_t size_ = 1, step_ = 1;
};

/// use(choice) for pairwise choices, as long as it returns true. With the environment's FIAK_SOAK=minutes for all
/// choices, as far as the time goes, from number FIAK_SOAK_FROM on; how far is printed.
template <size_t kProperties, class Use>
void for_choices(const Choice<kProperties>& values, Random& random, Use&& use) {
  const char* minutes = std::getenv("FIAK_SOAK");
  if (minutes == nullptr) {
    for (const auto& choice : pairwise_choices(values, random)) {
      if (!use(choice)) return;
    }
    return;
  }
  const AllChoices<kProperties> all(values);
  const char* from = std::getenv("FIAK_SOAK_FROM");
  const int64_t first = from == nullptr ? 0 : std::atoll(from);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(60 * std::atof(minutes));
  int64_t i = first;
  for (; i < all.size() && std::chrono::steady_clock::now() < end; ++i) {
    if (!use(all.at(i))) {
      std::printf("failed at FIAK_SOAK_FROM=%lld\n", static_cast<long long>(i));
      return;
    }
  }
  std::printf("cases %lld to %lld of %lld\n", static_cast<long long>(first), static_cast<long long>(i),
              static_cast<long long>(all.size()));
}

}  // namespace fiak::tests
