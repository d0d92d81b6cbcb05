// Dense attention, backward: blocks of queries against all keys, as matrix products; which pairs count, and by what
// weight, is the caller's business.
//
// S = scale Q K^T again, P = exp(S + ln w - lse), dA = dO V^T, dS = P (dA - delta), dw = exp(S - lse) (dA - delta),
// dQ = dS K, dK = dS^T Q, dV = P^T dO, with powers of two for exp. Where lse is so large that it was rounded by more
// than P may be off, P is exp(S + ln w - max) / sum, with the row's maximum and sum from the same S. bfloat16 runs on
// pairs or tiles (tile_grads.h), where the instruction set has them: P and dS are rounded to bfloat16, sums are
// float32.
//
// It runs in waves. A wave is a range of queries, a range of keys and a few heads and batch elements. First its rows
// are computed: P and dS of the wave, dQ and the weights' gradient; then its columns, dK and dV, from the P and dS that
// are still in the cache. Tiles of a wave without a pair that counts are skipped. Every sum is a chain of multiply-adds
// onto memory in ascending order of what it runs over (dQ: keys; dK and dV: query heads, then queries; weights: batch
// elements), so how waves are cut changes no bit, and they are cut by the number of threads. Where key heads, or
// batch elements, divide evenly among the threads, each runs its own alone.
#pragma once

#include <algorithm>

#include "kernels/cpu/dense/dense_rows.h"

namespace fiak::cpu::FIAK_ISA {

// Queries of a task, and of a partial sum of weights that all queries share.
#if defined(FIAK_ISA_AMX_BF16)
constexpr int64_t kGradRows = 32;
#else
constexpr int64_t kGradRows = 24;
#endif
static_assert(kGradRows % kTileRows == 0);

constexpr int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

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

/// Scores times `factor`, plus `bias` if there is one, as both passes over a row with a large logsumexp must have them,
/// bit for bit: in memory, so that no compiler fuses their last operation with what follows.
template <bool kScale>
__attribute__((noinline)) static void finish_scores(float* scores, int64_t count, float factor, const float* bias) {
  const Vec f = broadcast(factor);
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec s = load(scores + j);
    if constexpr (kScale) s = mul(s, f);
    if (bias != nullptr) s = add(s, load(bias + j));
    store(scores + j, s);
  }
}

/// The largest raised score of a row, and the inverse of the sum of 2^(raised score - maximum); 0: they are not needed.
struct RowSum {
  float maximum, inverse;
};

/// Adds the finished scores of keys [0, count) to a row's maximum and sum so far.
template <class Support>
static void sum_row(const float* scores, const Support& support, int64_t count, RowState& state) {
  const float maximum = row_maximum<false>(scores, support, count, 1.0f);
  if (maximum == -kInfinity) return;
  raise_maximum(maximum, state.maximum == -kInfinity, state, nullptr, 0);
  const Vec shift = broadcast(state.maximum);
  Vec sums = zero();
  for_vectors(
      count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Vec e = exp2(support.grad_raised(j, n, load(scores + j), shift));
        sums = add(sums, support.grad_weighted(j, n, e));
      });
  state.total += reduce_add(sums);
}

/// A row's scores, which log2(e) has multiplied, become its attention, and its dA become dS, for keys [0, count); 0 up
/// to `columns`. Where kScale, scores are still to be multiplied by `factor`; where kSummed, they are finished, and
/// `factor` and `logsumexp` are the row's RowSum. `dropout_factors` may be null; `grad_weights` is what dw is added
/// to, or null.
template <bool kScale, bool kSummed, class Support>
static void grad_row(float* scores, float* products, const Support& support, int64_t count, int64_t columns,
                     float factor, float logsumexp, float delta, const float* bias, const float* dropout_factors,
                     float* grad_weights) {
  const Vec lse = broadcast(logsumexp), shift = broadcast(kSummed ? logsumexp : logsumexp * kLog2E),
            d = broadcast(delta), f = broadcast(factor);
  for_vectors(
      count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        Vec s = load(scores + j), grad = load(products + j), e;
        if (dropout_factors != nullptr) grad = mul(grad, load(dropout_factors + j));
        if constexpr (kSummed) {
          e = mul(exp2(support.grad_raised(j, n, s, shift)), f);
        } else {
          if constexpr (kScale) s = mul(s, f);
          if (bias != nullptr) s = add(s, load(bias + j));
          e = exp2(support.grad_shifted(j, n, s, lse, shift));
        }
        const Vec ds = mul(e, sub(grad, d));
        Vec attention = support.grad_weighted(j, n, e);
        if (dropout_factors != nullptr) attention = mul(attention, load(dropout_factors + j));
        store(scores + j, attention);
        store(products + j, support.grad_weighted(j, n, ds));
        if (grad_weights == nullptr) return;
        const Vec dw = support.weight_gradient(j, n, ds);
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

/// Batch elements [b, b + batch) and key heads [head, head + heads), each pair of them a state, for one query head of
/// each key head; queries [query, query + queries) and keys [key, key + keys).
struct Wave {
  int64_t b, batch, head, heads, query_head, query, queries, key, keys;
};

/// The operands and products of a backward pass, by vectors of multiply-adds.
template <bool kVnni>
class VectorGrads {
 public:
  static constexpr int64_t kKeys = 48;   // what ranges of keys are multiples of
  static constexpr bool kScaled = true;  // scores come times their factor
  struct Multiplier {};                  // what a thread must have while it multiplies
  static_assert(kKeys % kTileWidth == 0 && kKeys % kTileRows == 0);

  /// A wave has at most `queries` queries and `keys` keys, whose P and dS take wave_units() units each.
  VectorGrads(const AttentionArgs& args, const Input& grad_output, int64_t queries, int64_t keys)
      : args_(args),
        grad_output_(grad_output),
        queries_(queries),
        width_(keys),
        depth_(units<kVnni>(args.head_dim)),
        value_depth_(units<kVnni>(args.value_dim)),
        row_size_(padded(args.head_dim)),
        value_dim_(padded(args.value_dim)) {}
  int64_t wave_units() const { return units<kVnni>(queries_) * width_; }

  /// Keys and values of a head.
  struct Keys {
    Columns key_columns, value_columns;
    Panel key;
    bool finite;
    float* memory[3];  // of these
  };
  __attribute__((always_inline)) Keys make_keys(int64_t all_keys, ScratchArena& arena) const {
    Keys x{};
    x.memory[0] = arena.floats(depth_ * tile_columns(all_keys));
    x.memory[1] = arena.floats(value_depth_ * tile_columns(all_keys));
    x.memory[2] = arena.floats(all_keys * row_size_);
    return x;
  }
  __attribute__((always_inline)) void load_keys(int64_t b, int64_t key_head, int64_t keys, int64_t, Keys& x) const {
    ThreadArena scratch;
    float* rows = scratch.floats(tile_rows(keys) * larger(row_size_, value_dim_));
    x.key_columns = load_columns<kVnni>(args_.key, args_.dtype, b, key_head, keys, args_.head_dim, rows, x.memory[0]);
    x.value_columns =
        load_columns<kVnni>(args_.value, args_.dtype, b, key_head, keys, args_.value_dim, rows, x.memory[1]);
    x.key = load_depth<kVnni>(args_.key, args_.dtype, b, key_head, keys, args_.head_dim, x.memory[2]);
    x.finite = all_finite<kVnni>(x.key, units<kVnni>(keys), row_size_);
  }

  /// The queries of a task, and their scores and dA in rows of the wave's keys.
  struct Task {
    float *query, *grad_output, *scores, *products;
    int64_t count;
  };
  /// Queries [first, first + count), which are those from `row` on of the wave that has P and dS.
  __attribute__((always_inline)) Task load_task(int64_t b, int64_t h, int64_t first, int64_t count, int64_t row,
                                                float* attention, float* grad_scores, ScratchArena& arena) const {
    Task x;
    x.count = count;
    x.query = arena.floats(kGradRows * padded(depth_));
    x.grad_output = arena.floats(kGradRows * padded(value_depth_));
    // Numbers are computed where the wave keeps them, pairs on the side.
    x.scores = kVnni ? arena.floats(kGradRows * width_) : attention + row * width_;
    x.products = kVnni ? arena.floats(kGradRows * width_) : grad_scores + row * width_;
    load_block<kVnni>(args_.query, args_.dtype, b, h, first, count, args_.head_dim, 1.0f, x.query);
    load_block<kVnni>(grad_output_, args_.dtype, b, h, first, count, args_.value_dim, 1.0f, x.grad_output);
    return x;
  }
  /// Scores and dA of `seen` keys from `key` on, in columns from `at` on; row r sees none beyond r + `diagonal`.
  __attribute__((always_inline)) void multiply_keys(const Keys& keys, const Task& task, int64_t key, int64_t seen,
                                                    int64_t at, int64_t diagonal, float factor) const {
    const auto span = [&](const Columns& all) {
      return Columns{all.data + key / kTileWidth * all.strip_stride, all.row_stride, all.strip_stride};
    };
    matrix_product<false, kVnni>(StridedRows{task.query, padded(depth_), 1}, span(keys.key_columns),
                                 tile_rows(task.count), padded(seen), depth_, task.scores + at, width_, diagonal,
                                 factor);
    matrix_product<false, kVnni>(StridedRows{task.grad_output, padded(value_depth_), 1}, span(keys.value_columns),
                                 tile_rows(task.count), padded(seen), value_depth_, task.products + at, width_,
                                 diagonal);
  }
  __attribute__((always_inline)) void wait() const {}
  /// Keeps P and dS in columns [begin, end) of a task for the wave, where the task's queries stand from `row` on, and
  /// dS for add_keys.
  __attribute__((always_inline)) void keep_grads(const Task& task, int64_t row, int64_t begin, int64_t end,
                                                 float* wave_attention, float* wave_grads) const {
#if defined(FIAK_ISA_AVX512_BF16)
    if constexpr (kVnni) {
      float *scores = task.scores, *products = task.products;
      if (task.count % 2 != 0) {
        std::memset(scores + task.count * width_ + begin, 0, (end - begin) * sizeof(float));
        std::memset(products + task.count * width_ + begin, 0, (end - begin) * sizeof(float));
      }
      for (int64_t r = 0; r < task.count; r += 2) {
        float *attention = wave_attention + (row + r) / 2 * width_, *grad = wave_grads + (row + r) / 2 * width_;
        float *p = scores + r * width_, *ds = products + r * width_;
        for (int64_t j = begin; j < end; j += kLanes) {
          store(attention + j, vnni_of(load(p + j), load(p + width_ + j)));
          store(grad + j, vnni_of(load(ds + j), load(ds + width_ + j)));
        }
      }
      for (int64_t r = 0; r < task.count; ++r) {
        float* ds = products + r * width_ + begin;
        for (int64_t j = 0; j < end - begin; j += 2 * kLanes) {
          const Vec high = j + kLanes < end - begin ? load(ds + j + kLanes) : zero();
          store(ds + j / 2, vnni_in_order(load(ds + j), high));
        }
      }
    }
#endif
    (void)task, (void)row, (void)begin, (void)end, (void)wave_attention, (void)wave_grads;
  }
  /// sums += dS keys, of `seen` keys from `key` on, whose dS stand from column `at` on.
  __attribute__((always_inline)) void add_keys(const Keys& keys, const Task& task, int64_t key, int64_t seen,
                                               int64_t at, float* sums) const {
    const Panel rows{keys.key.row(units<kVnni>(key)), keys.key.stride};
    guarded_product<true, kVnni>(keys.finite, task.products + at, width_, 1, rows, tile_rows(task.count), row_size_,
                                 units<kVnni>(seen), sums, row_size_);
  }

  /// Rows of a wave's queries, along which dK and dV sum up.
  struct Queries {
    Panel rows;
    int64_t count, size;
    bool finite;
  };
  /// Queries [first, first + count), or their dO.
  __attribute__((always_inline)) Queries load_queries(int64_t b, int64_t h, int64_t first, int64_t count,
                                                      ScratchArena& arena) const {
    return load_rows(args_.query, args_.head_dim, b, h, first, count, arena.floats(queries_ * row_size_));
  }
  __attribute__((always_inline)) Queries load_grad_output(int64_t b, int64_t h, int64_t first, int64_t count,
                                                          ScratchArena& arena) const {
    return load_rows(grad_output_, args_.value_dim, b, h, first, count, arena.floats(queries_ * value_dim_));
  }
  /// sums of keys [key, key + keys) += the wave's P or dS times queries [from, to), where these keys stand from `at`
  /// on.
  __attribute__((always_inline)) void add_queries(const Queries& x, const float* wave_numbers, int64_t from, int64_t to,
                                                  int64_t at, int64_t key, int64_t keys, float* sums) const {
    const int64_t n = units<kVnni>(from), depth = units<kVnni>(smaller(to, x.count)) - n;
    guarded_product<true, kVnni>(x.finite, wave_numbers + n * width_ + at, 1, width_, {x.rows.row(n), x.rows.stride},
                                 tile_rows(keys), x.size, depth, sums + key * x.size, x.size);
  }
  /// sums[0, keys) += dS over the wave's queries [from, to), of which there are `count` in all.
  __attribute__((always_inline)) void add_scores(const float* wave_grads, int64_t from, int64_t to, int64_t count,
                                                 int64_t at, int64_t keys, float* sums) const {
    for (int64_t k = units<kVnni>(from); k < units<kVnni>(smaller(to, count)); ++k) {
      for (int64_t j = 0; j < padded(keys); j += kLanes) {
        Vec sum = load(sums + j);
        const Vec x = load(wave_grads + k * width_ + at + j);
#if defined(FIAK_ISA_AVX512_BF16)
        if constexpr (kVnni) sum = add(add(sum, even_bfloat16(x)), odd_bfloat16(x));
#endif
        if constexpr (!kVnni) sum = add(sum, x);
        store(sums + j, sum);
      }
    }
  }
  /// The sums of keys [key, key + count), count <= kLanes, which may lie in `rows`, as rows of padded(size).
  __attribute__((always_inline)) float* sums_of(float* sums, int64_t key, int64_t, int64_t size, float*) const {
    return sums + key * padded(size);
  }

 private:
  __attribute__((always_inline)) Queries load_rows(const Input& x, int64_t size, int64_t b, int64_t h, int64_t first,
                                                   int64_t count, float* target) const {
    Queries rows;
    rows.rows = load_depth<kVnni>(from_row(x, args_.dtype, first), args_.dtype, b, h, count, size, target);
    rows.count = count;
    rows.size = padded(size);
    rows.finite = all_finite<kVnni>(rows.rows, units<kVnni>(count), rows.size);
    return rows;
  }

  const AttentionArgs& args_;
  const Input& grad_output_;
  const int64_t queries_, width_, depth_, value_depth_, row_size_, value_dim_;
};

}  // namespace fiak::cpu::FIAK_ISA

#if defined(FIAK_ISA_AMX_BF16)
#include "kernels/cpu/dense/tile_grads.h"
#endif

namespace fiak::cpu::FIAK_ISA {

template <class Products>
struct ProductsOf {
  using Type = Products;
};

/// How much a wave has at most.
struct WaveShape {
  int64_t batch, heads, queries, keys;
};

// 32-bit units of P and of dS in a wave: within the L2 cache for one thread alone; of several, enough work for each
// between two barriers, in bounded memory.
constexpr int64_t kAloneUnits = 48 * 1024, kThreadUnits = 512 * 1024, kMostUnits = 2 * 1024 * 1024;

/// Of ranges of keys that are multiples of kKeys.
template <int64_t kKeys>
FIAK_INLINE WaveShape most_of_wave(const AttentionArgs& args, int64_t key_heads, bool by_head, int64_t threads) {
  const bool alone = threads == 1;
  WaveShape most{1, alone || by_head ? 1 : key_heads, 0, 0};
  const int64_t tasks = alone ? 4 : 4 * threads, all_keys = rounded_up(args.keys, kKeys);
  most.queries = smaller(rounded_up(args.queries, kGradRows), (tasks + most.heads - 1) / most.heads * kGradRows);
  const int64_t room = alone ? kAloneUnits : smaller(kMostUnits, threads * kThreadUnits);
  most.keys = larger(kKeys, smaller(all_keys, room / larger(1, most.heads * most.queries) / kKeys * kKeys));
  if (!alone && !by_head && most.queries >= args.queries && most.keys >= args.keys) {
    most.batch = larger(1, smaller(args.batch, room / larger(1, most.heads * most.queries * most.keys)));
  }
  return most;
}

/// What a query head attends to is `pairs_of(b, h)`'s; beside what dense_forward asks of it:
///
///   needs(first, rows, j, keys)  whether any of these queries may need any of these keys, of which there are at most
///                                64; of the others no number counts
///   grad_weights(n)              where to add the gradient of query n's weights, or null
///   fetch_grads(n, j, keys)      prefetches the support of query n, and where its gradient goes, if slow to come
template <class Products, class PairsOf>
class DenseBackward {
 public:
  /// Where `by_head`, the heads add to the gradient of the same weights, and take turns. Of all batch elements and
  /// heads, [batch, key_heads.count], it computes those that are `mine`; all if that is null.
  DenseBackward(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads, const float* delta,
                const PairsOf& pairs_of, const bool* mine, bool by_head, const Parallel& parallel)
      : args_(args),
        grads_(grads),
        key_heads_(key_heads),
        delta_(delta),
        pairs_of_(pairs_of),
        mine_(mine),
        parallel_(parallel),
        row_size_(padded(args.head_dim)),
        value_dim_(padded(args.value_dim)),
        all_keys_(rounded_up(args.keys, kKeys)),
        gaussian_(args.score == Score::kGaussian),
        dropout_(make_dropout(args.dropout_p, args.seed)),
        most_(most_of_wave<kKeys>(args, key_heads.count, by_head, parallel.threads)),
        products_(args, grads.grad_output, most_.queries, most_.keys) {}

  /// Batch elements and key heads [first, last), head by head; all of them where several threads share each.
  void run(int64_t first, int64_t last) {
    state_bytes_ = laid_out_bytes([&](ScratchArena& arena) { make_state(arena); });
    const SharedScratch memory(state_bytes_ * most_.batch * most_.heads);
    states_ = static_cast<char*>(memory.data());
    for (int64_t head = first / args_.batch; head * args_.batch < last; head += most_.heads) {
      const int64_t begin = larger(0, first - head * args_.batch),
                    end = smaller(args_.batch, last - head * args_.batch);
      for (int64_t b = begin; b < end; b += most_.batch) {
        run_states(
            {b, smaller(most_.batch, end - b), head, smaller(most_.heads, key_heads_.count - head), 0, 0, 0, 0, 0});
      }
    }
  }

 private:
  static constexpr int64_t kKeys = Products::kKeys;
  static_assert(kKeys <= 64);

  /// What the threads share of a batch element's key head.
  struct KeyHeadState {
    typename Products::Keys keys;
    float *bias, *grad_key, *grad_value, *score_sums, *grad_query, *attention, *grad_scores;
    RowSum* row_sums;  // of the wave's queries
    bool* needed;      // of the wave's tiles of kGradRows queries and kKeys keys
  };

  static constexpr int64_t kOwnBytes = (sizeof(KeyHeadState) + 63) / 64 * 64;

  /// A state and what its pointers point to, behind which it is kept itself.
  KeyHeadState make_state(ScratchArena& arena) const {
    KeyHeadState x{};
    x.keys = products_.make_keys(all_keys_, arena);
    x.bias = arena.floats(all_keys_);
    x.score_sums = arena.floats(all_keys_);
    x.grad_key = arena.floats(all_keys_ * row_size_);
    x.grad_value = arena.floats(all_keys_ * value_dim_);
    x.grad_query = arena.floats(most_.queries * row_size_);
    x.attention = arena.floats(products_.wave_units());
    x.grad_scores = arena.floats(products_.wave_units());
    x.row_sums = reinterpret_cast<RowSum*>(arena.floats(2 * most_.queries));
    x.needed = reinterpret_cast<bool*>(arena.floats((most_.queries / kGradRows * key_blocks() + 3) / 4));
    arena.floats(kOwnBytes / 4);
    return x;
  }
  int64_t key_blocks() const { return most_.keys / kKeys; }
  KeyHeadState& state(int64_t i) const {
    return *reinterpret_cast<KeyHeadState*>(states_ + (i + 1) * state_bytes_ - kOwnBytes);
  }

  int64_t batch_of(const Wave& wave, int64_t i) const { return wave.b + i / wave.heads; }
  int64_t key_head_of(const Wave& wave, int64_t i) const { return key_heads_.at(wave.head + i % wave.heads); }
  bool is_mine(const Wave& wave, int64_t i) const {
    return mine_ == nullptr || mine_[batch_of(wave, i) * key_heads_.count + wave.head + i % wave.heads];
  }

  /// Packs the keys and values of state i and clears its sums.
  void start(const Wave& wave, int64_t i) {
    const int64_t b = batch_of(wave, i), key_head = key_head_of(wave, i), keys = keys_of(args_, b);
    KeyHeadState& x = state(i);
    x = lay_out_in(states_ + i * state_bytes_, [&](ScratchArena& arena) { return make_state(arena); });
    if (gaussian_) {
      ThreadArena scratch;
      key_bias(args_, b, key_head, keys, scratch.floats(row_size_), x.bias);
    }
    products_.load_keys(b, key_head, keys, all_keys_, x.keys);
    std::memset(x.score_sums, 0, all_keys_ * sizeof(float));
    std::memset(x.grad_key, 0, all_keys_ * row_size_ * sizeof(float));
    std::memset(x.grad_value, 0, all_keys_ * value_dim_ * sizeof(float));
  }

  /// All queries and keys of a wave's states.
  void run_states(Wave wave) {
    const int64_t states = wave.batch * wave.heads;
    parallel_range(parallel_, states, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (is_mine(wave, i)) start(wave, i);
      }
    });
    for (wave.query_head = 0; wave.query_head < shared_heads(args_); ++wave.query_head) {
      for (wave.query = 0; wave.query < args_.queries; wave.query += most_.queries) {
        wave.queries = smaller(most_.queries, args_.queries - wave.query);
        for (wave.key = 0; wave.key == 0 || wave.key < args_.keys; wave.key += most_.keys) {
          wave.keys = smaller(most_.keys, args_.keys - wave.key);
          run_wave(wave);
        }
      }
    }
    parallel_blocks(parallel_, states, args_.keys, kKeys, [&](int64_t i, int64_t begin, int64_t end) {
      if (is_mine(wave, i)) finish(wave, i, begin, end);
    });
  }

  void run_wave(const Wave& wave) {
    // A task runs all batch elements of a head's queries, so that it alone adds to the gradient of their weights.
    parallel_blocks(parallel_, wave.heads, wave.queries, kGradRows, [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kGradRows) {
        for (int64_t b = 0; b < wave.batch; ++b) {
          const int64_t i = b * wave.heads + head;
          if (is_mine(wave, i)) rows(wave, i, wave.query + first, smaller(kGradRows, end - first));
        }
      }
    });
    if (grads_.grad_key.data == nullptr && grads_.grad_value.data == nullptr) return;
    parallel_blocks(parallel_, wave.batch * wave.heads, wave.keys, kKeys, [&](int64_t i, int64_t begin, int64_t end) {
      if (is_mine(wave, i)) columns(wave, i, begin, end);
    });
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

  /// Queries [first, first + count) of state i against the wave's keys.
  void rows(const Wave& wave, int64_t i, int64_t first, int64_t count) {
    const KeyHeadState& x = state(i);
    const int64_t b = batch_of(wave, i), h = key_head_of(wave, i) * shared_heads(args_) + wave.query_head;
    const int64_t row = first - wave.query;
    const auto pairs = pairs_of_(b, h);
    if (wave.key == 0) sum_rows(x, b, h, pairs, first, count, row);
    const bool any = find_needed(x, b, pairs, first, count, row, wave.key);
    float* sums = x.grad_query + row * row_size_;
    const bool query_wanted = grads_.grad_query.data != nullptr;
    if (wave.key == 0 && query_wanted) std::memset(sums, 0, kGradRows * row_size_ * sizeof(float));
    if (any) add_rows(wave, x, b, h, pairs, first, count);
    if (!query_wanted || wave.key + wave.keys < args_.keys) return;
    for (int64_t r = 0; r < count; ++r) {
      store_row(sums + r * row_size_, args_.dtype, args_.head_dim, static_cast<float>(args_.scale),
                row_address(grads_.grad_query, args_.dtype, b, h, first + r));
    }
  }

  bool* needed_of(const KeyHeadState& x, int64_t row) const { return x.needed + row / kGradRows * key_blocks(); }
  float logsumexp_of(int64_t b, int64_t h, int64_t n) const {
    return static_cast<const float*>(grads_.logsumexp)[(b * args_.query_heads + h) * args_.queries + n];
  }

  /// Finds out which tiles of the wave's keys, which start at `key`, queries [first, first + count) need, if any.
  template <class Pairs>
  bool find_needed(const KeyHeadState& x, int64_t b, const Pairs& pairs, int64_t first, int64_t count, int64_t row,
                   int64_t key) const {
    const int64_t keys = smaller(most_.keys, keys_of(args_, b) - key);
    bool* needed = needed_of(x, row);
    bool any = false;
    for (int64_t k = 0; k < key_blocks(); ++k) {
      const int64_t j = k * kKeys;
      needed[k] = j < keys && pairs.needs(first, count, key + j, smaller(kKeys, keys - j));
      any |= needed[k];
    }
    return any;
  }

  /// use(task, r, key, begin, end, columns) for row r of queries [first, first + count) and each run of needed tiles
  /// of the wave's keys, which start at `wave_key`: it has scores and dA in columns [begin, end), `columns` of them
  /// for keys that the row may attend to, from `key` on. Then done(task, key, begin, end, seen) for the run.
  template <class Pairs, class Use, class Done>
  void multiply_rows(const KeyHeadState& x, int64_t b, int64_t h, const Pairs& pairs, int64_t first, int64_t count,
                     int64_t row, int64_t wave_key, ScratchArena& arena, Use&& use, Done&& done) {
    const auto task = products_.load_task(b, h, first, count, row, x.attention, x.grad_scores, arena);
    const auto factor = static_cast<float>(args_.scale * kLog2E);
    const int64_t keys = smaller(most_.keys, keys_of(args_, b) - wave_key);
    int64_t ends[kGradRows], diagonal = -kGradRows;
    for (int64_t r = 0; r < count; ++r) {
      ends[r] = pairs.end(first + r);
      diagonal = larger(diagonal, ends[r] - 1 - r);
    }
    for_needed(needed_of(x, row), key_blocks(), 1, kKeys, [&](int64_t begin, int64_t end) {
      const int64_t key = wave_key + begin, seen = smaller(end, keys) - begin;
      products_.multiply_keys(x.keys, task, key, seen, begin, diagonal - key, factor);
      for (int64_t r = 0; r < count; ++r) {
        const bool empty = logsumexp_of(b, h, first + r) == -kInfinity;
        use(task, r, key, begin, end, empty ? 0 : larger(0, smaller(seen, ends[r] - key)));
      }
      done(task, key, begin, end, seen);
    });
  }

  /// The maxima and sums of queries [first, first + count) whose logsumexp is large, over all keys.
  template <class Pairs>
  void sum_rows(const KeyHeadState& x, int64_t b, int64_t h, const Pairs& pairs, int64_t first, int64_t count,
                int64_t row) {
    RowState states[kGradRows];
    bool any = false;
    for (int64_t r = 0; r < count; ++r) {
      states[r] = {-kInfinity, 0.0f};
      x.row_sums[row + r] = {0.0f, 0.0f};
      any |= is_large_logsumexp(logsumexp_of(b, h, first + r));
    }
    if (!any) return;
    [[maybe_unused]] const typename Products::Multiplier multiplier{};
    const auto factor = static_cast<float>(args_.scale * kLog2E);
    for (int64_t wave_key = 0; wave_key < keys_of(args_, b); wave_key += most_.keys) {
      if (!find_needed(x, b, pairs, first, count, row, wave_key)) continue;
      ThreadArena arena;
      multiply_rows(
          x, b, h, pairs, first, count, row, wave_key, arena,
          [&](const auto& task, int64_t r, int64_t key, int64_t begin, int64_t, int64_t columns) {
            if (!is_large_logsumexp(logsumexp_of(b, h, first + r))) return;
            float* scores = task.scores + r * most_.keys + begin;
            finish_scores<!Products::kScaled>(scores, columns, factor, gaussian_ ? x.bias + key : nullptr);
            for (int64_t j = 0; j < columns; j += kKeys) {  // so that no cut of waves or runs changes a bit
              pairs.with(first + r, key + j, [&](const auto& support) {
                sum_row(scores + j, support, smaller(kKeys, columns - j), states[r]);
              });
            }
          },
          [](const auto&...) {});
    }
    for (int64_t r = 0; r < count; ++r) {
      if (states[r].total > 0.0f) x.row_sums[row + r] = {states[r].maximum, 1.0f / states[r].total};
    }
  }

  template <class Pairs>
  void add_rows(const Wave& wave, const KeyHeadState& x, int64_t b, int64_t h, const Pairs& pairs, int64_t first,
                int64_t count) {
    ThreadArena arena;
    const int64_t row = first - wave.query, width = most_.keys;
    [[maybe_unused]] const typename Products::Multiplier multiplier{};
    float* dropout_factors = arena.floats(width);
    const auto factor = static_cast<float>(args_.scale * kLog2E);
    multiply_rows(
        x, b, h, pairs, first, count, row, wave.key, arena,
        [&](const auto& task, int64_t r, int64_t key, int64_t begin, int64_t end, int64_t columns) {
          const int64_t n = first + r;
          float* grad_weights = pairs.grad_weights(n);
          if (dropout_.active()) {
            for (int64_t j = 0; j < columns; ++j) {
              dropout_factors[j] = static_cast<float>(dropout_.factor(b, h, pairs.row(n), key + j));
            }
            for (int64_t j = columns; j < padded(columns); ++j) dropout_factors[j] = 0.0f;
          }
          pairs.fetch_grads(n, key, columns);
          products_.wait();
          const RowSum sum = x.row_sums[row + r];
          const float delta = delta_[(b * args_.query_heads + h) * args_.queries + n];
          const float *bias = gaussian_ ? x.bias + key : nullptr,
                      *factors = dropout_.active() ? dropout_factors : nullptr;
          float *scores = task.scores + r * width + begin, *products = task.products + r * width + begin;
          if (grad_weights != nullptr) grad_weights += key;
          if (sum.inverse != 0.0f) finish_scores<!Products::kScaled>(scores, columns, factor, bias);
          pairs.with(n, key, [&](const auto& support) {
            if (sum.inverse != 0.0f) {
              grad_row<false, true>(scores, products, support, columns, end - begin, sum.inverse, sum.maximum, delta,
                                    nullptr, factors, grad_weights);
            } else {
              grad_row<!Products::kScaled, false>(scores, products, support, columns, end - begin, factor,
                                                  logsumexp_of(b, h, n), delta, bias, factors, grad_weights);
            }
          });
        },
        [&](const auto& task, int64_t key, int64_t begin, int64_t end, int64_t seen) {
          products_.keep_grads(task, row, begin, end, x.attention, x.grad_scores);
          if (grads_.grad_query.data == nullptr) return;
          products_.add_keys(x.keys, task, key, seen, begin, x.grad_query + row * row_size_);
        });
  }

  /// Adds the wave's queries to dK and dV of its keys [begin, end) of state i.
  void columns(const Wave& wave, int64_t i, int64_t begin, int64_t end) {
    const KeyHeadState& x = state(i);
    const int64_t b = batch_of(wave, i), h = key_head_of(wave, i) * shared_heads(args_) + wave.query_head;
    const int64_t row_blocks = (wave.queries + kGradRows - 1) / kGradRows;
    end = smaller(end, keys_of(args_, b) - wave.key);
    bool any = false;
    for (int64_t key = begin; key < end; key += kKeys) {
      for (int64_t k = 0; k < row_blocks; ++k) any |= x.needed[k * key_blocks() + key / kKeys];
    }
    if (!any) return;
    ThreadArena arena;
    [[maybe_unused]] const typename Products::Multiplier multiplier{};
    const auto query = products_.load_queries(b, h, wave.query, wave.queries, arena);
    const auto grad_output = products_.load_grad_output(b, h, wave.query, wave.queries, arena);
    for (int64_t first = begin, next; first < end; first = next) {
      // Tiles that the same queries need go at once.
      const bool* needed = x.needed + first / kKeys;
      next = first + kKeys;
      while (next < end && same_column(needed, x.needed + next / kKeys, row_blocks)) next += kKeys;
      const int64_t key = wave.key + first, keys = smaller(next, end) - first;
      for_needed(needed, row_blocks, key_blocks(), kGradRows, [&](int64_t from, int64_t to) {
        if (grads_.grad_value.data != nullptr) {
          products_.add_queries(grad_output, x.attention, from, to, first, key, keys, x.grad_value);
        }
        if (grads_.grad_key.data == nullptr) return;
        products_.add_queries(query, x.grad_scores, from, to, first, key, keys, x.grad_key);
        if (gaussian_) products_.add_scores(x.grad_scores, from, to, wave.queries, first, keys, x.score_sums + key);
      });
    }
  }

  bool same_column(const bool* a, const bool* b, int64_t row_blocks) const {
    for (int64_t k = 0; k < row_blocks; ++k) {
      if (a[k * key_blocks()] != b[k * key_blocks()]) return false;
    }
    return true;
  }

  /// Stores dK and dV of keys [begin, end) of state i.
  void finish(const Wave& wave, int64_t i, int64_t begin, int64_t end) {
    const KeyHeadState& x = state(i);
    const int64_t b = batch_of(wave, i), key_head = key_head_of(wave, i), most = larger(row_size_, value_dim_);
    ThreadArena arena;
    float* key = arena.floats(row_size_);
    float* rows = arena.floats(kLanes * most);
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = smaller(kLanes, end - first);
      if (grads_.grad_key.data != nullptr) {
        float* sums = products_.sums_of(x.grad_key, first, count, args_.head_dim, rows);
        for (int64_t j = first; j < first + count; ++j, sums += row_size_) {
          if (gaussian_ && x.score_sums[j] != 0.0f) {  // d s_ij / d k_j = scale (q_i - k_j)
            load_row(row_address(args_.key, args_.dtype, b, key_head, j), args_.dtype, args_.head_dim, 1.0f, key);
            for (int64_t d = 0; d < row_size_; ++d) sums[d] -= x.score_sums[j] * key[d];
          }
          store_row(sums, args_.dtype, args_.head_dim, static_cast<float>(args_.scale),
                    row_address(grads_.grad_key, args_.dtype, b, key_head, j));
        }
      }
      if (grads_.grad_value.data != nullptr) {
        const float* sums = products_.sums_of(x.grad_value, first, count, args_.value_dim, rows);
        for (int64_t j = first; j < first + count; ++j, sums += value_dim_) {
          store_row(sums, args_.dtype, args_.value_dim, 1.0f,
                    row_address(grads_.grad_value, args_.dtype, b, key_head, j));
        }
      }
    }
  }

  const AttentionArgs& args_;
  const BackwardArgs& grads_;
  const KeyHeads key_heads_;
  const float* delta_;
  const PairsOf& pairs_of_;
  const bool* mine_;
  const Parallel& parallel_;
  const int64_t row_size_, value_dim_, all_keys_;
  const bool gaussian_;
  const Dropout dropout_;
  const WaveShape most_;
  const Products products_;
  char* states_ = nullptr;
  int64_t state_bytes_ = 0;
};

/// delta_i = sum_j a_ij dA_ij = dO_i . O_i for every query of some key heads, in [batch, query_heads, queries].
static void compute_delta(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                          const Parallel& parallel, float* delta) {
  const int64_t shared = shared_heads(args), heads = key_heads.count * shared;
  parallel_range(parallel, args.batch * heads, [&](int64_t begin, int64_t end) {
    const int64_t size = padded(args.value_dim);
    ThreadArena scratch;
    float* grad_output = scratch.floats(size);
    float* output = scratch.floats(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = key_heads.at(i % heads / shared) * shared + i % shared;
      for (int64_t n = 0; n < args.queries; ++n) {
        load_row(row_address(grads.grad_output, args.dtype, b, h, n), args.dtype, args.value_dim, 1.0f, grad_output);
        load_row(row_address(grads.output, args.dtype, b, h, n), args.dtype, args.value_dim, 1.0f, output);
        delta[(b * args.query_heads + h) * args.queries + n] = dot(grad_output, output, size);
      }
    }
  });
}

/// The backward pass of some key heads. See DenseBackward.
template <class PairsOf>
static void dense_backward(const AttentionArgs& args, const BackwardArgs& grads, const KeyHeads& key_heads,
                           const PairsOf& pairs_of, bool weights_wanted, bool by_head, const Parallel& parallel) {
  if (key_heads.count == 0 || args.batch == 0) return;
  const SharedScratch delta_memory(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(delta_memory.data());
  compute_delta(args, grads, key_heads, parallel, delta);
  // What a thread runs alone, without barriers; all batch elements add to the gradient of a head's weights.
  const int64_t all = key_heads.count * args.batch, states_per_task = weights_wanted ? args.batch : 1,
                count = all / states_per_task;
  const int64_t threads = larger(1, parallel.threads);
  const bool alone = !by_head && (count + threads - 1) / threads * threads * 10 <= count * 11;
  const auto run = [&](auto products, const bool* mine) {
    using Backward = DenseBackward<typename decltype(products)::Type, PairsOf>;
    if (!alone) return Backward(args, grads, key_heads, delta, pairs_of, mine, by_head, parallel).run(0, all);
    const Parallel one{};
    parallel_range(parallel, count, [&](int64_t first, int64_t last) {
      Backward(args, grads, key_heads, delta, pairs_of, mine, false, one)
          .run(first * states_per_task, last * states_per_task);
    });
  };
#if defined(FIAK_ISA_AMX_BF16)
  if (args.dtype == DType::kBFloat16) {
    const SharedScratch memory(all);
    auto* tiled = static_cast<bool*>(memory.data());
    parallel_range(parallel, all, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        tiled[i] = TileGrads::serves(args, grads.grad_output, i / key_heads.count, key_heads.at(i % key_heads.count));
      }
    });
    const int64_t served = std::count(tiled, tiled + all, true);
    if (served > 0) run(ProductsOf<TileGrads>(), tiled);
    if (served == all) return;
    bool* others = tiled;
    for (int64_t i = 0; i < all; ++i) others[i] = !tiled[i];
    return run(ProductsOf<VectorGrads<true>>(), others);
  }
#elif defined(FIAK_ISA_AVX512_BF16)
  if (args.dtype == DType::kBFloat16) return run(ProductsOf<VectorGrads<true>>(), nullptr);
#endif
  run(ProductsOf<VectorGrads<false>>(), nullptr);
}

template <int64_t kKeys>
FIAK_INLINE void dense_backward_blocks(const AttentionArgs& args, int64_t threads, BlockCounts& blocks) {
  const WaveShape most = most_of_wave<kKeys>(args, args.key_heads, false, threads);
  blocks.add(args.queries, larger(1, most.queries));
  blocks.add(args.keys, most.keys);
  blocks.add(args.batch, most.batch);
  blocks.add(args.queries, kGradRows);
  blocks.add(args.keys, kKeys);
}
/// How the backward pass of all heads is cut among the threads that share them.
FIAK_INLINE void dense_backward_blocks(const AttentionArgs& args, int64_t threads, BlockCounts& blocks) {
  dense_backward_blocks<VectorGrads<kHasVnni>::kKeys>(args, threads, blocks);
#if defined(FIAK_ISA_AMX_BF16)
  dense_backward_blocks<TileGrads::kKeys>(args, threads, blocks);
#endif
}

}  // namespace fiak::cpu::FIAK_ISA
