// Dense attention, forward: blocks of queries against all keys, as matrix products with the softmax between; which
// pairs count, and by what weight, is the caller's business.
//
// S = scale Q K^T (K transposed once for each head), P = 2^(S + log2 w - max), O = P V, with log2(e) in the scale; the
// maximum, of S + log2 w or about that, the sum of P and O are carried from one block of keys to the next. bfloat16
// runs on pairs where the instruction set has them: P is rounded to bfloat16, sums are float32.
#pragma once

#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/block_counts.h"
#include "kernels/cpu/linear/gemm.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int64_t kBlockRows = 48;  // queries of a block, whole tiles of any height
static_assert(kBlockRows % (kTileRows * kTileVectors) == 0);
constexpr int64_t kBlockKeys = 384;  // keys of a block at most: its scores stay in the L2 cache
constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kRowsAhead = 8;  // weights that are fetched early, since they come from far

FIAK_INLINE int64_t row_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
/// Keys of a block: all of them, or about equal shares that start at multiples of a number.
FIAK_INLINE int64_t block_keys(int64_t keys, int64_t multiple) {
  const int64_t count = larger(1, (keys + kBlockKeys - 1) / kBlockKeys);
  return ((keys + count - 1) / count + multiple - 1) / multiple * multiple;
}

// Operands of products, in units of 32 bits: numbers, or with kVnni two bfloat16 numbers that follow each other along
// the depth.

template <bool kVnni>
constexpr int64_t units(int64_t numbers) {
  return kVnni ? (numbers + 1) / 2 : numbers;
}

/// Loads rows [begin, begin + count) of x times `factor` (1 for pairs), whole vectors wide, and zero rows up to whole
/// tiles. Pairs lie along the row.
template <bool kVnni>
static void load_block(const Input& x, DType dtype, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t size,
                       float factor, float* target) {
  const int64_t stride = padded(units<kVnni>(size));
  for (int64_t i = 0; i < count; ++i) {
    const char* row = row_address(x, dtype, b, h, begin + i);
#if defined(FIAK_ISA_AVX512_BF16)
    for (int64_t d = 0; kVnni && d < size; d += 2 * kLanes) {
      store(target + i * stride + d / 2, load_vnni_in_order(row + 2 * d, smaller(2 * kLanes, size - d)));
    }
#endif
    if (!kVnni) load_row(row, dtype, size, factor, target + i * stride);
  }
  for (int64_t i = count * stride; i < tile_rows(count) * stride; i += kLanes) store(target + i, zero());
}

/// The transpose of rows [0, count): the depth runs along the rows. `rows` holds tile_rows(count) * padded(units(size))
/// units, `target` units(size) * tile_columns(count).
template <bool kVnni>
static Columns load_columns(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size, float* rows,
                            float* target) {
  const char* first = row_address(x, dtype, b, h, 0);
  Panel panel{rows, padded(units<kVnni>(size))};
  if (dtype == DType::kFloat32) {
    panel = {reinterpret_cast<const float*>(first), x.row_stride};
  } else if (kVnni && size % 2 == 0 && x.row_stride % 2 == 0) {
    panel = {reinterpret_cast<const float*>(first), x.row_stride / 2};
  } else {
    load_block<kVnni>(x, dtype, b, h, 0, count, size, 1.0f, rows);
  }
  return transpose(panel, count, units<kVnni>(size), target);
}

/// Rows [0, count) along which the result runs: the depth runs across them. `target` holds units(count) * padded(size).
template <bool kVnni>
static Panel load_depth(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size, float* target) {
  if constexpr (!kVnni) return make_panel(x, dtype, b, h, count, size, target);
#if defined(FIAK_ISA_AVX512_BF16)
  const int64_t stride = padded(size);
  for (int64_t n = 0; n < count; n += 2) {
    const char* first = row_address(x, dtype, b, h, n);
    const char* second = n + 1 < count ? row_address(x, dtype, b, h, n + 1) : first;
    for (int64_t d = 0; d < size; d += kLanes) {
      const int64_t width = smaller(kLanes, size - d);
      const Vec pairs = load_vnni_of(first + 2 * d, second + 2 * d, width);
      store(target + n / 2 * stride + d, n + 1 < count ? pairs : low_half(pairs));
    }
  }
  return {target, stride};
#endif
}

/// Whether every number is finite.
template <bool kVnni>
static bool all_finite(const Panel& rows, int64_t count, int64_t size) {
  Vec difference = zero();  // x - x is NaN for NaN and infinity
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec x = load(rows.row(n) + d);
      difference = add(difference, sub(x, x));
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kVnni) difference = add(difference, sub(even_bfloat16(x), even_bfloat16(x)));
#endif
    }
  }
  return reduce_add(difference) == 0.0f;
}

/// out (+)= a b, where numbers of b that are not finite do not pass factors of 0 in a.
template <bool kAdd, bool kVnni>
static void guarded_product(bool finite, const float* a, int64_t a_row, int64_t a_column, const Panel& b, int64_t rows,
                            int64_t columns, int64_t depth, float* out, int64_t out_row) {
  if (finite) {
    matrix_product<kAdd, kVnni>(StridedRows{a, a_row, a_column}, columns_of(b), rows, columns, depth, out, out_row);
    return;
  }
  for (int64_t r = 0; r < rows && !kAdd; ++r) std::memset(out + r * out_row, 0, columns * sizeof(float));
  product_of_nonzeros<kVnni>(a, a_row, a_column, b, rows, columns, depth, out, out_row);
}

// The support of a row of weights, from some key on, for keys j to j + n - 1, n <= kLanes:
//
//   kept(j, n)                  which of them are inside
//   raised(j, n, s)             scores with their weights' logarithms, or about that, in powers of two; any outside
//   shifted(j, n, s, f, shift)  s f - shift with their weights' exponents; f = 1 without kScale; any outside
//   weighted(j, n, x)           2^shifted times what is left of the weights; 0 outside
//   grad_shifted(j, n, s, lse, shift), grad_weighted(j, n, x)
//                               the same, where a weight of 0 has an exponent, too; shift is the logsumexp times
//                               log2(e)
//   grad_raised(j, n, s, shift) what grad_shifted is where shift is the largest raised score instead
//   weight_gradient(j, n, x)    from 2^grad_shifted (dA - delta), that of the weight's logarithm, or what
//                               scale_weight_gradients makes that of the weight

/// Keys whose weights are 1.
struct AllKeys {
  __attribute__((always_inline)) Mask kept(int64_t, int64_t n) const { return first_lanes(n); }
  __attribute__((always_inline)) Vec raised(int64_t, int64_t, Vec s) const { return s; }
  template <bool kScale>
  __attribute__((always_inline)) Vec shifted(int64_t, int64_t, Vec s, Vec f, Vec shift) const {
    return kScale ? fmsub(s, f, shift) : sub(s, shift);
  }
  __attribute__((always_inline)) Vec weighted(int64_t, int64_t n, Vec x) const { return keep(first_lanes(n), x); }
  __attribute__((always_inline)) Vec grad_shifted(int64_t, int64_t, Vec s, Vec, Vec shift) const {
    return sub(s, shift);
  }
  __attribute__((always_inline)) Vec grad_raised(int64_t, int64_t, Vec s, Vec shift) const { return sub(s, shift); }
  __attribute__((always_inline)) Vec grad_weighted(int64_t j, int64_t n, Vec x) const { return weighted(j, n, x); }
  __attribute__((always_inline)) Vec weight_gradient(int64_t, int64_t, Vec x) const { return x; }
};

struct WeightedKeys {
  const float* weights;
  __attribute__((always_inline)) Vec weight(int64_t j, int64_t n) const {
    return n == kLanes ? load(weights + j) : load_first(weights + j, n);
  }
  __attribute__((always_inline)) Mask kept(int64_t j, int64_t n) const {
    return above_or_nan(first_lanes(n), weight(j, n), zero());
  }
  __attribute__((always_inline)) Vec raised(int64_t j, int64_t n, Vec s) const { return add_log2(s, weight(j, n)); }
  template <bool kScale>
  __attribute__((always_inline)) Vec shifted(int64_t j, int64_t n, Vec s, Vec f, Vec shift) const {
    // The exponent less the shift is exact, or nearly.
    const Vec exponent = exponent_minus(weight(j, n), shift);
    return kScale ? fmadd(s, f, exponent) : add(s, exponent);
  }
  __attribute__((always_inline)) Vec weighted(int64_t j, int64_t n, Vec x) const {
    return keep(kept(j, n), mul(x, weight_factor(weight(j, n))));
  }
  __attribute__((always_inline)) Vec grad_shifted(int64_t j, int64_t n, Vec s, Vec, Vec shift) const {
    return grad_raised(j, n, s, shift);
  }
  __attribute__((always_inline)) Vec grad_raised(int64_t j, int64_t n, Vec s, Vec shift) const {
    return add(s, WeightParts(weight(j, n)).exponent_minus(shift));
  }
  __attribute__((always_inline)) Vec grad_weighted(int64_t j, int64_t n, Vec x) const {
    return keep(kept(j, n), mul(x, WeightParts(weight(j, n)).factor()));
  }
  __attribute__((always_inline)) Vec weight_gradient(int64_t, int64_t, Vec x) const { return x; }
};

/// Keys whose weights' logarithms are given.
struct LogWeightedKeys {
  const float* weights;
  __attribute__((always_inline)) Vec weight(int64_t j, int64_t n) const {
    return n == kLanes ? load(weights + j) : load_first(weights + j, n);
  }
  __attribute__((always_inline)) Mask kept(int64_t j, int64_t n) const {
    return above_or_nan(first_lanes(n), weight(j, n), broadcast(-kInfinity));
  }
  __attribute__((always_inline)) Vec raised(int64_t j, int64_t n, Vec s) const {
    return add(s, exponent_of_log(weight(j, n)));
  }
  template <bool kScale>
  __attribute__((always_inline)) Vec shifted(int64_t j, int64_t n, Vec s, Vec f, Vec shift) const {
    const Vec exponent = sub(exponent_of_log(weight(j, n)), shift);
    return kScale ? fmadd(s, f, exponent) : add(s, exponent);
  }
  __attribute__((always_inline)) Vec weighted(int64_t j, int64_t n, Vec x) const { return keep(kept(j, n), x); }
  /// No probability is more than 1, however the logarithm of a sum of such large ones was rounded.
  __attribute__((always_inline)) Vec grad_shifted(int64_t j, int64_t n, Vec s, Vec lse, Vec) const {
    return min(zero(), fmadd(sub(weight(j, n), lse), broadcast(kLog2E), s));
  }
  __attribute__((always_inline)) Vec grad_raised(int64_t j, int64_t n, Vec s, Vec shift) const {
    return shifted<false>(j, n, s, s, shift);
  }
  __attribute__((always_inline)) Vec grad_weighted(int64_t j, int64_t n, Vec x) const { return weighted(j, n, x); }
  __attribute__((always_inline)) Vec weight_gradient(int64_t j, int64_t n, Vec x) const { return weighted(j, n, x); }
};

/// The support of a pattern's row, given as bits from key j = 0 on.
struct KeptKeys : AllKeys {
  const char* bits;
  explicit __attribute__((always_inline)) KeptKeys(const char* bits) : bits(bits) {}
  __attribute__((always_inline)) Mask kept(int64_t j, int64_t n) const {
    return n == kLanes ? bit_lanes(bits + j / 8) : first_of(bit_lanes(bits + j / 8), n);
  }
  __attribute__((always_inline)) Vec weighted(int64_t j, int64_t n, Vec x) const { return keep(kept(j, n), x); }
  __attribute__((always_inline)) Vec grad_weighted(int64_t j, int64_t n, Vec x) const { return weighted(j, n, x); }
};

/// visit(j, n) for whole vectors of keys [0, count) and what is left.
template <class Visit>
FIAK_INLINE void for_vectors(int64_t count, Visit&& visit) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) visit(j, int64_t{kLanes});
  if (j < count) visit(j, count - j);
}

/// The largest score of the support among keys [0, count), its weight in it, -inf if there is none. Where kScale,
/// scores are still to be multiplied by `factor`.
template <bool kScale, class Support>
static float row_maximum(const float* scores, const Support& support, int64_t count, float factor) {
  const Vec f = broadcast(factor);
  Vec maxima = broadcast(-kInfinity);
  for_vectors(
      count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Vec s = load(scores + j);
        maxima = keep_max(support.kept(j, n), support.raised(j, n, kScale ? mul(s, f) : s), maxima);
      });
  return reduce_max(maxima);
}

template <class Support>
static bool is_empty(const Support& support, int64_t count) {
  Vec inside = zero();
  for_vectors(
      count, [&](int64_t j, int64_t n)
                 __attribute__((always_inline)) { inside = max(inside, keep(support.kept(j, n), broadcast(1.0f))); });
  return reduce_max(inside) == 0.0f;
}

/// scores[0, count) = 2^(scores + log2 w - shift), times `dropout_factors` where given, as numbers or pairs; 0 beyond,
/// up to padded(count of the block). Returns the sum before `dropout_factors`.
template <bool kVnni, class Support>
static float weigh_row(float* scores, const Support& support, int64_t count, int64_t columns, float shift,
                       const float* dropout_factors) {
  const Vec s = broadcast(shift);
  Vec sums = zero();
  const auto weigh = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    // Above 128 is only what the support leaves out.
    const Vec shifted = support.template shifted<false>(j, n, load(scores + j), broadcast(1.0f), s);
    Vec e = support.weighted(j, n, exp2_below_128(shifted));
    sums = add(sums, e);
    if (dropout_factors != nullptr) e = mul(e, load(dropout_factors + j));
    return e;
  };
  if constexpr (!kVnni) {
    for_vectors(
        count, [&](int64_t j, int64_t n) __attribute__((always_inline)) { store(scores + j, weigh(j, n)); });
    for (int64_t j = padded(count); j < columns; j += kLanes) store(scores + j, zero());
  }
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kVnni) {  // in place: a vector of pairs comes from the two vectors of scores that start twice as far
    int64_t j = 0;
    for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
      const Vec low = weigh(j, kLanes);
      store(scores + j / 2, vnni_in_order(low, weigh(j + kLanes, kLanes)));
    }
    if (j < count) {
      const Vec low = count - j >= kLanes ? weigh(j, kLanes) : weigh(j, count - j);
      const Vec high = count - j > kLanes ? weigh(j + kLanes, count - j - kLanes) : zero();
      store(scores + j / 2, vnni_in_order(low, high));
      j += 2 * kLanes;
    }
    for (; j < columns; j += 2 * kLanes) store(scores + j / 2, zero());
  }
#endif
  return reduce_add(sums);
}

/// A row's largest score, with its weight in it, and sum so far: key blocks are added one after another, scaled to the
/// largest score.
struct RowState {
  float maximum, total;
};

/// Takes in the largest score of another block; `sums` are scaled to it.
FIAK_INLINE void raise_maximum(float maximum, bool first, RowState& state, float* sums, int64_t value_dim) {
  if (first) {
    state = {maximum, 0.0f};
  } else if (maximum > state.maximum) {
    const Vec factor = exp2_below_128(broadcast(state.maximum - maximum));
    for (int64_t d = 0; d < value_dim; d += kLanes) store(sums + d, mul(load(sums + d), factor));
    state.total *= reduce_max(factor);
    state.maximum = maximum;
  }
}

/// The Gaussian score's share of keys [0, count), -scale/2 |k_j|^2, times log2(e); `row` holds padded(head_dim)
/// numbers.
FIAK_INLINE void key_bias(const AttentionArgs& args, int64_t b, int64_t key_head, int64_t count, float* row,
                          float* bias) {
  for (int64_t j = 0; j < count; ++j) {
    load_row(row_address(args.key, args.dtype, b, key_head, j), args.dtype, args.head_dim, 1.0f, row);
    bias[j] = -0.5f * static_cast<float>(args.scale * kLog2E) * dot(row, row, padded(args.head_dim));
  }
}

/// A query head of a batch element. A head at or beyond query_heads is none.
struct HeadPlace {
  int64_t b, h;
};

/// Keys [from, from + keys) of a block of keys, whose scores start at `at`.
struct KeySpan {
  int64_t from, keys, at;
};
constexpr int64_t kMaxSpans = kBlockKeys / 16;

/// The products of a head, by vectors of multiply-adds.
template <bool kVnni>
class VectorProducts {
 public:
  static constexpr int64_t kRows = kBlockRows;      // queries of a step, at most
  static constexpr int64_t kSpanKeys = kTileWidth;  // spans start at multiples of it
  static constexpr bool kCutsRows = true;           // whether it pays to know where rows end
  static constexpr bool kScaled = true;             // scores come times their factor
  static_assert(kBlockKeys % kSpanKeys == 0 && kBlockKeys / kSpanKeys <= kMaxSpans);

  VectorProducts(const AttentionArgs& args, HeadPlace at, int64_t keys, int64_t width, ScratchArena& scratch)
      : args_(args),
        at_(at),
        width_(width),
        depth_(units<kVnni>(args.head_dim)),
        value_dim_(padded(args.value_dim)),
        query_(scratch.floats(kBlockRows * padded(depth_))) {
    const int64_t b = at.b, key_head = at.h / shared_heads(args), all_keys = keys_of(args, b);
    float* rows = scratch.floats(tile_rows(keys) * padded(args.head_dim));
    key_ = load_columns<kVnni>(args.key, args.dtype, b, key_head, keys, args.head_dim, rows,
                               scratch.floats(depth_ * tile_columns(keys)));
    // All of the element's values decide, so that no split among threads changes a bit.
    value_ = load_depth<kVnni>(args.value, args.dtype, b, key_head, all_keys, args.value_dim,
                               scratch.floats(units<kVnni>(all_keys) * value_dim_));
    finite_ = all_finite<kVnni>(value_, units<kVnni>(all_keys), value_dim_);
  }
  __attribute__((always_inline)) int64_t step_rows() const { return kRows; }
  /// Called while there is nothing to multiply.
  __attribute__((always_inline)) void wait() const {}
  /// Whether these can compute the head.
  __attribute__((always_inline)) bool serves() const { return true; }

  __attribute__((always_inline)) void load_queries(int64_t first, int64_t rows) {
    load_block<kVnni>(args_.query, args_.dtype, at_.b, at_.h, first, rows, args_.head_dim, 1.0f, query_);
  }
  /// The scores of a span, from `scores` on in rows of `width`.
  __attribute__((always_inline)) void multiply_keys(const KeySpan& span, int64_t rows, int64_t diagonal, float factor,
                                                    float* scores) const {
    const Columns block{key_.data + span.from / kTileWidth * key_.strip_stride, key_.row_stride, key_.strip_stride};
    matrix_product<false, kVnni>(StridedRows{query_, padded(depth_), 1}, block, tile_rows(rows), padded(span.keys),
                                 depth_, scores + span.at, width_, diagonal - span.from, factor);
  }
  /// Row i's scores of a span become weights; returns their sum.
  template <class Support>
  __attribute__((always_inline)) float weigh(int64_t i, const KeySpan& span, float* scores, const Support& support,
                                             int64_t count, float, float shift, const float* dropout_factors) const {
    return weigh_row<kVnni>(scores + i * width_ + span.at, support, count, padded(span.keys), shift, dropout_factors);
  }
  /// sums (+)= weights values; row i sees the keys below ends[i].
  __attribute__((always_inline)) void add_values(const KeySpan* spans, int64_t count, int64_t rows, const int64_t* ends,
                                                 bool add, const float* scores, float* sums) const {
    constexpr int64_t kTallRows = kTileRows * kTileVectors;  // rows that see about the same keys
    for (int64_t k = 0; k < count; ++k) {
      const KeySpan& span = spans[k];
      const Panel rows_of_span{value_.row(units<kVnni>(span.from)), value_.stride};
      const auto product = add || k > 0 ? guarded_product<true, kVnni> : guarded_product<false, kVnni>;
      for (int64_t i = 0; i < rows; i += kTallRows) {
        const int64_t size = smaller(kTallRows, rows - i);
        int64_t most = span.from;
        for (int64_t r = i; r < i + size; ++r) most = larger(most, ends[r]);
        product(finite_, scores + i * width_ + span.at, width_, 1, rows_of_span, tile_rows(size), value_dim_,
                units<kVnni>(smaller(span.keys, most - span.from)), sums + i * value_dim_, value_dim_);
      }
    }
  }

 private:
  const AttentionArgs& args_;
  const HeadPlace at_;
  const int64_t width_, depth_, value_dim_;
  float* query_;
  Columns key_;
  Panel value_;
  bool finite_;
};

}  // namespace fiak::cpu::FIAK_ISA

#if defined(FIAK_ISA_AMX_BF16)
#include "kernels/cpu/dense/tile_products.h"
#endif

namespace fiak::cpu::FIAK_ISA {

/// Fetches what a head's queries and the next head read, a little at every query: cold operands would cost as much as
/// products, and many requests at once would fill the processor's queues.
class Prefetch {
 public:
  /// Queries are fetched `ahead` rows early.
  __attribute__((always_inline))
  Prefetch(const AttentionArgs& args, const ForwardResult& result, HeadPlace at, int64_t ahead, HeadPlace next)
      : queries_(args.queries), ahead_(ahead) {
    const auto size = element_size(args.dtype);
    query_size_ = args.head_dim * size;
    value_dim_ = args.value_dim * size;
    output_ = row_address(result.output, args.dtype, at.b, at.h, 0);
    output_step_ = result.output.row_stride * size;
    query_ = row_address(args.query, args.dtype, at.b, at.h, 0);
    query_step_ = args.query.row_stride * size;
    if (next.h >= args.query_heads) return;
    next_query_ = row_address(args.query, args.dtype, next.b, next.h, 0);
    const int64_t key_head = next.h / shared_heads(args);
    key_ = row_address(args.key, args.dtype, next.b, key_head, 0);
    key_step_ = args.key.row_stride * size;
    value_ = row_address(args.value, args.dtype, next.b, key_head, 0);
    value_step_ = args.value.row_stride * size;
    keys_ = keys_of(args, next.b);
    each_ = (keys_ + queries_ - 1) / larger(1, queries_);
  }
  /// Query n's row of the output, the query `ahead` rows on, and its share of the next head's keys and values.
  __attribute__((always_inline)) void at(int64_t n) const {
    prefetch_row_for_writing(output_ + n * output_step_, value_dim_);
    const int64_t later = n + ahead_;
    if (later < queries_) {
      prefetch_row(query_ + later * query_step_, query_size_);
    } else if (next_query_ != nullptr && later < 2 * queries_) {
      prefetch_row(next_query_ + (later - queries_) * query_step_, query_size_);
    }
    for (int64_t j = n * each_; j < smaller(keys_, (n + 1) * each_); ++j) {
      prefetch_row(key_ + j * key_step_, query_size_);
      prefetch_row(value_ + j * value_step_, value_dim_);
    }
  }

 private:
  int64_t queries_, ahead_, query_size_, value_dim_, output_step_, query_step_;
  int64_t key_step_ = 0, value_step_ = 0, keys_ = 0, each_ = 0;  // each_: keys for a query
  char* output_;
  const char *query_, *next_query_ = nullptr, *key_ = nullptr, *value_ = nullptr;
};

/// Queries [begin, end) of a head; begin is a multiple of kBlockRows. Returns false, having written nothing, where
/// Products does not serve its numbers. What they attend to is `head`'s:
///
///   end(n)            query n sees no key from there on; at most keys_of(b)
///   kMasked           whether supports leave out the keys from there on
///   with(n, j, call)  call(query n's support from key j on)
///   spans(first, rows, from, keys, span_keys, spans)
///                     writes those of keys [from, from + keys), in multiples of `span_keys` but for the last, that
///                     some of the rows need, and returns their number
///   fetch(n, j, keys) prefetches the support of query n if it is slow to come
///   row(n)            the query's number for dropout
template <class Products, class Pairs>
static bool dense_forward(const AttentionArgs& args, const ForwardResult& result, const Pairs& pairs, HeadPlace at,
                          int64_t begin, int64_t end, HeadPlace next) {
  const int64_t b = at.b, h = at.h, key_head = h / shared_heads(args), all_keys = keys_of(args, b);
  int64_t keys = 0;
  // Where supports tell anyway, loops of one length are predicted better.
  const auto end_of = [&](int64_t n) __attribute__((always_inline)) {
    return Pairs::kMasked && !Products::kCutsRows ? all_keys : pairs.end(n);
  };
  for (int64_t n = begin; n < end; ++n) keys = larger(keys, end_of(n));
  const int64_t value_dim = padded(args.value_dim), width = block_keys(all_keys, Products::kSpanKeys);
  const bool gaussian = args.score == Score::kGaussian;
  const auto factor = static_cast<float>(args.scale * kLog2E);
  const float left = Products::kScaled || gaussian ? 1.0f : factor;  // what scores, with their bias, still lack
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  constexpr int64_t kRows = Products::kRows;
  ThreadArena scratch;
  float* sums = scratch.floats(kRows * value_dim);
  float* scores = scratch.floats(kRows * width);
  float* dropout_factors = scratch.floats(width);
  float* bias = scratch.floats(keys);
  float* row = scratch.floats(padded(args.head_dim));
  if (gaussian) key_bias(args, b, key_head, keys, row, bias);
  Products products(args, at, keys, width, scratch);
  if (!products.serves()) return false;
  const int64_t step = products.step_rows();
  const Prefetch prefetch(args, result, at, step, next);

  for (int64_t first = begin; first < end; first += step) {
    const int64_t rows = smaller(step, end - first);
    products.load_queries(first, rows);
    // Row i sees the keys below ends[i], and none beyond i + diagonal.
    int64_t ends[kRows], seen = 0, diagonal = -kRows;
    for (int64_t i = 0; i < rows; ++i) {
      ends[i] = end_of(first + i);
      seen = larger(seen, ends[i]);
      diagonal = larger(diagonal, ends[i] - 1 - i);
    }
    RowState states[kRows];
    bool started = false;
    for (int64_t from = 0; from < seen; from += width) {
      KeySpan spans[kMaxSpans];
      const int64_t count = pairs.spans(first, rows, from, smaller(width, seen - from), Products::kSpanKeys, spans);
      if (count == 0) continue;
      const auto for_spans = [&](int64_t i, auto&& call) __attribute__((always_inline)) {
        for (int64_t k = 0; k < count; ++k) {
          const KeySpan& span = spans[k];
          call(span, larger(0, smaller(span.keys, ends[i] - span.from)));
        }
      };
      for (int64_t k = 0; k < count; ++k) products.multiply_keys(spans[k], rows, diagonal, factor, scores);
      // All maxima come before the exponentials, which would wait for each of them.
      for (int64_t i = 0; i < rows; ++i) {
        float maximum = -kInfinity;
        for_spans(
            i, [&](const KeySpan& span, int64_t seen_keys) __attribute__((always_inline)) {
              pairs.fetch(first + i, span.from, seen_keys);
              float* s = scores + i * width + span.at;
              for (int64_t j = 0; gaussian && j < seen_keys; ++j) {
                s[j] = (Products::kScaled ? s[j] : s[j] * factor) + bias[span.from + j];
              }
              const float found = pairs.with(first + i, span.from, [&](const auto& x) {
                return row_maximum<!Products::kScaled>(s, x, seen_keys, left);
              });
              maximum = found > maximum ? found : maximum;
            });
        if (i % 16 == 15) products.wait();
        raise_maximum(maximum, !started, states[i], sums + i * value_dim, value_dim);
      }
      for (int64_t i = 0; i < rows; ++i) {
        if (!started) prefetch.at(first + i);
        // A row without a finite score so far: 2^-inf = 0.
        const float shift = states[i].maximum == -kInfinity ? 0.0f : states[i].maximum;
        for_spans(
            i, [&](const KeySpan& span, int64_t seen_keys) __attribute__((always_inline)) {
              if (dropout.active()) {
                for (int64_t j = 0; j < padded(span.keys); ++j) {
                  dropout_factors[j] =
                      j < seen_keys ? static_cast<float>(dropout.factor(b, h, pairs.row(first + i), span.from + j))
                                    : 0.0f;
                }
              }
              states[i].total += pairs.with(first + i, span.from, [&](const auto& x) {
                return products.weigh(i, span, scores, x, seen_keys, left, shift,
                                      dropout.active() ? dropout_factors : nullptr);
              });
            });
      }
      products.add_values(spans, count, rows, ends, started, scores, sums);
      started = true;
    }
    if (!started) {
      std::memset(sums, 0, rows * value_dim * sizeof(float));
      for (int64_t i = 0; i < rows; ++i) states[i] = {-kInfinity, 0.0f};
    }
    float logs[kRows];
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t k = i; k < i + kLanes; ++k) logs[k] = k < rows ? states[k].total : 1.0f;
      store(logs + i, log_of_normal(load(logs + i)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i;
      if (i % 16 == 15) products.wait();
      float inverse = 0.0f, lse = -kInfinity;
      const bool none = ends[i] == 0 || (states[i].maximum == -kInfinity &&
                                         pairs.with(n, 0, [&](const auto& x) { return is_empty(x, ends[i]); }));
      if (!none) {
        const float total = states[i].maximum > -kInfinity && states[i].total < kInfinity ? states[i].total : kNaN;
        inverse = 1.0f / total;
        lse = states[i].maximum * kLn2 + (total >= kSmallestNormal ? logs[i] : __builtin_logf(total));
      }
      static_cast<float*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] = lse;
      store_row(sums + i * value_dim, args.dtype, args.value_dim, inverse,
                row_address(result.output, args.dtype, b, h, n));
    }
  }
  return true;
}

template <class Pairs>
static void dense_forward_rows(const AttentionArgs& args, const ForwardResult& result, const Pairs& pairs, HeadPlace at,
                               int64_t begin, int64_t end, HeadPlace next) {
#if defined(FIAK_ISA_AMX_BF16)
  if (args.dtype == DType::kBFloat16 && dense_forward<TileProducts>(args, result, pairs, at, begin, end, next)) return;
#endif
#if defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) {
    dense_forward<VectorProducts<true>>(args, result, pairs, at, begin, end, next);
    return;
  }
#endif
  dense_forward<VectorProducts<false>>(args, result, pairs, at, begin, end, next);
}

/// How a head's forward pass is cut; all counts are 0 where `serves` is not.
FIAK_INLINE void dense_forward_blocks(const AttentionArgs& args, bool serves, BlockCounts& blocks) {
  const int64_t queries = serves ? args.queries : 0, keys = serves ? args.keys : 0;
  blocks.add(queries, kBlockRows);
  blocks.add(queries, kTileRows);
  blocks.add(keys, larger(1, block_keys(keys, kTileWidth)));
  blocks.add(keys, kTileWidth);
  blocks.add(keys, kLanes);
  for (const int64_t size : {args.head_dim, args.value_dim}) {
    blocks.add(serves ? size : 0, kTileWidth);
    blocks.add(serves ? size : 0, kLanes);
  }
#if defined(FIAK_ISA_AMX_BF16)
  const int64_t step = TileProducts::step_rows(args, smaller(larger(1, block_keys(keys, kTileDepth)), keys));
  blocks.add(serves ? step : 0);
  blocks.add(queries, step);
  blocks.add(keys, kTileDepth);
  blocks.add(serves ? args.head_dim : 0, kTileDepth);
#endif
}

}  // namespace fiak::cpu::FIAK_ISA
