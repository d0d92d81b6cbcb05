// Decoding: few queries against many keys. What it costs is reading K and V once, so their rows are read where they
// lie.
//
// The keys go by in chunks, whose softmax is taken at once, and those in stages: all query rows that share a key head
// take their turns on a stage's rows of K, or of V, while the rows of the next stage are fetched, so that the memory is
// never idle. Rows that several queries read are copied to where the L1 cache holds them, however far apart they lie.
//
// The keys are also cut into splits of whole chunks, which are tasks of their own: one batch element and head then keep
// many threads busy. A split yields each row's largest score, the sum of the weighted exponentials and the weighted sum
// of values; these are combined in order. Sizes alone decide about all cuts, so that no number of threads changes a
// bit.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/decode/decode.h"
#include "kernels/cpu/decode/decode_rows.h"
#include "kernels/cpu/pairs/indices.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kChunkBytes = 256 * 1024;  // of K and V, at most: they stay in the L2 cache
constexpr int64_t kLeastChunk = 128, kMostChunk = 1024;
constexpr int64_t kStageBytes = 24 * 1024;  // of copied rows, in the L1 cache
constexpr double kReuse = 2;                // how often a row is read for its copy to pay
constexpr int64_t kTasks = 128;             // splits are made for
constexpr int64_t kTaskCost = 64;           // what a task costs beside its keys, in keys
constexpr float kSmallestNormal = 0x1p-126f;

/// The keys that a query row attends to in a chunk: origin + index[i], with weights where not null.
struct KeySegment {
  int64_t origin;
  const uint16_t* index;
  const float* weights;
  int64_t count;
};

/// The segment of those entries whose weights are of the support.
FIAK_INLINE KeySegment pick_segment(KeySegment segment, float below, uint16_t* index, float* weights) {
  if (all_in_support(segment.weights, segment.count, below)) return segment;
  const int64_t kept = pick_support(segment.weights, segment.index, segment.count, below, index, weights);
  return {segment.origin, index, weights, kept};
}

/// A query row, of those that share a key head.
struct QueryRow {
  int64_t b, h, n;
};

// Where an op's pairs are. start(r, row) says what row r of those that share a key head is, segment(r, first, end, ...)
// gives its keys in [first, end); chunks come in ascending order.

class CsrPairs {
 public:
  static constexpr bool kAllKeys = false;  // whether rows read about all keys

  static bool has_weights(const CsrArgs& args) { return args.prior != nullptr; }
  static int64_t most_keys(const CsrArgs& args) { return args.keys; }
  static int64_t dropout_row(const CsrArgs& args, const QueryRow& row) { return row.n + offset_of(args, row.b); }
  /// How often a row of K is read, on average.
  static double reuse(const CsrArgs& args, int64_t rows) {
    const PlanView& plan = args.plan;
    const double pairs = static_cast<double>(plan.heads * plan.num_queries) * static_cast<double>(plan.num_keys);
    return static_cast<double>(rows) * static_cast<double>(plan.nnz) / (pairs > 0 ? pairs : 1);
  }

  CsrPairs(const CsrArgs& args, int64_t rows, int64_t, ScratchArena& scratch)
      : args_(args), cursors_(reinterpret_cast<Cursor*>(scratch.floats(rows * kCursorFloats))) {}
  void start(int64_t r, const QueryRow& row) {
    const PlanView& plan = args_.plan;
    const PlanRange entries = plan.row(args_.plan_head(row.b, row.h) * plan.num_queries + dropout_row(args_, row));
    cursors_[r] = {entries.begin, entries.end, false};
  }
  KeySegment segment(int64_t r, int64_t first, int64_t end) {
    Cursor& cursor = cursors_[r];
    const uint16_t* columns = args_.plan.columns;
    if (!cursor.has_started) {
      cursor.has_started = true;
      cursor.entry += search_below(columns + cursor.entry, cursor.end - cursor.entry, first);
    }
    const int64_t entry = cursor.entry;
    cursor.entry += count_below(columns + entry, cursor.end - entry, end);
    const int64_t count = cursor.entry - entry;
    const auto* prior = static_cast<const float*>(args_.prior);
    // The next chunk's entries, about as many: searching them would wait for each cache line.
    prefetch_row(reinterpret_cast<const char*>(columns + cursor.entry), 2 * count + 64);
    if (prior != nullptr) prefetch_row(reinterpret_cast<const char*>(prior + cursor.entry), 4 * count);
    return {0, columns + entry, prior != nullptr ? prior + entry : nullptr, count};
  }

 private:
  struct Cursor {
    int64_t entry, end;
    bool has_started;
  };
  static constexpr int64_t kCursorFloats = sizeof(Cursor) / sizeof(float);

  const CsrArgs& args_;
  Cursor* cursors_;
};

class PriorPairs {
 public:
  static constexpr bool kAllKeys = true;

  static bool has_weights(const PriorArgs& args) { return args.prior != nullptr; }
  static int64_t most_keys(const PriorArgs& args) {
    return args.is_causal ? smaller(args.keys, args.queries) : args.keys;
  }
  static int64_t dropout_row(const PriorArgs&, const QueryRow& row) { return row.n; }
  static double reuse(const PriorArgs&, int64_t rows) { return static_cast<double>(rows); }

  PriorPairs(const PriorArgs& args, int64_t rows, int64_t chunk, ScratchArena& scratch)
      : args_(args),
        index_(reinterpret_cast<uint16_t*>(scratch.floats((chunk + kIndexPadding) / 2))),
        rows_(reinterpret_cast<Row*>(scratch.floats(rows * kRowFloats))) {
    for (int64_t i = 0; i < chunk; ++i) index_[i] = static_cast<uint16_t>(i);
  }
  void start(int64_t r, const QueryRow& row) {
    const auto* prior = static_cast<const float*>(args_.prior);
    if (prior != nullptr) {
      prior += row.b % args_.prior_groups * args_.prior_group_stride + row.h * args_.prior_head_stride +
               row.n * args_.prior_row_stride;
    }
    rows_[r] = {prior, args_.is_causal ? row.n + 1 : args_.keys};
  }
  const uint16_t* all() const { return index_; }
  KeySegment segment(int64_t r, int64_t first, int64_t end) {
    const Row& row = rows_[r];
    if (row.weights != nullptr) prefetch_row(reinterpret_cast<const char*>(row.weights + end), 4 * (end - first));
    return {first, index_, row.weights != nullptr ? row.weights + first : nullptr,
            larger(0, smaller(end, row.visible) - first)};
  }

 private:
  struct Row {
    const float* weights;
    int64_t visible;
  };
  static constexpr int64_t kRowFloats = sizeof(Row) / sizeof(float);

  const PriorArgs& args_;
  uint16_t* index_;
  Row* rows_;
};

/// What a query row has gathered so far: a vector of these, then the sum of the values.
struct RowState {
  // Largest score with its weight, or about that, in powers of two; sum of the powers; 0 where there is no pair.
  float maximum, total, any;
};
constexpr int64_t kStateFloats = kLanes;

FIAK_INLINE RowState& state_of(float* row) { return *reinterpret_cast<RowState*>(row); }

/// Scales a row to a new maximum.
FIAK_INLINE void raise_maximum(float* row, float maximum, int64_t sum_floats) {
  RowState& state = state_of(row);
  if (maximum <= state.maximum) return;
  const Vec factor = exp2_below_128(broadcast(state.maximum - maximum));
  float* sums = row + kStateFloats;
  for (int64_t d = 0; d < sum_floats; d += kLanes) store(sums + d, mul(load(sums + d), factor));
  state.total *= reduce_max(factor);
  state.maximum = maximum;
}

/// Adds the keys of another split to a row.
FIAK_INLINE void combine(float* row, const float* other, int64_t sum_floats) {
  const RowState& added = *reinterpret_cast<const RowState*>(other);
  RowState& state = state_of(row);
  raise_maximum(row, added.maximum, sum_floats);
  // Where neither has a finite score, both sums are of zeros or NaN.
  const Vec factor =
      state.maximum == -kInfinity ? broadcast(1.0f) : exp2_below_128(broadcast(added.maximum - state.maximum));
  for (int64_t d = kStateFloats; d < kStateFloats + sum_floats; d += kLanes) {
    store(row + d, fmadd(load(other + d), factor, load(row + d)));
  }
  state.total += added.total * reduce_max(factor);
  state.any += added.any;
}

/// The weights of a segment's entries, which are all of the support.
enum class SegmentWeights { kOnes, kWeights, kLogs };

/// scores *= scale in [0, count); the largest with their weights, ignoring NaN.
template <SegmentWeights kWeights>
static float scale_scores(float* scores, const float* weights, int64_t count, float scale) {
  const Vec factor = broadcast(scale);
  Vec maxima = broadcast(-kInfinity);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(kLanes, count - i);
    Vec s = mul(load(scores + i), factor);
    store(scores + i, s);
    if constexpr (kWeights == SegmentWeights::kWeights) s = add_log2(s, load_first(weights + i, n));
    if constexpr (kWeights == SegmentWeights::kLogs) s = add(s, exponent_of_log(load_first(weights + i, n)));
    maxima = keep_max(first_lanes(n), s, maxima);
  }
  return reduce_max(maxima);
}

/// scores = 2^(scores + log2 w - maximum) in [0, count); their sum.
template <SegmentWeights kWeights>
static float weigh_scores(float* scores, const float* weights, int64_t count, float maximum) {
  const Vec shift = broadcast(maximum == -kInfinity ? 0.0f : maximum);  // without a finite score: 2^-inf = 0
  Vec sums = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(kLanes, count - i);
    Vec exponent = sub(zero(), shift), w = zero();
    if constexpr (kWeights != SegmentWeights::kOnes) w = load_first(weights + i, n);
    if constexpr (kWeights == SegmentWeights::kWeights) exponent = exponent_minus(w, shift);
    if constexpr (kWeights == SegmentWeights::kLogs) exponent = sub(exponent_of_log(w), shift);
    Vec e = exp2_below_128(add(load(scores + i), exponent));
    if constexpr (kWeights == SegmentWeights::kWeights) e = mul(e, weight_factor(w));
    e = keep(first_lanes(n), e);
    sums = add(sums, e);
    store(scores + i, e);
  }
  return reduce_add(sums);
}

/// How a call is cut, by its sizes alone.
struct Cuts {
  int64_t rows;           // that share a key head
  int64_t chunk;          // keys, a power of two
  int64_t stages, stage;  // of a chunk, keys of a stage
  int64_t splits, split_keys;
  bool copies;

  Cuts(const AttentionArgs& args, int64_t keys, double reuse)
      : rows(shared_heads(args) * args.queries), chunk(kMostChunk), stages(1), copies(reuse >= kReuse) {
    const int64_t key_bytes = args.head_dim * element_size(args.dtype);
    const int64_t value_bytes = args.value_dim * element_size(args.dtype);
    while (chunk > kLeastChunk && chunk * (key_bytes + value_bytes) > kChunkBytes) chunk /= 2;
    if (copies) stages = smaller(chunk / 16, chunk * larger(key_bytes, value_bytes) / kStageBytes + 1);
    stage = (chunk + stages - 1) / stages;
    const int64_t chunks = (keys + chunk - 1) / chunk, heads = args.batch * args.key_heads;
    splits = larger(1, smaller(chunks, (kTasks + heads - 1) / heads));
    split_keys = larger(1, (chunks + splits - 1) / splits) * chunk;
    splits = larger(1, (keys + split_keys - 1) / split_keys);
  }
};

/// A chunk's keys: each row's segment with where it enters each stage, and, in the same way, all that some row reads.
struct Chunk {
  int64_t first;         // from the segments' origin
  KeySegment* segments;  // [rows]
  int32_t* cuts;         // [rows, stages + 1]
  uint16_t* picked;      // [rows, chunk], and weights: segments that leave entries out
  float* picked_weights;
  uint16_t* used;        // [chunk]
  const uint16_t* read;  // what some row reads
  int32_t* read_cuts;    // [stages + 1]
};

template <class Pairs, class Args>
class Decoder {
 public:
  Decoder(const Args& args, const ForwardResult& result)
      : args_(args),
        result_(result),
        cuts_(args, Pairs::most_keys(args), Pairs::reuse(args, shared_heads(args) * args.queries)),
        loops_(row_loops(args.dtype, args.score == Score::kGaussian)),
        dropout_(make_dropout(args.dropout_p, args.seed)),
        query_floats_(loops_.floats(args.head_dim)),
        sum_floats_(loops_.floats(args.value_dim)),
        row_floats_(kStateFloats + sum_floats_) {}

  void compute(const Parallel& parallel) {
    const int64_t heads = args_.batch * args_.key_heads, splits = cuts_.splits, rows = cuts_.rows;
    if (splits == 1) {
      return parallel_balanced(
          parallel, heads, [&](int64_t i) { return work_before(i); },
          [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) decode(i, nullptr);
          });
    }
    const SharedScratch memory(heads * splits * rows * row_floats_ * sizeof(float));
    auto* states = static_cast<float*>(memory.data());
    parallel_balanced(
        parallel, heads * splits, [&](int64_t i) { return work_before(i); },
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) decode(i, states + i * rows * row_floats_);
        });
    parallel_range(parallel, heads * rows, [&](int64_t begin, int64_t end) {
      ThreadArena scratch;
      float* output = scratch.floats(sum_floats_);
      for (int64_t i = begin; i < end; ++i) {
        float* row = states + (i / rows * splits * rows + i % rows) * row_floats_;
        for (int64_t split = 1; split < splits; ++split) combine(row, row + split * rows * row_floats_, sum_floats_);
        finish(row, row_at(i / rows, i % rows), output);
      }
    });
  }

 private:
  static constexpr int64_t kSegmentFloats = sizeof(KeySegment) / sizeof(float);

  QueryRow row_at(int64_t head, int64_t r) const {
    const int64_t b = head / args_.key_heads, key_head = head % args_.key_heads;
    return {b, key_head * shared_heads(args_) + r / args_.queries, r % args_.queries};
  }
  int64_t keys(int64_t b) const { return smaller(keys_of(args_, b), Pairs::most_keys(args_)); }

  /// Pairs and tasks before task i.
  int64_t work_before(int64_t i) const {
    const int64_t head = i / cuts_.splits, b = head / args_.key_heads;
    int64_t before = i * kTaskCost;
    if (args_.kv_lens == nullptr) {
      before += head * Pairs::most_keys(args_);
    } else {
      for (int64_t k = 0; k < b; ++k) before += args_.key_heads * keys(k);
      if (b < args_.batch) before += head % args_.key_heads * keys(b);
    }
    return b < args_.batch ? before + smaller(keys(b), i % cuts_.splits * cuts_.split_keys) : before;
  }

  static Chunk make_chunk(const Cuts& cuts, bool weights, ScratchArena& scratch) {
    const int64_t picked = weights ? cuts.rows * cuts.chunk + kIndexPadding : 0;
    Chunk chunk{};
    chunk.segments = reinterpret_cast<KeySegment*>(scratch.floats(cuts.rows * kSegmentFloats));
    chunk.cuts = reinterpret_cast<int32_t*>(scratch.floats(cuts.rows * (cuts.stages + 1)));
    chunk.picked = reinterpret_cast<uint16_t*>(scratch.floats(picked / 2));
    chunk.picked_weights = scratch.floats(picked);
    chunk.used = reinterpret_cast<uint16_t*>(scratch.floats((cuts.chunk + kIndexPadding) / 2));
    chunk.read_cuts = reinterpret_cast<int32_t*>(scratch.floats(cuts.stages + 1));
    return chunk;
  }

  /// Where index[0, count) enters each stage of the chunk that starts at `first`.
  void cut(const uint16_t* index, int64_t count, int64_t first, int32_t* cuts) const {
    cuts[0] = 0;
    for (int64_t s = 1; s < cuts_.stages; ++s) {
      const int64_t from = cuts[s - 1];
      cuts[s] = static_cast<int32_t>(from + count_below(index + from, count - from, first + s * cuts_.stage));
    }
    cuts[cuts_.stages] = static_cast<int32_t>(count);
  }

  /// Fills in keys [first, end). `marks` are `chunk` zeros.
  void prepare(Pairs& pairs, int64_t first, int64_t end, unsigned char* marks, Chunk& chunk) const {
    const int64_t rows = cuts_.rows;
    for (int64_t r = 0; r < rows; ++r) {
      KeySegment& segment = chunk.segments[r];
      segment = pairs.segment(r, first, end);
      if (segment.weights != nullptr) {
        segment = pick_segment(segment, below_support(args_.log_prior), chunk.picked + r * cuts_.chunk,
                               chunk.picked_weights + r * cuts_.chunk);
      }
      cut(segment.index, segment.count, first - segment.origin, chunk.cuts + r * (cuts_.stages + 1));
    }
    chunk.first = first - chunk.segments[0].origin;
    int64_t count = 0;
    if constexpr (Pairs::kAllKeys) {
      chunk.read = pairs.all();
      count = end - first;
    } else if (rows == 1) {
      chunk.read = chunk.segments[0].index;
      count = chunk.segments[0].count;
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const KeySegment& segment = chunk.segments[r];
        for (int64_t i = 0; i < segment.count; ++i) marks[segment.index[i] - chunk.first] = 1;
      }
      for (int64_t j = 0; j < end - first; ++j) {
        chunk.used[count] = static_cast<uint16_t>(chunk.first + j);
        count += marks[j];
        marks[j] = 0;
      }
      chunk.read = chunk.used;
    }
    cut(chunk.read, count, chunk.first, chunk.read_cuts);
  }

  /// The rows of K or V that a stage reads.
  PickedRows rows_of(const Input& x, int64_t size, int64_t b, int64_t key_head, const Chunk& chunk, int64_t s) const {
    const int64_t begin = chunk.read_cuts[s];
    return {row_address(x, args_.dtype, b, key_head, chunk.segments[0].origin),
            x.row_stride * element_size(args_.dtype), size * element_size(args_.dtype), chunk.read + begin,
            chunk.read_cuts[s + 1] - begin};
  }
  PickedRows keys_of_stage(int64_t b, int64_t key_head, const Chunk& chunk, int64_t s) const {
    return rows_of(args_.key, args_.head_dim, b, key_head, chunk, s);
  }
  PickedRows values_of_stage(int64_t b, int64_t key_head, const Chunk& chunk, int64_t s) const {
    return rows_of(args_.value, args_.value_dim, b, key_head, chunk, s);
  }

  /// turn(r, its rows, its first entry in its segment, what to fetch) for all query rows on a stage's rows of K or V.
  template <class Turn>
  __attribute__((always_inline)) void take_turns(const Chunk& chunk, int64_t s, PickedRows stage,
                                                 const PickedRows& next, char* copies, Turn&& turn) const {
    const int64_t rows = cuts_.rows;
    if (cuts_.copies) {
      const int64_t stride = copied_bytes(stage.bytes);
      char* base = copies - (chunk.first + s * cuts_.stage) * stride;
      for (int64_t i = 0; i < stage.count; ++i) copy_row(stage.row(i), stage.bytes, base + stage.index[i] * stride);
      stage = {base, stride, stage.bytes, nullptr, 0};
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* cut = chunk.cuts + r * (cuts_.stages + 1) + s;
      stage.index = chunk.segments[r].index + cut[0];
      stage.count = cut[1] - cut[0];
      PickedRows fetched = next;
      const int64_t begin = next.count * r / rows;
      fetched.index += begin;
      fetched.count = next.count * (r + 1) / rows - begin;
      turn(r, stage, cut[0], fetched);
    }
  }

  /// Task i: a split of the keys of a batch element and key head. `states` takes what its rows have gathered; null
  /// where there is no other split.
  void decode(int64_t i, float* states) const {
    const int64_t head = i / cuts_.splits, b = head / args_.key_heads, key_head = head % args_.key_heads;
    const int64_t begin = i % cuts_.splits * cuts_.split_keys, end = smaller(keys(b), begin + cuts_.split_keys);
    const int64_t rows = cuts_.rows, chunk = cuts_.chunk;
    const bool alone = states == nullptr, weights = Pairs::has_weights(args_);
    const int64_t copies_floats =
        cuts_.copies ? cuts_.stage * copied_bytes(larger(args_.head_dim, args_.value_dim) * 4) / 4 : 0;
    ThreadArena scratch;
    Pairs pairs(args_, rows, chunk, scratch);
    float* queries = scratch.floats(rows * query_floats_);
    if (alone) states = scratch.floats(rows * row_floats_);
    float* output = scratch.floats(sum_floats_);
    float* scores = scratch.floats(rows * chunk);
    char* copies = reinterpret_cast<char*>(scratch.floats(copies_floats));
    auto* marks = reinterpret_cast<unsigned char*>(scratch.floats(chunk / 4));
    Chunk chunks[2] = {make_chunk(cuts_, weights, scratch), make_chunk(cuts_, weights, scratch)};

    std::memset(marks, 0, chunk);
    for (int64_t r = 0; r < rows; ++r) {
      const QueryRow row = row_at(head, r);
      pairs.start(r, row);
      loops_.prepare_query(row_address(args_.query, args_.dtype, b, row.h, row.n), args_.head_dim,
                           queries + r * query_floats_);
      float* state = states + r * row_floats_;
      for (int64_t d = 0; d < row_floats_; d += kLanes) store(state + d, zero());
      state_of(state).maximum = -kInfinity;
    }
    if (begin < end) prepare(pairs, begin, smaller(end, begin + chunk), marks, chunks[0]);
    for (int64_t first = begin, turn = 0; first < end; first += chunk, ++turn) {
      const Chunk& now = chunks[turn % 2];
      Chunk& next = chunks[(turn + 1) % 2];
      const bool more = first + chunk < end;
      if (more) prepare(pairs, first + chunk, smaller(end, first + 2 * chunk), marks, next);
      for (int64_t s = 0; s < cuts_.stages; ++s) {
        const bool last = s + 1 == cuts_.stages;
        take_turns(now, s, keys_of_stage(b, key_head, now, s),
                   last ? values_of_stage(b, key_head, now, 0) : keys_of_stage(b, key_head, now, s + 1), copies,
                   [&](int64_t r, const PickedRows& keys, int64_t entry, const PickedRows& fetched) {
                     multiply_keys(queries + r * query_floats_, keys, scores + r * chunk + entry, fetched);
                   });
      }
      for (int64_t r = 0; r < rows; ++r) {
        weigh(row_at(head, r), now.segments[r], scores + r * chunk, states + r * row_floats_);
      }
      for (int64_t s = 0; s < cuts_.stages; ++s) {
        const bool last = s + 1 == cuts_.stages;
        const PickedRows fetch = !last  ? values_of_stage(b, key_head, now, s + 1)
                                 : more ? keys_of_stage(b, key_head, next, 0)
                                        : PickedRows{};
        take_turns(now, s, values_of_stage(b, key_head, now, s), fetch, copies,
                   [&](int64_t r, const PickedRows& values, int64_t entry, const PickedRows& fetched) {
                     add_values(scores + r * chunk + entry, values, states + r * row_floats_ + kStateFloats, fetched);
                   });
      }
    }
    for (int64_t r = 0; alone && r < rows; ++r) finish(states + r * row_floats_, row_at(head, r), output);
  }

  /// The columns of rows of `size` numbers that loops go through: copied rows are whole vectors.
  int64_t columns(int64_t size) const { return cuts_.copies ? loops_.vectors(size) * loops_.numbers : size; }

  void multiply_keys(const float* query, const PickedRows& keys, float* scores, const PickedRows& fetched) const {
    loops_.for_parts_of(columns(args_.head_dim), [&](int64_t vectors, const RowPart& pass, int64_t from) {
      loops_.dots[vectors - 1](query + from, keys, pass, scores, pass.first ? fetched : PickedRows{});
    });
  }
  void add_values(const float* weights, const PickedRows& values, float* sums, const PickedRows& fetched) const {
    loops_.for_parts_of(columns(args_.value_dim), [&](int64_t vectors, const RowPart& pass, int64_t from) {
      loops_.weighted_sum[vectors - 1](weights, values, pass, sums + from, pass.first ? fetched : PickedRows{});
    });
  }
  template <SegmentWeights kWeights>
  void exponentiate(const KeySegment& segment, float* scores, float* state) const {
    const auto scale = static_cast<float>(args_.scale * kLog2E);
    raise_maximum(state, scale_scores<kWeights>(scores, segment.weights, segment.count, scale), sum_floats_);
    state_of(state).total += weigh_scores<kWeights>(scores, segment.weights, segment.count, state_of(state).maximum);
  }
  /// The weights of a segment's values, from its scores.
  void weigh(const QueryRow& row, const KeySegment& segment, float* scores, float* state) const {
    if (segment.count == 0) return;
    if (segment.weights == nullptr) {
      exponentiate<SegmentWeights::kOnes>(segment, scores, state);
    } else if (args_.log_prior) {
      exponentiate<SegmentWeights::kLogs>(segment, scores, state);
    } else {
      exponentiate<SegmentWeights::kWeights>(segment, scores, state);
    }
    state_of(state).any = 1.0f;
    if (!dropout_.active()) return;
    const int64_t n = Pairs::dropout_row(args_, row);
    for (int64_t i = 0; i < segment.count; ++i) {
      scores[i] *= static_cast<float>(dropout_.factor(row.b, row.h, n, segment.origin + segment.index[i]));
    }
  }

  /// Writes a row's results; `output` is scratch.
  void finish(const float* row, const QueryRow& at, float* output) const {
    const RowState& state = *reinterpret_cast<const RowState*>(row);
    const float* sums = row + kStateFloats;
    if (loops_.parts == 2) {  // even and odd places
      for (int64_t d = 0; d < sum_floats_; d += 2 * kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          output[d + 2 * k] = sums[d + k];
          output[d + 2 * k + 1] = sums[d + kLanes + k];
        }
      }
      sums = output;
    }
    float factor = 0.0f, logsumexp = -kInfinity;
    if (state.any > 0) {
      // A NaN or infinite weight, or no finite score, makes the row NaN.
      const float total = state.maximum > -kInfinity && state.total < kInfinity ? state.total : kNaN;
      factor = 1.0f / total;
      logsumexp = state.maximum * kLn2 +
                  (total >= kSmallestNormal ? reduce_max(log_of_normal(broadcast(total))) : __builtin_logf(total));
    }
    static_cast<float*>(result_.logsumexp)[(at.b * args_.query_heads + at.h) * args_.queries + at.n] = logsumexp;
    store_row(sums, args_.dtype, args_.value_dim, factor, row_address(result_.output, args_.dtype, at.b, at.h, at.n));
  }

  const Args& args_;
  const ForwardResult& result_;
  const Cuts cuts_;
  const RowLoops& loops_;
  const Dropout dropout_;
  const int64_t query_floats_, sum_floats_, row_floats_;
};

template <class Pairs, class Args>
void decode(const Args& args, const ForwardResult& result, const Parallel& parallel) {
  if (args.batch == 0 || args.queries == 0) return;
  Decoder<Pairs, Args>(args, result).compute(parallel);
}

template <class Pairs, class Args>
void decode_blocks(const Args& args, BlockCounts& blocks) {
  const bool serves = is_decoding(args);
  const int64_t keys = serves ? Pairs::most_keys(args) : 0;
  const Cuts cuts(args, keys, Pairs::reuse(args, shared_heads(args) * args.queries));
  const RowLoops& loops = row_loops(args.dtype, args.score == Score::kGaussian);
  blocks.add(serves);
  blocks.add(serves && cuts.copies);
  blocks.add(keys, cuts.chunk);
  blocks.add(keys % cuts.chunk, cuts.stage);
  blocks.add(keys, cuts.split_keys);
  for (const int64_t size : {args.head_dim, args.value_dim}) {
    blocks.add(serves ? loops.vectors(size) : 0);
    blocks.add(serves ? loops.vectors(size) : 0, loops.most_vectors);
  }
}

}  // namespace

void csr_decode(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  decode<CsrPairs>(args, result, parallel);
}

void prior_decode(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  decode<PriorPairs>(args, result, parallel);
}

void csr_decode_blocks(const CsrArgs& args, BlockCounts& blocks) { decode_blocks<CsrPairs>(args, blocks); }
void prior_decode_blocks(const PriorArgs& args, BlockCounts& blocks) { decode_blocks<PriorPairs>(args, blocks); }

}  // namespace fiak::cpu::FIAK_ISA
