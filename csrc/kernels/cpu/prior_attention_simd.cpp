// prior_attention, vectorised: dense attention (dense_rows.h) with weights.
//
// Backward: S = scale Q K^T again, dA = dO V^T, dw = exp(S - lse) (dA - delta), dS = w dw, dQ = dS K, dK = dS^T Q, dV =
// P^T dO, with powers of two for exp. bfloat16 runs on pairs where the instruction set has them: P and dS are rounded
// to bfloat16, sums are float32.
#include "kernels/cpu/decode.h"
#include "kernels/cpu/dense_rows.h"
#include "kernels/cpu/tables.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

const float* weights_of(const PriorArgs& args, int64_t b, int64_t h, int64_t n) {
  if (args.prior == nullptr) return nullptr;
  return static_cast<const float*>(args.prior) + b % args.prior_groups * args.prior_group_stride +
         h * args.prior_head_stride + n * args.prior_row_stride;
}

/// What the queries of a head attend to (dense_forward).
class PriorHead {
 public:
  static constexpr bool kMasked = false;
  PriorHead(const PriorArgs& args, int64_t b, int64_t h) : args_(args), b_(b), h_(h), keys_(keys_of(args, b)) {}
  __attribute__((always_inline)) int64_t end(int64_t n) const {
    return args_.is_causal ? smaller(keys_, n + 1) : keys_;
  }
  template <class Call>
  __attribute__((always_inline)) auto with(int64_t n, int64_t j, Call&& call) const {
    const float* weights = weights_of(args_, b_, h_, n);
    return weights == nullptr ? call(AllKeys{}) : call(WeightedKeys{weights + j});
  }
  __attribute__((always_inline)) int64_t spans(int64_t, int64_t, int64_t from, int64_t keys, int64_t,
                                               KeySpan* spans) const {
    spans[0] = {from, keys, 0};
    return 1;
  }
  __attribute__((always_inline)) void fetch(int64_t n, int64_t j, int64_t keys) const {
    if (args_.prior == nullptr || n + kRowsAhead >= args_.queries) return;
    prefetch_row(reinterpret_cast<const char*>(weights_of(args_, b_, h_, n + kRowsAhead) + j), keys * 4);
  }
  __attribute__((always_inline)) int64_t row(int64_t n) const { return n; }

 private:
  const PriorArgs& args_;
  int64_t b_, h_, keys_;
};

// Backward runs in waves. A wave is a range of queries, a range of keys and a few heads and batch elements. First its
// rows are computed: P and dS of the wave, dQ and the weights' gradient; then its columns, dK and dV, from the P and dS
// that are still in the cache. Every sum is a chain of multiply-adds onto memory in ascending order of what it runs
// over (dQ: keys; dK and dV: query heads, then queries; weights: batch elements), so how waves are cut changes no bit,
// and they are cut by the number of threads. Where key heads divide evenly among the threads, each runs its own alone.

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

/// A row's scores, which log2(e) has multiplied, become its attention, and its dA become dS, for keys [0, count); 0 up
/// to `columns`. `kept` are dropout's factors and `grad_weights` is what dw is added to, or null.
template <class Support>
void grad_row(float* scores, float* products, const Support& support, int64_t count, int64_t columns, float logsumexp,
              float delta, const float* bias, const float* kept, float* grad_weights) {
  const Vec shift = broadcast(logsumexp * kLog2E), d = broadcast(delta);
  for_vectors(
      count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        Vec s = load(scores + j), grad = load(products + j);
        if (bias != nullptr) s = add(s, load(bias + j));
        if (kept != nullptr) grad = mul(grad, load(kept + j));
        const Vec e = exp2(sub(s, shift)), dw = mul(e, sub(grad, d));
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

  /// Key heads [first, last).
  void run(int64_t first_head, int64_t last_head) {
    const int64_t slots = batch_ * heads_;
    const SharedScratch memory(64 + bytes_of(slots));
    Carver carver{static_cast<char*>(memory.data())};
    carver.next += -reinterpret_cast<uintptr_t>(carver.next) & 63;
    slots_ = carver.next;
    for (int64_t head = first_head; head < last_head; head += heads_) {
      for (int64_t b = 0; b < args_.batch; b += batch_) {
        Wave wave{b, smaller(batch_, args_.batch - b), head, smaller(heads_, last_head - head), 0, 0, 0, 0, 0};
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
    matrix_product<false, kPairs>(StridedRows{query, padded(depth_), 1}, block(x.key_columns), tile_rows(count),
                                  padded(seen), depth_, scores, keys_, diagonal,
                                  static_cast<float>(args_.scale * kLog2E));
    matrix_product<false, kPairs>(StridedRows{grad_output, padded(value_depth_), 1}, block(x.value_columns),
                                  tile_rows(count), padded(seen), value_depth_, products, keys_, diagonal);
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
  const int64_t threads = larger(1, parallel.threads);
  const bool shared_weights = sums != nullptr && args.prior_heads < args.query_heads;
  if (!shared_weights && args.key_heads % threads == 0) {  // each thread has heads of its own, without barriers
    const int64_t each = args.key_heads / threads;
    const Parallel alone{};
    parallel_range(parallel, threads, [&](int64_t first, int64_t last) {
      Backward<kPairs>(args, grads, delta, weight_rows, alone).run(first * each, last * each);
    });
  } else {
    Backward<kPairs>(args, grads, delta, weight_rows, parallel).run(0, args.key_heads);
  }
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
                    const PriorHead head(args, b, h);
                    const HeadPlace next{(b + 1) % args.batch, h + (b + 1) / args.batch};
                    dense_forward_rows(args, result, head, {b, h}, begin, end, next);
                  });
}

void prior_backward(const PriorArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
#if defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) return backward<true>(args, grads, parallel);
#endif
  backward<false>(args, grads, parallel);
}

}  // namespace fiak::cpu::FIAK_ISA
