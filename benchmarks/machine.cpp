#include "machine.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace fiak {
namespace {

/// The least of a few runs, in seconds.
template <class Run>
double shortest(Run&& run) {
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

#if defined(__x86_64__)

constexpr int64_t kLoops = 200000;

// Written in assembly, because compilers spill accumulators and merge loops. Each loop runs 12 independent instructions
// on registers 0 to 11 of the given width (x, y, z), whatever the flags that this file is compiled with.
#define FIAK_TWELVE(one) \
  one("0") one("1") one("2") one("3") one("4") one("5") one("6") one("7") one("8") one("9") one("10") one("11")
#define FIAK_CLOBBERS                                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "cc", \
      "memory"
#define FIAK_LOOP(zero, body)                                                                        \
  {                                                                                                  \
    int64_t loops = kLoops;                                                                          \
    asm volatile(FIAK_TWELVE(zero) "vxorps %%xmm12, %%xmm12, %%xmm12\n.p2align 6\n1:\n" FIAK_TWELVE( \
                     body) "dec %0\njnz 1b\nvzeroupper\n"                                            \
                 : "+r"(loops)                                                                       \
                 : "r"(line)                                                                         \
                 : FIAK_CLOBBERS);                                                                   \
  }
#define FIAK_ZERO(n) "vxorps %%xmm" n ", %%xmm" n ", %%xmm" n "\n"
#define FIAK_FMA_YMM(n) "vfmadd231ps %%ymm12, %%ymm12, %%ymm" n "\n"
#define FIAK_FMA_ZMM(n) "vfmadd231ps %%zmm12, %%zmm12, %%zmm" n "\n"
#define FIAK_DOT_ZMM(n) "vdpbf16ps %%zmm12, %%zmm12, %%zmm" n "\n"
#define FIAK_LOAD_YMM(n) "vmovups 64*" n "(%1), %%ymm" n "\n"
#define FIAK_LOAD_ZMM(n) "vmovups 64*" n "(%1), %%zmm" n "\n"

/// As many products of AMX tiles as FIAK_LOOP has instructions, on four tiles of sums.
void multiply_tiles() {
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static const Configuration all{1, 0, {}, {64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16}};
#define FIAK_FOUR_TILES                                                  \
  "tdpbf16ps %%tmm5, %%tmm4, %%tmm0\ntdpbf16ps %%tmm5, %%tmm4, %%tmm1\n" \
  "tdpbf16ps %%tmm5, %%tmm4, %%tmm2\ntdpbf16ps %%tmm5, %%tmm4, %%tmm3\n"
  int64_t loops = kLoops;
  asm volatile("ldtilecfg %1\n1:\n" FIAK_FOUR_TILES FIAK_FOUR_TILES FIAK_FOUR_TILES "dec %0\njnz 1b\ntilerelease\n"
               : "+r"(loops)
               : "m"(all)
               : "cc");
}

Rates measure_rates(cpu::Isa isa) {
  Rates rates;
  if (isa == cpu::Isa::kScalar) return rates;
  alignas(64) static const char line[12 * 64] = {};
  const double cycles = clock_hz() / (12.0 * kLoops);
  const auto rate = [&](auto&& run) { return 1 / (shortest(run) * cycles); };
  if (isa == cpu::Isa::kAvx2) {
    rates.vector_bytes = 32;
    rates.multiply_adds = rate([&] { FIAK_LOOP(FIAK_ZERO, FIAK_FMA_YMM) });
    rates.loads = rate([&] { FIAK_LOOP(FIAK_ZERO, FIAK_LOAD_YMM) });
    return rates;
  }
  rates.vector_bytes = 64;
  rates.multiply_adds = rate([&] { FIAK_LOOP(FIAK_ZERO, FIAK_FMA_ZMM) });
  rates.loads = rate([&] { FIAK_LOOP(FIAK_ZERO, FIAK_LOAD_ZMM) });
  if (isa == cpu::Isa::kAvx512) return rates;
  rates.bfloat16_multiplies = rate([&] { FIAK_LOOP(FIAK_ZERO, FIAK_DOT_ZMM) });
  if (isa == cpu::Isa::kAmxBf16) rates.tile_multiply_adds = 16 * 16 * 32 * rate(multiply_tiles);
  return rates;
}

#else

Rates measure_rates(cpu::Isa) { return {}; }

#endif

}  // namespace

double clock_hz() {
#if defined(__x86_64__)
  constexpr int64_t kChain = 100000;
  const double seconds = shortest([] {
    int64_t loops = kChain, x = 1;
    asm volatile("1:\nimul %1, %1\nimul %1, %1\nimul %1, %1\nimul %1, %1\ndec %0\njnz 1b\n"
                 : "+r"(loops), "+r"(x)::"cc");
  });
  return 4.0 * 3.0 * kChain / seconds;
#else
  return 0;
#endif
}

const Rates& rates(cpu::Isa isa) {
  static const Rates all[] = {
      measure_rates(cpu::Isa::kScalar), measure_rates(std::min(cpu::machine_isa(), cpu::Isa::kAvx2)),
      measure_rates(std::min(cpu::machine_isa(), cpu::Isa::kAvx512)),
      measure_rates(std::min(cpu::machine_isa(), cpu::Isa::kAvx512Bf16)), measure_rates(cpu::machine_isa())};
  return all[static_cast<int>(isa)];
}

double read_bandwidth() {
  static const double bandwidth = [] {
    const std::vector<uint64_t> numbers(size_t{1} << 26, 1);  // 512 MB
    uint64_t sums[8] = {};
    const double seconds = shortest([&] {
      for (size_t i = 0; i < numbers.size(); i += 8) {
        for (int j = 0; j < 8; ++j) sums[j] += numbers[i + j];
      }
      benchmark::DoNotOptimize(sums);
    });
    return numbers.size() * sizeof(uint64_t) / seconds;
  }();
  return bandwidth;
}

void evict_caches() {
  static std::vector<uint64_t> numbers(size_t{1} << 20);
  for (uint64_t& x : numbers) ++x;
  benchmark::DoNotOptimize(numbers.data());
}

}  // namespace fiak
