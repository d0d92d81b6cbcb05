// The products of dense attention in bfloat16 by AMX tiles (amx.h). Only dense_rows.h includes this.
#pragma once

#include "kernels/cpu/isa/amx.h"

namespace fiak::cpu::FIAK_ISA {

/// The addresses of a head's rows from `first` on.
struct RowAddresses {
  const char* rows;
  int64_t step;
  __attribute__((always_inline)) RowAddresses(const Input& x, HeadPlace at, int64_t first)
      : rows(row_address(x, DType::kBFloat16, at.b, at.h, first)), step(x.row_stride * 2) {}
  __attribute__((always_inline)) const char* operator()(int64_t n) const { return rows + n * step; }
};

/// What VectorProducts is, by tiles.
class TileProducts {
 public:
  static constexpr int64_t kRows = 2 * kTileSide;
  static constexpr int64_t kSpanKeys = kTileDepth;
  static constexpr int64_t kL1Operands = 50 * 1024;  // bytes
  static constexpr int64_t kAwakePairs = 1600;       // whose exponentials take some 700 cycles
  static constexpr bool kCutsRows = false;
  static constexpr bool kScaled = false;  // that would round the queries once more
  static_assert(kBlockKeys / kSpanKeys <= kMaxSpans);

  __attribute__((always_inline))
  TileProducts(const AttentionArgs& args, HeadPlace at, int64_t keys, int64_t width, ScratchArena& scratch)
      : args_(args),
        at_(at),
        key_head_(at.h / shared_heads(args)),
        all_keys_(keys_of(args, at.b)),
        width_(width),
        value_dim_(padded(args.value_dim)),
        head_units_(tile_units(args.head_dim)),
        value_units_(tile_units(all_keys_)),
        weight_units_(tile_units(width)),
        query_(scratch.floats(2 * head_units_)),
        key_(scratch.floats(sides(keys) * head_units_)),
        value_(scratch.floats(sides(args.value_dim) * value_units_)),
        weights_(scratch.floats(2 * weight_units_)) {
    pack_right(RowAddresses(args.key, {at.b, key_head_}, 0), keys, args.head_dim, key_);
    finite_ = pack_depth(RowAddresses(args.value, {at.b, key_head_}, 0), all_keys_, args.value_dim, all_keys_, value_);
  }
  /// More rows share what is loaded of the keys and values, fewer leave them room in the L1 cache.
  __attribute__((always_inline)) int64_t step_rows() const { return step_rows(args_, smaller(width_, all_keys_)); }
  /// With so many keys in a block.
  __attribute__((always_inline)) static int64_t step_rows(const AttentionArgs& args, int64_t keys) {
    const int64_t bytes = (sides(keys) * tile_units(args.head_dim) + sides(args.value_dim) * tile_units(keys)) * 4;
    return bytes > kL1Operands ? kRows : kTileSide;
  }
  __attribute__((always_inline)) void wait() const { keep_awake(); }
  /// Whether no factor of 0 would meet an infinite or NaN value. All of the element's values decide, so that no split
  /// among threads changes a bit.
  __attribute__((always_inline)) bool serves() const { return finite_; }

  __attribute__((always_inline)) void load_queries(int64_t first, int64_t rows) {
    keep_awake();
    pack_left(RowAddresses(args_.query, at_, first), rows, args_.head_dim, query_);
  }
  __attribute__((always_inline)) void multiply_keys(const KeySpan& span, int64_t rows, int64_t diagonal, float,
                                                    float* scores) const {
    const int64_t last = kRows - 1 + diagonal - span.from;  // key of the span that a row sees
    if (last < 0) return;
    const int64_t columns = smaller(sides(span.keys), last / kTileSide + 1);
    const float* key = key_ + span.from / kTileSide * head_units_;
    if (chunks(args_.head_dim) <= 2) {
      for (int64_t r = 0; r < sides(rows); ++r) {
        multiply_short(query_ + r * head_units_, key, columns, scores + r * kTileSide * width_ + span.at);
      }
      return;
    }
    for_tiles(
        sides(rows), columns, [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          sums.clear();
          sums.add(query_ + r * head_units_, head_units_, key + c * head_units_, head_units_, chunks(args_.head_dim));
          sums.store(scores + kTileSide * (r * width_ + c) + span.at, width_);
        });
  }
  template <class Support>
  __attribute__((always_inline)) float weigh(int64_t i, const KeySpan& span, const float* scores,
                                             const Support& support, int64_t count, float factor, float shift,
                                             const float* dropout_factors) const {
    const float* row = scores + i * width_ + span.at;
    float* target = weights_ + i / kTileSide * weight_units_ + tile_units(span.at) + i % kTileSide * kTileSide;
    const Vec f = broadcast(factor), s = broadcast(shift);
    Vec sums = zero();
    const auto weight = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec e = support.weighted(j, n, exp2_above_125(support.template shifted<true>(j, n, load(row + j), f, s)));
      sums = add(sums, e);
      if (dropout_factors != nullptr) e = mul(e, load(dropout_factors + j));
      return e;
    };
    int64_t j = 0;
    for (; j + kTileDepth <= count; j += kTileDepth, target += kTileUnits) {
      const Vec first = weight(j, kLanes);
      store(target, vnni_in_order(first, weight(j + kLanes, kLanes)));
    }
    if (j < count) {
      const Vec first = weight(j, smaller(kLanes, count - j));
      store(target, vnni_in_order(first, count - j > kLanes ? weight(j + kLanes, count - j - kLanes) : zero()));
      j += kTileDepth;
      target += kTileUnits;
    }
    for (; j < span.keys; j += kTileDepth, target += kTileUnits) store(target, zero());
    if (i * span.keys / kAwakePairs != (i + 1) * span.keys / kAwakePairs) keep_awake();
    return reduce_add(sums);
  }
  __attribute__((always_inline)) void add_values(const KeySpan* spans, int64_t count, int64_t rows, const int64_t* ends,
                                                 bool add, const float*, float* totals) const {
    int64_t most = 0;
    for (int64_t i = 0; i < rows; ++i) most = larger(most, ends[i]);
    while (count > 0 && spans[count - 1].from >= most) --count;
    for_tiles(
        sides(rows), sides(args_.value_dim), [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          float* target = totals + kTileSide * (r * value_dim_ + c);
          if (add) {
            sums.load(target, value_dim_);
          } else {
            sums.clear();
          }
          for (int64_t k = 0; k < count; ++k) {
            const KeySpan& span = spans[k];
            sums.add(weights_ + r * weight_units_ + tile_units(span.at), weight_units_,
                     value_ + c * value_units_ + tile_units(span.from), value_units_,
                     chunks(smaller(span.keys, most - span.from)));
          }
          sums.store(target, value_dim_);
        });
  }

 private:
  /// Scores of 16 queries of at most two chunks, which stay in registers 6 and 7.
  __attribute__((always_inline)) void multiply_short(const float* query, const float* key, int64_t columns,
                                                     float* target) const {
    const bool two = chunks(args_.head_dim) == 2;
    load_tile<6>(query);
    if (two) load_tile<7>(query + kTileUnits);
    for (int64_t c = 0; c < columns; c += 2, key += 2 * head_units_, target += 2 * kTileSide) {
      multiply_column<0, 2>(key, two, target);
      if (c + 1 < columns) multiply_column<1, 4>(key + head_units_, two, target + kTileSide);
    }
  }
  template <int kSums, int kKeys>
  __attribute__((always_inline)) void multiply_column(const float* key, bool two, float* target) const {
    clear_tile<kSums>();
    load_tile<kKeys>(key);
    multiply_tiles<kSums, 6, kKeys>();
    if (two) {
      load_tile<kKeys + 1>(key + kTileUnits);
      multiply_tiles<kSums, 7, kKeys + 1>();
    }
    store_tile<kSums>(target, width_ * 4);
  }
  const AttentionArgs& args_;
  const HeadPlace at_;
  const int64_t key_head_, all_keys_, width_, value_dim_;
  const int64_t head_units_, value_units_, weight_units_;  // of a row or column of tiles
  float *query_, *key_, *value_, *weights_;
  bool finite_ = false;
  Tiles tiles_;
};

}  // namespace fiak::cpu::FIAK_ISA
