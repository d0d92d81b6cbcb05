// The harness that runs CUDA kernels on the CPU: what it computes, what it reports, and that it notices a barrier, a
// wait, an atomic or a tail check that a kernel lacks.
// clang-format off
#include "simt/simt.h"  // first: it stands in for what nvcc knows by itself
// clang-format on
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/ptx.cuh"

namespace fiak {
namespace {

using simt::Schedule;
using simt::Site;

constexpr int kSeeds = simt::kThreadSanitizer ? 2 : 20;

// ---------------------------------------------------------------------------------------------------------------------
// Faults

/// sums[block] and, over all blocks, total: each thread brings one number, through asynchronous copies and shared
/// memory.
struct SumParams {
  const float* numbers;  // 4 a thread
  int count;             // of threads that have some
  float* sums;
  float* total;
};
constexpr unsigned kThreads = 96;

struct SumShared {
  float numbers[kThreads][4];
  float sums[kThreads + 1];  // the last one is nobody's
};

/// kExtra of 1 puts the tail check off by one.
template <int kExtra>
__global__ void sum_kernel(SumParams params) {
  auto& shared = cuda::shared_memory<SumShared>();
  const unsigned thread = threadIdx.x;
  const int at = static_cast<int>(blockIdx.x * kThreads + thread);
  const unsigned bytes = at < params.count ? 12 : 0;
  cuda::copy_async(shared.numbers[thread], params.numbers + 4 * at, bytes);
  cuda::copy_async_commit();
  cuda::copy_async_wait<0>();
  float sum = 0;
  for (const float x : shared.numbers[thread]) sum += x;
  shared.sums[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (unsigned i = 0; i < kThreads + kExtra; ++i) sum += shared.sums[i];
    params.sums[blockIdx.x] = sum;
    atomicAdd(params.total, sum);
  }
  __syncthreads();
  shared.sums[thread] = static_cast<float>(thread);
  __syncwarp();
  if (shared.sums[thread ^ 1] != static_cast<float>(thread ^ 1)) params.sums[blockIdx.x] = NAN;
}

struct SumRun {
  std::vector<float> sums;
  float total = 0;
  simt::Sites sites;
  bool operator!=(const SumRun& other) const { return sums != other.sums || total != other.total; }
};

template <int kExtra = 0>
SumRun run_sum(const Schedule& schedule) {
  constexpr unsigned kBlocks = 5;
  std::vector<float> numbers(4 * kThreads * kBlocks);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i % 4 == 3 ? NAN : static_cast<float>(i % 7);
  SumRun result{std::vector<float>(kBlocks), 0, {}};
  const SumParams params{numbers.data(), static_cast<int>(kThreads * kBlocks) - 40, result.sums.data(), &result.total};
  result.sites = simt::run({"sum_kernel", kBlocks, kThreads, sizeof(SumShared)}, schedule, sum_kernel<kExtra>, params);
  return result;
}

TEST(Simt, GivesTheSameWhateverTheSchedule) {
  const SumRun first = run_sum({});
  EXPECT_EQ(first.sites.size(), 6u);  // a copy, a wait, two barriers, a __syncwarp, an atomic
  for (uint64_t seed = 1; seed < kSeeds; ++seed) EXPECT_FALSE(run_sum({seed, {}}) != first) << "seed " << seed;
}

TEST(Simt, NoticesATailCheckOffByOne) { EXPECT_TRUE(std::isnan(run_sum<1>({}).total)); }

TEST(Simt, NoticesEverySiteThatIsBroken) {
  const SumRun clean = run_sum({});
  for (const Site& site : clean.sites) {
    if (simt::kThreadSanitizer) {
      // The copy and the wait for it, the first two, concern no other thread: no race.
      if (std::distance(clean.sites.begin(), clean.sites.find(site)) < 2) continue;
      EXPECT_EXIT((run_sum({0, site}), std::exit(0)), testing::ExitedWithCode(66), "data race") << site.text();
    } else {
      int noticed = 0;
      for (uint64_t seed = 0; seed < kSeeds; ++seed) noticed += run_sum({seed, site}) != clean;
      EXPECT_GE(noticed, 1) << site.text();
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reports

enum class Mistake { kNone, kDivergentBarrier, kExitBeforeBarrier, kMaskWithoutSelf, kMasksDiffer, kLaneExited, kTrap };

__global__ void mistaken_kernel(Mistake mistake) {
  const unsigned thread = threadIdx.x;
  switch (mistake) {
    case Mistake::kNone:
      break;
    case Mistake::kDivergentBarrier:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Mistake::kExitBeforeBarrier:
      if (thread == 5) return;
      __syncthreads();
      break;
    case Mistake::kMaskWithoutSelf:
      __shfl_sync(0xfffffffeu, 1.0f, 3);
      break;
    case Mistake::kMasksDiffer:
      __any_sync(thread % 2 == 0 ? 0xffffffffu : 0xaaaaaaaau, true);
      break;
    case Mistake::kLaneExited:
      if (thread == 40) return;
      __ballot_sync(0xffffffffu, true);
      break;
    case Mistake::kTrap:
      if (thread == 7) __trap();
      break;
  }
}

TEST(Simt, ReportsMistakes) {
  const auto report = [](Mistake mistake, uint64_t seed) -> std::string {
    try {
      simt::run({"mistaken_kernel", 2, 64}, {seed, {}}, mistaken_kernel, mistake);
    } catch (const simt::Error& error) {
      return error.what();
    }
    return "";
  };
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const auto expect = [&](Mistake mistake, const std::vector<const char*>& parts) {
      const std::string text = report(mistake, seed);
      for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
    };
    EXPECT_EQ(report(Mistake::kNone, seed), "");
    expect(Mistake::kDivergentBarrier, {"mistaken_kernel, block ", ", thread ", "divergent barrier", "test_simt.cpp:"});
    expect(Mistake::kExitBeforeBarrier, {"waits at the barrier of", "test_simt.cpp:", "1 threads of the block exited"});
    expect(Mistake::kMaskWithoutSelf, {", thread ", "waits for lanes fffffffe", "a mask that lacks its own lane"});
    expect(Mistake::kMasksDiffer, {"waits for lanes ffffffff at", "waits for lanes aaaaaaaa at"});
    expect(Mistake::kLaneExited, {"waits for lanes ffffffff at", "thread 40 exited"});
    expect(Mistake::kTrap, {", thread 7 (seed ", "trapped"});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Warp collectives

struct WarpParams {
  const float *a, *b;      // [16, 16] by rows, and [8, 16]: the columns of a [16, 8] matrix
  float* product;          // [16, 8]: a b
  float* product_by_rows;  // the same, of b as a [16, 8] matrix by rows
  float* shuffled;         // [32]
};

template <class Element>
struct WarpShared {
  alignas(16) Element a[16][16], b[8][16], b_by_rows[16][8];
};

template <class Element>
__global__ void warp_kernel(WarpParams params) {
  auto& shared = cuda::shared_memory<WarpShared<Element>>();
  const unsigned lane = threadIdx.x;
  const auto narrow = [](float x) { return Element{static_cast<uint16_t>(cuda::pack(x, 0, Element{}))}; };
  for (unsigned i = lane; i < 256; i += 32) shared.a[i / 16][i % 16] = narrow(params.a[i]);
  for (unsigned i = lane; i < 128; i += 32) {
    shared.b[i / 16][i % 16] = narrow(params.b[i]);
    shared.b_by_rows[i % 16][i / 16] = narrow(params.b[i]);
  }
  __syncwarp();
  uint32_t a[4], b[4], b_by_rows[4];
  cuda::ldmatrix(a, &shared.a[lane % 16][lane / 16 * 8]);
  cuda::ldmatrix(b, &shared.b[lane % 8][lane / 8 % 2 * 8]);
  cuda::ldmatrix_transposed(b_by_rows, &shared.b_by_rows[lane % 16][0]);
  float d[4] = {}, d_by_rows[4] = {};
  cuda::mma(d, a, b, Element{});
  cuda::mma(d_by_rows, a, b_by_rows, Element{});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    params.product[at] = d[i];
    params.product_by_rows[at] = d_by_rows[i];
  }
  float sum = static_cast<float>(lane);
  for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  const bool votes = __ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u && __any_sync(0xffffffffu, lane == 9) &&
                     !__all_sync(0xffffffffu, lane != 9);
  params.shuffled[lane] = votes ? __shfl_sync(0xffffffffu, sum, static_cast<int>(lane) / 2) : NAN;
}

template <class Element>
void expect_warp_products() {
  std::vector<float> a(256), b(128), product(128), product_by_rows(128), shuffled(32);
  std::mt19937 random(1);
  for (auto* matrix : {&a, &b}) {
    for (float& x : *matrix) x = static_cast<float>(random() % 17) - 8;  // exact in every type
  }
  const WarpParams params{a.data(), b.data(), product.data(), product_by_rows.data(), shuffled.data()};
  simt::run({"warp_kernel", 1, 32, sizeof(WarpShared<Element>)}, {}, warp_kernel<Element>, params);
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned column = 0; column < 8; ++column) {
      float sum = 0;
      for (unsigned k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[column * 16 + k];
      EXPECT_EQ(product[row * 8 + column], sum);
      EXPECT_EQ(product_by_rows[row * 8 + column], sum);
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) EXPECT_EQ(shuffled[lane], static_cast<float>(lane / 8 * 16 + 6));
}

TEST(Simt, MultipliesFragments) {
  expect_warp_products<Half>();
  expect_warp_products<BFloat16>();
}

}  // namespace
}  // namespace fiak
