// The entries of a pattern as the kernels of this family take them: bundles of samples that share a pattern, keys in
// slices whose packed rows fit into the L1 cache, and segments, a row's entries in one slice.
#pragma once

#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/entries/entries.h"
#include "kernels/cpu/entries/sparse_rows.h"
#include "kernels/cpu/pairs/indices.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t kScoreBuffer = 64 * 1024;  // floats of scores between the passes, which stay in the L2 cache
constexpr int64_t kMinSlice = 96;            // keys: short segments cost more than they save

/// Of `rows` rows whose scores take `row_floats` each, those of a pass.
FIAK_INLINE int64_t most_pass_rows(int64_t rows, int64_t row_floats) {
  constexpr int64_t kMost = 4096;
  return larger(1, smaller(smaller(rows, kScoreBuffer / row_floats), kMost));
}
/// The same of a backward pass, which has scores and dA.
FIAK_INLINE int64_t most_grad_pass_rows(int64_t rows, int64_t row_floats) {
  return larger(1, smaller(rows, kScoreBuffer / 2 / row_floats));
}

/// Which samples share a pattern, and how they are bundled: those of a group in order, as many bundles of
/// `samples` as they fill, then one by one.
struct SampleBundles {
  int64_t groups, samples, per_group, full, count;

  SampleBundles(const CsrArgs& args, int64_t wanted) : groups(args.groups()), samples(wanted) {
    per_group = args.batch / larger(1, groups);
    full = per_group / samples;
    count = groups * (full + per_group % samples);
  }
  SampleBundle at(int64_t i) const {
    const int64_t each = count / groups, group = i / each, k = i % each;
    SampleBundle bundle{static_cast<int>(k < full ? samples : 1), {}};
    const int64_t first = k < full ? k * samples : full * samples + (k - full);
    for (int64_t e = 0; e < bundle.samples; ++e) bundle.b[e] = group + (first + e) * groups;
    return bundle;
  }
};

/// The keys of a head in slices.
struct KeySlices {
  int64_t keys, size, count;

  /// All in one.
  explicit KeySlices(int64_t keys) : keys(keys), size(keys), count(1) {}
  /// Such that the L1 cache holds their packed rows; all in one if it holds most.
  KeySlices(int64_t keys, int64_t row_bytes, int64_t most = kPlanShort) : keys(keys), size(keys), count(1) {
    if (keys * row_bytes <= kWholePanelBytes && keys <= most) return;
    size = smaller(most, larger(kMinSlice, kSliceBytes / row_bytes));
    size = (keys + (keys + size - 1) / size - 1) / ((keys + size - 1) / size);
    count = (keys + size - 1) / size;
  }
  int64_t first(int64_t slice) const { return slice * size; }
  int64_t end(int64_t slice) const { return smaller(keys, (slice + 1) * size); }
};

/// weights[0, count) of a quad's entries, for every sample, 0 behind them.
template <int kSamples>
FIAK_INLINE Quads<kSamples> entry_quads(const float* weights, int64_t count) {
  alignas(64) float group[kQuad * kSamples];
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) {
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) group[e * kQuad + k] = k < count ? weights[k] : 0.0f;
  }
  return load_quads<kSamples>(group);
}

FIAK_INLINE Extra query_extra(const CsrArgs& args) {
  return args.score == Score::kGaussian ? Extra::kOne : Extra::kNone;
}
/// Bytes of the wider packed rows of backward.
FIAK_INLINE int64_t backward_row_bytes(const CsrArgs& args, Storage storage, int64_t samples) {
  const auto bundled = static_cast<int>(samples);
  return larger(row_vectors(columns_with(query_extra(args), args.head_dim, storage), storage, bundled),
                row_vectors(args.value_dim, storage, bundled)) *
         kVectorBytes;
}

/// The queries, or the keys, of backward's waves: few enough for P and dS to stay in the L2 cache.
FIAK_INLINE KeySlices wave_slices(int64_t count, int64_t row_bytes) {
  constexpr int64_t kMost = 320;
  return {count, row_bytes, kMost};
}

}  // namespace fiak::cpu::FIAK_ISA
