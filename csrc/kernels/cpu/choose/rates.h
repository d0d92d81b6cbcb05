// The nanoseconds of what the cost model counts: entry_1, entry_2, entry_4, entry_vector, far_vector, segment and
// packed_vector over entries, pair, pair_multiply, dense_row and number dense.
//
// `python -m benchmarks.cost_model --fit FILES --write` replaces the numbers that FILES have measurements for, and what
// stands above them, which says where they are from. It keeps all else, and always packed_vector and number, which were
// fitted once on a Zen 5 core (those of amx_bf16 on a Xeon): the case table, where every key has many queries, hardly
// tells these costs from those of a row, and they decide where there are few.
#pragma once

#include "kernels/cpu/choose/cost_model.h"

namespace fiak::cpu {

// clang-format off
constexpr CsrRates kAvx2Rates = {"avx2",
  // avx2, forward, entries: one Zen 4 core
  {1.00, 0.90, 0.90, 0.197, 0.191, 39.7, 2.5,
  // avx2, forward, dense: one Zen 4 core
   0.668, 0.0175, 7.8, 0.43},
  // avx2, backward, entries: one Zen 3 core; benchmarks.compare
  {3.55, 5.03, 5.03, 0.383, 0, 104.1, 2.5,
  // avx2, backward, dense: one Zen 3 core; benchmarks.compare
   0.804, 0.0324, 350.5, 0.43}};
constexpr CsrRates kAvx512Rates = {"avx512",
  // avx512, forward, entries: one Zen 4 core
  {0.71, 0.66, 2.03, 0.353, 0.283, 23.6, 5.2,
  // avx512, forward, dense: one Zen 4 core
   0.425, 0.0165, 6.8, 0.41},
  // avx512, backward, entries: one Zen 4 core; benchmarks.compare
  {3.04, 3.68, 5.81, 0.336, 0, 39.6, 5.2,
  // avx512, backward, dense: one Zen 4 core; benchmarks.compare
   0.210, 0.0199, 126.0, 0.41}};
constexpr CsrRates kAvx512Bf16Rates = {"avx512_bf16",
  // avx512_bf16, forward, entries: one Zen 4 core
  {0.33, 0.97, 1.10, 0.549, 0.225, 51.8, 5.0,
  // avx512_bf16, forward, dense: one Zen 4 core
   0.568, 0.0085, 6.4, 0.21},
  // avx512_bf16, backward, entries: one Zen 4 core; benchmarks.compare
  {2.97, 4.38, 7.34, 0.437, 0, 61.0, 5.0,
  // avx512_bf16, backward, dense: one Zen 4 core; benchmarks.compare
   0.562, 0.0096, 81.4, 0.21}};
constexpr CsrRates kXeonRates = {"xeon",
  // xeon, forward, entries: one core of a Xeon with AMX
  {0.93, 1.18, 2.66, 0.278, 0.254, 46.7, 5.2,
  // xeon, forward, dense: one core of a Xeon with AMX
   0.451, 0.0118, 9.8, 0.41},
  // xeon, backward, entries: one core of a Xeon with AMX; benchmarks.compare
  {4.75, 7.27, 15.0, 0.268, 0, 56.5, 5.2,
  // xeon, backward, dense: one core of a Xeon with AMX; benchmarks.compare
   0.377, 0.0142, 193.5, 0.41}};
constexpr CsrRates kAmxBf16Rates = {"amx_bf16",
  // amx_bf16, forward, entries: one core of a Xeon with AMX; entry_1 is extrapolated
  {1.20, 1.56, 2.28, 0.840, 0.261, 54.8, 5.0,
  // amx_bf16, forward, dense: one core of a Xeon with AMX; fiak_benchmarks' square cases with 70% pruned, within 5%
   0.420, 0.0007, 0.8, 0.14},
  // amx_bf16, backward, entries: one core of a Xeon with AMX; benchmarks.compare
  {4.80, 6.39, 12.9, 0.805, 0, 78.1, 5.0,
  // amx_bf16, backward, dense: not measured; forward's parts, nearly doubled, so that what is measured wins close calls
   2.0, 0.0025, 150.0, 0.14}};
// clang-format on

}  // namespace fiak::cpu
