// csr_attention over entries, backward.
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/entries/segments.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kTaskRows = 8;  // the queries that a thread takes at once

/// Backward segments in waves. A wave is a bundle, a few key heads, one query head of each, a chunk of its queries and
/// a block of its keys. First the columns' segments are listed; then the rows compute P and dS, dQ and the weights'
/// gradient, and leave P and dS where their columns come to want them; then the columns add up dK and dV. All that a
/// wave of one head touches stays in the L2 cache. Every sum has a fixed order (dQ: keys; dK, dV: query heads, then
/// queries; weights: batch elements), so that how waves are cut, and how many threads share one, changes no bit.
template <Storage kStorage, int kSamples>
class CsrBackward {
 public:
  CsrBackward(const CsrArgs& args, const BackwardArgs& grads)
      : args_(args),
        grads_(grads),
        gaussian_(args.score == Score::kGaussian),
        dropout_(make_dropout(args.dropout_p, args.seed)),
        head_vectors_(row_vectors(columns_with(query_extra(args), args.head_dim, kStorage), kStorage, kSamples)),
        value_vectors_(row_vectors(args.value_dim, kStorage, kSamples)),
        head_floats_(sum_vectors(head_vectors_, kStorage) * kLanes),
        value_floats_(sum_vectors(value_vectors_, kStorage) * kLanes),
        chunks_(wave_slices(args.plan.num_queries, backward_row_bytes(args, kStorage, kSamples))),
        slices_(wave_slices(args.keys, backward_row_bytes(args, kStorage, kSamples))) {
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
    most_floats_ = most_segment_floats<kSamples>(slices_.size, smaller(most_entries, chunk_rows_ * slices_.size));
  }

  /// Memory for each key head of a wave.
  int64_t state_bytes() const {
    return laid_out_bytes([&](ScratchArena& arena) { make_state(arena); });
  }

  /// All of `bundle` for key heads [first, first + count) of `key_heads`, in count * state_bytes() bytes at `memory`.
  void compute(const SampleBundle& bundle, const KeyHeads& key_heads, int64_t first, int64_t count,
               const Parallel& parallel, char* memory) const {
    const auto key_head = [&](int64_t i) { return key_heads.at(first + i); };
    const int64_t each = state_bytes();
    const auto state = [&](int64_t i) {
      return lay_out_in(memory + i * each, [&](ScratchArena& arena) { return make_state(arena); });
    };
    const int64_t heads = shared_heads(args_), keys = keys_of(args_, bundle.b[0]),
                  offset = offset_of(args_, bundle.b[0]);
    parallel_range(parallel, count * args_.keys, [&](int64_t begin, int64_t end) {
      for_parts(begin, end, args_.keys,
                [&](int64_t i, int64_t from, int64_t to) { start(state(i), bundle, key_head(i), from, to); });
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
        for_rows(
            [&](int64_t i, int64_t low, int64_t high) { start_rows(state(i), bundle, head(i), begin, low, high); });
        for (int64_t block = 0; block < slices_.count; ++block) {
          const Wave wave{begin, end, slices_.first(block), smaller(keys, slices_.end(block))};
          if (wave.key >= wave.key_end) continue;
          if (columns_wanted()) {
            parallel_range(parallel, count, [&](int64_t from, int64_t to) {
              for (int64_t i = from; i < to; ++i) list_columns(state(i), bundle, head(i), wave);
            });
          }
          for_rows(
              [&](int64_t i, int64_t low, int64_t high) { compute_rows(state(i), bundle, head(i), wave, low, high); });
          if (!columns_wanted()) continue;
          const int64_t columns_of_state = wave.key_end - wave.key;
          parallel_range(parallel, count * columns_of_state, [&](int64_t from, int64_t to) {
            for_parts(from, to, columns_of_state,
                      [&](int64_t i, int64_t low, int64_t high) { compute_columns(state(i), wave, low, high); });
          });
        }
        if (grads_.grad_query.data == nullptr) continue;
        for_rows(
            [&](int64_t i, int64_t low, int64_t high) { finish_rows(state(i), bundle, head(i), begin, low, high); });
      }
    }
    if (!columns_wanted()) return;
    parallel_range(parallel, count * args_.keys, [&](int64_t begin, int64_t end) {
      for_parts(begin, end, args_.keys,
                [&](int64_t i, int64_t from, int64_t to) { finish(state(i), bundle, key_head(i), keys, from, to); });
    });
  }

 private:
  static constexpr int64_t kQuadFloats = kQuad * kSamples;
  static constexpr int64_t kSegmentFloats = sizeof(RowSegment) / sizeof(float);
  static constexpr float kOutside = -1.0f;  // P where the columns must not touch a row

  /// Pattern rows [row, row_end) and keys [key, key_end).
  struct Wave {
    int64_t row, row_end, key, key_end;
  };

  struct KeyHeadState {
    BundlePanel key, value;          // all keys
    BundlePanel query, grad_output;  // the queries of a chunk
    float *grad_key, *grad_value;    // sums for all keys
    float* grad_query;               // sums for the queries of a chunk
    float* deltas;                   // dO . O of the queries of a chunk, a group each
    float *shifts, *factors;         // P = 2^(score - shift) factor, in the same way
    int64_t* column_cursors;         // [keys]: the first entry of a column that no chunk has had yet
    int64_t* row_cursors;            // [queries of a chunk]: the first entry of a row that no block has had yet
    RowSegment* segments;            // [keys of a block]: of the columns
    float* p_and_ds;                 // P and dS, side by side, of the columns' segments
  };

  /// A row's shift and factor, a group each.
  struct Exponent {
    const float *shift, *factor;
  };

  bool columns_wanted() const { return grads_.grad_key.data != nullptr || grads_.grad_value.data != nullptr; }
  int64_t plan_head(const SampleBundle& bundle, int64_t h) const { return args_.plan_head(bundle.b[0], h); }

  KeyHeadState make_state(ScratchArena& arena) const {
    const auto panel = [&](int64_t rows, int64_t chunks) {
      return bundle_panel(reinterpret_cast<char*>(arena.floats(bundle_panel_floats(rows, chunks))), rows, chunks);
    };
    KeyHeadState x;
    x.key = panel(args_.keys, head_vectors_);
    x.value = panel(args_.keys, value_vectors_);
    x.query = panel(chunk_rows_, head_vectors_);
    x.grad_output = panel(chunk_rows_, value_vectors_);
    x.grad_key = arena.floats((args_.keys + kMaxSamples) * head_floats_);
    x.grad_value = arena.floats((args_.keys + kMaxSamples) * value_floats_);
    x.grad_query = arena.floats((chunk_rows_ + kMaxSamples) * head_floats_);
    x.deltas = arena.floats(chunk_rows_ * kQuadFloats);
    x.shifts = arena.floats(chunk_rows_ * kQuadFloats);
    x.factors = arena.floats(chunk_rows_ * kQuadFloats);
    x.column_cursors = reinterpret_cast<int64_t*>(arena.floats(args_.keys * 2));
    x.row_cursors = reinterpret_cast<int64_t*>(arena.floats(chunk_rows_ * 2));
    x.segments = reinterpret_cast<RowSegment*>(arena.floats(slices_.size * kSegmentFloats));
    x.p_and_ds = arena.floats(2 * most_floats_);
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
  void start(const KeyHeadState& x, const SampleBundle& bundle, int64_t key_head, int64_t begin, int64_t end) const {
    const int64_t last = smaller(end, keys_of(args_, bundle.b[0]));
    ThreadArena arena;
    float* scratch = arena.floats(pack_floats());
    if (begin < last) {
      pack_rows<kSamples>(args_.key, args_.dtype, bundle, key_head, begin, last, args_.head_dim, kStorage,
                          gaussian_ ? Extra::kHalfSquare : Extra::kNone, x.key.from(begin), scratch);
      pack_rows<kSamples>(args_.value, args_.dtype, bundle, key_head, begin, last, args_.value_dim, kStorage,
                          Extra::kNone, x.value.from(begin), scratch);
    }
    std::memset(x.grad_key + begin * head_floats_, 0, (end - begin) * head_floats_ * sizeof(float));
    std::memset(x.grad_value + begin * value_floats_, 0, (end - begin) * value_floats_ * sizeof(float));
  }

  /// The segments of a wave's columns.
  void list_columns(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, const Wave& wave) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h);
    const bool first = wave.row == offset_of(args_, bundle.b[0]);
    int64_t place = 0;
    for (int64_t j = wave.key; j < wave.key_end; ++j) {
      const PlanRange places = plan.places(head, j);
      if (first) {
        x.column_cursors[j] = places.begin + count_below(plan.rows + places.begin, places.end - places.begin, wave.row);
      }
      const uint16_t* index = plan.rows + x.column_cursors[j];
      const int64_t count = count_below(index, places.end - x.column_cursors[j], wave.row_end);
      x.column_cursors[j] += count;
      const auto column = static_cast<uint32_t>(j - wave.key);
      x.segments[column] = {index, column, static_cast<uint32_t>(count), place};
      if (count % kQuad != 0) {  // what stands behind a column's last entry
        float* last = x.p_and_ds + place + offset_of_two<kSamples>(count / kQuad * kQuad, 0);
        store_lanes(last, broadcast_quads<kSamples>(0));
        store_lanes(last + kQuadFloats, broadcast_quads<kSamples>(0));
      }
      place += 2 * segment_floats<kSamples>(count);
    }
  }

  int64_t pack_floats() const { return pack_scratch(larger(args_.head_dim, args_.value_dim)); }

  /// Packs pattern rows [begin, end) of the chunk that starts at `chunk`; no sums yet.
  void start_rows(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, int64_t chunk, int64_t begin,
                  int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t offset = offset_of(args_, bundle.b[0]), first = begin - chunk;
    const int64_t room = padded(args_.value_dim);
    ThreadArena arena;
    float* scratch = arena.floats(pack_floats());
    float* grad_output = arena.floats(room);
    float* output = arena.floats(room);
    pack_rows<kSamples>(args_.query, args_.dtype, bundle, h, begin - offset, end - offset, args_.head_dim, kStorage,
                        query_extra(args_), x.query.from(first), scratch);
    pack_rows<kSamples>(grads_.grad_output, args_.dtype, bundle, h, begin - offset, end - offset, args_.value_dim,
                        kStorage, Extra::kNone, x.grad_output.from(first), scratch);
    const int64_t row = plan_head(bundle, h) * plan.num_queries + begin;
    for (int64_t r = 0; r < end - begin; ++r) x.row_cursors[first + r] = plan.row_offsets[row + r];
    float* sums = x.grad_query + first * head_floats_;
    for (int64_t i = 0; i < (end - begin) * head_floats_; i += kLanes) store(sums + i, zero());
    for (int64_t n = begin - offset; n < end - offset; ++n) {
      float delta[kSamples];
      for (int e = 0; e < kSamples; ++e) {
        const int64_t ahead = smaller(n + 8, end - offset - 1);
        prefetch_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, ahead),
                     args_.value_dim * element_size(args_.dtype));
        load_row(row_address(grads_.grad_output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_dim, 1.0f,
                 grad_output);
        load_row(row_address(grads_.output, args_.dtype, bundle.b[e], h, n), args_.dtype, args_.value_dim, 1.0f,
                 output);
        delta[e] = dot(grad_output, output, room);
      }
      spread_samples<kSamples>(delta, x.deltas + (n + offset - chunk) * kQuadFloats);
    }
    for (int64_t row = begin; row < end; ++row) start_exponent(x, bundle, h, row, row - chunk);
  }

  /// The shift and factor of pattern row `row`, which is row r of its chunk.
  void start_exponent(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, int64_t row, int64_t r) const {
    float shift[kSamples], factor[kSamples];
    bool large[kSamples], any = false;
    for (int e = 0; e < kSamples; ++e) {
      const int64_t n = row - offset_of(args_, bundle.b[0]);
      const int64_t at = (bundle.b[e] * args_.query_heads + h) * args_.queries + n;
      const float lse = static_cast<const float*>(grads_.logsumexp)[at];
      shift[e] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // no entry counts where there is no support
      factor[e] = 1.0f;
      large[e] = is_large_logsumexp(lse);
      any |= large[e];
    }
    if (any) sum_row(x, bundle, h, row, r, large, shift, factor);
    spread_samples<kSamples>(shift, x.shifts + r * kQuadFloats);
    spread_samples<kSamples>(factor, x.factors + r * kQuadFloats);
  }

  /// The same from the row's scores, which are computed once more, for the samples that are `large`.
  void sum_row(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, int64_t row, int64_t r, const bool* large,
               float* shift, float* factor) const {
    const PlanView& plan = args_.plan;
    const PlanRange entries = plan.row(plan_head(bundle, h) * plan.num_queries + row);
    const uint16_t* index = plan.columns + entries.begin;
    const int64_t count = count_below(index, entries.end - entries.begin, keys_of(args_, bundle.b[0]));
    const float* prior = args_.prior != nullptr ? static_cast<const float*>(args_.prior) + entries.begin : nullptr;
    const int64_t room = most_segment_floats<kSamples>(1, count) + kLanes;
    const int64_t weight_floats = prior != nullptr ? WeightArrays::floats(count) : 0;
    ThreadArena scratch;
    float* scores = scratch.floats(room);
    const WeightArrays parts(scratch.floats(weight_floats), count);
    if (prior != nullptr) parts.take(prior, count, args_.log_prior);
    const RowSegment segment{index, 0, static_cast<uint32_t>(count), 0};
    DotsTask task{};
    task.begin = &segment;
    task.end = &segment + 1;
    task.out = scores;
    task.scale = static_cast<float>(args_.scale * kLog2E);
    task.fill = -kInfinity;
    dots<kStorage, kSamples>(task, x.query.from(r), x.key, 0);
    for (int e = 0; e < kSamples; ++e) {
      if (!large[e]) continue;
      /// use(score with the weight's exponent, the weight's factor) of the entries in the support.
      const auto for_scores = [&](auto&& use) {
        for (int64_t k = 0; k < count; ++k) {
          const double score = static_cast<double>(scores[offset_of_entry<kSamples>(k, e)]);
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

  void finish_rows(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, int64_t chunk, int64_t begin,
                   int64_t end) const {
    const int64_t count = end - begin;
    ThreadArena scratch;
    float* factors = scratch.floats(count * kSamples);
    for (int64_t i = 0; i < count * kSamples; ++i) factors[i] = static_cast<float>(args_.scale);
    unpack_rows<kStorage, kSamples>(x.grad_query + (begin - chunk) * head_floats_, head_floats_, factors,
                                    grads_.grad_query, args_.dtype, bundle, h, begin - offset_of(args_, bundle.b[0]),
                                    count, args_.head_dim, scratch.floats(pack_floats()));
  }

  /// Pattern rows [begin, end) of a wave.
  void compute_rows(const KeyHeadState& x, const SampleBundle& bundle, int64_t h, const Wave& wave, int64_t begin,
                    int64_t end) const {
    const PlanView& plan = args_.plan;
    const int64_t head = plan_head(bundle, h);
    const int64_t columns = wave.key_end - wave.key;
    const auto* prior = static_cast<const float*>(args_.prior);
    const bool weighing = prior != nullptr || dropout_.active();
    const int64_t row_floats = most_segment_floats<kSamples>(1, columns);
    const int64_t pass_rows = most_grad_pass_rows(end - begin, row_floats);
    const int64_t most = pass_rows * row_floats;
    const int64_t picked_floats = prior != nullptr ? (pass_rows * columns + kIndexPadding) / 2 : 0;
    const int64_t weight_floats = prior != nullptr ? WeightArrays::floats(columns) : 0;
    ThreadArena scratch;
    auto* segments = reinterpret_cast<RowSegment*>(scratch.floats(pass_rows * kSegmentFloats));
    float* scores = scratch.floats(most);
    float* products = scratch.floats(most);
    auto* places = reinterpret_cast<uint32_t*>(scratch.floats(columns));
    float* factors = scratch.floats(weighing ? row_floats : 0);  // of dropout, for one row
    auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(picked_floats));
    const WeightArrays parts(scratch.floats(weight_floats), columns);
    if (columns_wanted()) first_places(x, head, wave, begin, places);
    const int64_t first_index = wave.key;

    for (int64_t pass = begin; pass < end; pass += pass_rows) {
      const int64_t count = smaller(pass_rows, end - pass), first = pass - wave.row;
      const float *deltas = x.deltas + first * kQuadFloats, *shifts = x.shifts + first * kQuadFloats;
      const float* exponent_factors = x.factors + first * kQuadFloats;
      int64_t place = 0;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row_end = plan.row_offsets[head * plan.num_queries + pass + r + 1];
        int64_t& cursor = x.row_cursors[first + r];
        const int64_t entries = count_below(plan.columns + cursor, row_end - cursor, wave.key_end);
        segments[r] = {plan.columns + cursor, static_cast<uint32_t>(r), static_cast<uint32_t>(entries), place};
        place += segment_floats<kSamples>(entries);
        cursor += entries;
      }
      DotsTask task{};
      task.begin = segments;
      task.end = segments + count;
      task.out = scores;
      task.scale = static_cast<float>(args_.scale * kLog2E);
      task.fill = -kInfinity;
      dots<kStorage, kSamples>(task, x.query.from(first), x.key, 0);
      task.out = products;
      task.scale = 1.0f;
      task.fill = 0.0f;
      dots<kStorage, kSamples>(task, x.grad_output.from(first), x.value, 0);
      uint16_t* free_index = picked;
      for (int64_t r = 0; r < count; ++r) {
        RowSegment& segment = segments[r];
        float *p = scores + segment.place, *ds = products + segment.place;
        const Exponent exponent{shifts + r * kQuadFloats, exponent_factors + r * kQuadFloats};
        const float* delta = deltas + r * kQuadFloats;
        if (weighing) {
          weigh(x, segment, bundle, h, pass + r, p, ds, factors, parts, exponent, delta, free_index, places,
                first_index);
        } else {
          differentiate(segment, p, ds, exponent, delta);
        }
      }
      for (int64_t r = 0; columns_wanted() && !weighing && r < count; ++r) {
        const RowSegment segment = segments[r];
        const float *p = scores + segment.place, *ds = products + segment.place;
        int64_t k = 0;
        for (; k + kQuad <= segment.count; k += kQuad, p += kQuadFloats, ds += kQuadFloats) {
          leave_quad(x, segment.index + k, places, first_index, p, ds);
        }
        for (; k < segment.count; ++k, ++p, ++ds) leave(x, places[segment.index[k] - first_index], p, ds);
      }
      if (grads_.grad_query.data == nullptr) continue;
      SumsTask sum{};
      sum.begin = segments;
      sum.end = segments + count;
      sum.weights = products;
      sum.sums = x.grad_query + first * head_floats_;
      sum.sums_stride = head_floats_;
      weighted_sums<kStorage, kSamples>(sum, x.key, 0);
    }
  }

  /// Where the entries of a wave's columns go that are of pattern row `row` or later.
  void first_places(const KeyHeadState& x, int64_t head, const Wave& wave, int64_t row, uint32_t* places) const {
    const PlanView& plan = args_.plan;
    for (int64_t j = wave.key; j < wave.key_end; ++j) {
      const RowSegment& segment = x.segments[j - wave.key];
      int64_t done = 0;
      if (row != wave.row) {
        const PlanRange places = plan.places(head, j);
        const int64_t first = search_below(plan.rows + places.begin, places.end - places.begin, wave.row);
        done = count_below(plan.rows + places.begin + first, places.end - places.begin - first, row);
      }
      places[j - wave.key] = static_cast<uint32_t>(segment.place + offset_of_two<kSamples>(done, 0));
    }
  }

  /// Where an entry of a column goes; its next one goes behind it.
  __attribute__((always_inline)) static uint32_t take_place(uint32_t& next) {
    const uint32_t place = next;
    next = place + 2 + (place & 2) * 2 * (kSamples - 1);  // offset_of_two
    return place;
  }
  /// Leaves P and dS of an entry, whose first samples' are at p and ds, where its column's next entry stands.
  __attribute__((always_inline)) static void leave(const KeyHeadState& x, uint32_t& next, const float* p,
                                                   const float* ds) {
    float* target = x.p_and_ds + take_place(next);
#pragma GCC unroll 4
    for (int e = 0; e < kSamples; ++e) {
      target[e * kQuad] = p[e * kQuad];
      target[e * kQuad + 1] = ds[e * kQuad];
    }
  }
  /// Leaves those of a group, each entry's by one store.
  __attribute__((always_inline)) static void leave_quad(const KeyHeadState& x, const uint16_t* index, uint32_t* places,
                                                        int64_t first_index, const float* p, const float* ds) {
    float* targets[kQuad];
#pragma GCC unroll 4
    for (int k = 0; k < kQuad; ++k) targets[k] = x.p_and_ds + take_place(places[index[k] - first_index]);
#pragma GCC unroll 4
    for (int e = 0; e < kSamples; ++e) {
      store_side_by_side(p + e * kQuad, ds + e * kQuad, targets, e * kQuad);
    }
  }

  /// P, dS and the weights' gradient of pattern row `row`, where there is a prior or dropout, and leaves the first two
  /// to the columns. Entries outside the support are taken out of the segment, because nothing may touch their rows;
  /// its indices then stand at `free_index`, which moves on.
  void weigh(const KeyHeadState& x, RowSegment& segment, const SampleBundle& bundle, int64_t h, int64_t row, float* p,
             float* ds, float* factors, const WeightArrays& parts, const Exponent& exponent, const float* delta,
             uint16_t*& free_index, uint32_t* places, int64_t first_index) const {
    const int64_t entry = segment.index - args_.plan.columns;
    const float* weights = args_.prior != nullptr ? static_cast<const float*>(args_.prior) + entry : nullptr;
    const auto for_entries = [&](auto&& use) __attribute__((always_inline)) {
      for (int64_t k = 0; k < segment.count; ++k) {
        for (int e = 0; e < kSamples; ++e) use(k, e, offset_of_entry<kSamples>(k, e));
      }
    };
    if (dropout_.active()) {
      for_entries([&](int64_t k, int e, int64_t at) {
        factors[at] = static_cast<float>(dropout_.factor(bundle.b[e], h, row, segment.index[k]));
        ds[at] *= factors[at];
      });
    }
    const bool logs = args_.log_prior;
    const float below = below_support(logs);
    if (weights == nullptr) {
      differentiate(segment, p, ds, exponent, delta);
    } else {
      alignas(64) float none[kQuadFloats];
      store_lanes(none, broadcast_quads<kSamples>(0));
      parts.take(weights, segment.count, logs);
      for (int64_t k = 0; k < segment.count; k += kQuad) {
        float* group = p + offset_of_entry<kSamples>(k, 0);
        const auto shifted =
            entry_quads<kSamples>(parts.exponents + k, segment.count - k) - load_quads<kSamples>(exponent.shift);
        store_lanes(group, load_quads<kSamples>(group) + shifted);
      }
      differentiate(segment, p, ds, {none, exponent.factor}, delta);
    }
    if (grads_.grad_prior != nullptr) {
      float* target = static_cast<float*>(grads_.grad_prior) + entry;
      for_entries([&](int64_t k, int e, int64_t at) {
        // Of a row without support nothing counts, not even NaN, and of a logarithm of 0 neither.
        if (exponent.shift[e * kQuad] == kInfinity || (logs && !in_support(weights[k], below))) return;
        target[k] += ds[at];
      });
    }
    for (int64_t k = 0; weights != nullptr && !logs && k < segment.count; k += kQuad) {
      const auto group = entry_quads<kSamples>(parts.factors + k, segment.count - k);
      const int64_t at = offset_of_entry<kSamples>(k, 0);
      store_lanes(p + at, load_quads<kSamples>(p + at) * group);
      store_lanes(ds + at, load_quads<kSamples>(ds + at) * group);
    }
    if (dropout_.active()) for_entries([&](int64_t, int, int64_t at) { p[at] *= factors[at]; });
    const bool all = weights == nullptr || all_in_support(weights, segment.count, below);
    alignas(64) float outside[kQuadFloats];
    store_lanes(outside, broadcast_quads<kSamples>(kOutside));
    for (int64_t k = 0; columns_wanted() && k < segment.count; ++k) {
      const bool inside = all || in_support(weights[k], below);
      const int64_t at = offset_of_entry<kSamples>(k, 0);
      leave(x, places[segment.index[k] - first_index], inside ? p + at : outside, inside ? ds + at : outside);
    }
    if (all) return;
    take_out(
        segment, free_index, [&](int64_t k) { return in_support(weights[k], below); },
        [&](int64_t to, int64_t from, int e) {
          for (float* numbers : {p, ds}) {
            numbers[offset_of_entry<kSamples>(to, e)] = from < 0 ? 0.0f : numbers[offset_of_entry<kSamples>(from, e)];
          }
        });
  }

  /// Keeps the entries of a segment for which keep(k), with their indices at `free_index`, which moves on, and their
  /// numbers: move(to, from, e) moves those of a sample's entry, or clears them if `from` is negative.
  template <class Keep, class Move>
  static void take_out(RowSegment& segment, uint16_t*& free_index, Keep&& keep, Move&& move) {
    uint16_t* index = free_index;
    int64_t kept = 0;
    for (int64_t k = 0; k < segment.count; ++k) {
      if (!keep(k)) continue;
      index[kept] = segment.index[k];
      for (int e = 0; e < kSamples; ++e) move(kept, k, e);
      ++kept;
    }
    for (int64_t k = kept; k % kQuad != 0; ++k) {
      for (int e = 0; e < kSamples; ++e) move(k, -1, e);
    }
    segment.index = index;
    segment.count = static_cast<uint32_t>(kept);
    free_index = index + kept;
  }

  /// P = 2^(scores - shift) factor and dS = P (products - delta) of a segment.
  __attribute__((always_inline)) static void differentiate(const RowSegment& segment, float* scores, float* products,
                                                           const Exponent& exponent, const float* delta) {
    const Vec shifts = spread_quads<kSamples>(exponent.shift), factors = spread_quads<kSamples>(exponent.factor);
    const Vec deltas = spread_quads<kSamples>(delta);
    for (int64_t i = 0; i < segment_floats<kSamples>(segment.count); i += kLanes) {
      const Vec attention = mul(exp2(sub(load(scores + i), shifts)), factors);
      store(scores + i, attention);
      store(products + i, mul(attention, sub(load(products + i), deltas)));
    }
  }

  /// Adds columns [begin, end) of a wave to dK and dV.
  void compute_columns(const KeyHeadState& x, const Wave& wave, int64_t begin, int64_t end) const {
    const int64_t row = -wave.row;  // of the panels, where index 0 would be
    ThreadArena scratch;
    if (args_.prior != nullptr) {
      const int64_t pairs = x.segments[end - 1].place / 2 + segment_floats<kSamples>(x.segments[end - 1].count) -
                            x.segments[begin].place / 2;
      auto* free_index = reinterpret_cast<uint16_t*>(scratch.floats((pairs / kSamples + kIndexPadding + 1) / 2));
      for (int64_t j = begin; j < end; ++j) {
        float* pair = x.p_and_ds + x.segments[j].place;
        const auto inside = [&](int64_t k) { return pair[offset_of_two<kSamples>(k, 0)] != kOutside; };
        int64_t k = 0;
        while (k < x.segments[j].count && inside(k)) ++k;
        if (k == x.segments[j].count) continue;
        take_out(x.segments[j], free_index, inside, [&](int64_t to, int64_t from, int e) {
          for (int64_t i = 0; i < 2; ++i) {
            pair[offset_of_two<kSamples>(to, e) + i] = from < 0 ? 0.0f : pair[offset_of_two<kSamples>(from, e) + i];
          }
        });
      }
    }
    const auto task = [&](float* sums, int64_t stride) {
      SumsTask sum{};
      sum.begin = x.segments + begin;
      sum.end = x.segments + end;
      sum.weights = x.p_and_ds;
      sum.sums = sums + wave.key * stride;
      sum.sums_stride = stride;
      return sum;
    };
    if (grads_.grad_value.data != nullptr) {
      weighted_sums<kStorage, kSamples, Weights::kFirstOfTwo>(task(x.grad_value, value_floats_), x.grad_output, row);
    }
    if (grads_.grad_key.data != nullptr) {
      weighted_sums<kStorage, kSamples, Weights::kSecondOfTwo>(task(x.grad_key, head_floats_), x.query, row);
    }
  }

  /// Stores dK and dV of keys [begin, end).
  void finish(const KeyHeadState& x, const SampleBundle& bundle, int64_t key_head, int64_t keys, int64_t begin,
              int64_t end) const {
    const int64_t count = end - begin, room = padded(args_.head_dim + 1);
    ThreadArena scratch;
    float* ones = scratch.floats(count * kSamples);
    float* scales = scratch.floats(count * kSamples);
    float* sums = scratch.floats(kSamples * room);
    float* key = scratch.floats(room);
    float* pack = scratch.floats(pack_scratch(larger(args_.head_dim, args_.value_dim)));
    for (int64_t i = 0; i < count * kSamples; ++i) {
      ones[i] = 1.0f;
      scales[i] = static_cast<float>(args_.scale);
    }
    if (grads_.grad_value.data != nullptr) {
      unpack_rows<kStorage, kSamples>(x.grad_value + begin * value_floats_, value_floats_, ones, grads_.grad_value,
                                      args_.dtype, bundle, key_head, begin, count, args_.value_dim, pack);
    }
    if (grads_.grad_key.data == nullptr) return;
    if (!gaussian_) {
      return unpack_rows<kStorage, kSamples>(x.grad_key + begin * head_floats_, head_floats_, scales, grads_.grad_key,
                                             args_.dtype, bundle, key_head, begin, count, args_.head_dim, pack);
    }
    // d s_ij / d k_j = scale (q_i - k_j): the sum of q's extra column, of ones, is the sum of dS.
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t v = 0; v < room; v += kLanes) {
        Vec columns[kSamples];
        separate<kStorage, kSamples>(x.grad_key + j * head_floats_, v / kLanes, columns);
#pragma GCC unroll 4
        for (int e = 0; e < kSamples; ++e) store(sums + e * room + v, columns[e]);
      }
      for (int e = 0; e < kSamples; ++e) {
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
  const int64_t head_vectors_, value_vectors_, head_floats_, value_floats_;
  const KeySlices chunks_, slices_;  // of queries and of keys
  int64_t chunk_rows_ = 0, most_floats_ = 0;
};

/// All waves of some key heads with bundles of kSamples.
template <Storage kStorage, int kSamples>
void backward_bundles(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                      const Parallel& parallel, const SampleBundles& bundles, int64_t samples) {
  const CsrBackward<kStorage, kSamples> backward(args, grads);
  const auto mine = [&](const SampleBundle& bundle) { return bundle.samples == samples; };
  int64_t count = 0;
  for (int64_t i = 0; i < bundles.count; ++i) count += mine(bundles.at(i));
  if (count == 0) return;
  // A bundle and key head is one thread's where there are enough of them; a weight's gradient sums over bundles.
  const int64_t units = count * key_heads.count, threads = larger(1, parallel.threads);
  const bool alone =
      grads.grad_prior == nullptr && units >= threads && (units + threads - 1) / threads * threads * 10 <= units * 11;
  const SharedScratch memory((alone ? threads : key_heads.count) * backward.state_bytes());
  char* states = static_cast<char*>(memory.data());
  if (!alone) {
    for (int64_t i = 0; i < bundles.count; ++i) {
      if (mine(bundles.at(i))) backward.compute(bundles.at(i), key_heads, 0, key_heads.count, parallel, states);
    }
    return;
  }
  const int64_t all = bundles.count * key_heads.count;
  parallel_range(parallel, threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      int64_t unit = 0;
      for (int64_t i = 0; i < all; ++i) {
        const SampleBundle bundle = bundles.at(i / key_heads.count);
        if (!mine(bundle)) continue;
        if (unit * threads / units == thread) {
          backward.compute(bundle, key_heads, i % key_heads.count, 1, Parallel{},
                           states + thread * backward.state_bytes());
        }
        ++unit;
      }
    }
  });
}

template <Storage kStorage>
void backward(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads, const Parallel& parallel) {
  const SampleBundles bundles(args, bundled_samples(args, kStorage));
  if (bundles.samples == kMaxSamples) {
    backward_bundles<kStorage, kMaxSamples>(args, grads, key_heads, parallel, bundles, kMaxSamples);
  }
  if (kMaxSamples > 2 && bundles.samples == 2) {
    backward_bundles<kStorage, 2>(args, grads, key_heads, parallel, bundles, 2);
  }
  backward_bundles<kStorage, 1>(args, grads, key_heads, parallel, bundles, 1);
}

template <Storage kStorage, int kSamples>
void count_blocks(const CsrArgs& args, BlockCounts& blocks) {
  const Extra extra = args.score == Score::kGaussian ? Extra::kOne : Extra::kNone;
  const int64_t head_vectors = row_vectors(columns_with(extra, args.head_dim, kStorage), kStorage, kSamples);
  const int64_t value_vectors = row_vectors(args.value_dim, kStorage, kSamples);
  const int64_t row_bytes = backward_row_bytes(args, kStorage, kSamples);
  for (const int64_t chunks : {head_vectors, value_vectors}) {
    blocks.add(chunks);
    blocks.add(chunks, kMaxVectors);
  }
  const KeySlices keys(args.keys, row_bytes);
  blocks.add(keys.count);
  for (const int64_t count : {int64_t{1}, keys.count}) {
    blocks.add(args.queries, most_pass_rows(args.queries, most_segment_floats<kSamples>(count, args.keys)));
  }
  const KeySlices chunks = wave_slices(args.plan.num_queries, row_bytes), slices = wave_slices(args.keys, row_bytes);
  blocks.add(chunks.count);
  blocks.add(slices.count);
  blocks.add(chunks.size, most_grad_pass_rows(chunks.size, most_segment_floats<kSamples>(1, slices.size)));
}

template <Storage kStorage>
void count_blocks(const CsrArgs& args, BlockCounts& blocks) {
  const int64_t samples = bundled_samples(args, kStorage);
  blocks.add(samples);
  if (samples == kMaxSamples) return count_blocks<kStorage, kMaxSamples>(args, blocks);
  if (samples == 2) return count_blocks<kStorage, 2>(args, blocks);
  count_blocks<kStorage, 1>(args, blocks);
}

}  // namespace

int64_t bundled_samples(const CsrArgs& args, Storage storage) {
  if (args.kv_lens != nullptr || args.query_offsets != nullptr) return 1;  // then samples differ
  if (args.plan.columns == nullptr) return 1;                              // rows take samples one by one
  return cpu::bundled_samples(args.batch / larger(1, args.groups()), args.keys, larger(args.head_dim, args.value_dim),
                              storage, kLanes);
}

Storage entries_storage(const CsrArgs& args) {
  const Storage storage = storage_of(kIsa, args.dtype);
  const auto samples = static_cast<int>(bundled_samples(args, storage));
  return cpu::entries_storage(storage, larger(args.head_dim, args.value_dim), samples, kLanes);
}

bool entries_leave_backward(const CsrArgs& args, const BackwardArgs& grads, Storage storage) {
  const PlanView& plan = args.plan;
  if (plan.columns == nullptr || plan.num_queries > kPlanShort || plan.column_offsets.data == nullptr) return true;
  if (grads.grad_prior != nullptr && args.pattern_heads() < args.query_heads) return true;
  constexpr double kMostSegments = 8;
  const int64_t samples = bundled_samples(args, storage), row_bytes = backward_row_bytes(args, storage, samples);
  const KeySlices chunks = wave_slices(args.queries, row_bytes), slices = wave_slices(args.keys, row_bytes);
  const auto segments = static_cast<double>(args.queries * slices.count + args.keys * chunks.count);
  const double entries = static_cast<double>(plan.nnz) / static_cast<double>(plan.heads * plan.num_queries) *
                         static_cast<double>(args.queries);  // of a head
  return segments >
         kMostSegments * static_cast<double>(samples) * (entries + static_cast<double>(args.queries + args.keys));
}

void entries_backward(const CsrArgs& args, const BackwardArgs& grads, [[maybe_unused]] Storage storage,
                      const KeyHeads& key_heads, const Parallel& parallel) {
#if defined(FIAK_ISA_AVX512_BF16)
  if (storage == Storage::kBFloat16) return backward<Storage::kBFloat16>(args, grads, key_heads, parallel);
#endif
  backward<Storage::kFloat32>(args, grads, key_heads, parallel);
}

void entries_blocks(const CsrArgs& args, BlockCounts& blocks) {
#if defined(FIAK_ISA_AVX512_BF16)
  blocks.add(entries_storage(args) == Storage::kBFloat16);
  if (entries_storage(args) == Storage::kBFloat16) return count_blocks<Storage::kBFloat16>(args, blocks);
#endif
  count_blocks<Storage::kFloat32>(args, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
