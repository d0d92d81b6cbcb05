#include "kernels/cpu/decode/decode_rows.h"
#include "kernels/cpu/pairs/indices.h"
#include "kernels/cpu/rows/rows.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kMostPairs = 512;  // of a row or column, at once
constexpr int64_t kRoom = kMostPairs + kIndexPadding;

/// Some pairs of a query, or of a key: rows origin + index[i] of the other operands.
struct PairSpan {
  int64_t origin, count;
  const uint16_t* index;
  const float* weights;  // or logarithms, with their parts in the memory; null where all weights are 1
  int64_t entry;         // of the plan, of the first of them, where they are entries that follow each other
};

/// Memory for pairs whose indices do not stand in the plan, and for weights and their parts.
struct PairMemory {
  uint16_t* index;
  float* weights;
  WeightArrays parts;

  explicit PairMemory(ScratchArena& scratch)
      : index(reinterpret_cast<uint16_t*>(scratch.floats(kRoom / 2))),
        weights(scratch.floats(kRoom)),
        parts(scratch.floats(WeightArrays::floats(kRoom)), kRoom) {}
};

/// The power of two of a pair's probability, but for its weight's factor and its row's. No pass over a row may round
/// the product alone, since all must get the same number, and near the shift that is all there is.
FIAK_INLINE Vec shifted(Vec score, Vec scale, const PairSpan& pairs, const PairMemory& memory, int64_t i, Vec shift) {
  // The exponent less the shift is exact, or nearly.
  return pairs.weights == nullptr ? fmsub(score, scale, shift)
                                  : fmadd(score, scale, sub(load(memory.parts.exponents + i), shift));
}

/// The first of entries [begin, end), whose numbers at(i) ascend, with a number from `bound` on.
template <class At>
FIAK_INLINE int64_t search(int64_t begin, int64_t end, int64_t bound, At&& at) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (at(middle) < bound) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

/// The keys of a query that are visible, in order; only those of the support if `picks`.
class QueryPairs {
 public:
  QueryPairs(const CsrArgs& args, int64_t b, int64_t h, int64_t n, bool picks, const PairMemory& memory)
      : args_(args), memory_(memory), picks_(picks) {
    const PlanView& plan = args.plan;
    const PlanRange row = plan.row(args.plan_head(b, h) * plan.num_queries + n + offset_of(args, b));
    const int64_t keys = keys_of(args, b);
    entry_ = row.begin;
    end_ =
        keys == plan.num_keys ? row.end : search(row.begin, row.end, keys, [&](int64_t i) { return plan.column(i); });
  }
  bool next(PairSpan& pairs) {
    const PlanView& plan = args_.plan;
    const auto* prior = static_cast<const float*>(args_.prior);
    if (prior == nullptr && plan.columns != nullptr) {
      pairs = {0, smaller(end_ - entry_, kMostPairs), plan.columns + entry_, nullptr, entry_};
      entry_ += pairs.count;
      return pairs.count > 0;
    }
    pairs = {0, 0, memory_.index, prior != nullptr ? memory_.weights : nullptr, entry_};
    for (; entry_ < end_ && pairs.count < kMostPairs; ++entry_) {
      if (picks_ && prior != nullptr && !in_support(prior[entry_], below_support(args_.log_prior))) continue;
      const int64_t column = plan.column(entry_);
      if (pairs.count == 0) pairs.origin = column / kPlanShort * kPlanShort;
      if (column - pairs.origin >= kPlanShort) break;
      if (prior != nullptr) memory_.weights[pairs.count] = prior[entry_];
      memory_.index[pairs.count++] = static_cast<uint16_t>(column - pairs.origin);
    }
    if (prior != nullptr) memory_.parts.take(memory_.weights, pairs.count, args_.log_prior);
    return pairs.count > 0;
  }

 private:
  const CsrArgs& args_;
  const PairMemory& memory_;
  bool picks_;
  int64_t entry_, end_;
};

/// The queries of a key that the call has, in order; only those of the support.
class KeyPairs {
 public:
  KeyPairs(const CsrArgs& args, int64_t b, int64_t h, int64_t j, const PairMemory& memory)
      : args_(args), memory_(memory), head_(args.plan_head(b, h)), offset_(offset_of(args, b)) {
    const PlanView& plan = args.plan;
    const PlanRange places = plan.places(head_, j);
    const auto row = [&](int64_t i) { return plan.query_of(head_, i); };
    place_ = offset_ == 0 ? places.begin : search(places.begin, places.end, offset_, row);
    end_ = offset_ + args.queries == plan.num_queries ? places.end
                                                      : search(place_, places.end, offset_ + args.queries, row);
    if (args.prior != nullptr) first_entry_ = plan.first_entry(head_);
  }
  bool next(PairSpan& pairs) {
    const PlanView& plan = args_.plan;
    const auto* prior = static_cast<const float*>(args_.prior);
    if (prior == nullptr && plan.num_queries <= kPlanShort) {
      pairs = {-offset_, smaller(end_ - place_, kMostPairs), plan.rows + place_, nullptr, 0};
      place_ += pairs.count;
      return pairs.count > 0;
    }
    pairs = {0, 0, memory_.index, prior != nullptr ? memory_.weights : nullptr, 0};
    for (; place_ < end_ && pairs.count < kMostPairs; ++place_) {
      const float weight = prior != nullptr ? prior[first_entry_ + plan.positions[place_]] : 1.0f;
      if (prior != nullptr && !in_support(weight, below_support(args_.log_prior))) continue;
      const int64_t n = plan.query_of(head_, place_) - offset_;
      if (pairs.count == 0) pairs.origin = n / kPlanShort * kPlanShort;
      if (n - pairs.origin >= kPlanShort) break;
      if (prior != nullptr) memory_.weights[pairs.count] = weight;
      memory_.index[pairs.count++] = static_cast<uint16_t>(n - pairs.origin);
    }
    if (prior != nullptr) memory_.parts.take(memory_.weights, pairs.count, args_.log_prior);
    return pairs.count > 0;
  }

 private:
  const CsrArgs& args_;
  const PairMemory& memory_;
  int64_t head_, offset_, first_entry_ = 0, place_ = 0, end_ = 0;
};

/// Products of vectors with rows of the operands, and their weighted sums.
class Products {
 public:
  explicit Products(const AttentionArgs& args)
      : args_(args),
        scores_(row_loops(args.dtype, args.score == Score::kGaussian)),
        plain_(row_loops(args.dtype, false)) {}

  /// Of a prepared row or a sum of that many columns.
  int64_t floats(int64_t size) const { return plain_.floats(size); }

  PickedRows rows(const Input& x, int64_t size, int64_t b, int64_t h, const PairSpan& pairs) const {
    return {row_address(x, args_.dtype, b, h, pairs.origin), x.row_stride * element_size(args_.dtype),
            size * element_size(args_.dtype), pairs.index, pairs.count};
  }
  void prepare(const Input& x, int64_t size, int64_t b, int64_t h, int64_t n, bool for_scores, float* row) const {
    (for_scores ? scores_ : plain_).prepare_query(row_address(x, args_.dtype, b, h, n), size, row);
  }
  /// out[i] = row . row i of `rows`, or its score if `for_scores`; fetches `next` meanwhile.
  void dots(const float* row, int64_t size, bool for_scores, const PickedRows& rows, const PickedRows& next,
            float* out) const {
    const RowLoops& loops = for_scores ? scores_ : plain_;
    loops.for_parts_of(size, [&](int64_t vectors, const RowPart& pass, int64_t from) {
      loops.dots[vectors - 1](row + from, rows, pass, out, pass.first ? next : PickedRows{});
    });
  }
  void add(const float* weights, int64_t size, const PickedRows& rows, float* sums) const {
    plain_.for_parts_of(size, [&](int64_t vectors, const RowPart& pass, int64_t from) {
      plain_.weighted_sum[vectors - 1](weights, rows, pass, sums + from, PickedRows{});
    });
  }
  /// The columns of a sum in order; `sums` itself, or in `ordered`.
  const float* in_order(const float* sums, int64_t size, float* ordered) const {
    if (plain_.parts == 1) return sums;
    for (int64_t d = 0; d < floats(size); d += 2 * kLanes) {  // even and odd places
      for (int64_t k = 0; k < kLanes; ++k) {
        ordered[d + 2 * k] = sums[d + k];
        ordered[d + 2 * k + 1] = sums[d + kLanes + k];
      }
    }
    return ordered;
  }

 private:
  const AttentionArgs& args_;
  const RowLoops &scores_, &plain_;
};

void clear(float* sums, int64_t floats) {
  for (int64_t d = 0; d < floats; d += kLanes) store(sums + d, zero());
}

/// factors[0, count) of dropout.
template <class Factor>
FIAK_INLINE void fill_factors(float* factors, const PairSpan& pairs, Factor&& factor) {
  for (int64_t k = 0; k < pairs.count; ++k) factors[k] = static_cast<float>(factor(pairs.origin + pairs.index[k]));
}

}  // namespace

void csr_rows_forward(const CsrArgs& args, const ForwardResult& result, int64_t b, int64_t h, int64_t begin,
                      int64_t end, int64_t longest) {
  const int64_t key_head = h / shared_heads(args), room = padded(longest) + kIndexPadding;
  const Products products(args);
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const int64_t query_floats = products.floats(args.head_dim), sum_floats = products.floats(args.value_dim);
  ThreadArena scratch;
  const PairMemory memory(scratch);
  float* query = scratch.floats(query_floats);
  float* sums = scratch.floats(sum_floats);
  float* ordered = scratch.floats(sum_floats);
  float* scores = scratch.floats(room);
  const Vec scale = broadcast(static_cast<float>(args.scale * kLog2E));
  for (int64_t n = begin; n < end; ++n) {
    products.prepare(args.query, args.head_dim, b, h, n, true, query);
    Vec maxima = broadcast(-kInfinity);
    int64_t count = 0;
    PairSpan pairs;
    for (QueryPairs all(args, b, h, n, true, memory); all.next(pairs); count += pairs.count) {
      float* s = scores + count;
      products.dots(query, args.head_dim, true, products.rows(args.key, args.head_dim, b, key_head, pairs),
                    products.rows(args.value, args.value_dim, b, key_head, pairs), s);
      for (int64_t i = 0; i < pairs.count; i += kLanes) {
        Vec x = mul(load(s + i), scale);
        if (pairs.weights != nullptr) x = add(x, load(memory.parts.exponents + i));
        maxima = keep_max(first_lanes(smaller(kLanes, pairs.count - i)), x, maxima);
      }
    }
    const float maximum = reduce_max(maxima);
    // Without a finite score: 2^-inf = 0.
    const Vec shift = broadcast(maximum == -kInfinity ? 0.0f : maximum);
    double total = 0;
    clear(sums, sum_floats);
    int64_t done = 0;
    for (QueryPairs all(args, b, h, n, true, memory); all.next(pairs); done += pairs.count) {
      float* p = scores + done;
      Vec sum = zero();
      for (int64_t i = 0; i < pairs.count; i += kLanes) {
        Vec e = exp2_below_128(shifted(load(p + i), scale, pairs, memory, i, shift));
        if (pairs.weights != nullptr) e = mul(e, load(memory.parts.factors + i));
        const Mask lanes = first_lanes(smaller(kLanes, pairs.count - i));
        sum = add(sum, keep(lanes, e));
        store_first(p + i, smaller(kLanes, pairs.count - i), e);  // behind stand the scores of the next ones
      }
      total += reduce_add(sum);
      for (int64_t k = 0; dropout.active() && k < pairs.count; ++k) {
        p[k] *= static_cast<float>(dropout.factor(b, h, n + offset_of(args, b), pairs.origin + pairs.index[k]));
      }
      products.add(p, args.value_dim, products.rows(args.value, args.value_dim, b, key_head, pairs), sums);
    }
    float factor = 0.0f, logsumexp = -kInfinity;
    if (count > 0) {
      // A NaN or infinite weight, or no finite score, makes the row NaN.
      const auto sum = static_cast<float>(maximum > -kInfinity && total < kInfinity ? total : kNaN);
      factor = 1.0f / sum;
      logsumexp = maximum * kLn2 + __builtin_logf(sum);
    }
    static_cast<float*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] = logsumexp;
    store_row(products.in_order(sums, args.value_dim, ordered), args.dtype, args.value_dim, factor,
              row_address(result.output, args.dtype, b, h, n));
  }
}

namespace {

class RowsBackward {
 public:
  /// What a query's row of probabilities takes: P = 2^(score - shift) factor, dS = P (dP - delta).
  struct Row {
    float shift, factor, delta;
  };

  RowsBackward(const CsrArgs& args, const BackwardArgs& grads, Row* rows)
      : args_(args),
        grads_(grads),
        products_(args),
        dropout_(make_dropout(args.dropout_p, args.seed)),
        scale_(static_cast<float>(args.scale * kLog2E)),
        head_floats_(products_.floats(args.head_dim)),
        value_floats_(products_.floats(args.value_dim)),
        rows_(rows) {}

  /// Row n, without which no gradient can be computed.
  void fill_row(int64_t b, int64_t h, int64_t n) const {
    const int64_t room = padded(args_.value_dim);
    ThreadArena scratch;
    float* grad_output = scratch.floats(room);
    float* output = scratch.floats(room);
    load_row(row_address(grads_.grad_output, args_.dtype, b, h, n), args_.dtype, args_.value_dim, 1.0f, grad_output);
    load_row(row_address(grads_.output, args_.dtype, b, h, n), args_.dtype, args_.value_dim, 1.0f, output);
    const float logsumexp = static_cast<const float*>(grads_.logsumexp)[at(b, h, n)];
    Row& row = rows_[at(b, h, n)];
    // No entry counts where there is no support.
    row = {logsumexp == -kInfinity ? kInfinity : logsumexp * kLog2E, 1.0f, dot(grad_output, output, room)};
    if (is_large_logsumexp(logsumexp)) normalise(b, h, n, row);
  }

  /// Shift and factor from the row's scores, which are computed once more.
  void normalise(int64_t b, int64_t h, int64_t n, Row& row) const {
    const int64_t key_head = h / shared_heads(args_);
    ThreadArena scratch;
    const PairMemory memory(scratch);
    float* query = scratch.floats(head_floats_);
    float* scores = scratch.floats(kRoom);
    products_.prepare(args_.query, args_.head_dim, b, h, n, true, query);
    /// use(score with the weight's exponent, the weight's factor)
    const auto for_scores = [&](auto&& use) {
      PairSpan pairs;
      for (QueryPairs all(args_, b, h, n, true, memory); all.next(pairs);) {
        products_.dots(query, args_.head_dim, true, products_.rows(args_.key, args_.head_dim, b, key_head, pairs),
                       PickedRows{}, scores);
        for (int64_t k = 0; k < pairs.count; ++k) {
          const bool weighed = pairs.weights != nullptr;
          const double exponent = weighed ? static_cast<double>(memory.parts.exponents[k]) : 0.0;
          use(static_cast<double>(scores[k]) * static_cast<double>(scale_) + exponent,
              weighed ? static_cast<double>(memory.parts.factors[k]) : 1.0);
        }
      }
    };
    double maximum = -__builtin_inf(), total = 0;
    for_scores([&](double score, double) { maximum = score > maximum ? score : maximum; });
    if (maximum == -__builtin_inf()) return;
    maximum = static_cast<double>(static_cast<float>(maximum));
    for_scores([&](double score, double weight) { total += weight * __builtin_exp2(score - maximum); });
    if (!(total > 0 && total < __builtin_inf())) return;
    int exponent = 0;
    row.factor = static_cast<float>(1 / __builtin_frexp(total, &exponent));
    row.shift = static_cast<float>(maximum) + static_cast<float>(exponent);
  }

  /// dQ of query n, and what it adds to the gradient of its row's weights.
  void row(int64_t b, int64_t h, int64_t n) const {
    const int64_t key_head = h / shared_heads(args_);
    ThreadArena scratch;
    const PairMemory memory(scratch);
    float* query = scratch.floats(head_floats_);
    float* sums = scratch.floats(head_floats_);
    float* ordered = scratch.floats(head_floats_);
    float* grad_output = scratch.floats(value_floats_);
    float* scores = scratch.floats(kRoom);
    float* ds = scratch.floats(kRoom);
    float* factors = scratch.floats(kRoom);
    products_.prepare(args_.query, args_.head_dim, b, h, n, true, query);
    products_.prepare(grads_.grad_output, args_.value_dim, b, h, n, false, grad_output);
    clear(sums, head_floats_);
    const Row row = rows_[at(b, h, n)];
    const auto* prior = static_cast<const float*>(args_.prior);
    PairSpan pairs;
    for (QueryPairs all(args_, b, h, n, false, memory); all.next(pairs);) {
      PickedRows keys = products_.rows(args_.key, args_.head_dim, b, key_head, pairs);
      const PickedRows rows = products_.rows(args_.value, args_.value_dim, b, key_head, pairs);
      products_.dots(query, args_.head_dim, true, keys, rows, scores);
      products_.dots(grad_output, args_.value_dim, false, rows, PickedRows{}, ds);
      if (dropout_.active()) {
        fill_factors(factors, pairs, [&](int64_t j) { return dropout_.factor(b, h, n + offset_of(args_, b), j); });
      }
      for (int64_t i = 0; i < pairs.count; i += kLanes) {
        Vec product = load(ds + i);
        if (dropout_.active()) product = mul(product, load(factors + i));
        const Vec grad = mul(sub(product, broadcast(row.delta)), broadcast(row.factor));
        const Vec power = shifted(load(scores + i), broadcast(scale_), pairs, memory, i, broadcast(row.shift));
        const Vec p = mul(exp2(power), grad);
        store(ds + i, prior != nullptr ? mul(p, load(memory.parts.factors + i)) : p);
        if (prior != nullptr) store(scores + i, p);
      }
      if (grads_.grad_prior != nullptr && row.shift != kInfinity) {  // of a row without support nothing counts
        float* target = static_cast<float*>(grads_.grad_prior) + pairs.entry;
        for (int64_t k = 0; k < pairs.count; ++k) {
          // Of a logarithm of 0 nothing counts, not even NaN.
          if (args_.log_prior && !in_support(pairs.weights[k], below_support(true))) continue;
          target[k] += scores[k];
        }
      }
      if (prior != nullptr) {  // outside the support nothing may touch a row
        int64_t kept = 0;
        for (int64_t k = 0; k < pairs.count; ++k) {
          memory.index[kept] = pairs.index[k];
          ds[kept] = ds[k];
          kept += in_support(pairs.weights[k], below_support(args_.log_prior));
        }
        keys.count = kept;
      }
      products_.add(ds, args_.head_dim, keys, sums);
    }
    if (grads_.grad_query.data == nullptr) return;
    store_row(products_.in_order(sums, args_.head_dim, ordered), args_.dtype, args_.head_dim,
              static_cast<float>(args_.scale), row_address(grads_.grad_query, args_.dtype, b, h, n));
  }

  /// dK and dV of key j.
  void column(int64_t b, int64_t key_head, int64_t j) const {
    const bool key_wanted = grads_.grad_key.data != nullptr, gaussian = args_.score == Score::kGaussian;
    const int64_t key_floats = padded(args_.head_dim), room = larger(larger(head_floats_, value_floats_), key_floats);
    ThreadArena scratch;
    const PairMemory memory(scratch);
    float* key = scratch.floats(head_floats_);
    float* key_sums = scratch.floats(head_floats_);
    float* value = scratch.floats(value_floats_);
    float* value_sums = scratch.floats(value_floats_);
    float* row = scratch.floats(room);
    float* key_row = scratch.floats(key_floats);
    float* scores = scratch.floats(kRoom);
    float* ds = scratch.floats(kRoom);
    float* factors = scratch.floats(kRoom);
    float* shifts = scratch.floats(kRoom);
    float* row_factors = scratch.floats(kRoom);
    clear(key_sums, head_floats_);
    clear(value_sums, value_floats_);
    float total = 0;  // of dS
    if (j < keys_of(args_, b)) {
      products_.prepare(args_.key, args_.head_dim, b, key_head, j, false, key);
      products_.prepare(args_.value, args_.value_dim, b, key_head, j, false, value);
      float half_square = 0;
      if (gaussian) {
        load_row(row_address(args_.key, args_.dtype, b, key_head, j), args_.dtype, args_.head_dim, 1.0f, key_row);
        half_square = 0.5f * dot(key_row, key_row, key_floats);
      }
      for (int64_t h = key_head * shared_heads(args_); h < (key_head + 1) * shared_heads(args_); ++h) {
        PairSpan pairs;
        for (KeyPairs all(args_, b, h, j, memory); all.next(pairs);) {
          const PickedRows queries = products_.rows(args_.query, args_.head_dim, b, h, pairs);
          const PickedRows rows = products_.rows(grads_.grad_output, args_.value_dim, b, h, pairs);
          products_.dots(key, args_.head_dim, false, queries, rows, scores);
          if (key_wanted) products_.dots(value, args_.value_dim, false, rows, PickedRows{}, ds);
          for (int64_t k = 0; k < pairs.count; ++k) {
            const Row& query_row = rows_[at(b, h, pairs.origin + pairs.index[k])];
            shifts[k] = query_row.shift;
            row_factors[k] = query_row.factor;
          }
          if (dropout_.active()) {
            const int64_t offset = offset_of(args_, b);
            fill_factors(factors, pairs, [&](int64_t n) { return dropout_.factor(b, h, n + offset, j); });
          }
          for (int64_t i = 0; i < pairs.count; i += kLanes) {
            const Vec score = sub(load(scores + i), broadcast(half_square));
            const Vec power = shifted(score, broadcast(scale_), pairs, memory, i, load(shifts + i));
            const Vec p = mul(exp2(power), load(row_factors + i));
            store(scores + i, pairs.weights != nullptr ? mul(p, load(memory.parts.factors + i)) : p);
          }
          if (key_wanted) {
            for (int64_t k = 0; k < pairs.count; ++k) shifts[k] = rows_[at(b, h, pairs.origin + pairs.index[k])].delta;
            for (int64_t i = 0; i < pairs.count; i += kLanes) {
              Vec product = load(ds + i);
              if (dropout_.active()) product = mul(product, load(factors + i));
              const Mask kept = first_lanes(smaller(kLanes, pairs.count - i));
              const Vec grad = keep(kept, mul(load(scores + i), sub(product, load(shifts + i))));
              store(ds + i, grad);
              if (gaussian) total += reduce_add(grad);
            }
            products_.add(ds, args_.head_dim, queries, key_sums);
          }
          if (grads_.grad_value.data == nullptr) continue;
          for (int64_t i = 0; dropout_.active() && i < pairs.count; i += kLanes) {
            store(scores + i, mul(load(scores + i), load(factors + i)));
          }
          products_.add(scores, args_.value_dim, rows, value_sums);
        }
      }
    }
    if (grads_.grad_value.data != nullptr) {
      store_row(products_.in_order(value_sums, args_.value_dim, row), args_.dtype, args_.value_dim, 1.0f,
                row_address(grads_.grad_value, args_.dtype, b, key_head, j));
    }
    if (!key_wanted) return;
    const float* sums = products_.in_order(key_sums, args_.head_dim, row);
    if (gaussian && total != 0.0f) {  // d s_ij / d k_j = scale (q_i - k_j)
      for (int64_t d = 0; d < args_.head_dim; ++d) row[d] = sums[d] - total * key_row[d];
      sums = row;
    }
    store_row(sums, args_.dtype, args_.head_dim, static_cast<float>(args_.scale),
              row_address(grads_.grad_key, args_.dtype, b, key_head, j));
  }

 private:
  int64_t at(int64_t b, int64_t h, int64_t n) const { return (b * args_.query_heads + h) * args_.queries + n; }

  const CsrArgs& args_;
  const BackwardArgs& grads_;
  const Products products_;
  const Dropout dropout_;
  const float scale_;
  const int64_t head_floats_, value_floats_;
  Row* rows_;  // [batch, query_heads, queries]
};

}  // namespace

void csr_rows_backward(const CsrArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                       const Parallel& parallel) {
  const int64_t shared = shared_heads(args), heads = key_heads.count * shared, queries = args.queries;
  const SharedScratch memory(args.batch * args.query_heads * queries * sizeof(RowsBackward::Row));
  const RowsBackward backward(args, grads, static_cast<RowsBackward::Row*>(memory.data()));
  /// use(b, h, n) for all queries that read the key heads.
  const auto for_queries = [&](auto&& use) {
    parallel_range(parallel, args.batch * heads * queries, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / queries % heads;
        use(i / queries / heads, key_heads.at(head / shared) * shared + head % shared, i % queries);
      }
    });
  };
  for_queries([&](int64_t b, int64_t h, int64_t n) { backward.fill_row(b, h, n); });
  if (grads.grad_prior != nullptr) {
    // By the pattern's rows, so that a weight's gradient is one thread's.
    const int64_t groups = args.groups(), pattern_heads = args.pattern_heads();
    const int64_t readers = args.query_heads / pattern_heads;  // query heads of a pattern's head
    const int64_t rows = args.query_offsets != nullptr ? args.plan.num_queries : queries;
    parallel_range(parallel, groups * pattern_heads * rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / rows % pattern_heads, group = i / rows / pattern_heads;
        for (int64_t b = group; b < args.batch; b += groups) {
          const int64_t n = i % rows - offset_of(args, b);
          if (n < 0 || n >= queries) continue;
          for (int64_t h = head * readers; h < (head + 1) * readers; ++h) backward.row(b, h, n);
        }
      }
    });
  } else if (grads.grad_query.data != nullptr) {
    for_queries([&](int64_t b, int64_t h, int64_t n) { backward.row(b, h, n); });
  }
  if (grads.grad_key.data == nullptr && grads.grad_value.data == nullptr) return;
  parallel_range(parallel, args.batch * key_heads.count * args.keys, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / args.keys;
      backward.column(head / key_heads.count, key_heads.at(head % key_heads.count), i % args.keys);
    }
  });
}

}  // namespace fiak::cpu::FIAK_ISA
