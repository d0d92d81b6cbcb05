// What tests of device code share: launches on the CPU, under another schedule each, and faults on purpose. Include
// simt/simt.h before it.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <vector>

namespace fiak::tests {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

/// Of the next launch. Every launch of a test has another seed; simt::Error and print_seed print it.
inline simt::Schedule schedule;
inline simt::Sites sites;  // of all launches since it was cleared

constexpr auto kLaunch = [](const auto& kernel, int64_t blocks, const auto& params) {
  ++schedule.seed;
  sites.merge(simt::run(kernel, blocks, schedule, params));
};

inline void print_seed() { std::printf("the latest launch had seed %d\n", static_cast<int>(schedule.seed)); }

using Bytes = std::vector<std::vector<unsigned char>>;

/// Breaks each site that results() executes, and expects that some schedule of eight then gives other results or an
/// error. There must be at least `least_sites`.
template <class Results>
void expect_faults_noticed(size_t least_sites, Results&& results) {
  const auto under = [&](const simt::Schedule& with) -> Bytes {
    schedule = with;
    return results();
  };
  sites.clear();
  const Bytes clean = under({});
  EXPECT_GE(sites.size(), least_sites);
  for (const simt::Site& site : simt::Sites(sites)) {
    bool noticed = false;
    for (uint64_t seed = 1; seed <= 8 && !noticed; ++seed) {
      try {
        noticed = under({1000 * seed, site}) != clean;
      } catch (const simt::Error&) {
        noticed = true;
      }
    }
    EXPECT_TRUE(noticed) << site.text();
  }
  std::printf("%d sites\n", static_cast<int>(sites.size()));
  schedule = {};
}

}  // namespace fiak::tests
