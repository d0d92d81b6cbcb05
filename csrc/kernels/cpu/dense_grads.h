// Dense attention, backward: blocks of queries against all keys, as matrix products; which pairs count, and by what
// weight, is the caller's business.
//
// S = scale Q K^T again, dA = dO V^T, dw = exp(S - lse) (dA - delta), dS = w dw, dQ = dS K, dK = dS^T Q, dV = P^T dO,
// with powers of two for exp. bfloat16 runs on pairs where the instruction set has them: P and dS are rounded to
// bfloat16, sums are float32.
//
// It runs in waves. A wave is a range of queries, a range of keys and a few heads and batch elements. First its rows
// are computed: P and dS of the wave, dQ and the weights' gradient; then its columns, dK and dV, from the P and dS that
// are still in the cache. Tiles of a wave without a pair that counts are skipped. Every sum is a chain of multiply-adds
// onto memory in ascending order of what it runs over (dQ: keys; dK and dV: query heads, then queries; weights: batch
// elements), so how waves are cut changes no bit, and they are cut by the number of threads. Where key heads, or
// batch elements, divide evenly among the threads, each runs its own alone.
#pragma once

#include "kernels/cpu/dense_rows.h"

namespace fiak::cpu::FIAK_ISA {

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
FIAK_INLINE Input from_row(const Input& x, DType dtype, int64_t begin) {
  return {static_cast<const char*>(x.data) + begin * x.row_stride * element_size(dtype), x.batch_stride, x.head_stride,
          x.row_stride};
}

/// A row's scores, which log2(e) has multiplied, become its attention, and its dA become dS, for keys [0, count); 0 up
/// to `columns`. `kept` are dropout's factors and `grad_weights` is what dw is added to, or null.
template <class Support>
static void grad_row(float* scores, float* products, const Support& support, int64_t count, int64_t columns,
                     float logsumexp, float delta, const float* bias, const float* kept, float* grad_weights) {
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

/// Batch elements [b, b + batch) and key heads [head, head + heads), each pair of them a slot, for one query head of
/// each key head; queries [query, query + queries) and keys [key, key + keys).
struct Wave {
  int64_t b, batch, head, heads, query_head, query, queries, key, keys;
};

/// Some key heads, ascending; `heads` is null where these are all.
struct KeyHeads {
  const int64_t* heads;
  int64_t count;
  __attribute__((always_inline)) int64_t at(int64_t i) const { return heads != nullptr ? heads[i] : i; }
};

/// What a query head attends to is `head_at(b, h)`'s; beside what dense_forward asks of it:
///
///   needs(first, rows, j, keys)  whether any of these queries may need any of these keys, of which there are at most
///                                kGradKeys and j is a multiple of it; of the others no number counts
///   grad_weights(n)              where to add the gradient of query n's weights, or null
///   fetch_grads(n, j, keys)      prefetches the support of query n, and where its gradient goes, if slow to come
template <bool kPairs, class HeadAt>
class DenseBackward {
 public:
  /// Where `by_head`, the heads add to the gradient of the same weights, and take turns.
  DenseBackward(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads, const float* delta,
                const HeadAt& head_at, bool by_head, const Parallel& parallel)
      : args_(args),
        grads_(grads),
        key_heads_(key_heads),
        delta_(delta),
        head_at_(head_at),
        parallel_(parallel),
        row_size_(padded(args.head_size)),
        value_size_(padded(args.value_size)),
        depth_(units<kPairs>(args.head_size)),
        value_depth_(units<kPairs>(args.value_size)),
        all_keys_(rounded_up(args.keys, kGradKeys)),
        gaussian_(args.score == Score::kGaussian),
        dropout_(make_dropout(args.dropout_p, args.seed)) {
    const bool alone = parallel.threads == 1;
    heads_ = alone || by_head ? 1 : key_heads.count;
    const int64_t tasks = alone ? 4 : 4 * parallel.threads;
    queries_ = smaller(rounded_up(args.queries, kGradRows), (tasks + heads_ - 1) / heads_ * kGradRows);
    const int64_t room = alone ? kAloneUnits : smaller(kMostUnits, parallel.threads * kThreadUnits);
    keys_ = larger(kGradKeys, smaller(all_keys_, room / larger(1, heads_ * queries_) / kGradKeys * kGradKeys));
    batch_ = 1;
    if (!alone && !by_head && queries_ >= args.queries && keys_ >= args.keys) {
      batch_ = larger(1, smaller(args.batch, room / larger(1, heads_ * queries_ * keys_)));
    }
  }

  /// Batch elements and key heads [first, last), head by head; all of them where several threads share each.
  void run(int64_t first, int64_t last) {
    const SharedScratch memory(64 + bytes_of(batch_ * heads_));
    Carver carver{static_cast<char*>(memory.data())};
    carver.next += -reinterpret_cast<uintptr_t>(carver.next) & 63;
    slots_ = carver.next;
    for (int64_t head = first / args_.batch; head * args_.batch < last; head += heads_) {
      const int64_t begin = larger(0, first - head * args_.batch),
                    end = smaller(args_.batch, last - head * args_.batch);
      for (int64_t b = begin; b < end; b += batch_) {
        run_slots({b, smaller(batch_, end - b), head, smaller(heads_, key_heads_.count - head), 0, 0, 0, 0, 0});
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
    bool* needed;  // of the wave's tiles of kGradRows queries and kGradKeys keys
  };

  static constexpr int64_t kSlotBytes = 192;
  static_assert(sizeof(Slot) <= kSlotBytes);

  /// A slot, and behind it what its pointers point to.
  int64_t bytes_of(int64_t slots) const {
    return slots *
           (kSlotBytes + carved(depth_ * tile_columns(all_keys_)) + carved(value_depth_ * tile_columns(all_keys_)) +
            carved(all_keys_ * row_size_) + 2 * carved(all_keys_) + carved(all_keys_ * row_size_) +
            carved(all_keys_ * value_size_) + carved(queries_ * row_size_) + 2 * carved(wave_units()) +
            carved((queries_ / kGradRows * key_blocks() + 3) / 4));
  }
  int64_t key_blocks() const { return keys_ / kGradKeys; }
  int64_t wave_units() const { return units<kPairs>(queries_) * keys_; }
  Slot& slot(int64_t i) const { return *reinterpret_cast<Slot*>(slots_ + bytes_of(1) * i); }

  int64_t batch_of(const Wave& wave, int64_t i) const { return wave.b + i / wave.heads; }
  int64_t key_head_of(const Wave& wave, int64_t i) const { return key_heads_.at(wave.head + i % wave.heads); }

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
    x.needed = reinterpret_cast<bool*>(carver.floats(0));
    std::memset(x.score_sums, 0, all_keys_ * sizeof(float));
    std::memset(x.grad_key, 0, all_keys_ * row_size_ * sizeof(float));
    std::memset(x.grad_value, 0, all_keys_ * value_size_ * sizeof(float));
  }

  /// All queries and keys of a wave's slots.
  void run_slots(Wave wave) {
    const int64_t slots = wave.batch * wave.heads;
    parallel_range(parallel_, slots, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) start(wave, i);
    });
    for (wave.query_head = 0; wave.query_head < shared_heads(args_); ++wave.query_head) {
      for (wave.query = 0; wave.query < args_.queries; wave.query += queries_) {
        wave.queries = smaller(queries_, args_.queries - wave.query);
        for (wave.key = 0; wave.key == 0 || wave.key < args_.keys; wave.key += keys_) {
          wave.keys = smaller(keys_, args_.keys - wave.key);
          run_wave(wave);
        }
      }
    }
    parallel_blocks(parallel_, slots, args_.keys, kGradKeys,
                    [&](int64_t i, int64_t begin, int64_t end) { finish(wave, i, begin, end); });
  }

  void run_wave(const Wave& wave) {
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
                    [&](int64_t i, int64_t begin, int64_t end) { columns(wave, i, begin, end); });
  }

  /// use(begin, end) for runs of needed ones of `count` tiles, which are `step` apart and `size` long.
  template <class Use>
  static void for_needed(const bool* needed, int64_t count, int64_t step, int64_t size, Use&& use) {
    for (int64_t k = 0; k < count;) {
      int64_t end = k;
      while (end < count && needed[end * step]) ++end;
      if (k < end) use(k * size, end * size);
      k = end + 1;
    }
  }

  /// Queries [first, first + count) of slot i against the wave's keys.
  void rows(const Wave& wave, int64_t i, int64_t first, int64_t count) {
    const Slot& x = slot(i);
    const int64_t b = batch_of(wave, i), h = key_head_of(wave, i) * shared_heads(args_) + wave.query_head;
    const int64_t keys = smaller(wave.keys, keys_of(args_, b) - wave.key), row = first - wave.query;
    const auto head = head_at_(b, h);
    bool* needed = x.needed + row / kGradRows * key_blocks();
    bool any = false;
    for (int64_t k = 0; k < key_blocks(); ++k) {
      const int64_t j = k * kGradKeys;
      needed[k] = j < keys && head.needs(first, count, wave.key + j, smaller(kGradKeys, keys - j));
      any |= needed[k];
    }
    float* sums = x.grad_query + row * row_size_;
    const bool query_wanted = grads_.grad_query.data != nullptr;
    if (wave.key == 0 && query_wanted) std::memset(sums, 0, tile_rows(count) * row_size_ * sizeof(float));
    if (any) add_rows(wave, x, b, h, head, first, count, keys, needed);
    if (!query_wanted || wave.key + wave.keys < args_.keys) return;
    for (int64_t r = 0; r < count; ++r) {
      store_row(sums + r * row_size_, args_.dtype, args_.head_size, static_cast<float>(args_.scale),
                row_address(grads_.grad_query, args_.dtype, b, h, first + r));
    }
  }

  template <class Head>
  void add_rows(const Wave& wave, const Slot& x, int64_t b, int64_t h, const Head& head, int64_t first, int64_t count,
                int64_t keys, const bool* needed) {
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
    load_block<kPairs>(args_.query, args_.dtype, b, h, first, count, args_.head_size, 1.0f, query);
    load_block<kPairs>(grads_.grad_output, args_.dtype, b, h, first, count, args_.value_size, 1.0f, grad_output);
    int64_t ends[kGradRows], diagonal = -kGradRows;
    for (int64_t r = 0; r < count; ++r) {
      ends[r] = head.end(first + r);
      diagonal = larger(diagonal, ends[r] - 1 - r);
    }
    for_needed(needed, key_blocks(), 1, kGradKeys, [&](int64_t begin, int64_t end) {
      const int64_t key = wave.key + begin, seen = smaller(end, keys) - begin;
      const auto span = [&](const Columns& all) {
        return Columns{all.data + key / kTileWidth * all.panel_stride, all.row_stride, all.panel_stride};
      };
      matrix_product<false, kPairs>(StridedRows{query, padded(depth_), 1}, span(x.key_columns), tile_rows(count),
                                    padded(seen), depth_, scores + begin, keys_, diagonal - key,
                                    static_cast<float>(args_.scale * kLog2E));
      matrix_product<false, kPairs>(StridedRows{grad_output, padded(value_depth_), 1}, span(x.value_columns),
                                    tile_rows(count), padded(seen), value_depth_, products + begin, keys_,
                                    diagonal - key);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t n = first + r, at = (b * args_.query_heads + h) * args_.queries + n;
        const float lse = static_cast<const float*>(grads_.logsumexp)[at];
        const int64_t columns = lse == -kInfinity ? 0 : larger(0, smaller(seen, ends[r] - key));
        float* grad_weights = head.grad_weights(n);
        if (dropout_.active()) {
          for (int64_t j = 0; j < columns; ++j) {
            kept[j] = static_cast<float>(dropout_.factor(b, h, head.row(n), key + j));
          }
          for (int64_t j = columns; j < padded(columns); ++j) kept[j] = 0.0f;
        }
        head.fetch_grads(n, key, columns);
        head.with(n, key, [&](const auto& support) {
          grad_row(scores + r * keys_ + begin, products + r * keys_ + begin, support, columns, end - begin, lse,
                   delta_[at], gaussian_ ? x.bias + key : nullptr, dropout_.active() ? kept : nullptr,
                   grad_weights != nullptr ? grad_weights + key : nullptr);
        });
      }
      if constexpr (kPairs) keep_pairs(x, row, count, begin, end, scores, products);
      if (grads_.grad_query.data == nullptr) return;
      const Panel rows{x.key.row(units<kPairs>(key)), x.key.stride};
      guarded_product<true, kPairs>(x.key_finite, products + begin, keys_, 1, rows, tile_rows(count), row_size_,
                                    units<kPairs>(seen), x.grad_query + row * row_size_, row_size_);
    });
  }

  /// Keeps P and dS of the wave's keys [begin, end) for the columns as pairs of queries, and leaves dS as pairs of keys
  /// in `products`.
  void keep_pairs(const Slot& x, int64_t row, int64_t count, int64_t begin, int64_t end, float* scores,
                  float* products) const {
#if defined(FIAK_ISA_AVX512_BF16)
    if (count % 2 != 0) {
      std::memset(scores + count * keys_ + begin, 0, (end - begin) * sizeof(float));
      std::memset(products + count * keys_ + begin, 0, (end - begin) * sizeof(float));
    }
    for (int64_t r = 0; r < count; r += 2) {
      float *attention = x.attention + (row + r) / 2 * keys_, *grad = x.grad_scores + (row + r) / 2 * keys_;
      float *p = scores + r * keys_, *ds = products + r * keys_;
      for (int64_t j = begin; j < end; j += kLanes) {
        store(attention + j, pairs_of(load(p + j), load(p + keys_ + j)));
        store(grad + j, pairs_of(load(ds + j), load(ds + keys_ + j)));
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      float* ds = products + r * keys_ + begin;
      for (int64_t j = 0; j < end - begin; j += 2 * kLanes) {
        const Vec high = j + kLanes < end - begin ? load(ds + j + kLanes) : zero();
        store(ds + j / 2, pairs_in_order(load(ds + j), high));
      }
    }
#else
    (void)x, (void)row, (void)count, (void)begin, (void)end, (void)scores, (void)products;
#endif
  }

  /// Adds the wave's queries to dK and dV of its keys [begin, end) of slot i.
  void columns(const Wave& wave, int64_t i, int64_t begin, int64_t end) {
    const Slot& x = slot(i);
    const int64_t b = batch_of(wave, i), h = key_head_of(wave, i) * shared_heads(args_) + wave.query_head;
    const int64_t row_blocks = (wave.queries + kGradRows - 1) / kGradRows;
    end = smaller(end, keys_of(args_, b) - wave.key);
    bool any = false;
    for (int64_t key = begin; key < end; key += kGradKeys) {
      for (int64_t k = 0; k < row_blocks; ++k) any |= x.needed[k * key_blocks() + key / kGradKeys];
    }
    if (!any) return;
    Carver carver{static_cast<char*>(thread_scratch(carved(queries_ * row_size_) + carved(queries_ * value_size_)))};
    const int64_t count = units<kPairs>(wave.queries);
    const Panel query = load_depth<kPairs>(from_row(args_.query, args_.dtype, wave.query), args_.dtype, b, h,
                                           wave.queries, args_.head_size, carver.floats(queries_ * row_size_));
    const Panel grad_output =
        load_depth<kPairs>(from_row(grads_.grad_output, args_.dtype, wave.query), args_.dtype, b, h, wave.queries,
                           args_.value_size, carver.floats(queries_ * value_size_));
    const bool query_finite = all_finite<kPairs>(query, count, row_size_);
    const bool output_finite = all_finite<kPairs>(grad_output, count, value_size_);
    for (int64_t first = begin, next; first < end; first = next) {
      // Tiles that the same queries need go at once.
      const bool* needed = x.needed + first / kGradKeys;
      next = first + kGradKeys;
      while (next < end && same_column(needed, x.needed + next / kGradKeys, row_blocks)) next += kGradKeys;
      const int64_t keys = smaller(next, end) - first;
      for_needed(needed, row_blocks, key_blocks(), kGradRows, [&](int64_t from, int64_t to) {
        const int64_t n = units<kPairs>(from), depth = units<kPairs>(smaller(to, wave.queries)) - n;
        const float *attention = x.attention + n * keys_ + first, *grad_scores = x.grad_scores + n * keys_ + first;
        if (grads_.grad_value.data != nullptr) {
          guarded_product<true, kPairs>(output_finite, attention, 1, keys_, {grad_output.row(n), grad_output.stride},
                                        tile_rows(keys), value_size_, depth,
                                        x.grad_value + (wave.key + first) * value_size_, value_size_);
        }
        if (grads_.grad_key.data == nullptr) return;
        guarded_product<true, kPairs>(query_finite, grad_scores, 1, keys_, {query.row(n), query.stride},
                                      tile_rows(keys), row_size_, depth, x.grad_key + (wave.key + first) * row_size_,
                                      row_size_);
        for (int64_t k = 0; gaussian_ && k < depth; ++k) {
          add_scores(grad_scores + k * keys_, keys, x.score_sums + wave.key + first);
        }
      });
    }
  }

  bool same_column(const bool* a, const bool* b, int64_t row_blocks) const {
    for (int64_t k = 0; k < row_blocks; ++k) {
      if (a[k * key_blocks()] != b[k * key_blocks()]) return false;
    }
    return true;
  }

  /// sums[0, keys) += a row of dS, or both of a row of pairs.
  static void add_scores(const float* grad_scores, int64_t keys, float* sums) {
    for (int64_t j = 0; j < padded(keys); j += kLanes) {
      Vec sum = load(sums + j);
      const Vec x = load(grad_scores + j);
#if defined(FIAK_ISA_AVX512_BF16)
      if constexpr (kPairs) sum = add(add(sum, first_of_pairs(x)), second_of_pairs(x));
#endif
      if constexpr (!kPairs) sum = add(sum, x);
      store(sums + j, sum);
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

  const AttentionArgs& args_;
  const BackwardArgs& grads_;
  const KeyHeads key_heads_;
  const float* delta_;
  const HeadAt& head_at_;
  const Parallel& parallel_;
  const int64_t row_size_, value_size_, depth_, value_depth_, all_keys_;
  const bool gaussian_;
  const Dropout dropout_;
  int64_t batch_, heads_, queries_, keys_;  // the most of a wave
  char* slots_ = nullptr;
};

/// delta_i = sum_j a_ij dA_ij = dO_i . O_i for every query of some key heads, in [batch, query_heads, queries].
static void compute_delta(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                          const Parallel& parallel, float* delta) {
  const int64_t shared = shared_heads(args), heads = key_heads.count * shared;
  parallel_range(parallel, args.batch * heads, [&](int64_t begin, int64_t end) {
    const int64_t size = padded(args.value_size);
    Carver scratch{static_cast<char*>(thread_scratch(2 * carved(size)))};
    float* grad_output = scratch.floats(size);
    float* output = scratch.floats(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = key_heads.at(i % heads / shared) * shared + i % shared;
      for (int64_t n = 0; n < args.queries; ++n) {
        load_row(row_address(grads.grad_output, args.dtype, b, h, n), args.dtype, args.value_size, 1.0f, grad_output);
        load_row(row_address(grads.output, args.dtype, b, h, n), args.dtype, args.value_size, 1.0f, output);
        delta[(b * args.query_heads + h) * args.queries + n] = dot(grad_output, output, size);
      }
    }
  });
}

/// The backward pass of some key heads. See DenseBackward.
template <class HeadAt>
static void dense_backward(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                           const HeadAt& head_at, bool weights_wanted, bool by_head, const Parallel& parallel) {
  if (key_heads.count == 0 || args.batch == 0) return;
  const SharedScratch delta_memory(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(delta_memory.data());
  compute_delta(args, grads, key_heads, parallel, delta);
  const auto run = [&](auto pairs) {
    using Backward = DenseBackward<pairs.value != 0, HeadAt>;
    // What a thread runs alone, without barriers; all batch elements add to the gradient of a head's weights.
    const int64_t unit = weights_wanted ? args.batch : 1, count = key_heads.count * args.batch / unit;
    const int64_t threads = larger(1, parallel.threads);
    if (!by_head && (count + threads - 1) / threads * threads * 10 <= count * 11) {
      const Parallel alone{};
      parallel_range(parallel, count, [&](int64_t first, int64_t last) {
        Backward(args, grads, key_heads, delta, head_at, false, alone).run(first * unit, last * unit);
      });
    } else {
      Backward(args, grads, key_heads, delta, head_at, by_head, parallel).run(0, key_heads.count * args.batch);
    }
  };
#if defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) return run(Constant<1>());
#endif
  run(Constant<0>());
}

}  // namespace fiak::cpu::FIAK_ISA
