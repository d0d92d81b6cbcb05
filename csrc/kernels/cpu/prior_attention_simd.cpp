// prior_attention, vectorised: blocks of queries against all keys, as matrix products with the weighted softmax
// between.
//
// Forward: S = scale Q K^T (K transposed once for each head), P = w exp(S - max), O = P V; the maximum, the sum of P
// and O are carried from one block of keys to the next. Backward: S again, dA = dO V^T, dw = exp(S - lse) (dA - delta),
// dS = w dw, dQ = dS K, dK = dS^T Q, dV = P^T dO. bfloat16 runs on pairs where the instruction set has them: P and dS
// are rounded to bfloat16, sums are float32.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/tables.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kBlockRows = 48;  // queries of a block, whole tiles of any height
static_assert(kBlockRows % (kTileRows * kTileVectors) == 0);
constexpr int64_t kBlockKeys = 384;  // keys of a block at most: its scores stay in the L2 cache
static_assert(kBlockKeys % kTileWidth == 0);
constexpr float kSmallestNormal = 0x1p-126f;
constexpr int64_t kRowsAhead = 8;  // weights that are fetched early, since they come from far

int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
/// Keys of a block: all of them, or about equal shares that start at whole tiles.
int64_t block_keys(int64_t keys) {
  const int64_t count = larger(1, (keys + kBlockKeys - 1) / kBlockKeys);
  return tile_columns((keys + count - 1) / count);
}

const float* weights_of(const PriorArgs& args, int64_t b, int64_t h, int64_t n) {
  if (args.prior == nullptr) return nullptr;
  return static_cast<const float*>(args.prior) + b % args.prior_groups * args.prior_group_stride +
         h * args.prior_head_stride + n * args.prior_row_stride;
}

// Operands of products, in units of 32 bits: numbers, or with kPairs two bfloat16 numbers that follow each other along
// the depth.

template <bool kPairs>
constexpr int64_t units(int64_t numbers) {
  return kPairs ? (numbers + 1) / 2 : numbers;
}

/// Loads rows [begin, begin + count) of x times `factor` (1 for pairs), whole vectors wide, and zero rows up to whole
/// tiles. Pairs lie along the row.
template <bool kPairs>
void load_block(const Input& x, DType dtype, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t size,
                float factor, float* target) {
  const int64_t stride = padded(units<kPairs>(size));
  for (int64_t i = 0; i < count; ++i) {
    const char* row = row_address(x, dtype, b, h, begin + i);
#if defined(FIAK_ISA_AVX512_BF16)
    for (int64_t d = 0; kPairs && d < size; d += 2 * kLanes) {
      store(target + i * stride + d / 2, load_pairs_in_order(row + 2 * d, smaller(2 * kLanes, size - d)));
    }
#endif
    if (!kPairs) load_row(row, dtype, size, factor, target + i * stride);
  }
  for (int64_t i = count * stride; i < tile_rows(count) * stride; i += kLanes) store(target + i, zero());
}

/// The transpose of rows [0, count): the depth runs along the rows. `rows` holds tile_rows(count) * padded(units(size))
/// units, `target` units(size) * tile_columns(count).
template <bool kPairs>
Columns load_columns(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size, float* rows,
                     float* target) {
  const char* first = row_address(x, dtype, b, h, 0);
  Panel panel{rows, padded(units<kPairs>(size))};
  if (dtype == DType::kFloat32) {
    panel = {reinterpret_cast<const float*>(first), x.row_stride};
  } else if (kPairs && size % 2 == 0 && x.row_stride % 2 == 0) {
    panel = {reinterpret_cast<const float*>(first), x.row_stride / 2};
  } else {
    load_block<kPairs>(x, dtype, b, h, 0, count, size, 1.0f, rows);
  }
  return transpose(panel, count, units<kPairs>(size), target);
}

/// Rows [0, count) along which the result runs: the depth runs across them. `target` holds units(count) * padded(size).
template <bool kPairs>
Panel load_depth(const Input& x, DType dtype, int64_t b, int64_t h, int64_t count, int64_t size, float* target) {
  if constexpr (!kPairs) return make_panel(x, dtype, b, h, count, size, target);
#if defined(FIAK_ISA_AVX512_BF16)
  const int64_t stride = padded(size);
  for (int64_t n = 0; n < count; n += 2) {
    const char* first = row_address(x, dtype, b, h, n);
    const char* second = n + 1 < count ? row_address(x, dtype, b, h, n + 1) : first;
    for (int64_t d = 0; d < size; d += kLanes) {
      const int64_t width = smaller(kLanes, size - d);
      const Vec pairs = load_pairs_of(first + 2 * d, second + 2 * d, width);
      store(target + n / 2 * stride + d, n + 1 < count ? pairs : low_half(pairs));
    }
  }
  return {target, stride};
#endif
}

/// Whether every number is finite.
template <bool kPairs>
bool all_finite(const Panel& rows, int64_t count, int64_t size) {
  Vec difference = zero();  // x - x is NaN for NaN and infinity
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < size; d += kLanes) {
      const Vec x = load(rows.row(n) + d);
      difference = add(difference, sub(x, x));
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kPairs) difference = add(difference, sub(first_of_pairs(x), first_of_pairs(x)));
#endif
    }
  }
  return reduce_add(difference) == 0.0f;
}

/// out (+)= a b, where numbers of b that are not finite do not pass factors of 0 in a.
template <bool kAdd, bool kPairs>
void guarded_product(bool finite, const float* a, int64_t a_row, int64_t a_column, const Panel& b, int64_t rows,
                     int64_t columns, int64_t depth, float* out, int64_t out_row) {
  if (finite) {
    matrix_product<kAdd, kPairs>(a, a_row, a_column, columns_of(b), rows, columns, depth, out, out_row);
    return;
  }
  for (int64_t r = 0; r < rows && !kAdd; ++r) std::memset(out + r * out_row, 0, columns * sizeof(float));
  product_of_nonzeros<kPairs>(a, a_row, a_column, b, rows, columns, depth, out, out_row);
}

// The support of a row of weights, from some key on. kept(j, n): which of keys j to j + n - 1, n <= kLanes, are inside;
// weighted(j, n, x): x times their weights, 0 outside.

struct AllKeys {
  __attribute__((always_inline)) Mask kept(int64_t, int64_t n) const { return first_lanes(n); }
  __attribute__((always_inline)) Vec weighted(int64_t, int64_t n, Vec x) const { return keep(first_lanes(n), x); }
};

struct WeightedKeys {
  const float* weights;
  __attribute__((always_inline)) Vec weight(int64_t j, int64_t n) const {
    return n == kLanes ? load(weights + j) : load_first(weights + j, n);
  }
  __attribute__((always_inline)) Mask kept(int64_t j, int64_t n) const {
    return not_below_zero(first_lanes(n), weight(j, n));
  }
  __attribute__((always_inline)) Vec weighted(int64_t j, int64_t n, Vec x) const {
    return keep(kept(j, n), mul(x, weight(j, n)));
  }
};

/// visit(j, n) for whole vectors of keys [0, count) and what is left.
template <class Visit>
FIAK_INLINE void for_vectors(int64_t count, Visit&& visit) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) visit(j, int64_t{kLanes});
  if (j < count) visit(j, count - j);
}

/// The largest score of the support among keys [0, count), -inf if there is none.
template <class Support>
float row_maximum(const float* scores, const Support& support, int64_t count) {
  Vec maxima = broadcast(-kInfinity);
  for_vectors(
      count, [&](int64_t j, int64_t n)
                 __attribute__((always_inline)) { maxima = keep_max(support.kept(j, n), load(scores + j), maxima); });
  return reduce_max(maxima);
}

template <class Support>
bool is_empty(const Support& support, int64_t count) {
  Vec inside = zero();
  for_vectors(
      count, [&](int64_t j, int64_t n)
                 __attribute__((always_inline)) { inside = max(inside, keep(support.kept(j, n), broadcast(1.0f))); });
  return reduce_max(inside) == 0.0f;
}

/// scores[0, count) = w exp(scores - shift), times `kept` where given, as numbers or pairs; 0 beyond, up to
/// padded(count of the block). Returns the sum before `kept`.
template <bool kPairs, class Support>
float weigh_row(float* scores, const Support& support, int64_t count, int64_t columns, float shift, const float* kept) {
  const Vec s = broadcast(shift);
  Vec sums = zero();
  const auto weigh = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec e = support.weighted(j, n, exp(sub(load(scores + j), s)));
    sums = add(sums, e);
    if (kept != nullptr) e = mul(e, load(kept + j));
    return e;
  };
  if constexpr (!kPairs) {
    for_vectors(
        count, [&](int64_t j, int64_t n) __attribute__((always_inline)) { store(scores + j, weigh(j, n)); });
    for (int64_t j = padded(count); j < columns; j += kLanes) store(scores + j, zero());
  }
#if defined(FIAK_ISA_AVX512_BF16)
  if constexpr (kPairs) {  // in place: a vector of pairs comes from the two vectors of scores that start twice as far
    int64_t j = 0;
    for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
      const Vec low = weigh(j, kLanes);
      store(scores + j / 2, pairs_in_order(low, weigh(j + kLanes, kLanes)));
    }
    if (j < count) {
      const Vec low = count - j >= kLanes ? weigh(j, kLanes) : weigh(j, count - j);
      const Vec high = count - j > kLanes ? weigh(j + kLanes, count - j - kLanes) : zero();
      store(scores + j / 2, pairs_in_order(low, high));
      j += 2 * kLanes;
    }
    for (; j < columns; j += 2 * kLanes) store(scores + j / 2, zero());
  }
#endif
  return reduce_add(sums);
}

/// A row's largest score and sum so far: key blocks are added one after another, scaled to the largest score.
struct RowState {
  float maximum, total;
};

/// Takes in the largest score of another block; `sums` are scaled to it.
void raise_maximum(float maximum, bool first, RowState& state, float* sums, int64_t value_size) {
  if (first) {
    state = {maximum, 0.0f};
  } else if (maximum > state.maximum) {
    const Vec factor = exp(broadcast(state.maximum - maximum));
    for (int64_t d = 0; d < value_size; d += kLanes) store(sums + d, mul(load(sums + d), factor));
    state.total *= reduce_max(factor);
    state.maximum = maximum;
  }
}

/// The Gaussian score's share of keys [0, count), -scale/2 |k_j|^2; `row` holds padded(head_size) numbers.
void key_bias(const PriorArgs& args, int64_t b, int64_t key_head, int64_t count, float* row, float* bias) {
  for (int64_t j = 0; j < count; ++j) {
    load_row(row_address(args.key, args.dtype, b, key_head, j), args.dtype, args.head_size, 1.0f, row);
    bias[j] = -0.5f * static_cast<float>(args.scale) * dot(row, row, padded(args.head_size));
  }
}

/// Fetches rows [begin, end) of a head into the L2 cache. Inlined: GCC drops calls of functions that only prefetch.
FIAK_INLINE void prefetch_rows(const Input& x, DType dtype, int64_t b, int64_t h, int64_t begin, int64_t end,
                               int64_t size) {
  for (int64_t n = begin; n < end; ++n) prefetch_row(row_address(x, dtype, b, h, n), size * element_size(dtype));
}

/// Fetches what block `first` of this head and the next head will read: cold operands would cost as much as products.
FIAK_INLINE void prefetch_next(const PriorArgs& args, const ForwardResult& result, int64_t b, int64_t h,
                               int64_t first) {
  const int64_t block_end = smaller(args.queries, first + kBlockRows);
  for (int64_t n = first; n < block_end; ++n) {
    prefetch_row_for_writing(row_address(result.output, args.dtype, b, h, n),
                             args.value_size * element_size(args.dtype));
  }
  prefetch_rows(args.query, args.dtype, b, h, block_end, smaller(args.queries, block_end + kBlockRows), args.head_size);
  if (++b == args.batch) {
    b = 0;
    if (++h == args.query_heads) return;
  }
  // Its keys and values are spread over this head's blocks.
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b), each = keys / blocks(args.queries) + 1;
  const int64_t begin = smaller(keys, first / kBlockRows * each), end = smaller(keys, begin + each);
  prefetch_rows(args.key, args.dtype, b, key_head, begin, end, args.head_size);
  prefetch_rows(args.value, args.dtype, b, key_head, begin, end, args.value_size);
  if (block_end == args.queries) {
    prefetch_rows(args.query, args.dtype, b, h, 0, smaller(args.queries, kBlockRows), args.head_size);
  }
}

/// Queries [begin, end) of query head h for batch element b; begin is a multiple of kBlockRows.
template <bool kPairs>
void forward_rows(const PriorArgs& args, const ForwardResult& result, int64_t b, int64_t h, int64_t begin,
                  int64_t end) {
  const int64_t key_head = h / shared_heads(args), all_keys = keys_of(args, b);
  const int64_t keys = args.is_causal ? smaller(all_keys, end) : all_keys;
  const int64_t depth = units<kPairs>(args.head_size), row_size = padded(args.head_size);
  const int64_t value_size = padded(args.value_size), width = block_keys(all_keys);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{static_cast<char*>(
      thread_scratch(carved(kBlockRows * padded(depth)) + carved(kBlockRows * value_size) + carved(kBlockRows * width) +
                     carved(width) + carved(keys) + carved(tile_rows(keys) * row_size) +
                     carved(depth * tile_columns(keys)) + carved(units<kPairs>(all_keys) * value_size)))};
  float* query = scratch.floats(kBlockRows * padded(depth));
  float* sums = scratch.floats(kBlockRows * value_size);
  float* scores = scratch.floats(kBlockRows * width);
  float* kept = scratch.floats(width);
  float* bias = scratch.floats(keys);
  float* key_rows = scratch.floats(tile_rows(keys) * row_size);
  if (gaussian) key_bias(args, b, key_head, keys, query, bias);
  const Columns key = load_columns<kPairs>(args.key, args.dtype, b, key_head, keys, args.head_size, key_rows,
                                           scratch.floats(depth * tile_columns(keys)));
  // All of the element's values decide, so that no split among threads changes a bit.
  const Panel value = load_depth<kPairs>(args.value, args.dtype, b, key_head, all_keys, args.value_size,
                                         scratch.floats(units<kPairs>(all_keys) * value_size));
  const bool finite = all_finite<kPairs>(value, units<kPairs>(all_keys), value_size);

  for (int64_t first = begin; first < end; first += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, end - first);
    const int64_t seen = args.is_causal ? smaller(keys, first + rows) : keys;
    load_block<kPairs>(args.query, args.dtype, b, h, first, rows, args.head_size, 1.0f, query);
    prefetch_next(args, result, b, h, first);
    if (seen == 0) std::memset(sums, 0, rows * value_size * sizeof(float));
    RowState states[kBlockRows];
    const auto with_support = [&](int64_t n, int64_t from, auto&& call) __attribute__((always_inline)) {
      const float* weights = weights_of(args, b, h, n);
      return weights == nullptr ? call(AllKeys{}) : call(WeightedKeys{weights + from});
    };
    for (int64_t from = 0; from < seen; from += width) {
      const int64_t columns = padded(smaller(width, seen - from));
      const Columns block{key.data + from / kTileWidth * key.panel_stride, key.row_stride, key.panel_stride};
      matrix_product<false, kPairs>(query, padded(depth), 1, block, tile_rows(rows), columns, depth, scores, width,
                                    args.is_causal ? first - from : kNoDiagonal, static_cast<float>(args.scale));
      const auto count_of = [&](int64_t i) {
        const int64_t visible = args.is_causal ? smaller(keys, first + i + 1) : keys;
        return larger(0, smaller(smaller(width, seen - from), visible - from));
      };
      // All maxima come before the exponentials, which would wait for each of them.
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i, count = count_of(i);
        float* s = scores + i * width;
        if (args.prior != nullptr && n + kRowsAhead < args.queries) {
          prefetch_row(reinterpret_cast<const char*>(weights_of(args, b, h, n + kRowsAhead) + from), count * 4);
        }
        for (int64_t j = 0; gaussian && j < count; ++j) s[j] += bias[from + j];
        const float maximum = with_support(n, from, [&](const auto& x) { return row_maximum(s, x, count); });
        raise_maximum(maximum, from == 0, states[i], sums + i * value_size, value_size);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i, count = count_of(i);
        if (dropout.active()) {
          for (int64_t j = 0; j < count; ++j) kept[j] = static_cast<float>(dropout.factor(b, h, n, from + j));
          for (int64_t j = count; j < columns; ++j) kept[j] = 0.0f;
        }
        // A row without a finite score so far: exp(-inf) = 0.
        const float shift = states[i].maximum == -kInfinity ? 0.0f : states[i].maximum;
        states[i].total += with_support(n, from, [&](const auto& x) {
          return weigh_row<kPairs>(scores + i * width, x, count, columns, shift, dropout.active() ? kept : nullptr);
        });
      }
      const Panel rows_of_block{value.row(units<kPairs>(from)), value.stride};
      const auto add_values = from == 0 ? guarded_product<false, kPairs> : guarded_product<true, kPairs>;
      const int64_t group = args.is_causal ? kTileRows * kTileVectors : kBlockRows;  // rows with about the same keys
      for (int64_t i = 0; i < rows; i += group) {
        const int64_t most = args.is_causal ? larger(0, first + i + group - from) : seen;
        add_values(finite, scores + i * width, width, 1, rows_of_block, tile_rows(smaller(group, rows - i)), value_size,
                   units<kPairs>(smaller(smaller(width, seen - from), most)), sums + i * value_size, value_size);
      }
    }
    float logs[kBlockRows];
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t k = i; k < i + kLanes; ++k) logs[k] = k < rows ? states[k].total : 1.0f;
      store(logs + i, log_of_normal(load(logs + i)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i, visible = args.is_causal ? smaller(keys, n + 1) : keys;
      float factor = 0.0f, lse = -kInfinity;
      const bool none = visible == 0 || (states[i].maximum == -kInfinity &&
                                         with_support(n, 0, [&](const auto& x) { return is_empty(x, visible); }));
      if (!none) {
        const float total = states[i].maximum > -kInfinity && states[i].total < kInfinity ? states[i].total : kNaN;
        factor = 1.0f / total;
        lse = states[i].maximum + (total >= kSmallestNormal ? logs[i] : __builtin_logf(total));
      }
      static_cast<float*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] = lse;
      store_row(sums + i * value_size, args.dtype, args.value_size, factor,
                row_address(result.output, args.dtype, b, h, n));
    }
  }
}

// Backward runs in waves. A wave is a range of queries, a range of keys and a few heads and batch elements. First its
// rows are computed: P and dS of the wave, dQ and the weights' gradient; then its columns, dK and dV, from the P and dS
// that are still in the cache. Every sum is a chain of multiply-adds onto memory in ascending order of what it runs
// over (dQ: keys; dK and dV: query heads, then queries; weights: batch elements), so how waves are cut changes no bit,
// and they are cut by the number of threads.

constexpr int64_t kGradRows = 24;  // queries of a task, and of a partial sum of weights that all queries share
constexpr int64_t kGradKeys = 48;  // what ranges of keys are multiples of
static_assert(kGradRows % (kTileRows * kTileVectors) == 0);
static_assert(kGradKeys % kTileWidth == 0 && kGradKeys % kTileRows == 0);

constexpr int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/// part(i, begin, end) for runs of whole blocks of [0, length) of each of `count` things.
template <class Part>
FIAK_INLINE void parallel_blocks(const Parallel& parallel, int64_t count, int64_t length, int64_t block, Part&& part) {
  const int64_t each = (length + block - 1) / block;
  parallel_range(parallel, count * each, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / each, stop = smaller(end, (i + 1) * each);
      part(i, (begin - i * each) * block, smaller(length, (stop - i * each) * block));
      begin = stop;
    }
  });
}

/// x from row `begin` on.
Input from_row(const Input& x, DType dtype, int64_t begin) {
  return {static_cast<const char*>(x.data) + begin * x.row_stride * element_size(dtype), x.batch_stride, x.head_stride,
          x.row_stride};
}

/// A row's scores become its attention, and its dA become dS, for keys [0, count); 0 up to `columns`. `kept` are
/// dropout's factors and `grad_weights` is what dw is added to, or null.
template <class Support>
void grad_row(float* scores, float* products, const Support& support, int64_t count, int64_t columns, float logsumexp,
              float delta, const float* bias, const float* kept, float* grad_weights) {
  const Vec shift = broadcast(logsumexp), d = broadcast(delta);
  for_vectors(
      count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        Vec s = load(scores + j), grad = load(products + j);
        if (bias != nullptr) s = add(s, load(bias + j));
        if (kept != nullptr) grad = mul(grad, load(kept + j));
        const Vec e = exp(sub(s, shift)), dw = mul(e, sub(grad, d));
        Vec attention = support.weighted(j, n, e);
        if (kept != nullptr) attention = mul(attention, load(kept + j));
        store(scores + j, attention);
        store(products + j, support.weighted(j, n, dw));
        if (grad_weights == nullptr) return;
        if (n == kLanes) {
          store(grad_weights + j, add(load(grad_weights + j), dw));
        } else {
          store_first(grad_weights + j, n, add(load_first(grad_weights + j, n), dw));
        }
      });
  for (int64_t j = padded(count); j < columns; j += kLanes) {
    store(scores + j, zero());
    store(products + j, zero());
  }
}

/// Where the weights' gradient of a query is added up: a row for each query or, where all queries share their weights,
/// a partial sum for each kGradRows of them, so that no split among threads changes the order. Null: not wanted.
struct WeightRows {
  float* sums;
  int64_t groups, heads, rows, keys, queries_per_row;
  float* row(const PriorArgs& args, int64_t b, int64_t h, int64_t n) const {
    if (sums == nullptr) return nullptr;
    const int64_t head = h / (args.query_heads / heads);
    return sums + ((b % groups * heads + head) * rows + n / queries_per_row) * keys;
  }
};

/// Batch elements [b, b + batch) and key heads [head, head + heads), each pair of them a slot, for one query head of
/// each key head; queries [query, query + queries) and keys [key, key + keys).
struct Wave {
  int64_t b, batch, head, heads, query_head, query, queries, key, keys;
};

template <bool kPairs>
class Backward {
 public:
  Backward(const PriorArgs& args, const BackwardArgs& grads, const float* delta, const WeightRows& weight_rows,
           const Parallel& parallel)
      : args_(args),
        grads_(grads),
        delta_(delta),
        weight_rows_(weight_rows),
        parallel_(parallel),
        row_size_(padded(args.head_size)),
        value_size_(padded(args.value_size)),
        depth_(units<kPairs>(args.head_size)),
        value_depth_(units<kPairs>(args.value_size)),
        all_keys_(rounded_up(args.keys, kGradKeys)),
        gaussian_(args.score == Score::kGaussian),
        dropout_(make_dropout(args.dropout_p, args.seed)) {
    const bool alone = parallel.threads == 1;
    // Weights that heads share are added up head by head.
    const bool by_head = weight_rows.sums != nullptr && weight_rows.heads < args.query_heads;
    heads_ = alone || by_head ? 1 : args.key_heads;
    const int64_t tasks = alone ? 4 : 4 * parallel.threads;
    queries_ = smaller(rounded_up(args.queries, kGradRows), (tasks + heads_ - 1) / heads_ * kGradRows);
    const int64_t room = alone ? kAloneUnits : smaller(kMostUnits, parallel.threads * kThreadUnits);
    keys_ = larger(kGradKeys, smaller(all_keys_, room / larger(1, heads_ * queries_) / kGradKeys * kGradKeys));
    batch_ = 1;
    if (!alone && !by_head && queries_ >= args.queries && keys_ >= args.keys) {
      batch_ = larger(1, smaller(args.batch, room / larger(1, heads_ * queries_ * keys_)));
    }
  }

  void run() {
    const int64_t slots = batch_ * heads_;
    const SharedScratch memory(64 + bytes_of(slots));
    Carver carver{static_cast<char*>(memory.data())};
    carver.next += -reinterpret_cast<uintptr_t>(carver.next) & 63;
    slots_ = carver.next;
    for (int64_t head = 0; head < args_.key_heads; head += heads_) {
      for (int64_t b = 0; b < args_.batch; b += batch_) {
        Wave wave{b, smaller(batch_, args_.batch - b), head, smaller(heads_, args_.key_heads - head), 0, 0, 0, 0, 0};
        parallel_range(parallel_, wave.batch * wave.heads, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) start(wave, i);
        });
        for (wave.query_head = 0; wave.query_head < shared_heads(args_); ++wave.query_head) {
          for (wave.query = 0; wave.query < args_.queries; wave.query += queries_) {
            wave.queries = smaller(queries_, args_.queries - wave.query);
            const int64_t seen = args_.is_causal ? smaller(args_.keys, wave.query + wave.queries) : args_.keys;
            for (wave.key = 0; wave.key == 0 || wave.key < seen; wave.key += keys_) {
              wave.keys = smaller(keys_, args_.keys - wave.key);
              run(wave);
            }
          }
        }
        parallel_blocks(parallel_, wave.batch * wave.heads, args_.keys, kGradKeys,
                        [&](int64_t i, int64_t begin, int64_t end) { finish(wave, i, begin, end); });
      }
    }
  }

 private:
  // 32-bit units of P and of dS in a wave: within the L2 cache for one thread alone; of several, enough work for each
  // between two barriers, in bounded memory.
  static constexpr int64_t kAloneUnits = 48 * 1024, kThreadUnits = 512 * 1024, kMostUnits = 2 * 1024 * 1024;

  /// What the threads share of a batch element's key head.
  struct Slot {
    Columns key_columns, value_columns;
    Panel key;
    bool key_finite;
    float *bias, *grad_key, *grad_value, *score_sums, *grad_query, *attention, *grad_scores;
  };

  static constexpr int64_t kSlotBytes = 128;
  static_assert(sizeof(Slot) <= kSlotBytes);

  /// A slot, and behind it what its pointers point to.
  int64_t bytes_of(int64_t slots) const {
    return slots *
           (kSlotBytes + carved(depth_ * tile_columns(all_keys_)) + carved(value_depth_ * tile_columns(all_keys_)) +
            carved(all_keys_ * row_size_) + 2 * carved(all_keys_) + carved(all_keys_ * row_size_) +
            carved(all_keys_ * value_size_) + carved(queries_ * row_size_) + 2 * carved(wave_units()));
  }
  int64_t wave_units() const { return units<kPairs>(queries_) * keys_; }
  Slot& slot(int64_t i) const { return *reinterpret_cast<Slot*>(slots_ + bytes_of(1) * i); }

  int64_t batch_of(const Wave& wave, int64_t i) const { return wave.b + i / wave.heads; }
  int64_t key_head_of(const Wave& wave, int64_t i) const { return wave.head + i % wave.heads; }

  /// Packs the keys and values of slot i and clears its sums.
  void start(const Wave& wave, int64_t i) {
    const int64_t b = batch_of(wave, i), key_head = key_head_of(wave, i), keys = keys_of(args_, b);
    Slot& x = slot(i);
    Carver carver{reinterpret_cast<char*>(&x) + kSlotBytes};
    auto* rows = static_cast<float*>(thread_scratch(carved(tile_rows(keys) * larger(row_size_, value_size_))));
    x.bias = carver.floats(all_keys_);
    if (gaussian_) key_bias(args_, b, key_head, keys, rows, x.bias);
    x.key_columns = load_columns<kPairs>(args_.key, args_.dtype, b, key_head, keys, args_.head_size, rows,
                                         carver.floats(depth_ * tile_columns(all_keys_)));
    x.value_columns = load_columns<kPairs>(args_.value, args_.dtype, b, key_head, keys, args_.value_size, rows,
                                           carver.floats(value_depth_ * tile_columns(all_keys_)));
    x.key = load_depth<kPairs>(args_.key, args_.dtype, b, key_head, keys, args_.head_size,
                               carver.floats(all_keys_ * row_size_));
    x.key_finite = all_finite<kPairs>(x.key, units<kPairs>(keys), row_size_);
    x.score_sums = carver.floats(all_keys_);
    x.grad_key = carver.floats(all_keys_ * row_size_);
    x.grad_value = carver.floats(all_keys_ * value_size_);
    x.grad_query = carver.floats(queries_ * row_size_);
    x.attention = carver.floats(wave_units());
    x.grad_scores = carver.floats(wave_units());
    std::memset(x.score_sums, 0, all_keys_ * sizeof(float));
    std::memset(x.grad_key, 0, all_keys_ * row_size_ * sizeof(float));
    std::memset(x.grad_value, 0, all_keys_ * value_size_ * sizeof(float));
  }

  void run(const Wave& wave) {
    // A task runs all batch elements of a head's queries, so that it alone adds to the gradient of their weights.
    parallel_blocks(parallel_, wave.heads, wave.queries, kGradRows, [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kGradRows) {
        for (int64_t b = 0; b < wave.batch; ++b) {
          rows(wave, b * wave.heads + head, wave.query + first, smaller(kGradRows, end - first));
        }
      }
    });
    if (grads_.grad_key.data == nullptr && grads_.grad_value.data == nullptr) return;
    parallel_blocks(parallel_, wave.batch * wave.heads, wave.keys, kGradKeys,
                    [&](int64_t i, int64_t begin, int64_t end) {
                      columns(wave, i, wave.key + begin, smaller(wave.key + end, keys_of(args_, batch_of(wave, i))));
                    });
  }

  /// Queries [first, first + count) of slot i against the wave's keys.
  void rows(const Wave& wave, int64_t i, int64_t first, int64_t count) {
    const Slot& x = slot(i);
    const int64_t b = batch_of(wave, i), key_head = key_head_of(wave, i);
    const int64_t h = key_head * shared_heads(args_) + wave.query_head;
    const int64_t keys = keys_of(args_, b), visible = args_.is_causal ? smaller(keys, first + count) : keys;
    if (wave.key > 0 && wave.key >= visible) return;
    const int64_t seen = smaller(wave.keys, visible - wave.key), filled = rounded_up(seen, kGradKeys);

    Carver carver{static_cast<char*>(thread_scratch(carved(kGradRows * padded(depth_)) +
                                                    carved(kGradRows * padded(value_depth_)) + carved(keys_) +
                                                    2 * carved(kGradRows * keys_)))};
    float* query = carver.floats(kGradRows * padded(depth_));
    float* grad_output = carver.floats(kGradRows * padded(value_depth_));
    float* kept = carver.floats(keys_);
    // Numbers are computed where the wave keeps them, pairs on the side.
    const int64_t row = first - wave.query;
    float* scores = kPairs ? carver.floats(kGradRows * keys_) : x.attention + row * keys_;
    float* products = kPairs ? carver.floats(kGradRows * keys_) : x.grad_scores + row * keys_;

    const auto block = [&](const Columns& all) {
      return Columns{all.data + wave.key / kTileWidth * all.panel_stride, all.row_stride, all.panel_stride};
    };
    const int64_t diagonal = args_.is_causal ? first - wave.key : kNoDiagonal;
    load_block<kPairs>(args_.query, args_.dtype, b, h, first, count, args_.head_size, 1.0f, query);
    load_block<kPairs>(grads_.grad_output, args_.dtype, b, h, first, count, args_.value_size, 1.0f, grad_output);
    matrix_product<false, kPairs>(query, padded(depth_), 1, block(x.key_columns), tile_rows(count), padded(seen),
                                  depth_, scores, keys_, diagonal, static_cast<float>(args_.scale));
    matrix_product<false, kPairs>(grad_output, padded(value_depth_), 1, block(x.value_columns), tile_rows(count),
                                  padded(seen), value_depth_, products, keys_, diagonal);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r, at = (b * args_.query_heads + h) * args_.queries + n;
      const float lse = static_cast<const float*>(grads_.logsumexp)[at];
      const int64_t row_seen = args_.is_causal ? larger(0, smaller(seen, n + 1 - wave.key)) : seen;
      const int64_t columns = lse == -kInfinity ? 0 : row_seen;
      const float* weights = weights_of(args_, b, h, n);
      float* grad_weights = weight_rows_.row(args_, b, h, n);
      if (grad_weights != nullptr) grad_weights += wave.key;
      if (dropout_.active()) {
        for (int64_t j = 0; j < columns; ++j) kept[j] = static_cast<float>(dropout_.factor(b, h, n, wave.key + j));
        for (int64_t j = columns; j < padded(columns); ++j) kept[j] = 0.0f;
      }
      const auto grad = [&](const auto& support) {
        grad_row(scores + r * keys_, products + r * keys_, support, columns, filled, lse, delta_[at],
                 gaussian_ ? x.bias + wave.key : nullptr, dropout_.active() ? kept : nullptr, grad_weights);
      };
      if (weights == nullptr) {
        grad(AllKeys{});
      } else {
        if (n + kRowsAhead < args_.queries) prefetch_weights(b, h, n + kRowsAhead, wave.key, columns);
        grad(WeightedKeys{weights + wave.key});
      }
    }
    if constexpr (kPairs) keep_pairs(x, row, count, filled, scores, products);
    if (grads_.grad_query.data == nullptr) return;
    float* sums = x.grad_query + row * row_size_;
    const Panel key{x.key.row(units<kPairs>(wave.key)), x.key.stride};
    const auto add_keys = wave.key == 0 ? guarded_product<false, kPairs> : guarded_product<true, kPairs>;
    add_keys(x.key_finite, products, keys_, 1, key, tile_rows(count), row_size_, units<kPairs>(seen), sums, row_size_);
    if (wave.key + wave.keys < visible) return;
    for (int64_t r = 0; r < count; ++r) {
      store_row(sums + r * row_size_, args_.dtype, args_.head_size, static_cast<float>(args_.scale),
                row_address(grads_.grad_query, args_.dtype, b, h, first + r));
    }
  }

  __attribute__((always_inline)) void prefetch_weights(int64_t b, int64_t h, int64_t n, int64_t key,
                                                       int64_t count) const {
    if (args_.prior_row_stride == 0) return;
    prefetch_row(reinterpret_cast<const char*>(weights_of(args_, b, h, n) + key), count * 4);
    if (const float* grad = weight_rows_.row(args_, b, h, n); grad != nullptr) {
      prefetch_row_for_writing(reinterpret_cast<const char*>(grad + key), count * 4);
    }
  }

  /// Keeps P and dS for the columns as pairs of queries, and leaves dS as pairs of keys in `products`.
  void keep_pairs(const Slot& x, int64_t row, int64_t count, int64_t filled, float* scores, float* products) const {
#if defined(FIAK_ISA_AVX512_BF16)
    if (count % 2 != 0) {
      std::memset(scores + count * keys_, 0, filled * sizeof(float));
      std::memset(products + count * keys_, 0, filled * sizeof(float));
    }
    for (int64_t r = 0; r < count; r += 2) {
      float *attention = x.attention + (row + r) / 2 * keys_, *grad = x.grad_scores + (row + r) / 2 * keys_;
      float *p = scores + r * keys_, *ds = products + r * keys_;
      for (int64_t j = 0; j < filled; j += kLanes) {
        store(attention + j, pairs_of(load(p + j), load(p + keys_ + j)));
        store(grad + j, pairs_of(load(ds + j), load(ds + keys_ + j)));
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      float* ds = products + r * keys_;
      for (int64_t j = 0; j < filled; j += 2 * kLanes) {
        const Vec high = j + kLanes < filled ? load(ds + j + kLanes) : zero();
        store(ds + j / 2, pairs_in_order(load(ds + j), high));
      }
    }
#else
    (void)x, (void)row, (void)count, (void)filled, (void)scores, (void)products;
#endif
  }

  /// Adds the wave's queries to dK and dV of keys [begin, end) of slot i.
  void columns(const Wave& wave, int64_t i, int64_t begin, int64_t end) {
    const Slot& x = slot(i);
    const int64_t b = batch_of(wave, i), h = key_head_of(wave, i) * shared_heads(args_) + wave.query_head;
    Carver carver{static_cast<char*>(thread_scratch(carved(queries_ * row_size_) + carved(queries_ * value_size_)))};
    const int64_t count = units<kPairs>(wave.queries);
    const Panel query = load_depth<kPairs>(from_row(args_.query, args_.dtype, wave.query), args_.dtype, b, h,
                                           wave.queries, args_.head_size, carver.floats(queries_ * row_size_));
    const Panel grad_output =
        load_depth<kPairs>(from_row(grads_.grad_output, args_.dtype, wave.query), args_.dtype, b, h, wave.queries,
                           args_.value_size, carver.floats(queries_ * value_size_));
    const bool query_finite = all_finite<kPairs>(query, count, row_size_);
    const bool output_finite = all_finite<kPairs>(grad_output, count, value_size_);
    // Of causal keys the queries before them have nothing; otherwise all keys go at once.
    const int64_t step = args_.is_causal ? kGradKeys : larger(kGradKeys, end - begin);
    for (int64_t key = begin; key < end; key += step) {
      const int64_t first = args_.is_causal ? units<kPairs>(larger(0, smaller(key - wave.query, wave.queries))) : 0;
      const int64_t keys = tile_rows(smaller(step, end - key)), at = first * keys_ + key - wave.key;
      const Panel seen_query{query.row(first), query.stride}, seen_output{grad_output.row(first), grad_output.stride};
      if (grads_.grad_value.data != nullptr) {
        guarded_product<true, kPairs>(output_finite, x.attention + at, 1, keys_, seen_output, keys, value_size_,
                                      count - first, x.grad_value + key * value_size_, value_size_);
      }
      if (grads_.grad_key.data == nullptr) continue;
      guarded_product<true, kPairs>(query_finite, x.grad_scores + at, 1, keys_, seen_query, keys, row_size_,
                                    count - first, x.grad_key + key * row_size_, row_size_);
      for (int64_t n = first; gaussian_ && n < count; ++n) {
        const float* from = x.grad_scores + n * keys_ + key - wave.key;
        float* to = x.score_sums + key;
        for (int64_t j = 0; j < padded(smaller(step, end - key)); j += kLanes) {
          Vec sum = load(to + j);
#if defined(FIAK_ISA_AVX512_BF16)
          if constexpr (kPairs) sum = add(add(sum, first_of_pairs(load(from + j))), second_of_pairs(load(from + j)));
#endif
          if constexpr (!kPairs) sum = add(sum, load(from + j));
          store(to + j, sum);
        }
      }
    }
  }

  /// Stores dK and dV of keys [begin, end) of slot i.
  void finish(const Wave& wave, int64_t i, int64_t begin, int64_t end) {
    const Slot& x = slot(i);
    const int64_t b = batch_of(wave, i), key_head = key_head_of(wave, i);
    auto* key = static_cast<float*>(thread_scratch(carved(row_size_)));
    for (int64_t j = begin; j < end; ++j) {
      float* sum = x.grad_key + j * row_size_;
      if (grads_.grad_key.data != nullptr) {
        if (gaussian_ && x.score_sums[j] != 0.0f) {  // d s_ij / d k_j = scale (q_i - k_j)
          load_row(row_address(args_.key, args_.dtype, b, key_head, j), args_.dtype, args_.head_size, 1.0f, key);
          for (int64_t d = 0; d < row_size_; ++d) sum[d] -= x.score_sums[j] * key[d];
        }
        store_row(sum, args_.dtype, args_.head_size, static_cast<float>(args_.scale),
                  row_address(grads_.grad_key, args_.dtype, b, key_head, j));
      }
      if (grads_.grad_value.data != nullptr) {
        store_row(x.grad_value + j * value_size_, args_.dtype, args_.value_size, 1.0f,
                  row_address(grads_.grad_value, args_.dtype, b, key_head, j));
      }
    }
  }

  const PriorArgs& args_;
  const BackwardArgs& grads_;
  const float* delta_;
  const WeightRows weight_rows_;
  const Parallel& parallel_;
  const int64_t row_size_, value_size_, depth_, value_depth_, all_keys_;
  const bool gaussian_;
  const Dropout dropout_;
  int64_t batch_, heads_, queries_, keys_;  // the most of a wave
  char* slots_ = nullptr;
};

template <bool kPairs>
void backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const SharedScratch delta_memory(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(delta_memory.data());
  compute_delta(args, grads, parallel, delta);

  auto* grad_weight = static_cast<float*>(grads.grad_weight);
  const bool partial = grad_weight != nullptr && args.prior_rows != args.queries;
  const int64_t row_blocks = (args.queries + kGradRows - 1) / kGradRows, heads = args.prior_groups * args.prior_heads;
  const int64_t sum_rows = partial ? row_blocks : args.queries;
  const SharedScratch partial_memory(partial ? heads * sum_rows * args.keys * sizeof(float) : 0);
  float* sums = partial ? static_cast<float*>(partial_memory.data()) : grad_weight;
  if (sums != nullptr) {
    parallel_range(parallel, heads * sum_rows, [&](int64_t begin, int64_t end) {
      std::memset(sums + begin * args.keys, 0, (end - begin) * args.keys * sizeof(float));
    });
  }
  const WeightRows weight_rows{sums, args.prior_groups, args.prior_heads, sum_rows, args.keys, partial ? kGradRows : 1};
  Backward<kPairs>(args, grads, delta, weight_rows, parallel).run();
  for (int64_t i = 0; partial && i < heads; ++i) {
    float* target = grad_weight + i * args.keys;
    std::memset(target, 0, args.keys * sizeof(float));
    for (int64_t block = 0; block < row_blocks; ++block) {
      const float* from = sums + (i * row_blocks + block) * args.keys;
      for (int64_t j = 0; j < args.keys; ++j) target[j] += from[j];
    }
  }
}

}  // namespace

void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  if (is_decoding(args)) return prior_decode(args, result, parallel);
  // The batch runs inside the heads, so that a head's weights stay in the cache.
  parallel_blocks(parallel, args.query_heads * args.batch, args.queries, kBlockRows,
                  [&](int64_t i, int64_t begin, int64_t end) {
                    const int64_t h = i / args.batch, b = i % args.batch;
#if defined(FIAK_ISA_AVX512_BF16)
                    if (args.dtype == DType::kBFloat16) return forward_rows<true>(args, result, b, h, begin, end);
#endif
                    forward_rows<false>(args, result, b, h, begin, end);
                  });
}

void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
#if defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) return backward<true>(args, grads, parallel);
#endif
  backward<false>(args, grads, parallel);
}

}  // namespace fiak::cpu::FIAK_ISA
