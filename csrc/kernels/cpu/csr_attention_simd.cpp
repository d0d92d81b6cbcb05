// csr_attention, vectorised: one query's entries at a time, on the rows of K and V that they name; forward, heads that
// keep most of their pairs run on the dense kernel (csr_dense.h) instead.
//
// Two passes over many queries, first on the keys and then on the values, so that each has the L1 cache for itself.
// Within the first, a few queries' scores are exponentiated in one stream: exp's long dependency chains then overlap
// with nothing that waits for them. A sparse row's accesses are too irregular for the hardware to foresee, so each pass
// prefetches into the L2 cache what the next one reads. Threads split the work by entries; where the weights' gradient
// is wanted they split the pattern's rows and run the batch inside, so that it needs no atomics.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/csr_dense.h"
#include "kernels/cpu/sparse_rows.h"
#include "kernels/cpu/sparse_rows_old.h"
#include "kernels/cpu/tables.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kRowCost = 16;             // what a row costs beside its entries, in entries
constexpr int64_t kScoreBuffer = 64 * 1024;  // floats of scores between the two passes, which stay in the L2 cache
constexpr int64_t kQueriesAtOnce = 8;        // queries whose scores are exponentiated in one go, in the L1 cache
constexpr int64_t kMaxPassRows = 4096;
constexpr int64_t kWholePanelBytes = 64 * 1024;  // up to this a head's packed rows are one block
constexpr int64_t kBlockBytes = 40 * 1024;       // of packed rows, to fit into the L1 cache
constexpr int64_t kBundleBytes = 52 * 1024;
constexpr int64_t kMinBlock = 96;  // keys: short runs cost more than they save

/// The first place in ascending index[0, count) whose value is at least `bound`.
int64_t lower_bound(const uint16_t* index, int64_t count, int64_t bound) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (index[middle] < bound) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

/// use(first, index, count, entry) for each run of a pattern row's entries whose columns are first + index[i] < keys.
template <class Use>
FIAK_INLINE void for_row_segments(const PlanView& plan, int64_t row, int64_t keys, Use&& use) {
  const int64_t* segment = plan.row_segments + row * plan.key_blocks;
  for (int64_t block = 0; block < plan.key_blocks; ++block) {
    const int64_t first = block * kPlanBlock;
    const uint16_t* index = plan.columns + segment[block];
    int64_t count = segment[block + 1] - segment[block];
    if (keys < plan.num_keys && keys - first < kPlanBlock) {
      count = keys > first ? lower_bound(index, count, keys - first) : 0;
    }
    if (count > 0) use(first, index, count, segment[block]);
  }
}

/// use(first, index, count, place) for each run of a pattern column's rows first + index[i] in [begin, end).
template <class Use>
FIAK_INLINE void for_column_segments(const PlanView& plan, int64_t column, int64_t begin, int64_t end, Use&& use) {
  const int64_t* segment = plan.column_segments + column * plan.query_blocks;
  for (int64_t block = 0; block < plan.query_blocks; ++block) {
    const int64_t first = block * kPlanBlock;
    int64_t from = segment[block], to = segment[block + 1];
    if (begin > 0 || end < plan.num_queries) {
      const uint16_t* index = plan.rows + from;
      const int64_t count = to - from;
      to = from + lower_bound(index, count, end - first);
      from = from + lower_bound(index, count, begin - first);
    }
    if (from < to) use(first, plan.rows + from, to - from, from);
  }
}

int64_t longest_row(const PlanView& plan, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* segment = plan.row_segments + row * plan.key_blocks;
    longest = larger(longest, segment[plan.key_blocks] - segment[0]);
  }
  return longest;
}

int64_t offset_of(const CsrArgs& args, int64_t b) { return args.query_offsets != nullptr ? args.query_offsets[b] : 0; }

bool in_support(float w) { return !(w <= 0); }  // true for NaN, which must reach its row

/// Copies the entries of the support: a pruned weight's key and value rows must not be touched.
int64_t pick_support(const float* values, const uint16_t* index, int64_t count, uint16_t* picked, float* weights) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    picked[kept] = index[i];
    weights[kept] = values[i];
    kept += in_support(values[i]);
  }
  return kept;
}

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
  /// Batch elements in the bundles before i.
  int64_t elements_before(int64_t i) const {
    const int64_t each = larger(1, count / groups), k = i % each;
    return i / each * per_group + (k < full ? k * elements : full * elements + (k - full));
  }
};

/// The keys of a head in blocks whose packed rows the L1 cache holds.
struct KeyBlocks {
  int64_t keys, size, count;

  KeyBlocks(int64_t keys, int64_t row_bytes) : keys(keys), size(keys), count(1) {
    if (keys * row_bytes <= kWholePanelBytes) return;
    size = larger(kMinBlock, kBlockBytes / row_bytes);
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

/// How many of the ascending index[0, count) are below `bound`. Reads up to 64 bytes behind the last.
int64_t count_below(const uint16_t* index, int64_t count, int64_t bound) {
  if (bound > 65535) return count;
  int64_t i = 0;
#if defined(FIAK_ISA_AVX512)
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(bound));
  for (; i < count; i += 32) {
    const uint32_t above = ~_mm512_cmplt_epu16_mask(_mm512_loadu_si512(index + i), limit);
    if (above != 0) return smaller(count, i + __builtin_ctz(above));
  }
#else
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(bound));
  for (; i < count; i += 16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i));
    const uint32_t above = _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
    if (above != 0) return smaller(count, i + __builtin_ctz(above) / 2);
  }
#endif
  return count;
}

bool all_in_support(const float* weights, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (!all_positive_or_nan(weights + i)) return false;
  }
  for (; i < count; ++i) {
    if (!in_support(weights[i])) return false;
  }
  return true;
}

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
  const int64_t group_rows = blocks.count == 1 ? smaller(kQueriesAtOnce, pass_rows) : pass_rows;
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

/// Backward for pattern rows [begin, end) of query head h: dQ, and added onto the weights' gradient.
void backward_rows(const CsrArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t h,
                   int64_t begin, int64_t end, int64_t longest) {
  const int64_t head = b % (args.plan.heads / args.query_heads) * args.query_heads + h;
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b), offset = offset_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size);
  const int64_t room = padded(longest) + kLanes;
  const auto* values = static_cast<const float*>(args.values);
  auto* grad_values = static_cast<float*>(grads.grad_weight);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{
      static_cast<char*>(thread_scratch(2 * carved(head_size) + carved(value_size) + 3 * carved(room) + carved(keys) +
                                        carved(keys * head_size) + carved(keys * value_size)))};
  float* query = scratch.floats(head_size);
  float* sum = scratch.floats(head_size);
  float* grad_output = scratch.floats(value_size);
  float* scores = scratch.floats(room);
  float* products = scratch.floats(room);
  auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(room));
  float* bias = scratch.floats(keys);
  const Panel key =
      pack_panel(args.key, args.dtype, b, key_head, keys, args.head_size, scratch.floats(keys * head_size));
  const Panel value =
      pack_panel(args.value, args.dtype, b, key_head, keys, args.value_size, scratch.floats(keys * value_size));
  if (gaussian) gaussian_bias(args, key, keys, bias);

  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row - offset, at = (b * args.query_heads + h) * args.queries + n;
    const float lse = static_cast<const float*>(grads.logsumexp)[at], row_delta = delta[at];
    for (int64_t d = 0; d < head_size; d += kLanes) store(sum + d, zero());
    if (lse != -kInfinity) {
      load_row(row_address(args.query, args.dtype, b, h, n), args.dtype, args.head_size, static_cast<float>(args.scale),
               query);
      load_row(row_address(grads.grad_output, args.dtype, b, h, n), args.dtype, args.value_size, 1.0f, grad_output);
      for_row_segments(args.plan, head * args.plan.num_queries + row, keys,
                       [&](int64_t first, const uint16_t* index, int64_t count, int64_t entry) {
                         old_dots(query, key.row(first), key.stride, head_size, index, count, scores);
                         old_dots(grad_output, value.row(first), value.stride, value_size, index, count, products);
                         if (gaussian) {
                           for (int64_t e = 0; e < count; ++e) scores[e] += bias[first + index[e]];
                         }
                         if (dropout.active()) {
                           for (int64_t e = 0; e < count; ++e) {
                             products[e] *= static_cast<float>(dropout.factor(b, h, row, first + index[e]));
                           }
                         }
                         exp_row(scores, count, lse);
                         for (int64_t e = 0; e < count; ++e) scores[e] *= products[e] - row_delta;
                         if (grad_values != nullptr) {
                           for (int64_t e = 0; e < count; ++e) grad_values[entry + e] += scores[e];
                         }
                         if (values != nullptr) {
                           for (int64_t e = 0; e < count; ++e) products[e] = scores[e] * values[entry + e];
                           int64_t kept = 0;
                           for (int64_t e = 0; e < count; ++e) {
                             picked[kept] = index[e];
                             scores[kept] = products[e];
                             kept += in_support(values[entry + e]);
                           }
                           index = picked;
                           count = kept;
                         }
                         old_weighted_sum(scores, key.row(first), key.stride, head_size, index, count, sum);
                       });
    }
    if (grads.grad_query.data != nullptr) {
      store_row(sum, args.dtype, args.head_size, static_cast<float>(args.scale),
                row_address(grads.grad_query, args.dtype, b, h, n));
    }
  }
}

/// Backward for keys [begin, end) of one key head: dK and dV, summed over the query heads that read it.
void backward_columns(const CsrArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t key_head,
                      int64_t begin, int64_t end, int64_t longest) {
  const PlanView& plan = args.plan;
  const int64_t first_head = b % (plan.heads / args.query_heads) * args.query_heads;
  const int64_t heads = shared_heads(args), keys = keys_of(args, b), offset = offset_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size), queries = args.queries;
  const int64_t room = padded(longest) + kLanes;
  const auto* values = static_cast<const float*>(args.values);
  const float scale = static_cast<float>(args.scale);
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{static_cast<char*>(
      thread_scratch(2 * carved(head_size) + 2 * carved(value_size) + 4 * carved(room) + 2 * carved(heads * 4) +
                     heads * (carved(queries * head_size) + carved(queries * value_size))))};
  float* key = scratch.floats(head_size);
  float* key_sum = scratch.floats(head_size);
  float* value = scratch.floats(value_size);
  float* value_sum = scratch.floats(value_size);
  float* attention = scratch.floats(room);
  float* products = scratch.floats(room);
  float* weights = scratch.floats(room);
  auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(room));
  static_assert(sizeof(Panel) <= 4 * sizeof(float), "two panels a head are carved below");
  auto* query_panels = reinterpret_cast<Panel*>(scratch.floats(heads * 4));
  auto* output_panels = reinterpret_cast<Panel*>(scratch.floats(heads * 4));
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t h = key_head * heads + i;
    query_panels[i] =
        pack_panel(args.query, args.dtype, b, h, queries, args.head_size, scratch.floats(queries * head_size));
    output_panels[i] =
        pack_panel(grads.grad_output, args.dtype, b, h, queries, args.value_size, scratch.floats(queries * value_size));
  }

  for (int64_t j = begin; j < end; ++j) {
    for (int64_t d = 0; d < head_size; d += kLanes) store(key_sum + d, zero());
    for (int64_t d = 0; d < value_size; d += kLanes) store(value_sum + d, zero());
    if (j < keys) {
      load_row(row_address(args.key, args.dtype, b, key_head, j), args.dtype, args.head_size, scale, key);
      load_row(row_address(args.value, args.dtype, b, key_head, j), args.dtype, args.value_size, 1.0f, value);
      // |k|^2 comes from the scaled key: -scale/2 |k|^2 = -|scale k|^2 / (2 scale), and 0 where scale is.
      const float bias = args.score == Score::kGaussian && scale != 0 ? -0.5f / scale * dot(key, key, head_size) : 0.0f;
      float score_sum = 0;
      bool any = false;
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t h = key_head * heads + i, head = first_head + h;
        const Panel &query = query_panels[i], &grad_output = output_panels[i];
        const int64_t at = (b * args.query_heads + h) * queries;
        const float* lse = static_cast<const float*>(grads.logsumexp) + at;
        const float* row_delta = delta + at;
        const float* head_values =
            values != nullptr ? values + plan.row_segments[head * plan.num_queries * plan.key_blocks] : nullptr;
        for_column_segments(
            plan, head * plan.num_keys + j, offset, offset + queries,
            [&](int64_t first, const uint16_t* index, int64_t count, int64_t place) {
              if (head_values != nullptr) {
                int64_t kept = 0;
                for (int64_t e = 0; e < count; ++e) {
                  const float w = head_values[plan.positions[place + e]];
                  picked[kept] = index[e];
                  weights[kept] = w;
                  kept += in_support(w) && lse[first - offset + index[e]] != -kInfinity;
                }
                index = picked;
                count = kept;
                if (count == 0) return;
              }
              any = true;
              const float* queries_at = query.row(first - offset);
              const float* outputs_at = grad_output.row(first - offset);
              old_dots(key, queries_at, query.stride, head_size, index, count, attention);
              old_dots(value, outputs_at, grad_output.stride, value_size, index, count, products);
              for (int64_t e = 0; e < count; ++e) attention[e] += bias - lse[first - offset + index[e]];
              exp_row(attention, count, 0.0f);
              if (head_values != nullptr) {
                for (int64_t e = 0; e < count; ++e) attention[e] *= weights[e];
              }
              if (!dropout.active()) {
                old_weighted_sum(attention, outputs_at, grad_output.stride, value_size, index, count, value_sum);
                for (int64_t e = 0; e < count; ++e)
                  products[e] = attention[e] * (products[e] - row_delta[first - offset + index[e]]);
              } else {
                for (int64_t e = 0; e < count; ++e) {
                  const auto kept = static_cast<float>(dropout.factor(b, h, first + index[e], j));
                  products[e] = attention[e] * (kept * products[e] - row_delta[first - offset + index[e]]);
                  attention[e] *= kept;
                }
                old_weighted_sum(attention, outputs_at, grad_output.stride, value_size, index, count, value_sum);
              }
              old_weighted_sum(products, queries_at, query.stride, head_size, index, count, key_sum);
              for (int64_t e = 0; e < count; ++e) score_sum += products[e];
            });
      }
      if (args.score == Score::kGaussian && any && scale != 0) {
        // d s_ij / d k_j = scale (q_i - k_j), and `key` holds scale k_j.
        for (int64_t d = 0; d < head_size; ++d) key_sum[d] -= score_sum * (key[d] / scale);
      }
    }
    if (grads.grad_key.data != nullptr) {
      store_row(key_sum, args.dtype, args.head_size, scale, row_address(grads.grad_key, args.dtype, b, key_head, j));
    }
    if (grads.grad_value.data != nullptr) {
      store_row(value_sum, args.dtype, args.value_size, 1.0f,
                row_address(grads.grad_value, args.dtype, b, key_head, j));
    }
  }
}

/// rows(bundle, h, begin, end, longest, next bundle, next h) over the pattern rows of all queries, split by `costs`, or
/// by entries. Bundles are outside: the heads of one batch element often lie side by side. next h is -1 where there is
/// no next.
template <class Rows>
void for_bundle_rows(const CsrArgs& args, const Parallel& parallel, int64_t elements, const HeadCosts* costs,
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
    if (costs != nullptr) {
      const int64_t of_group = bundles.count / bundles.groups;
      return static_cast<int64_t>(costs->before(bundle / of_group, bundle % of_group, bundles.full, of_group,
                                                row / args.queries, row % args.queries));
    }
    const int64_t each = plan.nnz / bundles.groups + kRowCost * bundle_rows;
    if (bundle == bundles.count) return bundles.elements_before(bundle) * each;
    const int64_t group_row = bundles.at(bundle).b[0] % bundles.groups * bundle_rows;
    const int64_t entries = plan.row_segments[(group_row + row) * plan.key_blocks] -
                            plan.row_segments[group_row * plan.key_blocks] + kRowCost * row;
    return bundles.elements_before(bundle) * each + bundles.at(bundle).elements * smaller(entries, each);
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

/// rows(b, h, begin, end, longest) over the pattern rows of all queries, split by entries. Batch elements are outside.
template <class Rows>
void for_batch_rows(const CsrArgs& args, const Parallel& parallel, Rows&& rows) {
  for_bundle_rows(args, parallel, 1, nullptr,
                  [&](const Bundle& bundle, int64_t h, int64_t begin, int64_t end, int64_t longest, const Bundle&,
                      int64_t) { rows(bundle.b[0], h, begin, end, longest); });
}

/// rows(b, h, begin, end, longest) over all pattern rows that the batch uses, split by the pattern's entries: a thread
/// alone has a row of the pattern, for the whole batch.
template <class Rows>
void for_pattern_rows(const CsrArgs& args, const Parallel& parallel, Rows&& rows) {
  const PlanView& plan = args.plan;
  const int64_t groups = plan.heads / args.query_heads;
  const auto work = [&](int64_t row) { return plan.row_segments[row * plan.key_blocks] + kRowCost * row; };
  parallel_balanced(parallel, plan.heads * plan.num_queries, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t head = begin / plan.num_queries, first = head * plan.num_queries;
      const int64_t stop = smaller(end, first + plan.num_queries), longest = longest_row(plan, begin, stop);
      for (int64_t b = head / args.query_heads; b < args.batch; b += groups) {
        const int64_t offset = offset_of(args, b);
        const int64_t from = larger(begin - first, offset), to = smaller(stop - first, offset + args.queries);
        if (from < to) rows(b, head % args.query_heads, from, to, longest);
      }
      begin = stop;
    }
  });
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

}  // namespace

template <Storage kStorage>
void forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  const int64_t elements = bundled_elements(args, kStorage);
  const HeadCosts costs(args, static_cast<int>(elements), kStorage == Storage::kBFloat16);
  for_bundle_rows(args, parallel, elements, &costs,
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

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
#if defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) return forward<Storage::kBFloat16>(args, result, parallel);
#endif
  forward<Storage::kFloat32>(args, result, parallel);
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const PlanView& plan = args.plan;
  const SharedScratch shared(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(shared.data());
  compute_delta(args, grads, parallel, delta);

  if (grads.grad_weight != nullptr) std::memset(grads.grad_weight, 0, plan.nnz * sizeof(float));
  const auto rows = [&](int64_t b, int64_t h, int64_t begin, int64_t end, int64_t longest, auto...) {
    backward_rows(args, grads, delta, b, h, begin, end, longest);
  };
  if (grads.grad_weight != nullptr) {
    for_pattern_rows(args, parallel, rows);
  } else if (grads.grad_query.data != nullptr) {
    for_batch_rows(args, parallel, rows);
  }

  if (grads.grad_key.data != nullptr || grads.grad_value.data != nullptr) {
    const int64_t heads = shared_heads(args), groups = plan.heads / larger(1, args.query_heads);
    const auto segment = [&](int64_t head, int64_t j) {
      return plan.column_segments[(head * plan.num_keys + j) * plan.query_blocks];
    };
    // A unit is a key of a key head; its entries are those of all query heads that read it.
    const auto work = [&](int64_t unit) {
      const int64_t head = unit / plan.num_keys * heads, j = unit % plan.num_keys;
      int64_t entries = segment(head, 0) + kRowCost * unit;
      for (int64_t i = 0; i < heads && j > 0; ++i) entries += segment(head + i, j) - segment(head + i, 0);
      return entries;
    };
    parallel_balanced(parallel, groups * args.key_heads * plan.num_keys, work, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t unit = begin / plan.num_keys, first = unit * plan.num_keys;
        const int64_t stop = smaller(end, first + plan.num_keys);
        int64_t longest = 0;
        for (int64_t i = 0; i < heads; ++i) {
          for (int64_t j = begin - first; j < stop - first; ++j) {
            longest = larger(longest, segment(unit * heads + i, j + 1) - segment(unit * heads + i, j));
          }
        }
        for (int64_t b = unit / args.key_heads; b < args.batch; b += groups) {
          backward_columns(args, grads, delta, b, unit % args.key_heads, begin - first, stop - first, longest);
        }
        begin = stop;
      }
    });
  }
}

}  // namespace fiak::cpu::FIAK_ISA
