// csr_attention, vectorised: one query's entries at a time, on the rows of K and V that they name; forward, heads that
// keep most of their pairs run on the dense kernel (csr_dense.h) instead.
//
// Two passes over many queries, first on the keys and then on the values, so that each has the L1 cache for itself.
// Within the first, a few queries' scores are exponentiated in one stream: exp's long dependency chains then overlap
// with nothing that waits for them. A sparse row's accesses are too irregular for the hardware to foresee, so each pass
// prefetches into the L2 cache what the next one reads. Threads split the rows by what they cost.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/csr_dense.h"
#include "kernels/cpu/csr_rows.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/plan_indices.h"
#include "kernels/cpu/sparse_rows.h"
#include "kernels/cpu/tables.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kScoreBuffer = 64 * 1024;  // floats of scores between the two passes, which stay in the L2 cache
constexpr int64_t kQueriesAtOnce = 8;        // queries of an element whose scores are exponentiated in one go
constexpr int64_t kTaskRows = 8;             // of backward: the queries that a thread takes at once
constexpr int64_t kMaxPassRows = 4096;
constexpr int64_t kWholePanelBytes = 64 * 1024;  // up to this a head's packed rows are one block
constexpr int64_t kBlockBytes = 40 * 1024;       // of packed rows, to fit into the L1 cache
constexpr int64_t kBundleBytes = 52 * 1024;
constexpr int64_t kMinBlock = 96;  // keys: short runs cost more than they save

int64_t longest_row(const PlanView& plan, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t row = begin; row < end; ++row) {
    const PlanRange entries = plan.row(row);
    longest = larger(longest, entries.end - entries.begin);
  }
  return longest;
}

/// Of `rows` rows whose scores take `row_floats` each, those of a pass.
FIAK_INLINE int64_t most_pass_rows(int64_t rows, int64_t row_floats) {
  return larger(1, smaller(smaller(rows, kScoreBuffer / row_floats), kMaxPassRows));
}
/// The same of a backward pass, which has scores and dA.
FIAK_INLINE int64_t most_grad_pass_rows(int64_t rows, int64_t row_floats) {
  return larger(1, smaller(rows, kScoreBuffer / 2 / row_floats));
}

int64_t offset_of(const CsrArgs& args, int64_t b) { return args.query_offsets != nullptr ? args.query_offsets[b] : 0; }

/// Which batch elements share a pattern, and how they are bundled: those of a group in order, as many bundles of
/// `elements` as they fill, then one by one.
struct Bundles {
  int64_t groups, elements, per_group, full, count;

  Bundles(const CsrArgs& args, int64_t wanted) : groups(args.groups()), elements(wanted) {
    per_group = args.batch / larger(1, groups);
    full = per_group / elements;
    count = groups * (full + per_group % elements);
  }
  Bundle at(int64_t i) const {
    const int64_t each = count / groups, group = i / each, k = i % each;
    Bundle bundle{static_cast<int>(k < full ? elements : 1), {}};
    const int64_t first = k < full ? k * elements : full * elements + (k - full);
    for (int64_t e = 0; e < bundle.elements; ++e) bundle.b[e] = group + (first + e) * groups;
    return bundle;
  }
};

/// The keys of a head in blocks.
struct KeyBlocks {
  int64_t keys, size, count;

  /// All in one.
  explicit KeyBlocks(int64_t keys) : keys(keys), size(keys), count(1) {}
  /// Such that the L1 cache holds their packed rows; all in one if it holds most.
  KeyBlocks(int64_t keys, int64_t row_bytes, int64_t most = kPlanShort) : keys(keys), size(keys), count(1) {
    if (keys * row_bytes <= kWholePanelBytes && keys <= most) return;
    size = smaller(most, larger(kMinBlock, kBlockBytes / row_bytes));
    size = (keys + (keys + size - 1) / size - 1) / ((keys + size - 1) / size);
    count = (keys + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return smaller(keys, (block + 1) * size); }
};

/// The queries, or the keys, of a backward pass's waves: few enough for P and dS to stay in the L2 cache.
KeyBlocks wave_blocks(int64_t count, int64_t row_bytes) {
  constexpr int64_t kMost = 320;
  return {count, row_bytes, kMost};
}

/// The runs of consecutive rows of a pattern, for the entries that a call attends to: those of the support, of keys
/// that are there. They are in groups of rows, within a group by blocks of keys, and within a block in order.
template <int kElements>
class RowRuns {
 public:
  static int64_t bytes(const CsrArgs& args, const KeyBlocks& blocks, int64_t rows, int64_t longest) {
    const int64_t picked = args.prior != nullptr ? rows * (longest + kPlanPadding) : 0;
    return carved(rows * blocks.count * kRunFloats) + carved(args.prior != nullptr ? rows * blocks.count * 2 : 0) +
           carved(picked) + carved(picked / 2 + 1);
  }

  RowRuns(const CsrArgs& args, const KeyBlocks& blocks, int64_t rows, int64_t longest, Carver& scratch)
      : args_(args), blocks_(blocks), room_(longest + kPlanPadding) {
    const int64_t picked = args.prior != nullptr ? rows * room_ : 0;
    runs_ = reinterpret_cast<Run*>(scratch.floats(rows * blocks.count * kRunFloats));
    weights_ = reinterpret_cast<const float**>(scratch.floats(args.prior != nullptr ? rows * blocks.count * 2 : 0));
    picked_weights_ = scratch.floats(picked);
    picked_ = reinterpret_cast<uint16_t*>(scratch.floats(picked / 2 + 1));
  }

  /// Takes rows [row, row + rows) of the pattern. A run's row is counted from the first of its group.
  void take(int64_t row, int64_t rows, int64_t group_rows) {
    rows_ = rows;
    group_rows_ = group_rows;
    int64_t place = 0;
    for (int64_t group = 0; group < rows; group += group_rows) {
      const int64_t count = smaller(group_rows, rows - group);
      Run* runs = runs_ + group * blocks_.count;
      for (int64_t r = 0; r < count; ++r) take_row(row + group + r, group + r, static_cast<uint32_t>(r), runs, count);
      for (Run* run = runs; run < runs + count * blocks_.count; ++run) {
        run->place = place;
        place += run_floats<kElements>(run->count);
      }
    }
  }
  /// The first run of a block of the group that starts at row `group` of those taken; block blocks.count is the end.
  const Run* first(int64_t group, int64_t block) const {
    return runs_ + group * blocks_.count + block * smaller(group_rows_, rows_ - group);
  }
  /// The weights of a run's entries; only where the call has a prior.
  const float* weights(const Run* run) const { return weights_[run - runs_]; }

 private:
  static constexpr int64_t kRunFloats = sizeof(Run) / sizeof(float);

  /// Row `row` of the pattern, which is row i of those taken and row r of its group, whose runs are a block for each
  /// `rows`.
  void take_row(int64_t row, int64_t i, uint32_t r, Run* runs, int64_t rows) {
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
    if (blocks_.count == 1 && !picking && blocks_.keys == plan.num_keys) {
      runs[r] = {index, r, static_cast<uint32_t>(count), 0};
      if (weights != nullptr) weights_[runs - runs_ + r] = weights;
      return;
    }
    if (picking) {
      uint16_t* picked = picked_ + i * room_;
      float* picked_weights = picked_weights_ + i * room_;
      count = pick_support(weights, index, count, below_support(args_.log_prior), picked, picked_weights);
      index = picked;
      weights = picked_weights;
    }
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const int64_t taken = count_below(index, count, blocks_.end(block));
      Run* run = runs + block * rows + r;
      *run = {index, r, static_cast<uint32_t>(taken), 0};
      if (weights != nullptr) {
        weights_[run - runs_] = weights;
        weights += taken;
      }
      index += taken;
      count -= taken;
    }
  }

  const CsrArgs& args_;
  const KeyBlocks& blocks_;
  int64_t room_, rows_ = 0, group_rows_ = 1;
  Run* runs_;
  const float** weights_;
  float* picked_weights_;
  uint16_t* picked_;
};

/// weights[0, count) of a group's entries, for every element, 0 behind them.
template <int kElements>
FIAK_INLINE Group<kElements> entry_group(const float* weights, int64_t count) {
  alignas(64) float group[kGroup * kElements];
#pragma GCC unroll 4
  for (int e = 0; e < kElements; ++e) {
#pragma GCC unroll 4
    for (int k = 0; k < kGroup; ++k) group[e * kGroup + k] = k < count ? weights[k] : 0.0f;
  }
  return load_group<kElements>(group);
}

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

/// Pattern rows [begin, end) of query head h for the elements of `bundle`, with the keys in `blocked`, that is, small
/// blocks or not. `next`, `next_h` is what the caller comes to next; next_h is -1 where nothing is.
template <Storage kStorage, int kElements>
void forward_rows(const CsrArgs& args, const ForwardResult& result, const Bundle& bundle, int64_t h, bool blocked,
                  int64_t begin, int64_t end, int64_t longest, const Bundle& next, int64_t next_h) {
  const int64_t b0 = bundle.b[0], head = args.plan_head(b0, h);
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b0), offset = offset_of(args, b0);
  const bool gaussian = args.score == Score::kGaussian;
  const Extra query_extra = gaussian ? Extra::kOne : Extra::kNone;
  const Extra key_extra = gaussian ? Extra::kHalfSquare : Extra::kNone;
  const int64_t head_chunks = row_chunks(columns_with(query_extra, args.head_dim, kStorage), kStorage, kElements);
  const int64_t value_chunks = row_chunks(args.value_dim, kStorage, kElements);
  const int64_t sum_floats = sum_vectors(value_chunks, kStorage) * kLanes;
  const KeyBlocks blocks =
      blocked ? KeyBlocks(keys, larger(head_chunks, value_chunks) * kVectorBytes) : KeyBlocks(keys);
  using Runs = RowRuns<kElements>;
  constexpr int64_t kGroupFloats = kGroup * kElements;
  const int64_t row_floats = most_run_floats<kElements>(blocks.count, longest);
  const int64_t pass_rows = most_pass_rows(end - begin, row_floats);
  const int64_t group_rows = blocks.count == 1 ? smaller(kQueriesAtOnce * kElements, pass_rows) : pass_rows;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const int64_t flat = padded(pass_rows * kElements) + kLanes;
  const int64_t weight_floats = args.prior != nullptr ? WeightArrays::floats(longest) : 0;

  Carver scratch{static_cast<char*>(thread_scratch(
      Runs::bytes(args, blocks, pass_rows, longest) + carved(weight_floats) + carved(pass_rows * row_floats) +
      3 * carved(pass_rows * kGroupFloats) + 5 * carved(flat) + carved((group_rows + kMaxElements) * sum_floats) +
      carved(bundle_panel_floats(group_rows, head_chunks)) + carved(bundle_panel_floats(keys, head_chunks)) +
      carved(bundle_panel_floats(keys, value_chunks)) + carved(pack_scratch(larger(args.head_dim, args.value_dim)))))};
  Runs runs(args, blocks, pass_rows, longest, scratch);
  const WeightArrays parts(scratch.floats(weight_floats), longest);
  float* scores = scratch.floats(pass_rows * row_floats);
  // A group for each row.
  float* row_maxima = scratch.floats(pass_rows * kGroupFloats);
  float* row_totals = scratch.floats(pass_rows * kGroupFloats);
  float* row_divisors = scratch.floats(pass_rows * kGroupFloats);
  // A number for each row and element.
  float* maxima = scratch.floats(flat);
  float* totals = scratch.floats(flat);
  // What a row's sum is divided by: the sum of the weights as they multiplied the rows, rounded or not.
  float* divisors = kStorage == Storage::kBFloat16 && !dropout.active() ? scratch.floats(flat) : totals;
  float* logsumexp = scratch.floats(flat);
  float* factors = scratch.floats(flat);
  float* sums = scratch.floats((group_rows + kMaxElements) * sum_floats);
  const auto panel = [&](int64_t rows, int64_t chunks) {
    return bundle_panel(reinterpret_cast<char*>(scratch.floats(bundle_panel_floats(rows, chunks))), rows, chunks);
  };
  const BundlePanel query = panel(group_rows, head_chunks), key = panel(keys, head_chunks);
  const BundlePanel value = panel(keys, value_chunks);
  float* pack = scratch.floats(pack_scratch(larger(args.head_dim, args.value_dim)));

  pack_rows<kElements>(args.key, args.dtype, bundle, key_head, 0, keys, args.head_dim, kStorage, key_extra, key, pack);
  for (int64_t pass = begin; pass < end; pass += pass_rows) {
    const int64_t rows = smaller(pass_rows, end - pass);
    runs.take(head * args.plan.num_queries + pass, rows, group_rows);
    for (int64_t i = 0; i < rows * kGroupFloats; i += kGroupFloats) {
      store_lanes(row_maxima + i, broadcast_group<kElements>(-kInfinity));
      store_lanes(row_totals + i, broadcast_group<kElements>(0));
      store_lanes(row_divisors + i, broadcast_group<kElements>(0));
    }
    for (int64_t i = 0; i < flat; i += kLanes) {
      store(totals + i, broadcast(1.0f));
      store(divisors + i, broadcast(1.0f));
    }

    for (int64_t row = 0; row < rows; row += group_rows) {
      const int64_t count = smaller(group_rows, rows - row), n = pass + row - offset;
      const Run *first = runs.first(row, 0), *last = runs.first(row, blocks.count);
      float *group_maxima = row_maxima + row * kGroupFloats, *group_totals = row_totals + row * kGroupFloats;
      float* group_divisors = row_divisors + row * kGroupFloats;
      pack_rows<kElements>(args.query, args.dtype, bundle, h, n, n + count, args.head_dim, kStorage, query_extra, query,
                           pack);
      RowsAhead ahead;
      for (int e = 0; e < kElements; ++e) {
        const int64_t b = bundle.b[e], done = pass + row - begin;
        ahead.add(args.query, args.dtype, b, h, n + count, smaller(n + 2 * count, end - offset), args.head_dim);
        ahead.add(args.value, args.dtype, b, key_head, done, smaller(done + count, keys), args.value_dim);
      }
      for (int64_t block = 0; block < blocks.count; ++block) {
        DotsTask task{};
        task.begin = runs.first(row, block);
        task.end = runs.first(row, block + 1);
        task.out = scores;
        task.scale = static_cast<float>(args.scale * kLog2E);
        task.fill = -kInfinity;
        task.maxima = group_maxima;
        task.ahead = &ahead;
        dots<kStorage, kElements>(task, query, key, 0);
      }
      // use(run, row of its group, scores of a group of entries, its first entry) with the run's weights in `parts`.
      const auto for_weight_groups = [&](auto&& use) {
        for (const Run* run = first; run < last; ++run) {
          parts.take(runs.weights(run), run->count, args.log_prior);
          float* p = scores + run->place;
          for (int64_t k = 0; k < run->count; k += kGroup, p += kGroupFloats) {
            use(*run, run->row * kGroupFloats, p, k);
          }
        }
      };
      if (args.prior != nullptr) {  // the largest scores with their weights
        for (int64_t i = 0; i < count * kGroupFloats; i += kGroupFloats) {
          store_lanes(group_maxima + i, broadcast_group<kElements>(-kInfinity));
        }
        for_weight_groups([&](const Run& run, int64_t at, const float* p, int64_t k) {
          const auto score = load_group<kElements>(p) + entry_group<kElements>(parts.exponents + k, run.count - k);
          store_lanes(group_maxima + at, max_lanes(score, load_group<kElements>(group_maxima + at)));
        });
      }
      for (int64_t r = 0; r < count; ++r) {
        float* maximum = group_maxima + r * kGroupFloats;
        store_lanes(maximum, max_in_blocks(load_group<kElements>(maximum)));
        for (int e = 0; e < kElements; ++e) maxima[(row + r) * kElements + e] = maximum[e * kGroup];
      }
      if (args.prior == nullptr && !dropout.active()) {
        exp2_and_total<kStorage, kElements, true, kLeftWeights<kStorage>>(first, last, scores, group_maxima,
                                                                          group_totals, group_divisors);
        continue;
      }
      if (args.prior != nullptr) {
        // The exponent less the maximum is exact, or nearly.
        for_weight_groups([&](const Run& run, int64_t at, float* p, int64_t k) {
          const auto shifted =
              entry_group<kElements>(parts.exponents + k, run.count - k) - load_group<kElements>(group_maxima + at);
          store_lanes(p, load_group<kElements>(p) + shifted);
        });
        std::memset(group_maxima, 0, count * kGroupFloats * sizeof(float));
      }
      exp2_and_total<kStorage, kElements, true, Weights::kAlone>(first, last, scores, group_maxima, group_totals,
                                                                 group_divisors);
      if (args.prior != nullptr && !args.log_prior) {
        for_weight_groups([&](const Run& run, int64_t, float* p, int64_t k) {
          store_lanes(p, load_group<kElements>(p) * entry_group<kElements>(parts.factors + k, run.count - k));
        });
        std::memset(group_totals, 0, count * kGroupFloats * sizeof(float));
        std::memset(group_divisors, 0, count * kGroupFloats * sizeof(float));
        exp2_and_total<kStorage, kElements, false, Weights::kAlone>(first, last, scores, group_maxima, group_totals,
                                                                    group_divisors);
      }
      for (int64_t block = 0; dropout.active() && block < blocks.count; ++block) {
        for (const Run* run = runs.first(row, block); run < runs.first(row, block + 1); ++run) {
          for (int64_t k = 0; k < run->count; ++k) {
            for (int e = 0; e < kElements; ++e) {
              scores[run->place + offset_of_entry<kElements>(k, e)] *=
                  static_cast<float>(dropout.factor(bundle.b[e], h, pass + row + run->row, run->index[k]));
            }
          }
        }
      }
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kStorage == Storage::kBFloat16) round_weights<kElements>(first, last, scores);
#endif
    }
    if (pass == begin) {
      pack_rows<kElements>(args.value, args.dtype, bundle, key_head, 0, keys, args.value_dim, kStorage, Extra::kNone,
                           value, pack);
    }

    for (int64_t row = 0; row < rows; row += group_rows) {
      const int64_t count = smaller(group_rows, rows - row), n = pass + row - offset;
      RowsAhead ahead;
      for (int e = 0; e < kElements; ++e) {
        const int64_t done = pass + row - begin;
        ahead.add(result.output, args.dtype, bundle.b[e], h, n + count, smaller(n + 2 * count, end - offset),
                  args.value_dim);
        if (next_h >= 0 && e < next.elements) {
          ahead.add(args.key, args.dtype, next.b[e], next_h / shared_heads(args), done,
                    smaller(done + count, args.keys), args.head_dim);
        }
      }
      for (int64_t i = 0; i < count * sum_floats; i += kLanes) store(sums + i, zero());
      for (int64_t block = 0; block < blocks.count; ++block) {
        SumsTask task{};
        task.begin = runs.first(row, block);
        task.end = runs.first(row, block + 1);
        task.weights = scores;
        task.sums = sums;
        task.sums_stride = sum_floats;
        task.ahead = &ahead;
        weighted_sums<kStorage, kElements, kLeftWeights<kStorage>>(task, value, 0);
      }
      const auto reduce = [&](const float* groups, float* target) {
        for (int64_t r = row; r < row + count; ++r) {
          alignas(64) float total[kGroupFloats];
          store_lanes(total, sum_in_blocks(load_group<kElements>(groups + r * kGroupFloats)));
          for (int e = 0; e < kElements; ++e) target[r * kElements + e] = total[e * kGroup];
        }
      };
      reduce(row_totals, totals);
      if (divisors != totals) reduce(row_divisors, divisors);
      const int64_t at = row * kElements;
      normalise(maxima + at, totals + at, divisors + at, count * kElements, logsumexp, factors);
      for (int e = 0; e < kElements; ++e) {
        float* target = static_cast<float*>(result.logsumexp) + (bundle.b[e] * args.query_heads + h) * args.queries + n;
        for (int64_t r = 0; r < count; ++r) target[r] = logsumexp[r * kElements + e];
      }
      unpack_rows<kStorage, kElements>(sums, sum_floats, factors, result.output, args.dtype, bundle, h, n, count,
                                       args.value_dim, pack);
    }
  }
}

/// A group whose entries all have their element's number, values[e].
template <int kElements>
FIAK_INLINE void spread_elements(const float* values, float* target) {
#pragma GCC unroll 4
  for (int e = 0; e < kElements; ++e) _mm_storeu_ps(target + e * kGroup, _mm_set1_ps(values[e]));
}

FIAK_INLINE Extra query_extra(const CsrArgs& args) {
  return args.score == Score::kGaussian ? Extra::kOne : Extra::kNone;
}
/// Of the wider packed rows of backward.
int64_t backward_row_bytes(const CsrArgs& args, Storage storage, int64_t elements) {
  const auto bundled = static_cast<int>(elements);
  return larger(row_chunks(columns_with(query_extra(args), args.head_dim, storage), storage, bundled),
                row_chunks(args.value_dim, storage, bundled)) *
         kVectorBytes;
}

/// Backward runs in waves. A wave is a bundle, a few key heads, one query head of each, a chunk of its queries and a
/// block of its keys. First the columns' runs are listed; then the rows compute P and dS, dQ and the weights'
/// gradient, and leave P and dS where their columns come to want them; then the columns add up dK and dV. All that a
/// wave of one head touches stays in the L2 cache. Every sum has a fixed order (dQ: keys; dK, dV: query heads, then
/// queries; weights: batch elements), so that how waves are cut, and how many threads share one, changes no bit.
template <Storage kStorage, int kElements>
class CsrBackward {
 public:
  CsrBackward(const CsrArgs& args, const BackwardArgs& grads)
      : args_(args),
        grads_(grads),
        gaussian_(args.score == Score::kGaussian),
        dropout_(make_dropout(args.dropout_p, args.seed)),
        head_chunks_(row_chunks(columns_with(query_extra(args), args.head_dim, kStorage), kStorage, kElements)),
        value_chunks_(row_chunks(args.value_dim, kStorage, kElements)),
        head_floats_(sum_vectors(head_chunks_, kStorage) * kLanes),
        value_floats_(sum_vectors(value_chunks_, kStorage) * kLanes),
        chunks_(wave_blocks(args.plan.num_queries, backward_row_bytes(args, kStorage, kElements))),
        blocks_(wave_blocks(args.keys, backward_row_bytes(args, kStorage, kElements))) {
    const PlanView& plan = args.plan;
    const int64_t patterns = args.query_offsets == nullptr ? smaller(args.groups(), args.batch) : args.batch;
    int64_t most_entries = 0;
    for (int64_t i = 0; i < patterns * args.query_heads; ++i) {
      const int64_t b = i / args.query_heads, offset = offset_of(args, b);
      const int64_t first = args.plan_head(b, i % args.query_heads) * plan.num_queries;
      for (int64_t row = offset; row < offset + args.queries;) {
        const int64_t end = smaller(chunks_.end(row / chunks_.size), offset + args.queries);
        most_entries = larger(most_entries, plan.row_offsets[first + end] - plan.row_offsets[first + row]);
        row = end;
      }
    }
    chunk_rows_ = smaller(chunks_.size, args.queries);
    most_floats_ = most_run_floats<kElements>(blocks_.size, smaller(most_entries, chunk_rows_ * blocks_.size));
  }

  /// Memory for each key head of a wave.
  int64_t slot_bytes() const {
    return carved(bundle_panel_floats(args_.keys, head_chunks_)) +
           carved(bundle_panel_floats(args_.keys, value_chunks_)) +
           carved(bundle_panel_floats(chunk_rows_, head_chunks_)) +
           carved(bundle_panel_floats(chunk_rows_, value_chunks_)) +
           carved((args_.keys + kMaxElements) * head_floats_) + carved((args_.keys + kMaxElements) * value_floats_) +
           carved((chunk_rows_ + kMaxElements) * head_floats_) + 3 * carved(chunk_rows_ * kGroupFloats) +
           carved(args_.keys * 2) + carved(chunk_rows_ * 2) + carved(blocks_.size * kRunFloats) +
           carved(2 * most_floats_);
  }

  /// All of `bundle` for key heads [first, first + count) of `key_heads`, in count * slot_bytes() bytes at `memory`.
  void run(const Bundle& bundle, const KeyHeads& key_heads, int64_t first, int64_t count, const Parallel& parallel,
           char* memory) const {
    const auto key_head = [&](int64_t i) { return key_heads.at(first + i); };
    const auto slot = [&](int64_t i) { return make_slot(memory + i * slot_bytes()); };
    const int64_t heads = shared_heads(args_), keys = keys_of(args_, bundle.b[0]),
                  offset = offset_of(args_, bundle.b[0]);
    parallel_range(parallel, count * args_.keys, [&](int64_t begin, int64_t end) {
      for_parts(begin, end, args_.keys,
                [&](int64_t i, int64_t from, int64_t to) { start(slot(i), bundle, key_head(i), from, to); });
    });
    for (int64_t member = 0; member < heads; ++member) {
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        const int64_t begin = larger(chunks_.first(chunk), offset);
        const int64_t end = smaller(chunks_.end(chunk), offset + args_.queries);
        if (begin >= end) continue;
        const auto head = [&](int64_t i) { return key_head(i) * heads + member; };
        const int64_t groups = (end - begin + kTaskRows - 1) / kTaskRows;
        const auto for_rows = [&](auto&& use) {
          parallel_range(parallel, count * groups, [&](int64_t from, int64_t to) {
            for_parts(from, to, groups, [&](int64_t i, int64_t low, int64_t high) {
              use(i, begin + low * kTaskRows, smaller(end, begin + high * kTaskRows));
            });
          });
        };
        for_rows([&](int64_t i, int64_t low, int64_t high) { start_rows(slot(i), bundle, head(i), begin, low, high); });
        for (int64_t block = 0; block < blocks_.count; ++block) {
          const Tile tile{begin, end, blocks_.first(block), smaller(keys, blocks_.end(block))};
          if (tile.key >= tile.key_end) continue;
          if (columns_wanted()) {
            parallel_range(parallel, count, [&](int64_t from, int64_t to) {
              for (int64_t i = from; i < to; ++i) list_columns(slot(i), bundle, head(i), tile);
            });
          }
          for_rows([&](int64_t i, int64_t low, int64_t high) { rows(slot(i), bundle, head(i), tile, low, high); });
          if (!columns_wanted()) continue;
          const int64_t columns_of_slot = tile.key_end - tile.key;
          parallel_range(parallel, count * columns_of_slot, [&](int64_t from, int64_t to) {
            for_parts(from, to, columns_of_slot,
                      [&](int64_t i, int64_t low, int64_t high) { columns(slot(i), tile, low, high); });
          });
        }
        if (grads_.grad_query.data == nullptr) continue;
        for_rows(
            [&](int64_t i, int64_t low, int64_t high) { finish_rows(slot(i), bundle, head(i), begin, low, high); });
      }
    }
    if (!columns_wanted()) return;
    parallel_range(parallel, count * args_.keys, [&](int64_t begin, int64_t end) {
      for_parts(begin, end, args_.keys,
                [&](int64_t i, int64_t from, int64_t to) { finish(slot(i), bundle, key_head(i), keys, from, to); });
    });
  }

 private:
  static constexpr int64_t kGroupFloats = kGroup * kElements;
  static constexpr int64_t kRunFloats = sizeof(Run) / sizeof(float);
  static constexpr float kOutside = -1.0f;  // P where the columns must not touch a row

  /// Pattern rows [row, row_end) and keys [key, key_end).
  struct Tile {
    int64_t row, row_end, key, key_end;
  };

  struct Slot {
    BundlePanel key, value;          // all keys
    BundlePanel query, grad_output;  // the queries of a chunk
    float *grad_key, *grad_value;    // sums for all keys
    float* grad_query;               // sums for the queries of a chunk
    float* deltas;                   // dO . O of the queries of a chunk, a group each
    float *shifts, *factors;         // P = 2^(score - shift) factor, in the same way
    int64_t* column_cursors;         // [keys]: the first entry of a column that no chunk has had yet
    int64_t* row_cursors;            // [queries of a chunk]: the first entry of a row that no block has had yet
    Run* runs;                       // [keys of a block]: of the columns
    float* pairs;                    // P and dS, side by side, of the columns' runs
  };

  /// A row's shift and factor, a group each.
  struct Exponent {
    const float *shift, *factor;
  };

  bool columns_wanted() const { return grads_.grad_key.data != nullptr || grads_.grad_value.data != nullptr; }
  int64_t plan_head(const Bundle& bundle, int64_t h) const { return args_.plan_head(bundle.b[0], h); }

  Slot make_slot(char* memory) const {
    Carver carver{memory};
    const auto panel = [&](int64_t rows, int64_t chunks) {
      return bundle_panel(reinterpret_cast<char*>(carver.floats(bundle_panel_floats(rows, chunks))), rows, chunks);
    };
    Slot x;
    x.key = panel(args_.keys, head_chunks_);
    x.value = panel(args_.keys, value_chunks_);
    x.query = panel(chunk_rows_, head_chunks_);
    x.grad_output = panel(chunk_rows_, value_chunks_);
    x.grad_key = carver.floats((args_.keys + kMaxElements) * head_floats_);
    x.grad_value = carver.floats((args_.keys + kMaxElements) * value_floats_);
    x.grad_query = carver.floats((chunk_rows_ + kMaxElements) * head_floats_);
    x.deltas = carver.floats(chunk_rows_ * kGroupFloats);
    x.shifts = carver.floats(chunk_rows_ * kGroupFloats);
    x.factors = carver.floats(chunk_rows_ * kGroupFloats);
    x.column_cursors = reinterpret_cast<int64_t*>(carver.floats(args_.keys * 2));
    x.row_cursors = reinterpret_cast<int64_t*>(carver.floats(chunk_rows_ * 2));
    x.runs = reinterpret_cast<Run*>(carver.floats(blocks_.size * kRunFloats));
    x.pairs = carver.floats(2 * most_floats_);
    return x;
  }

  /// use(i, from, to) for the parts of [begin, end) in units of `size`.
  template <class Use>
  static void for_parts(int64_t begin, int64_t end, int64_t size, Use&& use) {
    while (begin < end) {
      const int64_t i = begin / size, stop = smaller(end, (i + 1) * size);
      use(i, begin - i * size, stop - i * size);
      begin = stop;
    }
  }

  /// Packs keys [begin, end) and their values; no sums yet.
  void start(const Slot& x, const Bundle& bundle, int64_t key_head, int64_t begin, int64_t end) const {
    const int64_t last = smaller(end, keys_of(args_, bundle.b[0]));
    auto* scratch = static_cast<float*>(thread_scratch(pack_bytes()));
    if (begin < last) {
      pack_rows<kElements>(args_.key, args_.dtype, bundle, key_head, begin, last, args_.head_dim, kStorage,
                           gaussian_ ? Extra::kHalfSquare : Extra::kNone, x.key.from(begin), scratch);
      pack_rows<kElements>(args_.value, args_.dtype, bundle, key_head, begin, last, args_.value_dim, kStorage,
                           Extra::kNone, x.value.from(begin), scratch);
    }
    std::memset(x.grad_key + begin * head_floats_, 0, (end - begin) * head_floats_ * sizeof(float));
    std::memset(x.grad_value + begin * value_floats_, 0, (end - begin) * value_floats_ * sizeof(float));
  }

  /// The runs of a tile's columns.
  void list_columns(const Slot& x, const Bundle& bundle, int64_t h, const Tile& tile) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h);
    const bool first = tile.row == offset_of(args_, bundle.b[0]);
    int64_t place = 0;
    for (int64_t j = tile.key; j < tile.key_end; ++j) {
      const PlanRange places = plan.places(head, j);
      if (first) {
        x.column_cursors[j] = places.begin + count_below(plan.rows + places.begin, places.end - places.begin, tile.row);
      }
      const uint16_t* index = plan.rows + x.column_cursors[j];
      const int64_t count = count_below(index, places.end - x.column_cursors[j], tile.row_end);
      x.column_cursors[j] += count;
      const auto column = static_cast<uint32_t>(j - tile.key);
      x.runs[column] = {index, column, static_cast<uint32_t>(count), place};
      if (count % kGroup != 0) {  // what stands behind a column's last entry
        float* last = x.pairs + place + offset_of_pair<kElements>(count / kGroup * kGroup, 0);
        store_lanes(last, broadcast_group<kElements>(0));
        store_lanes(last + kGroupFloats, broadcast_group<kElements>(0));
      }
      place += 2 * run_floats<kElements>(count);
    }
  }

  int64_t pack_bytes() const { return carved(pack_scratch(larger(args_.head_dim, args_.value_dim))); }

  /// Packs pattern rows [begin, end) of the chunk that starts at `chunk`; no sums yet.
  void start_rows(const Slot& x, const Bundle& bundle, int64_t h, int64_t chunk, int64_t begin, int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t offset = offset_of(args_, bundle.b[0]), first = begin - chunk;
    const int64_t room = padded(args_.value_dim);
    Carver carver{static_cast<char*>(thread_scratch(pack_bytes() + 2 * carved(room) + carved(kElements)))};
    float* scratch = carver.floats(pack_bytes() / 4);
    float* grad_output = carver.floats(room);
    float* output = carver.floats(room);
    pack_rows<kElements>(args_.query, args_.dtype, bundle, h, begin - offset, end - offset, args_.head_dim, kStorage,
                         query_extra(args_), x.query.from(first), scratch);
    pack_rows<kElements>(grads_.grad_output, args_.dtype, bundle, h, begin - offset, end - offset, args_.value_dim,
                         kStorage, Extra::kNone, x.grad_output.from(first), scratch);
    const int64_t row = plan_head(bundle, h) * plan.num_queries + begin;
    for (int64_t r = 0; r < end - begin; ++r) x.row_cursors[first + r] = plan.row_offsets[row + r];
    float* sums = x.grad_query + first * head_floats_;
    for (int64_t i = 0; i < (end - begin) * head_floats_; i += kLanes) store(sums + i, zero());
    for (int64_t n = begin - offset; n < end - offset; ++n) {
      float delta[kElements];
      for (int e = 0; e < kElements; ++e) {
        const int64_t ahead = smaller(n + 8, end - offset - 1);
        prefetch_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, ahead),
                     args_.value_dim * element_size(args_.dtype));
        load_row(row_address(grads_.grad_output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_dim, 1.0f,
                 grad_output);
        load_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_dim, 1.0f,
                 output);
        delta[e] = dot(grad_output, output, room);
      }
      spread_elements<kElements>(delta, x.deltas + (n + offset - chunk) * kGroupFloats);
    }
    for (int64_t row = begin; row < end; ++row) start_exponent(x, bundle, h, row, row - chunk);
  }

  /// The shift and factor of pattern row `row`, which is row r of its chunk.
  void start_exponent(const Slot& x, const Bundle& bundle, int64_t h, int64_t row, int64_t r) const {
    float shift[kElements], factor[kElements];
    bool large[kElements], any = false;
    for (int e = 0; e < kElements; ++e) {
      const int64_t n = row - offset_of(args_, bundle.b[0]);
      const int64_t at = (bundle.b[e] * args_.query_heads + h) * args_.queries + n;
      const float lse = static_cast<const float*>(grads_.logsumexp)[at];
      shift[e] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // no entry counts where there is no support
      factor[e] = 1.0f;
      large[e] = is_large_logsumexp(lse);
      any |= large[e];
    }
    if (any) sum_row(x, bundle, h, row, r, large, shift, factor);
    spread_elements<kElements>(shift, x.shifts + r * kGroupFloats);
    spread_elements<kElements>(factor, x.factors + r * kGroupFloats);
  }

  /// The same from the row's scores, which are computed once more, for the elements that are `large`.
  void sum_row(const Slot& x, const Bundle& bundle, int64_t h, int64_t row, int64_t r, const bool* large, float* shift,
               float* factor) const {
    const PlanView& plan = args_.plan;
    const PlanRange entries = plan.row(plan_head(bundle, h) * plan.num_queries + row);
    const uint16_t* index = plan.columns + entries.begin;
    const int64_t count = count_below(index, entries.end - entries.begin, keys_of(args_, bundle.b[0]));
    const float* prior = args_.prior != nullptr ? static_cast<const float*>(args_.prior) + entries.begin : nullptr;
    const int64_t room = most_run_floats<kElements>(1, count) + kLanes;
    const int64_t weight_floats = prior != nullptr ? WeightArrays::floats(count) : 0;
    const SharedScratch memory(carved(room) + carved(weight_floats) +
                               64);  // the thread's own holds what the caller has
    Carver scratch{reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64)};
    float* scores = scratch.floats(room);
    const WeightArrays parts(scratch.floats(weight_floats), count);
    if (prior != nullptr) parts.take(prior, count, args_.log_prior);
    const Run run{index, 0, static_cast<uint32_t>(count), 0};
    DotsTask task{};
    task.begin = &run;
    task.end = &run + 1;
    task.out = scores;
    task.scale = static_cast<float>(args_.scale * kLog2E);
    task.fill = -kInfinity;
    dots<kStorage, kElements>(task, x.query.from(r), x.key, 0);
    for (int e = 0; e < kElements; ++e) {
      if (!large[e]) continue;
      /// use(score with the weight's exponent, the weight's factor) of the entries in the support.
      const auto for_scores = [&](auto&& use) {
        for (int64_t k = 0; k < count; ++k) {
          const double score = static_cast<double>(scores[offset_of_entry<kElements>(k, e)]);
          if (prior == nullptr) {
            use(score, 1.0);
          } else if (in_support(prior[k], below_support(args_.log_prior))) {
            use(score + static_cast<double>(parts.exponents[k]), static_cast<double>(parts.factors[k]));
          }
        }
      };
      double maximum = -__builtin_inf(), total = 0;
      for_scores([&](double score, double) { maximum = score > maximum ? score : maximum; });
      if (maximum == -__builtin_inf()) continue;
      maximum = static_cast<double>(static_cast<float>(maximum));
      for_scores([&](double score, double weight) { total += weight * __builtin_exp2(score - maximum); });
      if (!(total > 0 && total < __builtin_inf())) continue;
      int exponent = 0;
      factor[e] = static_cast<float>(1 / __builtin_frexp(total, &exponent));
      shift[e] = static_cast<float>(maximum) + static_cast<float>(exponent);
    }
  }

  void finish_rows(const Slot& x, const Bundle& bundle, int64_t h, int64_t chunk, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    Carver scratch{static_cast<char*>(thread_scratch(carved(count * kElements) + pack_bytes()))};
    float* factors = scratch.floats(count * kElements);
    for (int64_t i = 0; i < count * kElements; ++i) factors[i] = static_cast<float>(args_.scale);
    unpack_rows<kStorage, kElements>(x.grad_query + (begin - chunk) * head_floats_, head_floats_, factors,
                                     grads_.grad_query, args_.dtype, bundle, h, begin - offset_of(args_, bundle.b[0]),
                                     count, args_.head_dim, scratch.floats(pack_bytes() / 4));
  }

  /// Pattern rows [begin, end) of a tile.
  void rows(const Slot& x, const Bundle& bundle, int64_t h, const Tile& tile, int64_t begin, int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h);
    const int64_t columns = tile.key_end - tile.key;
    const auto* prior = static_cast<const float*>(args_.prior);
    const bool weighing = prior != nullptr || dropout_.active();
    const int64_t row_floats = most_run_floats<kElements>(1, columns);
    const int64_t pass_rows = most_grad_pass_rows(end - begin, row_floats);
    const int64_t most = pass_rows * row_floats;
    const int64_t picked_floats = prior != nullptr ? (pass_rows * columns + kIndexPadding) / 2 : 0;
    const int64_t weight_floats = prior != nullptr ? WeightArrays::floats(columns) : 0;
    Carver scratch{static_cast<char*>(thread_scratch(carved(pass_rows * kRunFloats) + 2 * carved(most) +
                                                     carved(columns) + carved(weighing ? row_floats : 0) +
                                                     carved(picked_floats) + carved(weight_floats)))};
    auto* runs = reinterpret_cast<Run*>(scratch.floats(pass_rows * kRunFloats));
    float* scores = scratch.floats(most);
    float* products = scratch.floats(most);
    auto* places = reinterpret_cast<uint32_t*>(scratch.floats(columns));
    float* factors = scratch.floats(weighing ? row_floats : 0);  // of dropout, for one row
    auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(picked_floats));
    const WeightArrays parts(scratch.floats(weight_floats), columns);
    if (columns_wanted()) first_places(x, head, tile, begin, places);
    const int64_t first_index = tile.key;

    for (int64_t pass = begin; pass < end; pass += pass_rows) {
      const int64_t count = smaller(pass_rows, end - pass), first = pass - tile.row;
      const float *deltas = x.deltas + first * kGroupFloats, *shifts = x.shifts + first * kGroupFloats;
      const float* exponent_factors = x.factors + first * kGroupFloats;
      int64_t place = 0;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row_end = plan.row_offsets[head * plan.num_queries + pass + r + 1];
        int64_t& cursor = x.row_cursors[first + r];
        const int64_t entries = count_below(plan.columns + cursor, row_end - cursor, tile.key_end);
        runs[r] = {plan.columns + cursor, static_cast<uint32_t>(r), static_cast<uint32_t>(entries), place};
        place += run_floats<kElements>(entries);
        cursor += entries;
      }
      DotsTask task{};
      task.begin = runs;
      task.end = runs + count;
      task.out = scores;
      task.scale = static_cast<float>(args_.scale * kLog2E);
      task.fill = -kInfinity;
      dots<kStorage, kElements>(task, x.query.from(first), x.key, 0);
      task.out = products;
      task.scale = 1.0f;
      task.fill = 0.0f;
      dots<kStorage, kElements>(task, x.grad_output.from(first), x.value, 0);
      uint16_t* free_index = picked;
      for (int64_t r = 0; r < count; ++r) {
        Run& run = runs[r];
        float *p = scores + run.place, *ds = products + run.place;
        const Exponent exponent{shifts + r * kGroupFloats, exponent_factors + r * kGroupFloats};
        const float* delta = deltas + r * kGroupFloats;
        if (weighing) {
          weigh(x, run, bundle, h, pass + r, p, ds, factors, parts, exponent, delta, free_index, places, first_index);
        } else {
          differentiate(run, p, ds, exponent, delta);
        }
      }
      for (int64_t r = 0; columns_wanted() && !weighing && r < count; ++r) {
        const Run run = runs[r];
        const float *p = scores + run.place, *ds = products + run.place;
        int64_t k = 0;
        for (; k + kGroup <= run.count; k += kGroup, p += kGroupFloats, ds += kGroupFloats) {
          leave_group(x, run.index + k, places, first_index, p, ds);
        }
        for (; k < run.count; ++k, ++p, ++ds) leave(x, places[run.index[k] - first_index], p, ds);
      }
      if (grads_.grad_query.data == nullptr) continue;
      SumsTask sum{};
      sum.begin = runs;
      sum.end = runs + count;
      sum.weights = products;
      sum.sums = x.grad_query + first * head_floats_;
      sum.sums_stride = head_floats_;
      weighted_sums<kStorage, kElements>(sum, x.key, 0);
    }
  }

  /// Where the entries of a tile's columns go that are of pattern row `row` or later.
  void first_places(const Slot& x, int64_t head, const Tile& tile, int64_t row, uint32_t* places) const {
    const PlanView& plan = args_.plan;
    for (int64_t j = tile.key; j < tile.key_end; ++j) {
      const Run& run = x.runs[j - tile.key];
      int64_t done = 0;
      if (row != tile.row) {
        const PlanRange places = plan.places(head, j);
        const int64_t first = search_below(plan.rows + places.begin, places.end - places.begin, tile.row);
        done = count_below(plan.rows + places.begin + first, places.end - places.begin - first, row);
      }
      places[j - tile.key] = static_cast<uint32_t>(run.place + offset_of_pair<kElements>(done, 0));
    }
  }

  /// Where an entry of a column goes; its next one goes behind it.
  __attribute__((always_inline)) static uint32_t take_place(uint32_t& next) {
    const uint32_t place = next;
    next = place + 2 + (place & 2) * 2 * (kElements - 1);  // offset_of_pair
    return place;
  }
  /// Leaves P and dS of an entry, whose first elements' are at p and ds, where its column's next entry stands.
  __attribute__((always_inline)) static void leave(const Slot& x, uint32_t& next, const float* p, const float* ds) {
    float* target = x.pairs + take_place(next);
#pragma GCC unroll 4
    for (int e = 0; e < kElements; ++e) {
      target[e * kGroup] = p[e * kGroup];
      target[e * kGroup + 1] = ds[e * kGroup];
    }
  }
  /// Leaves those of a group, each entry's by one store.
  __attribute__((always_inline)) static void leave_group(const Slot& x, const uint16_t* index, uint32_t* places,
                                                         int64_t first_index, const float* p, const float* ds) {
    float* targets[kGroup];
#pragma GCC unroll 4
    for (int k = 0; k < kGroup; ++k) targets[k] = x.pairs + take_place(places[index[k] - first_index]);
#pragma GCC unroll 4
    for (int e = 0; e < kElements; ++e) {
      const __m128 a = _mm_loadu_ps(p + e * kGroup), b = _mm_loadu_ps(ds + e * kGroup);
      const __m128 low = _mm_unpacklo_ps(a, b), high = _mm_unpackhi_ps(a, b);
      const auto target = [&](int k) { return reinterpret_cast<__m64*>(targets[k] + e * kGroup); };
      _mm_storel_pi(target(0), low);
      _mm_storeh_pi(target(1), low);
      _mm_storel_pi(target(2), high);
      _mm_storeh_pi(target(3), high);
    }
  }

  /// P, dS and the weights' gradient of pattern row `row`, where there is a prior or dropout, and leaves the first two
  /// to the columns. Entries outside the support are taken out of the run, because nothing may touch their rows; its
  /// indices then stand at `free_index`, which moves on.
  void weigh(const Slot& x, Run& run, const Bundle& bundle, int64_t h, int64_t row, float* p, float* ds, float* factors,
             const WeightArrays& parts, const Exponent& exponent, const float* delta, uint16_t*& free_index,
             uint32_t* places, int64_t first_index) const {
    const int64_t entry = run.index - args_.plan.columns;
    const float* weights = args_.prior != nullptr ? static_cast<const float*>(args_.prior) + entry : nullptr;
    const auto for_entries = [&](auto&& use) __attribute__((always_inline)) {
      for (int64_t k = 0; k < run.count; ++k) {
        for (int e = 0; e < kElements; ++e) use(k, e, offset_of_entry<kElements>(k, e));
      }
    };
    if (dropout_.active()) {
      for_entries([&](int64_t k, int e, int64_t at) {
        factors[at] = static_cast<float>(dropout_.factor(bundle.b[e], h, row, run.index[k]));
        ds[at] *= factors[at];
      });
    }
    const bool logs = args_.log_prior;
    const float below = below_support(logs);
    if (weights == nullptr) {
      differentiate(run, p, ds, exponent, delta);
    } else {
      alignas(64) float none[kGroupFloats];
      store_lanes(none, broadcast_group<kElements>(0));
      parts.take(weights, run.count, logs);
      for (int64_t k = 0; k < run.count; k += kGroup) {
        float* group = p + offset_of_entry<kElements>(k, 0);
        const auto shifted =
            entry_group<kElements>(parts.exponents + k, run.count - k) - load_group<kElements>(exponent.shift);
        store_lanes(group, load_group<kElements>(group) + shifted);
      }
      differentiate(run, p, ds, {none, exponent.factor}, delta);
    }
    if (grads_.grad_weight != nullptr) {
      float* target = static_cast<float*>(grads_.grad_weight) + entry;
      for_entries([&](int64_t k, int e, int64_t at) {
        // Of a row without support nothing counts, not even NaN, and of a logarithm of 0 neither.
        if (exponent.shift[e * kGroup] == kInfinity || (logs && !in_support(weights[k], below))) return;
        target[k] += ds[at];
      });
    }
    for (int64_t k = 0; weights != nullptr && !logs && k < run.count; k += kGroup) {
      const auto group = entry_group<kElements>(parts.factors + k, run.count - k);
      const int64_t at = offset_of_entry<kElements>(k, 0);
      store_lanes(p + at, load_group<kElements>(p + at) * group);
      store_lanes(ds + at, load_group<kElements>(ds + at) * group);
    }
    if (dropout_.active()) for_entries([&](int64_t, int, int64_t at) { p[at] *= factors[at]; });
    const bool all = weights == nullptr || all_in_support(weights, run.count, below);
    alignas(64) float outside[kGroupFloats];
    store_lanes(outside, broadcast_group<kElements>(kOutside));
    for (int64_t k = 0; columns_wanted() && k < run.count; ++k) {
      const bool inside = all || in_support(weights[k], below);
      const int64_t at = offset_of_entry<kElements>(k, 0);
      leave(x, places[run.index[k] - first_index], inside ? p + at : outside, inside ? ds + at : outside);
    }
    if (all) return;
    take_out(
        run, free_index, [&](int64_t k) { return in_support(weights[k], below); },
        [&](int64_t to, int64_t from, int e) {
          for (float* numbers : {p, ds}) {
            numbers[offset_of_entry<kElements>(to, e)] = from < 0 ? 0.0f : numbers[offset_of_entry<kElements>(from, e)];
          }
        });
  }

  /// Keeps the entries of a run for which keep(k), with their indices at `free_index`, which moves on, and their
  /// numbers: move(to, from, e) moves those of an element's entry, or clears them if `from` is negative.
  template <class Keep, class Move>
  static void take_out(Run& run, uint16_t*& free_index, Keep&& keep, Move&& move) {
    uint16_t* index = free_index;
    int64_t kept = 0;
    for (int64_t k = 0; k < run.count; ++k) {
      if (!keep(k)) continue;
      index[kept] = run.index[k];
      for (int e = 0; e < kElements; ++e) move(kept, k, e);
      ++kept;
    }
    for (int64_t k = kept; k % kGroup != 0; ++k) {
      for (int e = 0; e < kElements; ++e) move(k, -1, e);
    }
    run.index = index;
    run.count = static_cast<uint32_t>(kept);
    free_index = index + kept;
  }

  /// P = 2^(scores - shift) factor and dS = P (products - delta) of a run.
  __attribute__((always_inline)) static void differentiate(const Run& run, float* scores, float* products,
                                                           const Exponent& exponent, const float* delta) {
    const Vec shifts = spread_group<kElements>(exponent.shift), factors = spread_group<kElements>(exponent.factor);
    const Vec deltas = spread_group<kElements>(delta);
    for (int64_t i = 0; i < run_floats<kElements>(run.count); i += kLanes) {
      const Vec attention = mul(exp2(sub(load(scores + i), shifts)), factors);
      store(scores + i, attention);
      store(products + i, mul(attention, sub(load(products + i), deltas)));
    }
  }

  /// Adds columns [begin, end) of a tile to dK and dV.
  void columns(const Slot& x, const Tile& tile, int64_t begin, int64_t end) const {
    const int64_t row = -tile.row;  // of the panels, where index 0 would be
    if (args_.prior != nullptr) {
      const int64_t pairs =
          x.runs[end - 1].place / 2 + run_floats<kElements>(x.runs[end - 1].count) - x.runs[begin].place / 2;
      auto* free_index = static_cast<uint16_t*>(thread_scratch((pairs / kElements + kIndexPadding) * 2));
      for (int64_t j = begin; j < end; ++j) {
        float* pair = x.pairs + x.runs[j].place;
        const auto inside = [&](int64_t k) { return pair[offset_of_pair<kElements>(k, 0)] != kOutside; };
        int64_t k = 0;
        while (k < x.runs[j].count && inside(k)) ++k;
        if (k == x.runs[j].count) continue;
        take_out(x.runs[j], free_index, inside, [&](int64_t to, int64_t from, int e) {
          for (int64_t i = 0; i < 2; ++i) {
            pair[offset_of_pair<kElements>(to, e) + i] = from < 0 ? 0.0f : pair[offset_of_pair<kElements>(from, e) + i];
          }
        });
      }
    }
    const auto task = [&](float* sums, int64_t stride) {
      SumsTask sum{};
      sum.begin = x.runs + begin;
      sum.end = x.runs + end;
      sum.weights = x.pairs;
      sum.sums = sums + tile.key * stride;
      sum.sums_stride = stride;
      return sum;
    };
    if (grads_.grad_value.data != nullptr) {
      weighted_sums<kStorage, kElements, Weights::kFirstOfPairs>(task(x.grad_value, value_floats_), x.grad_output, row);
    }
    if (grads_.grad_key.data != nullptr) {
      weighted_sums<kStorage, kElements, Weights::kSecondOfPairs>(task(x.grad_key, head_floats_), x.query, row);
    }
  }

  /// Stores dK and dV of keys [begin, end).
  void finish(const Slot& x, const Bundle& bundle, int64_t key_head, int64_t keys, int64_t begin, int64_t end) const {
    const int64_t count = end - begin, room = padded(args_.head_dim + 1);
    Carver scratch{static_cast<char*>(
        thread_scratch(2 * carved(count * kElements) + carved(kElements * room) + carved(room) + pack_bytes()))};
    float* ones = scratch.floats(count * kElements);
    float* scales = scratch.floats(count * kElements);
    float* sums = scratch.floats(kElements * room);
    float* key = scratch.floats(room);
    float* pack = scratch.floats(pack_scratch(larger(args_.head_dim, args_.value_dim)));
    for (int64_t i = 0; i < count * kElements; ++i) {
      ones[i] = 1.0f;
      scales[i] = static_cast<float>(args_.scale);
    }
    if (grads_.grad_value.data != nullptr) {
      unpack_rows<kStorage, kElements>(x.grad_value + begin * value_floats_, value_floats_, ones, grads_.grad_value,
                                       args_.dtype, bundle, key_head, begin, count, args_.value_dim, pack);
    }
    if (grads_.grad_key.data == nullptr) return;
    if (!gaussian_) {
      return unpack_rows<kStorage, kElements>(x.grad_key + begin * head_floats_, head_floats_, scales, grads_.grad_key,
                                              args_.dtype, bundle, key_head, begin, count, args_.head_dim, pack);
    }
    // d s_ij / d k_j = scale (q_i - k_j): the sum of q's extra column, of ones, is the sum of dS.
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t v = 0; v < room; v += kLanes) {
        Vec columns[kElements];
        separate<kStorage, kElements>(x.grad_key + j * head_floats_, v / kLanes, columns);
#pragma GCC unroll 4
        for (int e = 0; e < kElements; ++e) store(sums + e * room + v, columns[e]);
      }
      for (int e = 0; e < kElements; ++e) {
        float* sum = sums + e * room;
        const float score_sum = sum[args_.head_dim];
        if (j < keys && score_sum != 0.0f) {
          load_row(row_address(args_.key, args_.dtype, bundle.b[e], key_head, j), args_.dtype, args_.head_dim, 1.0f,
                   key);
          for (int64_t d = 0; d < args_.head_dim; ++d) sum[d] -= score_sum * key[d];
        }
        store_row(sum, args_.dtype, args_.head_dim, static_cast<float>(args_.scale),
                  row_address(grads_.grad_key, args_.dtype, bundle.b[e], key_head, j));
      }
    }
  }

  const CsrArgs& args_;
  const BackwardArgs& grads_;
  const bool gaussian_;
  const Dropout dropout_;
  const int64_t head_chunks_, value_chunks_, head_floats_, value_floats_;
  const KeyBlocks chunks_, blocks_;  // of queries and of keys
  int64_t chunk_rows_ = 0, most_floats_ = 0;
};

/// rows(bundle, h, begin, end, longest, next bundle, next h) over the pattern rows of all queries, split by `costs`.
/// Bundles are outside: the heads of one batch element often lie side by side. next h is -1 where there is
/// no next.
template <class Rows>
void for_bundle_rows(const CsrArgs& args, const Parallel& parallel, int64_t elements, const HeadCosts& costs,
                     Rows&& rows) {
  const PlanView& plan = args.plan;
  const Bundles bundles(args, elements);
  const int64_t heads = args.query_heads;
  // Rows that only some elements use are not worth a search for balance.
  const bool whole = args.query_offsets == nullptr && args.queries == plan.num_queries;
  const int64_t bundle_rows = heads * args.queries;
  const auto work = [&](int64_t unit) {
    if (!whole) return unit;
    const int64_t bundle = unit / bundle_rows, row = unit % bundle_rows;
    const int64_t of_group = bundles.count / bundles.groups;
    return static_cast<int64_t>(costs.before(bundle / of_group, bundle % of_group, bundles.full, of_group,
                                             row / args.queries, row % args.queries));
  };
  parallel_balanced(parallel, bundles.count * bundle_rows, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / args.queries, h = i % heads;
      const Bundle bundle = bundles.at(i / heads);
      const int64_t first = i * args.queries, stop = smaller(end, first + args.queries);
      const int64_t offset = offset_of(args, bundle.b[0]), from = begin - first + offset, to = stop - first + offset;
      const int64_t head_row = args.plan_head(bundle.b[0], h) * plan.num_queries;
      const bool last = stop >= end;
      rows(bundle, h, from, to, longest_row(plan, head_row + from, head_row + to),
           last ? bundle : bundles.at((i + 1) / heads), last ? -1 : (i + 1) % heads);
      begin = stop;
    }
  });
}

/// How many batch elements to bundle: as many as keep the rows of about 200 keys in the L1 cache.
int64_t bundled_elements(const CsrArgs& args, Storage storage) {
  if (args.kv_lens != nullptr || args.query_offsets != nullptr) return 1;  // then elements differ
  if (args.plan.columns == nullptr) return 1;                              // rows take elements one by one
  const int64_t per_group = args.batch / larger(1, args.groups());
  for (int elements = kMaxElements; elements > 1; elements /= 2) {
    const int64_t chunks = row_chunks(larger(args.head_dim, args.value_dim), storage, elements);
    if (per_group >= elements && smaller(args.keys, 200) * chunks * kVectorBytes <= kBundleBytes) return elements;
  }
  return 1;
}

/// All waves of some key heads with bundles of kElements.
template <Storage kStorage, int kElements>
void backward_bundles(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                      const Parallel& parallel, const Bundles& bundles, int64_t elements) {
  const CsrBackward<kStorage, kElements> backward(args, grads);
  const auto mine = [&](const Bundle& bundle) { return bundle.elements == elements; };
  int64_t count = 0;
  for (int64_t i = 0; i < bundles.count; ++i) count += mine(bundles.at(i));
  if (count == 0) return;
  // A bundle and key head is one thread's where there are enough of them; a weight's gradient sums over bundles.
  const int64_t units = count * key_heads.count, threads = larger(1, parallel.threads);
  const bool alone =
      grads.grad_weight == nullptr && units >= threads && (units + threads - 1) / threads * threads * 10 <= units * 11;
  const SharedScratch memory((alone ? threads : key_heads.count) * backward.slot_bytes() + 64);
  char* slots = static_cast<char*>(memory.data());
  slots += (64 - reinterpret_cast<uintptr_t>(slots) % 64) % 64;
  if (!alone) {
    for (int64_t i = 0; i < bundles.count; ++i) {
      if (mine(bundles.at(i))) backward.run(bundles.at(i), key_heads, 0, key_heads.count, parallel, slots);
    }
    return;
  }
  const int64_t all = bundles.count * key_heads.count;
  parallel_range(parallel, threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t unit = 0;
      for (int64_t i = 0; i < all; ++i) {
        const Bundle bundle = bundles.at(i / key_heads.count);
        if (!mine(bundle)) continue;
        if (unit * threads / units == thread) {
          backward.run(bundle, key_heads, i % key_heads.count, 1, Parallel{}, slots + thread * backward.slot_bytes());
        }
        ++unit;
      }
    }
  });
}

/// Whether backward goes by rows and columns rather than in tiles of both: where the runs of all tiles, empty or not,
/// are many more than the entries and what they belong to; where indices are not of 16 bits or a column takes a search
/// to find; and where query heads share weights, whose gradient sums over them.
template <Storage kStorage>
bool takes_rows(const CsrArgs& args, const BackwardArgs& grads, int64_t elements) {
  const PlanView& plan = args.plan;
  if (selected_csr_kernel() == CsrKernel::kRows) return true;
  if (plan.columns == nullptr || plan.num_queries > kPlanShort || plan.column_offsets.data == nullptr) return true;
  if (grads.grad_weight != nullptr && args.pattern_heads() < args.query_heads) return true;
  constexpr double kMostRuns = 8;
  const int64_t row_bytes = backward_row_bytes(args, kStorage, elements);
  const KeyBlocks chunks = wave_blocks(args.queries, row_bytes), blocks = wave_blocks(args.keys, row_bytes);
  const auto runs = static_cast<double>(args.queries * blocks.count + args.keys * chunks.count);
  const double entries = static_cast<double>(plan.nnz) / static_cast<double>(plan.heads * plan.num_queries) *
                         static_cast<double>(args.queries);  // of a head
  return runs > kMostRuns * static_cast<double>(elements) * (entries + static_cast<double>(args.queries + args.keys));
}

/// The heads that DenseBackward computes: one type for all storages, so that it is compiled once.
struct KeptHeads {
  const CsrArgs& args;
  KeptHead operator()(int64_t b, int64_t h) const { return KeptHead(args, {b, h}); }
};

template <Storage kStorage>
void backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  if (grads.grad_weight != nullptr) std::memset(grads.grad_weight, 0, args.plan.nnz * sizeof(float));
  if (args.batch == 0 || args.key_heads == 0) return;
  const int64_t elements = bundled_elements(args, kStorage);
  const Bundles bundles(args, elements);
  const HeadsByKernel heads(args, static_cast<int>(elements), kStorage);
  dense_backward(args, grads, heads.dense(), KeptHeads{args}, false, false, parallel);
  if (heads.entries().count == 0) return;
  if (takes_rows<kStorage>(args, grads, elements)) return csr_rows_backward(args, grads, heads.entries(), parallel);
  if (bundles.elements == kMaxElements) {
    backward_bundles<kStorage, kMaxElements>(args, grads, heads.entries(), parallel, bundles, kMaxElements);
  }
  if (kMaxElements > 2 && bundles.elements == 2) {
    backward_bundles<kStorage, 2>(args, grads, heads.entries(), parallel, bundles, 2);
  }
  backward_bundles<kStorage, 1>(args, grads, heads.entries(), parallel, bundles, 1);
}

/// forward_rows on the dense kernel, whose blocks of queries start at multiples of their size: of a block, whoever has
/// its first query computes all, so that no split among threads changes a bit.
void forward_dense(const CsrArgs& args, const ForwardResult& result, const Bundle& bundle, int64_t h, int64_t begin,
                   int64_t end, const Bundle& next, int64_t next_h) {
  const int64_t offset = offset_of(args, bundle.b[0]);
  const auto block = [&](int64_t row) { return smaller(args.queries, row_blocks(row - offset) * kBlockRows); };
  if (block(begin) == block(end)) return;
  for (int e = 0; e < bundle.elements; ++e) {
    const HeadPlace at{bundle.b[e], h};
    const HeadPlace after = e + 1 < bundle.elements ? HeadPlace{bundle.b[e + 1], h}
                            : next_h >= 0           ? HeadPlace{next.b[0], next_h}
                                                    : HeadPlace{0, args.query_heads};
    dense_forward_rows(args, result, KeptHead(args, at), at, block(begin), block(end), after);
  }
}

template <Storage kStorage>
void forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  const int64_t elements = bundled_elements(args, kStorage);
  const HeadCosts costs(args, static_cast<int>(elements), kStorage);
  for_bundle_rows(args, parallel, elements, costs,
                  [&](const Bundle& bundle, int64_t h, int64_t begin, int64_t end, int64_t longest, const Bundle& next,
                      int64_t next_h) {
                    const CsrKernel kernel = costs.kernel(bundle.b[0], h);
                    if (kernel == CsrKernel::kDense) {
                      return forward_dense(args, result, bundle, h, begin, end, next, next_h);
                    }
                    if (kernel == CsrKernel::kRows) {
                      const int64_t offset = offset_of(args, bundle.b[0]);
                      for (int e = 0; e < bundle.elements; ++e) {
                        csr_rows_forward(args, result, bundle.b[e], h, begin - offset, end - offset, longest);
                      }
                      return;
                    }
                    const auto rows = bundle.elements == 1   ? forward_rows<kStorage, 1>
                                      : bundle.elements == 2 ? forward_rows<kStorage, 2>
                                                             : forward_rows<kStorage, kMaxElements>;
                    rows(args, result, bundle, h, kernel == CsrKernel::kBlocks, begin, end, longest, next, next_h);
                  });
}

template <Storage kStorage, int kElements>
void count_blocks(const CsrArgs& args, BlockCounts& blocks) {
  const Extra extra = args.score == Score::kGaussian ? Extra::kOne : Extra::kNone;
  const int64_t head_chunks = row_chunks(columns_with(extra, args.head_dim, kStorage), kStorage, kElements);
  const int64_t value_chunks = row_chunks(args.value_dim, kStorage, kElements);
  const int64_t row_bytes = backward_row_bytes(args, kStorage, kElements);
  for (const int64_t chunks : {head_chunks, value_chunks}) {
    blocks.add(chunks);
    blocks.add(chunks, kMaxChunks);
  }
  const KeyBlocks keys(args.keys, row_bytes);
  blocks.add(keys.count);
  for (const int64_t count : {int64_t{1}, keys.count}) {
    blocks.add(args.queries, most_pass_rows(args.queries, most_run_floats<kElements>(count, args.keys)));
  }
  const KeyBlocks chunks = wave_blocks(args.plan.num_queries, row_bytes), tiles = wave_blocks(args.keys, row_bytes);
  blocks.add(chunks.count);
  blocks.add(tiles.count);
  blocks.add(chunks.size, most_grad_pass_rows(chunks.size, most_run_floats<kElements>(1, tiles.size)));
}

template <Storage kStorage>
void count_blocks(const CsrArgs& args, BlockCounts& blocks) {
  const int64_t elements = bundled_elements(args, kStorage);
  blocks.add(elements);
  if (elements == kMaxElements) return count_blocks<kStorage, kMaxElements>(args, blocks);
  if (elements == 2) return count_blocks<kStorage, 2>(args, blocks);
  count_blocks<kStorage, 1>(args, blocks);
}

#if defined(FIAK_ISA_AVX512_BF16)
/// bfloat16 rows that fill half a register or less are faster as float32, which takes no more of it.
Storage csr_storage(const CsrArgs& args) {
  if (args.dtype != DType::kBFloat16) return Storage::kFloat32;
  const bool half =
      larger(args.head_dim, args.value_dim) * 2 * bundled_elements(args, Storage::kBFloat16) * 2 <= kVectorBytes;
  return half ? Storage::kFloat32 : Storage::kBFloat16;
}
#endif

}  // namespace

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  const bool by_rows = args.plan.columns == nullptr || selected_csr_kernel() == CsrKernel::kRows;
  if (is_decoding(args) && !by_rows) return csr_decode(args, result, parallel);
#if defined(FIAK_ISA_AVX512_BF16)
  if (csr_storage(args) == Storage::kBFloat16) return forward<Storage::kBFloat16>(args, result, parallel);
#endif
  forward<Storage::kFloat32>(args, result, parallel);
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  auto* run = backward<Storage::kFloat32>;
#if defined(FIAK_ISA_AVX512_BF16)
  if (csr_storage(args) == Storage::kBFloat16) run = backward<Storage::kBFloat16>;
#endif
  run(args, grads, parallel);
  if (grads.grad_weight == nullptr || args.prior == nullptr || args.log_prior) return;
  parallel_range(parallel, args.plan.nnz, [&](int64_t begin, int64_t end) {
    scale_weight_gradients(static_cast<float*>(grads.grad_weight) + begin,
                           static_cast<const float*>(args.prior) + begin, end - begin);
  });
}

void csr_blocks(const CsrArgs& args, int64_t threads, BlockCounts& blocks) {
  csr_decode_blocks(args, blocks);
  dense_forward_blocks(args, !is_decoding(args), blocks);
  dense_backward_blocks(args, threads, blocks);
  blocks.add(args.keys, kPlanShort);
  blocks.add(args.queries, kPlanShort);
#if defined(FIAK_ISA_AVX512_BF16)
  blocks.add(csr_storage(args) == Storage::kBFloat16);
  if (csr_storage(args) == Storage::kBFloat16) return count_blocks<Storage::kBFloat16>(args, blocks);
#endif
  count_blocks<Storage::kFloat32>(args, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
