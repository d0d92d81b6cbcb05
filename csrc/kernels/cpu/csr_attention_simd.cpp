// csr_attention, vectorised: one query's entries at a time, on the rows of K and V that they name; forward, heads that
// keep most of their pairs run on the dense kernel (csr_dense.h) instead.
//
// Two passes over many queries, first on the keys and then on the values, so that each has the L1 cache for itself.
// Within the first, a few queries' scores are exponentiated in one stream: exp's long dependency chains then overlap
// with nothing that waits for them. A sparse row's accesses are too irregular for the hardware to foresee, so each pass
// prefetches into the L2 cache what the next one reads. Threads split the rows by what they cost.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/csr_dense.h"
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
    const int64_t* segment = plan.row_segments + row * plan.key_blocks;
    longest = larger(longest, segment[plan.key_blocks] - segment[0]);
  }
  return longest;
}

int64_t offset_of(const CsrArgs& args, int64_t b) { return args.query_offsets != nullptr ? args.query_offsets[b] : 0; }

/// Which batch elements share a pattern, and how they are bundled: those of a group in order, as many bundles of
/// `elements` as they fill, then one by one.
struct Bundles {
  int64_t groups, elements, per_group, full, count;

  Bundles(const CsrArgs& args, int64_t wanted)
      : groups(args.plan.heads / larger(1, args.query_heads)), elements(wanted) {
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

/// The keys of a head in blocks whose packed rows the L1 cache holds.
struct KeyBlocks {
  int64_t keys, size, count;

  KeyBlocks(int64_t keys, int64_t row_bytes, int64_t most = kPlanBlock) : keys(keys), size(keys), count(1) {
    if (keys * row_bytes <= kWholePanelBytes && keys <= most) return;
    size = smaller(most, larger(kMinBlock, kBlockBytes / row_bytes));
    if (keys > kPlanBlock) {
      while ((size & (size - 1)) != 0) size &= size - 1;  // a power of two divides the blocks of the plan
    } else {
      size = (keys + (keys + size - 1) / size - 1) / ((keys + size - 1) / size);
    }
    count = (keys + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return smaller(keys, (block + 1) * size); }
};

/// The steps for consecutive rows of a pattern, for the entries that a call attends to: those of the support, of keys
/// that are there. They are in groups of rows and within a group by blocks of keys.
template <int kElements>
class RowSteps {
 public:
  static int64_t bytes(const CsrArgs& args, const KeyBlocks& blocks, int64_t rows, int64_t longest) {
    const int64_t picked = args.values != nullptr ? rows * (longest + kPlanPadding) : 0;
    const int64_t steps = most_steps(blocks, rows, longest);
    return 2 * carved(rows * 2) + carved(rows * (blocks.count + 1)) + carved(picked) + carved(picked / 2 + 1) +
           carved(steps * 4) + carved(args.values != nullptr ? steps * 2 : 0) +
           carved(rows * blocks.count * kLanes / 2) + carved((rows * blocks.count + 1) * 2);
  }
  /// Of any `rows` rows of at most `longest` entries.
  static int64_t most_steps(const KeyBlocks& blocks, int64_t rows, int64_t longest) {
    return rows * (longest / kKeys<kElements> + blocks.count);
  }

  RowSteps(const CsrArgs& args, const KeyBlocks& blocks, int64_t rows, int64_t longest, Carver& scratch)
      : args_(args), blocks_(blocks), room_(longest + kPlanPadding) {
    const int64_t picked = args.values != nullptr ? rows * room_ : 0, steps = most_steps(blocks, rows, longest);
    index_ = reinterpret_cast<const uint16_t**>(scratch.floats(rows * 2));
    row_weights_ = reinterpret_cast<const float**>(scratch.floats(rows * 2));
    cuts_ = reinterpret_cast<int32_t*>(scratch.floats(rows * (blocks.count + 1)));
    picked_weights_ = scratch.floats(picked);
    picked_ = reinterpret_cast<uint16_t*>(scratch.floats(picked / 2 + 1));
    static_assert(sizeof(Step) <= 4 * sizeof(float), "what is carved");
    steps_ = reinterpret_cast<Step*>(scratch.floats(steps * 4));
    weights_ = reinterpret_cast<const float**>(scratch.floats(args.values != nullptr ? steps * 2 : 0));
    spare_ = reinterpret_cast<uint16_t*>(scratch.floats(rows * blocks.count * kLanes / 2));
    bounds_ = reinterpret_cast<int64_t*>(scratch.floats((rows * blocks.count + 1) * 2));
  }

  /// Takes rows [row, row + rows) of the pattern. A step's row is counted from the first of its group.
  void take(int64_t row, int64_t rows, int64_t group_rows) {
    const PlanView& plan = args_.plan;
    if (plan.key_blocks == 1 && blocks_.count == 1 && blocks_.keys == plan.num_keys && args_.values == nullptr) {
      return take_whole_rows(plan.row_segments + row, rows, group_rows);
    }
    for (int64_t r = 0; r < rows; ++r) take_row(row + r, r);
    Step* step = steps_;
    uint16_t* spare = spare_;
    int64_t* bound = bounds_;
    *bound++ = 0;
    for (int64_t group = 0; group < rows; group += group_rows) {
      const int64_t end = smaller(rows, group + group_rows);
      for (int64_t block = 0; block < blocks_.count; ++block) {
        for (int64_t r = group; r < end; ++r) {
          const int32_t* cut = cuts_ + r * (blocks_.count + 1) + block;
          const int64_t first = step - steps_;
          step = append_steps<kElements>(index_[r] + cut[0], cut[1] - cut[0], r - group, step, spare);
          if (args_.values == nullptr) continue;
          for (int64_t i = first; i < step - steps_; ++i) {
            weights_[i] = row_weights_[r] + cut[0] + (i - first) * kKeys<kElements>;
          }
        }
        *bound++ = step - steps_;
      }
    }
  }
  /// The first step of a group's block, and of what follows its last one.
  int64_t first(int64_t group, int64_t block) const { return bounds_[group * blocks_.count + block]; }
  const Step* step(int64_t i) const { return steps_ + i; }
  /// The weights of a step's entries; only where the call has values.
  const float* weights(int64_t i) const { return weights_[i]; }

 private:
  void take_whole_rows(const int64_t* segments, int64_t rows, int64_t group_rows) {
    Step* step = steps_;
    uint16_t* spare = spare_;
    int64_t* bound = bounds_;
    *bound++ = 0;
    for (int64_t group = 0; group < rows; group += group_rows) {
      for (int64_t r = group; r < smaller(rows, group + group_rows); ++r) {
        const int64_t first = segments[r];
        step = append_steps<kElements>(args_.plan.columns + first, segments[r + 1] - first, r - group, step, spare);
      }
      *bound++ = step - steps_;
    }
  }

  void take_row(int64_t row, int64_t r) {
    const PlanView& plan = args_.plan;
    const int64_t* segment = plan.row_segments + row * plan.key_blocks;
    const auto* values = static_cast<const float*>(args_.values);
    const int64_t all = segment[plan.key_blocks] - segment[0];
    index_[r] = plan.columns + segment[0];
    bool picking = false;
    if (values != nullptr) {
      row_weights_[r] = values + segment[0];
      picking = !all_in_support(values + segment[0], all);
      if (picking) {
        index_[r] = picked_ + r * room_;
        row_weights_[r] = picked_weights_ + r * room_;
      }
    }
    int32_t* cuts = cuts_ + r * (blocks_.count + 1);
    cuts[0] = 0;
    if (blocks_.count == 1 && !picking && blocks_.keys == plan.num_keys) {
      cuts[1] = static_cast<int32_t>(all);
      return;
    }
    int64_t block = 0, taken = 0;
    for (int64_t part = 0; part < plan.key_blocks; ++part) {
      const int64_t base = part * kPlanBlock;
      const uint16_t* index = plan.columns + segment[part];
      int64_t count = segment[part + 1] - segment[part];
      if (picking) {
        count = pick_support(values + segment[part], index, count, picked_ + r * room_ + taken,
                             picked_weights_ + r * room_ + taken);
        index = picked_ + r * room_ + taken;
      }
      int64_t done = 0;
      while (block < blocks_.count && blocks_.first(block) < base + kPlanBlock) {
        done += count_below(index + done, count - done, blocks_.end(block) - base);
        cuts[++block] = static_cast<int32_t>(taken + done);
      }
      taken += done;
    }
    for (; block < blocks_.count; ++block) cuts[block + 1] = cuts[block];
  }

  const CsrArgs& args_;
  const KeyBlocks& blocks_;
  int64_t room_;
  const uint16_t** index_;     // [rows]
  const float** row_weights_;  // [rows]
  int32_t* cuts_;              // [rows, blocks + 1]: where a row's entries enter a block
  float* picked_weights_;
  uint16_t *picked_, *spare_;
  Step* steps_;
  const float** weights_;
  int64_t* bounds_;
};

/// weights[0, count) as the register of entries that are the same for every element, 0 behind them.
template <int kElements>
FIAK_INLINE Vec entry_register(const float* weights, int64_t count) {
  alignas(64) float copy[kLanes];
  if (count < kKeys<kElements>) {
    for (int64_t k = 0; k < kKeys<kElements>; ++k) copy[k] = k < count ? weights[k] : 0.0f;
    weights = copy;
  }
  if constexpr (kElements == 1) return load(weights);
#if defined(FIAK_ISA_AVX512)
  if constexpr (kElements == 2) {
    const __m512 x = _mm512_castps256_ps512(_mm256_loadu_ps(weights));
    return _mm512_shuffle_f32x4(x, x, 0x50);
  }
  return _mm512_broadcast_f32x4(_mm_loadu_ps(weights));
#else
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(weights));
#endif
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

/// Pattern rows [begin, end) of query head h for the elements of `bundle`. `next`, `next_h` is what the caller comes to
/// next; next_h is -1 where nothing is.
template <Storage kStorage, int kElements>
void forward_rows(const CsrArgs& args, const ForwardResult& result, const Bundle& bundle, int64_t h, int64_t begin,
                  int64_t end, int64_t longest, const Bundle& next, int64_t next_h) {
  const int64_t b0 = bundle.b[0], head = b0 % (args.plan.heads / args.query_heads) * args.query_heads + h;
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b0), offset = offset_of(args, b0);
  const bool gaussian = args.score == Score::kGaussian;
  const Extra query_extra = gaussian ? Extra::kOne : Extra::kNone;
  const Extra key_extra = gaussian ? Extra::kHalfSquare : Extra::kNone;
  const int64_t head_chunks = row_chunks(columns_with(query_extra, args.head_size, kStorage), kStorage, kElements);
  const int64_t value_chunks = row_chunks(args.value_size, kStorage, kElements);
  const int64_t sum_floats = sum_vectors(value_chunks, kStorage) * kLanes;
  const KeyBlocks blocks(keys, larger(head_chunks, value_chunks) * kVectorBytes);
  using Steps = RowSteps<kElements>;
  const int64_t row_floats = Steps::most_steps(blocks, 1, longest) * kLanes;
  const int64_t pass_rows = larger(1, smaller(smaller(end - begin, kScoreBuffer / row_floats), kMaxPassRows));
  const int64_t group_rows = blocks.count == 1 ? smaller(kQueriesAtOnce * kElements, pass_rows) : pass_rows;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const int64_t flat = padded(pass_rows * kElements) + kLanes;

  Carver scratch{static_cast<char*>(thread_scratch(
      Steps::bytes(args, blocks, pass_rows, longest) + carved(pass_rows * row_floats) +
      3 * carved(group_rows * kLanes) + 5 * carved(flat) + carved((group_rows + kMaxElements) * sum_floats) +
      carved(bundle_panel_floats(group_rows, head_chunks)) + carved(bundle_panel_floats(keys, head_chunks)) +
      carved(bundle_panel_floats(keys, value_chunks)) +
      carved(pack_scratch(larger(args.head_size, args.value_size)))))};
  Steps steps(args, blocks, pass_rows, longest, scratch);
  float* scores = scratch.floats(pass_rows * row_floats);
  float* row_maxima = scratch.floats(group_rows * kLanes);
  float* row_totals = scratch.floats(group_rows * kLanes);
  float* row_divisors = scratch.floats(group_rows * kLanes);
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
  float* pack = scratch.floats(pack_scratch(larger(args.head_size, args.value_size)));

  pack_rows<kElements>(args.key, args.dtype, bundle, key_head, 0, keys, args.head_size, kStorage, key_extra, key, pack);
  for (int64_t pass = begin; pass < end; pass += pass_rows) {
    const int64_t rows = smaller(pass_rows, end - pass);
    steps.take(head * args.plan.num_queries + pass, rows, group_rows);
    for (int64_t i = 0; i < flat; i += kLanes) {
      store(totals + i, broadcast(1.0f));
      store(divisors + i, broadcast(1.0f));
    }

    for (int64_t row = 0; row < rows; row += group_rows) {
      const int64_t count = smaller(group_rows, rows - row), n = pass + row - offset, group = row / group_rows;
      pack_rows<kElements>(args.query, args.dtype, bundle, h, n, n + count, args.head_size, kStorage, query_extra,
                           query, pack);
      for (int64_t r = 0; r < count; ++r) store(row_maxima + r * kLanes, broadcast(-kInfinity));
      for (int e = 0; e < kElements; ++e) {
        const int64_t b = bundle.b[e], done = pass + row - begin;
        prefetch_rows(args.query, args.dtype, b, h, n + count, smaller(n + 2 * count, end - offset), args.head_size);
        prefetch_rows(args.value, args.dtype, b, key_head, done, smaller(done + count, keys), args.value_size);
      }
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t first = steps.first(group, block);
        DotsTask task{};
        task.begin = steps.step(first);
        task.end = steps.step(steps.first(group, block + 1));
        task.out = scores + first * kLanes;
        task.scale = static_cast<float>(args.scale * kLog2E);
        task.fill = -kInfinity;
        task.maxima = row_maxima;
        dots<kStorage, kElements>(task, query, key, blocks.first(block) / kPlanBlock * kPlanBlock);
      }
      for (int64_t r = 0; r < count; ++r) {
        float* maximum = row_maxima + r * kLanes;
        store(maximum, reduce_lanes<kElements>(load(maximum), [](Vec a, Vec b) { return max(a, b); }));
        for (int e = 0; e < kElements; ++e) maxima[e * rows + row + r] = maximum[e * kBlock];
      }
      const int64_t first = steps.first(group, 0);
      exp2_steps(scores + first * kLanes, row_maxima, steps.step(first), steps.step(steps.first(group + 1, 0)));
    }
    if (pass == begin) {
      pack_rows<kElements>(args.value, args.dtype, bundle, key_head, 0, keys, args.value_size, kStorage, Extra::kNone,
                           value, pack);
    }

    for (int64_t row = 0; row < rows; row += group_rows) {
      const int64_t count = smaller(group_rows, rows - row), n = pass + row - offset, group = row / group_rows;
      for (int e = 0; e < kElements; ++e) {
        const int64_t done = pass + row - begin;
        prefetch_rows_for_writing(result.output, args.dtype, bundle.b[e], h, n + count,
                                  smaller(n + 2 * count, end - offset), args.value_size);
        if (next_h >= 0 && e < next.elements) {
          prefetch_rows(args.key, args.dtype, next.b[e], next_h / shared_heads(args), done,
                        smaller(done + count, args.keys), args.head_size);
        }
      }
      for (int64_t i = 0; i < count * sum_floats; i += kLanes) store(sums + i, zero());
      for (int64_t i = 0; i < count * kLanes; i += kLanes) {
        store(row_totals + i, zero());
        store(row_divisors + i, zero());
      }
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t first = steps.first(group, block), last = steps.first(group, block + 1);
        const int64_t base = blocks.first(block) / kPlanBlock * kPlanBlock;
        if (args.values != nullptr || dropout.active()) {
          for (int64_t i = first; i < last; ++i) {
            const Step& step = *steps.step(i);
            float* p = scores + i * kLanes;
            if (args.values != nullptr) {
              store(p, mul(load(p), entry_register<kElements>(steps.weights(i), step.count)));
            }
            if (!dropout.active()) continue;
            float* total = row_totals + step.row * kLanes;
            store(total, add(load(total), load(p)));
            for (int64_t k = 0; k < step.count; ++k) {
              for (int e = 0; e < kElements; ++e) {
                p[lane_of<kElements>(k, e)] *=
                    static_cast<float>(dropout.factor(bundle.b[e], h, pass + row + step.row, base + step.index[k]));
              }
            }
          }
        }
        SumsTask task{};
        task.begin = steps.step(first);
        task.end = steps.step(last);
        task.weights = scores + first * kLanes;
        task.sums = sums;
        task.sums_stride = sum_floats;
        task.totals = dropout.active() ? nullptr : row_totals;
        task.rounded_totals = row_divisors;
        weighted_sums<kStorage, kElements>(task, value, base);
      }
      const auto reduce = [&](const float* lanes, float* target) {
        for (int64_t r = 0; r < count; ++r) {
          alignas(64) float total[kLanes];
          store(total, reduce_lanes<kElements>(load(lanes + r * kLanes), [](Vec a, Vec b) { return add(a, b); }));
          for (int e = 0; e < kElements; ++e) target[e * rows + row + r] = total[e * kBlock];
        }
      };
      reduce(row_totals, totals);
      if (divisors != totals) reduce(row_divisors, divisors);
      for (int e = 0; e < kElements; ++e) {
        const int64_t at = e * rows + row;
        normalise(maxima + at, totals + at, divisors + at, count, logsumexp + e * rows, factors + e * rows);
        std::memcpy(static_cast<float*>(result.logsumexp) + (bundle.b[e] * args.query_heads + h) * args.queries + n,
                    logsumexp + e * rows, count * sizeof(float));
      }
      unpack_rows<kStorage, kElements>(sums, sum_floats, factors, rows, result.output, args.dtype, bundle, h, n, count,
                                       args.value_size, pack);
    }
  }
}

/// The weights of backward that a register's entries have, and which of them are outside the support.
struct EntryWeights {
  Vec weights;
  uint32_t outside;  // a bit for each entry
};
template <int kElements>
FIAK_INLINE EntryWeights entry_weights(const float* weights, int64_t count) {
  uint32_t outside = 0;
  for (int64_t k = 0; k < count; ++k) outside |= static_cast<uint32_t>(!in_support(weights[k])) << k;
  return {entry_register<kElements>(weights, count), outside};
}

/// A register whose entries all have their element's number, values[e].
template <int kElements>
FIAK_INLINE void spread_elements(const float* values, float* target) {
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) {
    _mm_store_ps(target + block * kBlock, _mm_set1_ps(values[block % kElements]));
  }
}

/// Backward runs in waves. A wave is a bundle, a few key heads, one query head of each, a chunk of its queries and a
/// block of its keys. First the columns' lists of steps are made; then the rows compute P and dS, dQ and the weights'
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
        head_chunks_(row_chunks(columns_with(query_extra(), args.head_size, kStorage), kStorage, kElements)),
        value_chunks_(row_chunks(args.value_size, kStorage, kElements)),
        head_floats_(sum_vectors(head_chunks_, kStorage) * kLanes),
        value_floats_(sum_vectors(value_chunks_, kStorage) * kLanes),
        chunks_(args.plan.num_queries, larger(head_chunks_, value_chunks_) * kVectorBytes, kMostTileSize),
        blocks_(args.keys, larger(head_chunks_, value_chunks_) * kVectorBytes, kMostTileSize) {
    const PlanView& plan = args.plan;
    for (int64_t head = 0; head < plan.heads; ++head) {
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        const int64_t* rows = plan.row_segments + head * plan.num_queries * plan.key_blocks;
        most_entries_ = larger(
            most_entries_, rows[chunks_.end(chunk) * plan.key_blocks] - rows[chunks_.first(chunk) * plan.key_blocks]);
      }
    }
    chunk_rows_ = smaller(chunks_.size, args.queries);
    most_entries_ = smaller(most_entries_, chunk_rows_ * blocks_.size);
    most_steps_ = most_entries_ / kKeys<kElements> + larger(blocks_.size, chunk_rows_);
  }

  /// Memory for each key head of a wave.
  int64_t slot_bytes() const {
    return carved(bundle_panel_floats(args_.keys, head_chunks_)) +
           carved(bundle_panel_floats(args_.keys, value_chunks_)) +
           carved(bundle_panel_floats(chunk_rows_, head_chunks_)) +
           carved(bundle_panel_floats(chunk_rows_, value_chunks_)) +
           carved((args_.keys + kMaxElements) * head_floats_) + carved((args_.keys + kMaxElements) * value_floats_) +
           carved((chunk_rows_ + kMaxElements) * head_floats_) + carved(chunk_rows_ * kLanes) + carved(args_.keys * 2) +
           carved(chunk_rows_ * 2) + carved(blocks_.size) + carved(most_steps_ * 4) +
           carved(blocks_.size * kLanes / 2) + carved((column_groups(blocks_.size) + 1) * 2) +
           2 * carved(most_steps_ * kLanes);
  }

  /// All of `bundle` for key heads [first, first + count), in count * slot_bytes() bytes at `memory`.
  void run(const Bundle& bundle, int64_t first, int64_t count, const Parallel& parallel, char* memory) const {
    const auto slot = [&](int64_t i) { return make_slot(memory + i * slot_bytes()); };
    const int64_t heads = shared_heads(args_), keys = keys_of(args_, bundle.b[0]),
                  offset = offset_of(args_, bundle.b[0]);
    parallel_range(parallel, count * args_.keys, [&](int64_t begin, int64_t end) {
      for_parts(begin, end, args_.keys,
                [&](int64_t i, int64_t from, int64_t to) { start(slot(i), bundle, first + i, from, to); });
    });
    for (int64_t member = 0; member < heads; ++member) {
      for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
        const int64_t begin = larger(chunks_.first(chunk), offset);
        const int64_t end = smaller(chunks_.end(chunk), offset + args_.queries);
        if (begin >= end) continue;
        const auto head = [&](int64_t i) { return (first + i) * heads + member; };
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
          const int64_t column_parts = column_groups(tile.key_end - tile.key);
          parallel_range(parallel, count * column_parts, [&](int64_t from, int64_t to) {
            for_parts(from, to, column_parts,
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
                [&](int64_t i, int64_t from, int64_t to) { finish(slot(i), bundle, first + i, keys, from, to); });
    });
  }

 private:
  static constexpr int64_t kColumnGroup = 32;  // columns that a thread takes at once
  static constexpr int64_t kMostTileSize =
      320;  // queries and keys of a wave, so that its P and dS stay in the L2 cache

  /// Pattern rows [row, row_end) and keys [key, key_end), both within one block of the plan.
  struct Tile {
    int64_t row, row_end, key, key_end;
  };

  struct Slot {
    BundlePanel key, value;          // all keys
    BundlePanel query, grad_output;  // the queries of a chunk
    float *grad_key, *grad_value;    // sums for all keys
    float* grad_query;               // sums for the queries of a chunk
    float* deltas;                   // dO . O of the queries of a chunk, a register each
    int64_t* column_cursors;         // [keys]: the first entry of a column that no chunk has had yet
    int64_t* row_cursors;            // [queries of a chunk]: the first entry of a row that no block has had yet
    uint32_t* places;                // [keys of a block]: where in `attention` a column's first entry goes, in floats
    Step* steps;                     // of the columns
    uint16_t* spare;
    int64_t* bounds;                 // [column groups + 1]: the first step of a group
    float *attention, *grad_scores;  // P and dS in registers for the steps
  };

  Extra query_extra() const { return gaussian_ ? Extra::kOne : Extra::kNone; }
  bool columns_wanted() const { return grads_.grad_key.data != nullptr || grads_.grad_value.data != nullptr; }
  static int64_t column_groups(int64_t keys) { return (keys + kColumnGroup - 1) / kColumnGroup; }
  int64_t plan_head(const Bundle& bundle, int64_t h) const {
    return bundle.b[0] % (args_.plan.heads / args_.query_heads) * args_.query_heads + h;
  }

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
    x.deltas = carver.floats(chunk_rows_ * kLanes);
    x.column_cursors = reinterpret_cast<int64_t*>(carver.floats(args_.keys * 2));
    x.row_cursors = reinterpret_cast<int64_t*>(carver.floats(chunk_rows_ * 2));
    x.places = reinterpret_cast<uint32_t*>(carver.floats(blocks_.size));
    x.steps = reinterpret_cast<Step*>(carver.floats(most_steps_ * 4));
    x.spare = reinterpret_cast<uint16_t*>(carver.floats(blocks_.size * kLanes / 2));
    x.bounds = reinterpret_cast<int64_t*>(carver.floats((column_groups(blocks_.size) + 1) * 2));
    x.attention = carver.floats(most_steps_ * kLanes);
    x.grad_scores = carver.floats(most_steps_ * kLanes);
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
      pack_rows<kElements>(args_.key, args_.dtype, bundle, key_head, begin, last, args_.head_size, kStorage,
                           gaussian_ ? Extra::kHalfSquare : Extra::kNone, x.key.from(begin), scratch);
      pack_rows<kElements>(args_.value, args_.dtype, bundle, key_head, begin, last, args_.value_size, kStorage,
                           Extra::kNone, x.value.from(begin), scratch);
    }
    std::memset(x.grad_key + begin * head_floats_, 0, (end - begin) * head_floats_ * sizeof(float));
    std::memset(x.grad_value + begin * value_floats_, 0, (end - begin) * value_floats_ * sizeof(float));
  }

  /// The steps of a tile's columns, and a place for each entry.
  void list_columns(const Slot& x, const Bundle& bundle, int64_t h, const Tile& tile) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h), part = tile.row / kPlanBlock, base = part * kPlanBlock;
    const bool first = tile.row == offset_of(args_, bundle.b[0]) || tile.row == base;
    Step* step = x.steps;
    uint16_t* spare = x.spare;
    for (int64_t j = tile.key; j < tile.key_end; ++j) {
      const int64_t column = j - tile.key;
      if (column % kColumnGroup == 0) x.bounds[column / kColumnGroup] = step - x.steps;
      const int64_t* segment = plan.column_segments + (head * plan.num_keys + j) * plan.query_blocks + part;
      if (first) {
        x.column_cursors[j] =
            segment[0] + count_below(plan.rows + segment[0], segment[1] - segment[0], tile.row - base);
      }
      const uint16_t* index = plan.rows + x.column_cursors[j];
      const int64_t count = count_below(index, segment[1] - x.column_cursors[j], tile.row_end - base);
      x.column_cursors[j] += count;
      x.places[column] = static_cast<uint32_t>((step - x.steps) * kLanes);
      step = append_steps<kElements>(index, count, column % kColumnGroup, step, spare);
      if (count % kKeys<kElements> != 0) {  // what stands behind a column's last entry
        store(x.attention + (step - 1 - x.steps) * kLanes, zero());
        store(x.grad_scores + (step - 1 - x.steps) * kLanes, zero());
      }
    }
    x.bounds[column_groups(tile.key_end - tile.key)] = step - x.steps;
  }

  int64_t pack_bytes() const { return carved(pack_scratch(larger(args_.head_size, args_.value_size))); }

  /// Packs pattern rows [begin, end) of the chunk that starts at `chunk`; no sums yet.
  void start_rows(const Slot& x, const Bundle& bundle, int64_t h, int64_t chunk, int64_t begin, int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t offset = offset_of(args_, bundle.b[0]), first = begin - chunk;
    const int64_t room = padded(args_.value_size);
    Carver carver{static_cast<char*>(thread_scratch(pack_bytes() + 2 * carved(room) + carved(kElements)))};
    float* scratch = carver.floats(pack_bytes() / 4);
    float* grad_output = carver.floats(room);
    float* output = carver.floats(room);
    pack_rows<kElements>(args_.query, args_.dtype, bundle, h, begin - offset, end - offset, args_.head_size, kStorage,
                         query_extra(), x.query.from(first), scratch);
    pack_rows<kElements>(grads_.grad_output, args_.dtype, bundle, h, begin - offset, end - offset, args_.value_size,
                         kStorage, Extra::kNone, x.grad_output.from(first), scratch);
    const int64_t* segments = plan.row_segments + (plan_head(bundle, h) * plan.num_queries + begin) * plan.key_blocks;
    for (int64_t r = 0; r < end - begin; ++r) x.row_cursors[first + r] = segments[r * plan.key_blocks];
    float* sums = x.grad_query + first * head_floats_;
    for (int64_t i = 0; i < (end - begin) * head_floats_; i += kLanes) store(sums + i, zero());
    for (int64_t n = begin - offset; n < end - offset; ++n) {
      float delta[kElements];
      for (int e = 0; e < kElements; ++e) {
        const int64_t ahead = smaller(n + 8, end - offset - 1);
        prefetch_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, ahead),
                     args_.value_size * element_size(args_.dtype));
        load_row(row_address(grads_.grad_output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_size, 1.0f,
                 grad_output);
        load_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_size, 1.0f,
                 output);
        delta[e] = dot(grad_output, output, room);
      }
      spread_elements<kElements>(delta, x.deltas + (n + offset - chunk) * kLanes);
    }
  }

  void finish_rows(const Slot& x, const Bundle& bundle, int64_t h, int64_t chunk, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    Carver scratch{static_cast<char*>(thread_scratch(carved(count * kElements) + pack_bytes()))};
    float* factors = scratch.floats(count * kElements);
    for (int64_t i = 0; i < count * kElements; ++i) factors[i] = static_cast<float>(args_.scale);
    unpack_rows<kStorage, kElements>(x.grad_query + (begin - chunk) * head_floats_, head_floats_, factors, count,
                                     grads_.grad_query, args_.dtype, bundle, h, begin - offset_of(args_, bundle.b[0]),
                                     count, args_.head_size, scratch.floats(pack_bytes() / 4));
  }

  /// Pattern rows [begin, end) of a tile.
  void rows(const Slot& x, const Bundle& bundle, int64_t h, const Tile& tile, int64_t begin, int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h), offset = offset_of(args_, bundle.b[0]);
    const int64_t part = tile.key / kPlanBlock, base = part * kPlanBlock, columns = tile.key_end - tile.key;
    const auto* values = static_cast<const float*>(args_.values);
    const int64_t row_steps = (columns + kKeys<kElements> - 1) / kKeys<kElements>;  // at most
    const int64_t pass_rows = larger(1, smaller(end - begin, kScoreBuffer / 2 / (row_steps * kLanes)));
    const int64_t most = pass_rows * row_steps;
    Carver scratch{static_cast<char*>(thread_scratch(carved(most * 4) + carved(values != nullptr ? most * 2 : 0) +
                                                     carved(pass_rows * kLanes / 2) + 2 * carved(most * kLanes) +
                                                     carved(pass_rows * kLanes) + carved(columns) +
                                                     carved(values != nullptr ? most * kLanes / 2 : 0)))};
    auto* steps = reinterpret_cast<Step*>(scratch.floats(most * 4));
    auto** weights = reinterpret_cast<const float**>(scratch.floats(values != nullptr ? most * 2 : 0));
    auto* spare = reinterpret_cast<uint16_t*>(scratch.floats(pass_rows * kLanes / 2));
    float* scores = scratch.floats(most * kLanes);
    float* products = scratch.floats(most * kLanes);
    float* shifts = scratch.floats(pass_rows * kLanes);
    auto* places = reinterpret_cast<uint32_t*>(scratch.floats(columns));
    auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(values != nullptr ? most * kLanes / 2 : 0));
    if (columns_wanted()) first_places(x, head, tile, begin, places);
    const int64_t first_index = tile.key - base;

    for (int64_t pass = begin; pass < end; pass += pass_rows) {
      const int64_t count = smaller(pass_rows, end - pass), first = pass - tile.row;
      const float* deltas = x.deltas + first * kLanes;
      Step* last = steps;
      uint16_t* free_spare = spare;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t* segment = plan.row_segments + (head * plan.num_queries + pass + r) * plan.key_blocks + part;
        int64_t& cursor = x.row_cursors[first + r];
        const int64_t entries = count_below(plan.columns + cursor, segment[1] - cursor, tile.key_end - base);
        Step* from = last;
        last = append_steps<kElements>(plan.columns + cursor, entries, r, last, free_spare);
        for (Step* step = from; values != nullptr && step < last; ++step) {
          weights[step - steps] = values + cursor + (step - from) * kKeys<kElements>;
        }
        cursor += entries;
        float shift[kElements];
        for (int e = 0; e < kElements; ++e) {
          const int64_t at = (bundle.b[e] * args_.query_heads + h) * args_.queries + pass + r - offset;
          const float lse = static_cast<const float*>(grads_.logsumexp)[at];
          shift[e] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // no entry counts where there is no support
        }
        spread_elements<kElements>(shift, shifts + r * kLanes);
      }
      DotsTask task{};
      task.begin = steps;
      task.end = last;
      task.out = scores;
      task.scale = static_cast<float>(args_.scale * kLog2E);
      task.fill = -kInfinity;
      dots<kStorage, kElements>(task, x.query.from(first), x.key, base);
      task.out = products;
      task.scale = 1.0f;
      task.fill = 0.0f;
      dots<kStorage, kElements>(task, x.grad_output.from(first), x.value, base);
      if (values == nullptr && !dropout_.active()) {
        for (int64_t i = 0; i < last - steps; ++i) {
          const int64_t row = steps[i].row * kLanes;
          const Vec p = exp2(sub(load(scores + i * kLanes), load(shifts + row)));
          store(scores + i * kLanes, p);
          store(products + i * kLanes, mul(p, sub(load(products + i * kLanes), load(deltas + row))));
        }
        for (int64_t i = 0; columns_wanted() && i < last - steps; ++i) {
          for (int64_t k = 0; k < steps[i].count; ++k) {
            leave(x, places[steps[i].index[k] - first_index], k, scores + i * kLanes, products + i * kLanes);
          }
        }
      } else {
        last = weigh(x, steps, last, weights, bundle, h, pass, base, scores, products, shifts, deltas, picked, places,
                     first_index);
      }
      if (grads_.grad_query.data == nullptr) continue;
      SumsTask sum{};
      sum.begin = steps;
      sum.end = last;
      sum.weights = products;
      sum.sums = x.grad_query + first * head_floats_;
      sum.sums_stride = head_floats_;
      weighted_sums<kStorage, kElements>(sum, x.key, base);
    }
  }

  /// Where the entries of a tile's columns go that are of pattern row `row` or later.
  void first_places(const Slot& x, int64_t head, const Tile& tile, int64_t row, uint32_t* places) const {
    const PlanView& plan = args_.plan;
    const int64_t part = tile.row / kPlanBlock, base = part * kPlanBlock;
    for (int64_t j = tile.key; j < tile.key_end; ++j) {
      uint32_t& place = places[j - tile.key];
      place = x.places[j - tile.key];
      if (row == tile.row) continue;
      const int64_t* segment = plan.column_segments + (head * plan.num_keys + j) * plan.query_blocks + part;
      const int64_t first = search_below(plan.rows + segment[0], segment[1] - segment[0], tile.row - base);
      const int64_t done = count_below(plan.rows + segment[0] + first, segment[1] - segment[0] - first, row - base);
      place += static_cast<uint32_t>(done / kKeys<kElements> * kLanes + lane_of<kElements>(done % kKeys<kElements>, 0));
    }
  }

  /// Leaves P and dS of entry k of a step where its column's next entry stands.
  __attribute__((always_inline)) static void leave(const Slot& x, uint32_t& next, int64_t k, const float* p,
                                                   const float* ds) {
    const uint32_t place = next;
    // The next entry of an element stands in the next lane of its block, or in its next block.
    next = place + 1 + (place % kBlock == kBlock - 1 ? kBlock * (kElements - 1) : 0);
    const int64_t lane = lane_of<kElements>(k, 0);
#pragma GCC unroll 4
    for (int e = 0; e < kElements; ++e) {
      x.attention[place + e * kBlock] = p[lane + e * kBlock];
      x.grad_scores[place + e * kBlock] = ds[lane + e * kBlock];
    }
  }

  /// P, dS and the weights' gradient for the steps where there are values or dropout. Steps without support are taken
  /// out of the list, and entries without support out of the others, because nothing may touch their rows; returns the
  /// new end of the list. `picked` has room for the indices of every step.
  Step* weigh(const Slot& x, Step* steps, Step* last, const float* const* entry_values, const Bundle& bundle, int64_t h,
              int64_t pass, int64_t base, float* scores, float* products, const float* shifts, const float* deltas,
              uint16_t* picked, uint32_t* places, int64_t first_index) const {
    const auto* values = static_cast<const float*>(args_.values);
    auto* grad_values = static_cast<float*>(grads_.grad_weight);
    alignas(64) float outside_mark[kLanes];  // P is -1 where the columns must not touch a row
    store(outside_mark, broadcast(-1.0f));
    int64_t kept = 0;
    for (int64_t i = 0; i < last - steps; ++i) {
      const Step step = steps[i];
      float *s = scores + i * kLanes, *a = products + i * kLanes;
      float *p = scores + kept * kLanes, *ds = products + kept * kLanes;
      const Vec shift = load(shifts + step.row * kLanes);
      alignas(64) float factors[kLanes];
      if (dropout_.active()) {
        store(factors, zero());
        for (int64_t k = 0; k < step.count; ++k) {
          for (int e = 0; e < kElements; ++e) {
            factors[lane_of<kElements>(k, e)] =
                static_cast<float>(dropout_.factor(bundle.b[e], h, pass + step.row, base + step.index[k]));
          }
        }
        store(a, mul(load(a), load(factors)));
      }
      const Vec unweighted = exp2(sub(load(s), shift));
      Vec grad = mul(unweighted, sub(load(a), load(deltas + step.row * kLanes)));
      Vec attention = unweighted;
      uint32_t outside = 0;
      if (values != nullptr) {
        const float* weights = entry_values[i];
        if (grad_values != nullptr) {
          alignas(64) float each[kLanes];
          store(each, grad);
          float* target = grad_values + (weights - values);
          for (int64_t k = 0; k < step.count; ++k) {
            float sum = 0;
            for (int e = 0; e < kElements; ++e) {
              // Of a row without support nothing counts, not even NaN.
              const int64_t lane = lane_of<kElements>(k, e);
              if (shifts[step.row * kLanes + e * kBlock] != kInfinity) sum += each[lane];
            }
            target[k] += sum;
          }
        }
        const EntryWeights w = entry_weights<kElements>(weights, step.count);
        outside = w.outside;
        grad = mul(grad, w.weights);
        attention = mul(attention, w.weights);
      }
      if (dropout_.active()) attention = mul(attention, load(factors));
      store(p, attention);
      store(ds, grad);
      steps[kept] = step;
      const uint32_t all = (1u << step.count) - 1;
      if (outside != 0 && outside != all) {
        const uint16_t inside = step.index[__builtin_ctz(~outside)];
        for (int64_t k = 0; k < kKeys<kElements>; ++k) {
          const bool out = k >= step.count || (outside >> k & 1) != 0;
          picked[k] = out ? inside : step.index[k];
          for (int e = 0; out && e < kElements; ++e) p[lane_of<kElements>(k, e)] = ds[lane_of<kElements>(k, e)] = 0.0f;
        }
        steps[kept].index = picked;
        picked += kLanes;
      }
      if (outside != all) ++kept;
      for (int64_t k = 0; columns_wanted() && k < step.count; ++k) {
        const bool out = (outside >> k & 1) != 0;
        leave(x, places[step.index[k] - first_index], out ? 0 : k, out ? outside_mark : p, out ? outside_mark : ds);
      }
    }
    return steps + kept;
  }

  /// Takes entries outside the support out of the columns' steps [first, last); returns the new end of the list.
  int64_t drop_outside(const Slot& x, int64_t first, int64_t last, uint16_t* spare) const {
    int64_t kept = first;
    for (int64_t i = first; i < last; ++i) {
      const Step step = x.steps[i];
      const float* p = x.attention + i * kLanes;
      uint32_t outside = 0;
      for (int64_t k = 0; k < step.count; ++k) {
        outside |= static_cast<uint32_t>(p[lane_of<kElements>(k, 0)] == -1.0f) << k;
      }
      if (outside == (1u << step.count) - 1) continue;
      Vec attention = load(p), grad = load(x.grad_scores + i * kLanes);
      x.steps[kept] = step;
      if (outside != 0) {
        alignas(64) float a[kLanes], g[kLanes];
        store(a, attention);
        store(g, grad);
        const uint16_t inside = step.index[__builtin_ctz(~outside)];
        for (int64_t k = 0; k < kKeys<kElements>; ++k) {
          const bool out = k >= step.count || (outside >> k & 1) != 0;
          spare[k] = out ? inside : step.index[k];
          for (int e = 0; out && e < kElements; ++e) a[lane_of<kElements>(k, e)] = g[lane_of<kElements>(k, e)] = 0.0f;
        }
        attention = load(a);
        grad = load(g);
        x.steps[kept].index = spare;
        spare += kLanes;
      }
      store(x.attention + kept * kLanes, attention);
      store(x.grad_scores + kept * kLanes, grad);
      ++kept;
    }
    return kept;
  }

  /// Adds a tile to dK and dV of its column groups [begin, end).
  void columns(const Slot& x, const Tile& tile, int64_t begin, int64_t end) const {
    const int64_t row = tile.row / kPlanBlock * kPlanBlock - tile.row;  // of the panels, where index 0 would be
    const auto* values = static_cast<const float*>(args_.values);
    auto* spare = static_cast<uint16_t*>(
        thread_scratch(values != nullptr ? (x.bounds[end] - x.bounds[begin]) * kLanes * 2 + 8 * (end - begin) : 0));
    // The end of each group's steps, where some are taken out.
    auto* ends = reinterpret_cast<int64_t*>(spare + (x.bounds[end] - x.bounds[begin]) * kLanes);
    for (int64_t group = begin; values != nullptr && group < end; ++group) {
      ends[group - begin] =
          drop_outside(x, x.bounds[group], x.bounds[group + 1], spare + (x.bounds[group] - x.bounds[begin]) * kLanes);
    }
    const auto add_up = [&](const float* weights, const BundlePanel& panel, float* sums, int64_t stride) {
      for (int64_t group = begin; group < end; ++group) {
        SumsTask task{};
        task.begin = x.steps + x.bounds[group];
        task.end = x.steps + (values != nullptr ? ends[group - begin] : x.bounds[group + 1]);
        task.weights = weights + x.bounds[group] * kLanes;
        task.sums = sums + (tile.key + group * kColumnGroup) * stride;
        task.sums_stride = stride;
        weighted_sums<kStorage, kElements>(task, panel, row);
      }
    };
    if (grads_.grad_value.data != nullptr) add_up(x.attention, x.grad_output, x.grad_value, value_floats_);
    if (grads_.grad_key.data != nullptr) add_up(x.grad_scores, x.query, x.grad_key, head_floats_);
  }

  /// Stores dK and dV of keys [begin, end).
  void finish(const Slot& x, const Bundle& bundle, int64_t key_head, int64_t keys, int64_t begin, int64_t end) const {
    const int64_t count = end - begin, room = padded(args_.head_size + 1);
    Carver scratch{static_cast<char*>(
        thread_scratch(2 * carved(count * kElements) + carved(kElements * room) + carved(room) + pack_bytes()))};
    float* ones = scratch.floats(count * kElements);
    float* scales = scratch.floats(count * kElements);
    float* sums = scratch.floats(kElements * room);
    float* key = scratch.floats(room);
    float* pack = scratch.floats(pack_scratch(larger(args_.head_size, args_.value_size)));
    for (int64_t i = 0; i < count * kElements; ++i) {
      ones[i] = 1.0f;
      scales[i] = static_cast<float>(args_.scale);
    }
    if (grads_.grad_value.data != nullptr) {
      unpack_rows<kStorage, kElements>(x.grad_value + begin * value_floats_, value_floats_, ones, count,
                                       grads_.grad_value, args_.dtype, bundle, key_head, begin, count, args_.value_size,
                                       pack);
    }
    if (grads_.grad_key.data == nullptr) return;
    if (!gaussian_) {
      return unpack_rows<kStorage, kElements>(x.grad_key + begin * head_floats_, head_floats_, scales, count,
                                              grads_.grad_key, args_.dtype, bundle, key_head, begin, count,
                                              args_.head_size, pack);
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
        const float score_sum = sum[args_.head_size];
        if (j < keys && score_sum != 0.0f) {
          load_row(row_address(args_.key, args_.dtype, bundle.b[e], key_head, j), args_.dtype, args_.head_size, 1.0f,
                   key);
          for (int64_t d = 0; d < args_.head_size; ++d) sum[d] -= score_sum * key[d];
        }
        store_row(sum, args_.dtype, args_.head_size, static_cast<float>(args_.scale),
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
  int64_t chunk_rows_ = 0, most_entries_ = 0, most_steps_ = 0;
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
      const int64_t head_row = (bundle.b[0] % bundles.groups * heads + h) * plan.num_queries;
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
  const int64_t per_group = args.batch / larger(1, args.plan.heads / larger(1, args.query_heads));
  for (int elements = kMaxElements; elements > 1; elements /= 2) {
    const int64_t chunks = row_chunks(larger(args.head_size, args.value_size), storage, elements);
    if (per_group >= elements && smaller(args.keys, 200) * chunks * kVectorBytes <= kBundleBytes) return elements;
  }
  return 1;
}

/// All waves with bundles of kElements.
template <Storage kStorage, int kElements>
void backward_bundles(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel, const Bundles& bundles,
                      int64_t elements) {
  const CsrBackward<kStorage, kElements> backward(args, grads);
  const auto mine = [&](const Bundle& bundle) { return bundle.elements == elements; };
  int64_t count = 0;
  for (int64_t i = 0; i < bundles.count; ++i) count += mine(bundles.at(i));
  if (count == 0) return;
  // A bundle and key head is one thread's where there are enough of them; a weight's gradient sums over bundles.
  const int64_t units = count * args.key_heads, threads = larger(1, parallel.threads);
  const bool alone =
      grads.grad_weight == nullptr && units >= threads && (units + threads - 1) / threads * threads * 10 <= units * 11;
  const SharedScratch memory((alone ? threads : args.key_heads) * backward.slot_bytes() + 64);
  char* slots = static_cast<char*>(memory.data());
  slots += (64 - reinterpret_cast<uintptr_t>(slots) % 64) % 64;
  if (!alone) {
    for (int64_t i = 0; i < bundles.count; ++i) {
      if (mine(bundles.at(i))) backward.run(bundles.at(i), 0, args.key_heads, parallel, slots);
    }
    return;
  }
  const int64_t all = bundles.count * args.key_heads;
  parallel_range(parallel, threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t unit = 0;
      for (int64_t i = 0; i < all; ++i) {
        const Bundle bundle = bundles.at(i / args.key_heads);
        if (!mine(bundle)) continue;
        if (unit * threads / units == thread) {
          backward.run(bundle, i % args.key_heads, 1, Parallel{}, slots + thread * backward.slot_bytes());
        }
        ++unit;
      }
    }
  });
}

template <Storage kStorage>
void backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const Bundles bundles(args, bundled_elements(args, kStorage));
  if (args.batch == 0 || args.key_heads == 0) return;
  if (bundles.elements == kMaxElements) {
    backward_bundles<kStorage, kMaxElements>(args, grads, parallel, bundles, kMaxElements);
  }
  if (kMaxElements > 2 && bundles.elements == 2) {
    backward_bundles<kStorage, 2>(args, grads, parallel, bundles, 2);
  }
  backward_bundles<kStorage, 1>(args, grads, parallel, bundles, 1);
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
                    if (costs.is_dense(bundle.b[0], h)) {
                      forward_dense(args, result, bundle, h, begin, end, next, next_h);
                    } else if (bundle.elements == 1) {
                      forward_rows<kStorage, 1>(args, result, bundle, h, begin, end, longest, next, next_h);
                    } else if (bundle.elements == 2) {
                      forward_rows<kStorage, 2>(args, result, bundle, h, begin, end, longest, next, next_h);
                    } else {
                      forward_rows<kStorage, kMaxElements>(args, result, bundle, h, begin, end, longest, next, next_h);
                    }
                  });
}

#if defined(FIAK_ISA_AVX512_BF16)
/// bfloat16 rows that fill half a register or less are faster as float32, which takes no more of it.
Storage csr_storage(const CsrArgs& args) {
  if (args.dtype != DType::kBFloat16) return Storage::kFloat32;
  const bool half =
      larger(args.head_size, args.value_size) * 2 * bundled_elements(args, Storage::kBFloat16) * 2 <= kVectorBytes;
  return half ? Storage::kFloat32 : Storage::kBFloat16;
}
#endif

}  // namespace

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  if (is_decoding(args)) return csr_decode(args, result, parallel);
#if defined(FIAK_ISA_AVX512_BF16)
  if (csr_storage(args) == Storage::kBFloat16) return forward<Storage::kBFloat16>(args, result, parallel);
#endif
  forward<Storage::kFloat32>(args, result, parallel);
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const PlanView& plan = args.plan;
  if (grads.grad_weight != nullptr) std::memset(grads.grad_weight, 0, plan.nnz * sizeof(float));
#if defined(FIAK_ISA_AVX512_BF16)
  if (csr_storage(args) == Storage::kBFloat16) return backward<Storage::kBFloat16>(args, grads, parallel);
#endif
  backward<Storage::kFloat32>(args, grads, parallel);
}

}  // namespace fiak::cpu::FIAK_ISA
