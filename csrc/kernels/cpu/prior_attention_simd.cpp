// prior_attention, vectorised: blocks of queries against all keys, as matrix products with the weighted softmax
// between.
//
// Forward: S = scale Q K^T (K transposed once for each head), P = w exp(S - max), O = P V.
// Backward by rows: dA = dO V^T, dw = exp(S - lse) (dA - delta), dQ = (w dw) K.
// Backward by columns: the same scores transposed, dV = A^T dO, dK = dS^T Q.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/tables.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kBlockRows = 48;  // queries of a block, whole tiles of any height
static_assert(kBlockRows % (kTileRows * kTileVectors) == 0);
constexpr int64_t kBlockKeys = 8 * kTileWidth;  // keys of a block at most: its scores stay in the L2 cache
constexpr int64_t kRowsAhead = 8;               // weights that are fetched early, since they come from far

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
  std::memset(target + count * stride, 0, (tile_rows(count) - count) * stride * sizeof(float));
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

/// The sums of a block's rows so far: key blocks are added one after another, scaled to the largest score.
struct RowState {
  float maximum, total;
};

/// One block of scores of a row, keys [0, count) of it, becomes its share of the row's sums; `sums` are scaled to its
/// maximum.
template <bool kPairs, class Support>
void softmax_row(float* scores, const Support& support, int64_t count, int64_t columns, const float* kept, bool first,
                 RowState& state, float* sums, int64_t value_size) {
  const float maximum = row_maximum(scores, support, count);
  if (first) {
    state = {maximum, 0.0f};
  } else if (maximum > state.maximum) {
    const Vec factor = exp(broadcast(state.maximum - maximum));
    for (int64_t d = 0; d < value_size; d += kLanes) store(sums + d, mul(load(sums + d), factor));
    state.total *= reduce_max(factor);
    state.maximum = maximum;
  }
  // A row without a finite score so far: exp(-inf) = 0.
  const float shift = state.maximum == -kInfinity ? 0.0f : state.maximum;
  state.total += weigh_row<kPairs>(scores, support, count, columns, shift, kept);
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
  const int64_t value_size = padded(args.value_size), width = block_keys(keys);
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
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i, visible = args.is_causal ? smaller(keys, n + 1) : keys;
        const int64_t count = larger(0, smaller(smaller(width, seen - from), visible - from));
        float* s = scores + i * width;
        if (args.prior != nullptr && n + kRowsAhead < args.queries) {
          prefetch_row(reinterpret_cast<const char*>(weights_of(args, b, h, n + kRowsAhead) + from), count * 4);
        }
        if (gaussian) {
          for (int64_t j = 0; j < count; ++j) s[j] += bias[from + j];
        }
        if (dropout.active()) {
          for (int64_t j = 0; j < count; ++j) kept[j] = static_cast<float>(dropout.factor(b, h, n, from + j));
          for (int64_t j = count; j < columns; ++j) kept[j] = 0.0f;
        }
        with_support(n, from, [&](const auto& support) {
          softmax_row<kPairs>(s, support, count, columns, dropout.active() ? kept : nullptr, from == 0, states[i],
                              sums + i * value_size, value_size);
        });
      }
      const Panel rows_of_block{value.row(units<kPairs>(from)), value.stride};
      const auto add_values = from == 0 ? guarded_product<false, kPairs> : guarded_product<true, kPairs>;
      add_values(finite, scores, width, 1, rows_of_block, tile_rows(rows), value_size,
                 units<kPairs>(smaller(width, seen - from)), sums, value_size);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i, visible = args.is_causal ? smaller(keys, n + 1) : keys;
      float factor = 0.0f, lse = -kInfinity;
      const bool none = visible == 0 || (states[i].maximum == -kInfinity &&
                                         with_support(n, 0, [&](const auto& x) { return is_empty(x, visible); }));
      if (!none) {
        const float total = states[i].maximum > -kInfinity && states[i].total < kInfinity ? states[i].total : kNaN;
        factor = 1.0f / total;
        lse = states[i].maximum + __builtin_logf(total);
      }
      static_cast<float*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] = lse;
      store_row(sums + i * value_size, args.dtype, args.value_size, factor,
                row_address(result.output, args.dtype, b, h, n));
    }
  }
}

/// Zero weights times infinite rows: where a sum is not finite, computes it again over the nonzero weights only.
void repair(const float* weights, int64_t count, const Panel& rows, int64_t size, float* sum) {
  Vec difference = zero();
  for (int64_t d = 0; d < size; d += kLanes) difference = add(difference, sub(load(sum + d), load(sum + d)));
  if (reduce_add(difference) == 0.0f) return;  // x - x is NaN for NaN and infinity
  for (int64_t d = 0; d < size; ++d) sum[d] = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    if (weights[j] == 0.0f) continue;
    for (int64_t d = 0; d < size; ++d) sum[d] += weights[j] * rows.row(j)[d];
  }
}

/// Where the weights' gradient of a query is added up: row n of `rows`, or, where all queries share their weights, row
/// n / kBlockRows of partial sums, so that the order of the sum depends on no split among threads. Null: not wanted.
struct WeightRows {
  float* rows;
  int64_t stride, queries_per_row;
  __attribute__((always_inline)) float* row(int64_t n) const { return rows + n / queries_per_row * stride; }
};

/// Backward for queries [begin, end), begin a multiple of kBlockRows: dQ, and added onto the weights' gradient.
void backward_rows(const PriorArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t h,
                   int64_t begin, int64_t end, const WeightRows& grad_weights) {
  const int64_t key_head = h / shared_heads(args);
  const int64_t keys = args.is_causal ? smaller(keys_of(args, b), end) : keys_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size);
  const int64_t width = tile_columns(keys);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);
  const int64_t block_rows = tile_rows(smaller(kBlockRows, end - begin));

  Carver scratch{static_cast<char*>(thread_scratch(2 * carved(block_rows * head_size) +
                                                   carved(block_rows * value_size) + 2 * carved(block_rows * width) +
                                                   carved(keys) + carved(keys * head_size) + carved(head_size * width) +
                                                   carved(keys * value_size) + carved(value_size * width)))};
  float* query = scratch.floats(block_rows * head_size);
  float* sums = scratch.floats(block_rows * head_size);
  float* grad_output = scratch.floats(block_rows * value_size);
  float* scores = scratch.floats(block_rows * width);
  float* products = scratch.floats(block_rows * width);
  float* bias = scratch.floats(keys);
  const Panel key =
      make_panel(args.key, args.dtype, b, key_head, keys, args.head_size, scratch.floats(keys * head_size));
  const Columns key_columns = transpose(key, keys, head_size, scratch.floats(head_size * width));
  const Panel value =
      make_panel(args.value, args.dtype, b, key_head, keys, args.value_size, scratch.floats(keys * value_size));
  const Columns value_columns = transpose(value, keys, value_size, scratch.floats(value_size * width));
  if (gaussian) gaussian_bias(args, key, keys, bias);

  for (int64_t first = begin; first < end; first += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, end - first);
    const int64_t seen = args.is_causal ? smaller(keys, first + rows) : keys, columns = padded(seen);
    load_block<false>(args.query, args.dtype, b, h, first, rows, args.head_size, static_cast<float>(args.scale), query);
    load_block<false>(grads.grad_output, args.dtype, b, h, first, rows, args.value_size, 1.0f, grad_output);
    matrix_product<false>(query, head_size, 1, key_columns, tile_rows(rows), columns, head_size, scores, width);
    matrix_product<false>(grad_output, value_size, 1, value_columns, tile_rows(rows), columns, value_size, products,
                          width);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i, at = (b * args.query_heads + h) * args.queries + n;
      const float lse = static_cast<const float*>(grads.logsumexp)[at], row_delta = delta[at];
      const int64_t count = lse == -kInfinity ? 0 : (args.is_causal ? smaller(keys, n + 1) : keys);
      float* s = scores + i * width;
      float* da = products + i * width;
      if (gaussian) {
        for (int64_t j = 0; j < count; ++j) s[j] += bias[j];
      }
      if (dropout.active()) {
        for (int64_t j = 0; j < count; ++j) da[j] *= static_cast<float>(dropout.factor(b, h, n, j));
      }
      const Vec shift = broadcast(lse), d = broadcast(row_delta);
      for (int64_t j = 0; j < count; j += kLanes) {
        store(s + j, mul(exp(sub(load(s + j), shift)), sub(load(da + j), d)));
      }
      if (grad_weights.rows != nullptr) {
        float* target = grad_weights.row(n);
        for (int64_t j = 0; j < count; ++j) target[j] += s[j];
      }
      if (const float* weights = weights_of(args, b, h, n); weights != nullptr) {
        for (int64_t j = 0; j < count; ++j) s[j] = weights[j] <= 0 ? 0.0f : s[j] * weights[j];
      }
      for (int64_t j = count; j < columns; ++j) s[j] = 0.0f;
    }
    if (grads.grad_query.data == nullptr) continue;
    for (int64_t i = rows; i < tile_rows(rows); ++i) std::memset(scores + i * width, 0, columns * sizeof(float));
    matrix_product<false>(scores, width, 1, columns_of(key), tile_rows(rows), head_size, seen, sums, head_size);
    for (int64_t i = 0; i < rows; ++i) {
      repair(scores + i * width, seen, key, head_size, sums + i * head_size);
      store_row(sums + i * head_size, args.dtype, args.head_size, static_cast<float>(args.scale),
                row_address(grads.grad_query, args.dtype, b, h, first + i));
    }
  }
}

/// Backward for keys [begin, end) of one key head: dK and dV, summed over the query heads that read it.
void backward_columns(const PriorArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t key_head,
                      int64_t begin, int64_t end) {
  const int64_t heads = shared_heads(args), keys = keys_of(args, b), queries = args.queries;
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size);
  const int64_t width = tile_columns(queries), block_rows = tile_rows(smaller(kBlockRows, end - begin));
  const float scale = static_cast<float>(args.scale);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{static_cast<char*>(
      thread_scratch(3 * carved(block_rows * head_size) + 3 * carved(block_rows * value_size) +
                     3 * carved(block_rows * width) + carved(queries * head_size) + carved(head_size * width) +
                     carved(queries * value_size) + carved(value_size * width) + carved((end - begin) * head_size) +
                     carved((end - begin) * value_size) + carved(end - begin)))};
  float* key = scratch.floats(block_rows * head_size);
  float* value = scratch.floats(block_rows * value_size);
  float* attention = scratch.floats(block_rows * width);
  float* products = scratch.floats(block_rows * width);
  float* weights = scratch.floats(block_rows * width);
  float* key_sums = scratch.floats(block_rows * head_size);
  float* value_sums = scratch.floats(block_rows * value_size);
  float* query_scratch = scratch.floats(queries * head_size);
  float* query_columns_scratch = scratch.floats(head_size * width);
  float* output_scratch = scratch.floats(queries * value_size);
  float* output_columns_scratch = scratch.floats(value_size * width);
  float* grad_key = scratch.floats((end - begin) * head_size);  // sums over the query heads
  float* grad_value = scratch.floats((end - begin) * value_size);
  float* score_sums = scratch.floats(end - begin);
  std::memset(grad_key, 0, (end - begin) * head_size * sizeof(float));
  std::memset(grad_value, 0, (end - begin) * value_size * sizeof(float));
  std::memset(score_sums, 0, (end - begin) * sizeof(float));

  for (int64_t h = key_head * heads; h < (key_head + 1) * heads; ++h) {
    const Panel query = make_panel(args.query, args.dtype, b, h, queries, args.head_size, query_scratch);
    const Columns query_columns = transpose(query, queries, head_size, query_columns_scratch);
    const Panel output = make_panel(grads.grad_output, args.dtype, b, h, queries, args.value_size, output_scratch);
    const Columns output_columns = transpose(output, queries, value_size, output_columns_scratch);
    const int64_t at = (b * args.query_heads + h) * queries;
    const float* lse = static_cast<const float*>(grads.logsumexp) + at;
    const float* row_delta = delta + at;
    for (int64_t first = begin; first < smaller(end, keys); first += kBlockRows) {
      const int64_t rows = smaller(kBlockRows, smaller(end, keys) - first);
      // Causally hidden queries are left out, in whole panels.
      const int64_t start = args.is_causal ? smaller(first, queries) / kTileWidth * kTileWidth : 0;
      const int64_t columns = padded(queries) - start;
      const auto from_start = [&](const Columns& x) {
        return Columns{x.data + start / kTileWidth * x.panel_stride, x.row_stride, x.panel_stride};
      };
      load_block<false>(args.key, args.dtype, b, key_head, first, rows, args.head_size, scale, key);
      load_block<false>(args.value, args.dtype, b, key_head, first, rows, args.value_size, 1.0f, value);
      matrix_product<false>(key, head_size, 1, from_start(query_columns), tile_rows(rows), columns, head_size,
                            attention + start, width);
      matrix_product<false>(value, value_size, 1, from_start(output_columns), tile_rows(rows), columns, value_size,
                            products + start, width);
      if (args.prior != nullptr) {
        for (int64_t n = start; n < queries; ++n) {
          const float* row = weights_of(args, b, h, n) + first;
          for (int64_t i = 0; i < rows; ++i) weights[i * width + n] = row[i];
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t j = first + i, hidden = args.is_causal ? smaller(j, queries) : 0;
        float* a = attention + i * width;
        float* ds = products + i * width;
        const float* w = weights + i * width;
        const float bias =
            gaussian && scale != 0 ? -0.5f / scale * dot(key + i * head_size, key + i * head_size, head_size) : 0.0f;
        // Whole vectors may reach into hidden queries, whose exponential may overflow; they are cleared after it.
        for (int64_t n = start; n < queries; ++n) a[n] += bias - lse[n];
        for (int64_t n = hidden / kLanes * kLanes; n < queries; n += kLanes) store(a + n, exp(load(a + n)));
        float sum = 0;
        for (int64_t n = hidden; n < queries; ++n) {
          const bool outside = lse[n] == -kInfinity || (args.prior != nullptr && w[n] <= 0);
          a[n] = outside ? 0.0f : (args.prior != nullptr ? a[n] * w[n] : a[n]);
        }
        if (dropout.active()) {
          for (int64_t n = hidden; n < queries; ++n) {
            const auto kept = static_cast<float>(dropout.factor(b, h, n, j));
            ds[n] = a[n] == 0.0f ? 0.0f : a[n] * (kept * ds[n] - row_delta[n]);
            a[n] *= kept;
          }
        } else {
          for (int64_t n = hidden; n < queries; ++n) ds[n] = a[n] == 0.0f ? 0.0f : a[n] * (ds[n] - row_delta[n]);
        }
        for (int64_t n = hidden; n < queries; ++n) sum += ds[n];
        score_sums[j - begin] += sum;
        std::memset(a + start, 0, (hidden - start) * sizeof(float));
        std::memset(ds + start, 0, (hidden - start) * sizeof(float));
      }
      for (int64_t i = rows; i < tile_rows(rows); ++i) {
        std::memset(attention + i * width + start, 0, (queries - start) * sizeof(float));
        std::memset(products + i * width + start, 0, (queries - start) * sizeof(float));
      }
      const Panel seen_output{output.row(start), output.stride}, seen_query{query.row(start), query.stride};
      matrix_product<false>(attention + start, width, 1, columns_of(seen_output), tile_rows(rows), value_size,
                            queries - start, value_sums, value_size);
      matrix_product<false>(products + start, width, 1, columns_of(seen_query), tile_rows(rows), head_size,
                            queries - start, key_sums, head_size);
      for (int64_t i = 0; i < rows; ++i) {
        repair(attention + i * width + start, queries - start, seen_output, value_size, value_sums + i * value_size);
        repair(products + i * width + start, queries - start, seen_query, head_size, key_sums + i * head_size);
        float* to_key = grad_key + (first - begin + i) * head_size;
        float* to_value = grad_value + (first - begin + i) * value_size;
        for (int64_t d = 0; d < head_size; ++d) to_key[d] += key_sums[i * head_size + d];
        for (int64_t d = 0; d < value_size; ++d) to_value[d] += value_sums[i * value_size + d];
      }
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    float* sum = grad_key + (j - begin) * head_size;
    if (grads.grad_key.data != nullptr) {
      if (gaussian && score_sums[j - begin] != 0.0f) {  // d s_ij / d k_j = scale (q_i - k_j)
        load_row(row_address(args.key, args.dtype, b, key_head, j), args.dtype, args.head_size, 1.0f, key);
        for (int64_t d = 0; d < head_size; ++d) sum[d] -= score_sums[j - begin] * key[d];
      }
      store_row(sum, args.dtype, args.head_size, scale, row_address(grads.grad_key, args.dtype, b, key_head, j));
    }
    if (grads.grad_value.data != nullptr) {
      store_row(grad_value + (j - begin) * value_size, args.dtype, args.value_size, 1.0f,
                row_address(grads.grad_value, args.dtype, b, key_head, j));
    }
  }
}

/// part(head, begin, end) for runs of whole blocks of rows [begin, end) of each of `heads` heads.
template <class Part>
FIAK_INLINE void parallel_blocks(const Parallel& parallel, int64_t heads, int64_t rows, Part&& part) {
  const int64_t each = blocks(rows);
  parallel_range(parallel, heads * each, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t head = begin / each, stop = smaller(end, (head + 1) * each);
      part(head, (begin - head * each) * kBlockRows, smaller(rows, (stop - head * each) * kBlockRows));
      begin = stop;
    }
  });
}

}  // namespace

void prior_forward(const PriorArgs& args, const ForwardResult& result, const Parallel& parallel) {
  // The batch runs inside the heads, so that a head's weights stay in the cache.
  parallel_blocks(parallel, args.query_heads * args.batch, args.queries, [&](int64_t i, int64_t begin, int64_t end) {
    const int64_t h = i / args.batch, b = i % args.batch;
#if defined(FIAK_ISA_AVX512_BF16)
    if (args.dtype == DType::kBFloat16) return forward_rows<true>(args, result, b, h, begin, end);
#endif
    forward_rows<false>(args, result, b, h, begin, end);
  });
}

void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const SharedScratch delta_memory(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(delta_memory.data());
  compute_delta(args, grads, parallel, delta);

  const int64_t weight_heads = args.prior_heads, heads_per_weight = args.query_heads / larger(1, weight_heads);
  const int64_t groups = args.prior_groups, row_blocks = blocks(args.queries);
  auto* grad_weight = static_cast<float*>(grads.grad_weight);
  if (grad_weight == nullptr && grads.grad_query.data != nullptr) {
    parallel_blocks(parallel, args.batch * args.query_heads, args.queries, [&](int64_t i, int64_t begin, int64_t end) {
      backward_rows(args, grads, delta, i / args.query_heads, i % args.query_heads, begin, end, {nullptr, 0, 1});
    });
  } else if (grad_weight != nullptr) {
    // The batch runs inside, so that a thread alone adds to a weight's gradient.
    const bool shared_rows = args.prior_rows != args.queries;
    const SharedScratch partial_memory(shared_rows ? groups * weight_heads * row_blocks * args.keys * sizeof(float)
                                                   : 0);
    float* sums = shared_rows ? static_cast<float*>(partial_memory.data()) : grad_weight;
    const int64_t sums_per_head = shared_rows ? row_blocks : args.queries;
    std::memset(sums, 0, groups * weight_heads * sums_per_head * args.keys * sizeof(float));
    parallel_blocks(parallel, groups * weight_heads, args.queries, [&](int64_t i, int64_t begin, int64_t end) {
      const int64_t group = i / weight_heads, weight_head = i % weight_heads;
      const WeightRows rows{sums + i * sums_per_head * args.keys, args.keys, shared_rows ? kBlockRows : 1};
      for (int64_t h = weight_head * heads_per_weight; h < (weight_head + 1) * heads_per_weight; ++h) {
        for (int64_t b = group; b < args.batch; b += groups) {
          backward_rows(args, grads, delta, b, h, begin, end, rows);
        }
      }
    });
    if (shared_rows) {
      for (int64_t i = 0; i < groups * weight_heads; ++i) {
        float* target = grad_weight + i * args.keys;
        std::memset(target, 0, args.keys * sizeof(float));
        for (int64_t block = 0; block < row_blocks; ++block) {
          const float* from = sums + (i * row_blocks + block) * args.keys;
          for (int64_t j = 0; j < args.keys; ++j) target[j] += from[j];
        }
      }
    }
  }

  if (grads.grad_key.data != nullptr || grads.grad_value.data != nullptr) {
    parallel_blocks(parallel, args.batch * args.key_heads, args.keys, [&](int64_t i, int64_t begin, int64_t end) {
      backward_columns(args, grads, delta, i / args.key_heads, i % args.key_heads, begin, end);
    });
  }
}

}  // namespace fiak::cpu::FIAK_ISA
