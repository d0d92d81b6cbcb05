// csr_attention over entries, forward.
//
// Two passes over many queries, first on the keys and then on the values, so that each has the L1 cache for itself.
// Within the first, a few queries' scores are exponentiated in one stream: exp's long dependency chains then overlap
// with nothing that waits for them. A sparse row's accesses are too irregular for the hardware to foresee, so each pass
// prefetches into the L2 cache what the next one reads.
#include "kernels/cpu/entries/segments.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kQueriesAtOnce = 8;  // queries of a sample whose scores are exponentiated in one go

/// The segments of consecutive rows of a pattern, for the entries that a call attends to: those of the support, of keys
/// that are there. They are in groups of rows, within a group by slices of keys, and within a slice in order.
template <int kSamples>
class RowSegments {
 public:
  RowSegments(const CsrArgs& args, const KeySlices& slices, int64_t rows, int64_t longest, ScratchArena& scratch)
      : args_(args), slices_(slices), room_(longest + kPlanPadding) {
    const int64_t picked = args.prior != nullptr ? rows * room_ : 0;
    segments_ = reinterpret_cast<RowSegment*>(scratch.floats(rows * slices.count * kSegmentFloats));
    weights_ = reinterpret_cast<const float**>(scratch.floats(args.prior != nullptr ? rows * slices.count * 2 : 0));
    picked_weights_ = scratch.floats(picked);
    picked_ = reinterpret_cast<uint16_t*>(scratch.floats(picked / 2 + 1));
  }

  /// Takes rows [row, row + rows) of the pattern. A segment's row is counted from the first of its group.
  void take(int64_t row, int64_t rows, int64_t chunk_rows) {
    rows_ = rows;
    chunk_rows_ = chunk_rows;
    int64_t place = 0;
    for (int64_t group = 0; group < rows; group += chunk_rows) {
      const int64_t count = smaller(chunk_rows, rows - group);
      RowSegment* segments = segments_ + group * slices_.count;
      for (int64_t r = 0; r < count; ++r)
        take_row(row + group + r, group + r, static_cast<uint32_t>(r), segments, count);
      for (RowSegment* segment = segments; segment < segments + count * slices_.count; ++segment) {
        segment->place = place;
        place += segment_floats<kSamples>(segment->count);
      }
    }
  }
  /// The first segment of a slice of the group that starts at row `group` of those taken; slice slices.count is the
  /// end.
  const RowSegment* first(int64_t group, int64_t slice) const {
    return segments_ + group * slices_.count + slice * smaller(chunk_rows_, rows_ - group);
  }
  /// The weights of a segment's entries; only where the call has a prior.
  const float* weights(const RowSegment* segment) const { return weights_[segment - segments_]; }

 private:
  static constexpr int64_t kSegmentFloats = sizeof(RowSegment) / sizeof(float);

  /// Row `row` of the pattern, which is row i of those taken and row r of its group, whose segments are a slice for
  /// each `rows`.
  void take_row(int64_t row, int64_t i, uint32_t r, RowSegment* segments, int64_t rows) {
    const PlanView& plan = args_.plan;
    const PlanRange entries = plan.row(row);
    const uint16_t* index = plan.columns + entries.begin;
    int64_t count = entries.end - entries.begin;
    const float* weights = nullptr;
    bool picking = false;
    if (args_.prior != nullptr) {
      weights = static_cast<const float*>(args_.prior) + entries.begin;
      picking = !all_in_support(weights, count, below_support(args_.log_prior));
    }
    if (slices_.count == 1 && !picking && slices_.keys == plan.num_keys) {
      segments[r] = {index, r, static_cast<uint32_t>(count), 0};
      if (weights != nullptr) weights_[segments - segments_ + r] = weights;
      return;
    }
    if (picking) {
      uint16_t* picked = picked_ + i * room_;
      float* picked_weights = picked_weights_ + i * room_;
      count = pick_support(weights, index, count, below_support(args_.log_prior), picked, picked_weights);
      index = picked;
      weights = picked_weights;
    }
    for (int64_t slice = 0; slice < slices_.count; ++slice) {
      const int64_t taken = count_below(index, count, slices_.end(slice));
      RowSegment* segment = segments + slice * rows + r;
      *segment = {index, r, static_cast<uint32_t>(taken), 0};
      if (weights != nullptr) {
        weights_[segment - segments_] = weights;
        weights += taken;
      }
      index += taken;
      count -= taken;
    }
  }

  const CsrArgs& args_;
  const KeySlices& slices_;
  int64_t room_, rows_ = 0, chunk_rows_ = 1;
  RowSegment* segments_;
  const float** weights_;
  float* picked_weights_;
  uint16_t* picked_;
};

constexpr float kSmallest = 1e-37f;  // well above the subnormals, which log_of_normal cannot take

/// logsumexp and what to multiply a row's sum with, from the maximum of its scores, in powers of two, and the total of
/// those powers. Writes whole vectors.
void normalise(const float* maxima, const float* totals, const float* divisors, int64_t count, float* logsumexp,
               float* factors) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec total = load(totals + i);
    store(logsumexp + i, fmadd(load(maxima + i), broadcast(kLn2), log_of_normal(total)));
    store(factors + i, divide(broadcast(1.0f), load(divisors + i)));
    if (all_between(total, kSmallest, kInfinity)) continue;
    for (int64_t k = i; k < smaller(count, i + kLanes); ++k) {
      // Only these: what a row gets must not depend on its neighbours.
      if (totals[k] >= kSmallest && totals[k] < kInfinity) continue;
      if (totals[k] == 0.0f) {  // no entry
        logsumexp[k] = -kInfinity;
        factors[k] = 0.0f;
      } else if (totals[k] > 0 && totals[k] < kInfinity) {
        logsumexp[k] = maxima[k] * kLn2 + __builtin_logf(totals[k]);
      } else {  // a NaN or infinite weight makes its row NaN
        logsumexp[k] = factors[k] = kNaN;
      }
    }
  }
}

/// Pattern rows [begin, end) of query head h for the samples of `bundle`, with the keys in `split`, that is, small
/// slices or not. `next`, `next_h` is what the caller comes to next; next_h is -1 where nothing is.
template <Storage kStorage, int kSamples>
void forward_rows(const CsrArgs& args, const ForwardResult& result, const SampleBundle& bundle, int64_t h, bool split,
                  int64_t begin, int64_t end, int64_t longest, const SampleBundle& next, int64_t next_h) {
  const int64_t b0 = bundle.b[0], head = args.plan_head(b0, h);
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b0), offset = offset_of(args, b0);
  const bool gaussian = args.score == Score::kGaussian;
  const Extra query_extra = gaussian ? Extra::kOne : Extra::kNone;
  const Extra key_extra = gaussian ? Extra::kHalfSquare : Extra::kNone;
  const int64_t head_vectors = row_vectors(columns_with(query_extra, args.head_dim, kStorage), kStorage, kSamples);
  const int64_t value_vectors = row_vectors(args.value_dim, kStorage, kSamples);
  const int64_t sum_floats = sum_vectors(value_vectors, kStorage) * kLanes;
  const KeySlices slices =
      split ? KeySlices(keys, larger(head_vectors, value_vectors) * kVectorBytes) : KeySlices(keys);
  using Segments = RowSegments<kSamples>;
  constexpr int64_t kQuadFloats = kQuad * kSamples;
  const int64_t row_floats = most_segment_floats<kSamples>(slices.count, longest);
  const int64_t pass_rows = most_pass_rows(end - begin, row_floats);
  const int64_t chunk_rows = slices.count == 1 ? smaller(kQueriesAtOnce * kSamples, pass_rows) : pass_rows;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const int64_t flat = padded(pass_rows * kSamples) + kLanes;
  const int64_t weight_floats = args.prior != nullptr ? WeightArrays::floats(longest) : 0;

  ThreadArena scratch;
  Segments segments(args, slices, pass_rows, longest, scratch);
  const WeightArrays parts(scratch.floats(weight_floats), longest);
  float* scores = scratch.floats(pass_rows * row_floats);
  // A group for each row.
  float* row_maxima = scratch.floats(pass_rows * kQuadFloats);
  float* row_totals = scratch.floats(pass_rows * kQuadFloats);
  float* row_divisors = scratch.floats(pass_rows * kQuadFloats);
  // A number for each row and element.
  float* maxima = scratch.floats(flat);
  float* totals = scratch.floats(flat);
  // What a row's sum is divided by: the sum of the weights as they multiplied the rows, rounded or not.
  float* divisors = kStorage == Storage::kBFloat16 && !dropout.active() ? scratch.floats(flat) : totals;
  float* logsumexp = scratch.floats(flat);
  float* factors = scratch.floats(flat);
  float* sums = scratch.floats((chunk_rows + kMaxSamples) * sum_floats);
  const auto panel = [&](int64_t rows, int64_t chunks) {
    return bundle_panel(reinterpret_cast<char*>(scratch.floats(bundle_panel_floats(rows, chunks))), rows, chunks);
  };
  const BundlePanel query = panel(chunk_rows, head_vectors), key = panel(keys, head_vectors);
  const BundlePanel value = panel(keys, value_vectors);
  float* pack = scratch.floats(pack_scratch(larger(args.head_dim, args.value_dim)));

  pack_rows<kSamples>(args.key, args.dtype, bundle, key_head, 0, keys, args.head_dim, kStorage, key_extra, key, pack);
  for (int64_t pass = begin; pass < end; pass += pass_rows) {
    const int64_t rows = smaller(pass_rows, end - pass);
    segments.take(head * args.plan.num_queries + pass, rows, chunk_rows);
    for (int64_t i = 0; i < rows * kQuadFloats; i += kQuadFloats) {
      store_lanes(row_maxima + i, broadcast_quads<kSamples>(-kInfinity));
      store_lanes(row_totals + i, broadcast_quads<kSamples>(0));
      store_lanes(row_divisors + i, broadcast_quads<kSamples>(0));
    }
    for (int64_t i = 0; i < flat; i += kLanes) {
      store(totals + i, broadcast(1.0f));
      store(divisors + i, broadcast(1.0f));
    }

    for (int64_t row = 0; row < rows; row += chunk_rows) {
      const int64_t count = smaller(chunk_rows, rows - row), n = pass + row - offset;
      const RowSegment *first = segments.first(row, 0), *last = segments.first(row, slices.count);
      float *group_maxima = row_maxima + row * kQuadFloats, *group_totals = row_totals + row * kQuadFloats;
      float* group_divisors = row_divisors + row * kQuadFloats;
      pack_rows<kSamples>(args.query, args.dtype, bundle, h, n, n + count, args.head_dim, kStorage, query_extra, query,
                          pack);
      RowsAhead ahead;
      for (int e = 0; e < kSamples; ++e) {
        const int64_t b = bundle.b[e], done = pass + row - begin;
        ahead.add(args.query, args.dtype, b, h, n + count, smaller(n + 2 * count, end - offset), args.head_dim);
        ahead.add(args.value, args.dtype, b, key_head, done, smaller(done + count, keys), args.value_dim);
      }
      for (int64_t slice = 0; slice < slices.count; ++slice) {
        DotsTask task{};
        task.begin = segments.first(row, slice);
        task.end = segments.first(row, slice + 1);
        task.out = scores;
        task.scale = static_cast<float>(args.scale * kLog2E);
        task.fill = -kInfinity;
        task.maxima = group_maxima;
        task.ahead = &ahead;
        dots<kStorage, kSamples>(task, query, key, 0);
      }
      // use(segment, row of its group, scores of a group of entries, its first entry) with the segment's weights in
      // `parts`.
      const auto for_weight_quads = [&](auto&& use) {
        for (const RowSegment* segment = first; segment < last; ++segment) {
          parts.take(segments.weights(segment), segment->count, args.log_prior);
          float* p = scores + segment->place;
          for (int64_t k = 0; k < segment->count; k += kQuad, p += kQuadFloats) {
            use(*segment, segment->row * kQuadFloats, p, k);
          }
        }
      };
      if (args.prior != nullptr) {  // the largest scores with their weights
        for (int64_t i = 0; i < count * kQuadFloats; i += kQuadFloats) {
          store_lanes(group_maxima + i, broadcast_quads<kSamples>(-kInfinity));
        }
        for_weight_quads([&](const RowSegment& segment, int64_t at, const float* p, int64_t k) {
          const auto score = load_quads<kSamples>(p) + entry_quads<kSamples>(parts.exponents + k, segment.count - k);
          store_lanes(group_maxima + at, max_lanes(score, load_quads<kSamples>(group_maxima + at)));
        });
      }
      for (int64_t r = 0; r < count; ++r) {
        float* maximum = group_maxima + r * kQuadFloats;
        store_lanes(maximum, max_in_quads(load_quads<kSamples>(maximum)));
        for (int e = 0; e < kSamples; ++e) maxima[(row + r) * kSamples + e] = maximum[e * kQuad];
      }
      if (args.prior == nullptr && !dropout.active()) {
        exp2_and_total<kStorage, kSamples, true, kLeftWeights<kStorage>>(first, last, scores, group_maxima,
                                                                         group_totals, group_divisors);
        continue;
      }
      if (args.prior != nullptr) {
        // The exponent less the maximum is exact, or nearly.
        for_weight_quads([&](const RowSegment& segment, int64_t at, float* p, int64_t k) {
          const auto shifted =
              entry_quads<kSamples>(parts.exponents + k, segment.count - k) - load_quads<kSamples>(group_maxima + at);
          store_lanes(p, load_quads<kSamples>(p) + shifted);
        });
        std::memset(group_maxima, 0, count * kQuadFloats * sizeof(float));
      }
      exp2_and_total<kStorage, kSamples, true, Weights::kAlone>(first, last, scores, group_maxima, group_totals,
                                                                group_divisors);
      if (args.prior != nullptr && !args.log_prior) {
        for_weight_quads([&](const RowSegment& segment, int64_t, float* p, int64_t k) {
          store_lanes(p, load_quads<kSamples>(p) * entry_quads<kSamples>(parts.factors + k, segment.count - k));
        });
        std::memset(group_totals, 0, count * kQuadFloats * sizeof(float));
        std::memset(group_divisors, 0, count * kQuadFloats * sizeof(float));
        exp2_and_total<kStorage, kSamples, false, Weights::kAlone>(first, last, scores, group_maxima, group_totals,
                                                                   group_divisors);
      }
      for (int64_t slice = 0; dropout.active() && slice < slices.count; ++slice) {
        for (const RowSegment* segment = segments.first(row, slice); segment < segments.first(row, slice + 1);
             ++segment) {
          for (int64_t k = 0; k < segment->count; ++k) {
            for (int e = 0; e < kSamples; ++e) {
              scores[segment->place + offset_of_entry<kSamples>(k, e)] *=
                  static_cast<float>(dropout.factor(bundle.b[e], h, pass + row + segment->row, segment->index[k]));
            }
          }
        }
      }
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kStorage == Storage::kBFloat16) round_weights<kSamples>(first, last, scores);
#endif
    }
    if (pass == begin) {
      pack_rows<kSamples>(args.value, args.dtype, bundle, key_head, 0, keys, args.value_dim, kStorage, Extra::kNone,
                          value, pack);
    }

    for (int64_t row = 0; row < rows; row += chunk_rows) {
      const int64_t count = smaller(chunk_rows, rows - row), n = pass + row - offset;
      RowsAhead ahead;
      for (int e = 0; e < kSamples; ++e) {
        const int64_t done = pass + row - begin;
        ahead.add(result.output, args.dtype, bundle.b[e], h, n + count, smaller(n + 2 * count, end - offset),
                  args.value_dim);
        if (next_h >= 0 && e < next.samples) {
          ahead.add(args.key, args.dtype, next.b[e], next_h / shared_heads(args), done,
                    smaller(done + count, args.keys), args.head_dim);
        }
      }
      for (int64_t i = 0; i < count * sum_floats; i += kLanes) store(sums + i, zero());
      for (int64_t slice = 0; slice < slices.count; ++slice) {
        SumsTask task{};
        task.begin = segments.first(row, slice);
        task.end = segments.first(row, slice + 1);
        task.weights = scores;
        task.sums = sums;
        task.sums_stride = sum_floats;
        task.ahead = &ahead;
        weighted_sums<kStorage, kSamples, kLeftWeights<kStorage>>(task, value, 0);
      }
      const auto reduce = [&](const float* groups, float* target) {
        for (int64_t r = row; r < row + count; ++r) {
          alignas(64) float total[kQuadFloats];
          store_lanes(total, sum_in_quads(load_quads<kSamples>(groups + r * kQuadFloats)));
          for (int e = 0; e < kSamples; ++e) target[r * kSamples + e] = total[e * kQuad];
        }
      };
      reduce(row_totals, totals);
      if (divisors != totals) reduce(row_divisors, divisors);
      const int64_t at = row * kSamples;
      normalise(maxima + at, totals + at, divisors + at, count * kSamples, logsumexp, factors);
      for (int e = 0; e < kSamples; ++e) {
        float* target = static_cast<float*>(result.logsumexp) + (bundle.b[e] * args.query_heads + h) * args.queries + n;
        for (int64_t r = 0; r < count; ++r) target[r] = logsumexp[r * kSamples + e];
      }
      unpack_rows<kStorage, kSamples>(sums, sum_floats, factors, result.output, args.dtype, bundle, h, n, count,
                                      args.value_dim, pack);
    }
  }
}

template <Storage kStorage>
void forward(const CsrArgs& args, const ForwardResult& result, const BundleRows& rows, bool split) {
  const auto compute = rows.bundle.samples == 1   ? forward_rows<kStorage, 1>
                       : rows.bundle.samples == 2 ? forward_rows<kStorage, 2>
                                                  : forward_rows<kStorage, kMaxSamples>;
  compute(args, result, rows.bundle, rows.h, split, rows.begin, rows.end, rows.longest, rows.next, rows.next_h);
}

}  // namespace

void entries_forward(const CsrArgs& args, const ForwardResult& result, [[maybe_unused]] Storage storage,
                     const BundleRows& rows, bool split) {
#if defined(FIAK_ISA_AVX512_BF16)
  if (storage == Storage::kBFloat16) return forward<Storage::kBFloat16>(args, result, rows, split);
#endif
  forward<Storage::kFloat32>(args, result, rows, split);
}

}  // namespace fiak::cpu::FIAK_ISA
