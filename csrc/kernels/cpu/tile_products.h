// The products of dense attention in bfloat16 by AMX tiles (amx.h). Only dense_rows.h includes this.
#pragma once

#include "kernels/cpu/amx.h"

namespace fiak::cpu::FIAK_ISA {

/// What VectorProducts is, by tiles.
class TileProducts {
 public:
  static constexpr int64_t kSpanKeys = kChunk;
  static constexpr bool kScaled = false;  // that would round the queries once more
  static_assert(kBlockKeys / kSpanKeys <= kMaxSpans);

  static int64_t bytes(const AttentionArgs& args, int64_t b, int64_t keys, int64_t width) {
    return carved(kBlockRows / kTileSide * tile_units(args.head_size)) +
           carved(sides(keys) * tile_units(args.head_size)) +
           carved(sides(args.value_size) * tile_units(keys_of(args, b))) +
           carved(kBlockRows / kTileSide * tile_units(width));
  }
  __attribute__((always_inline))
  TileProducts(const AttentionArgs& args, HeadPlace at, int64_t keys, int64_t width, Carver& scratch)
      : args_(args),
        at_(at),
        key_head_(at.h / shared_heads(args)),
        all_keys_(keys_of(args, at.b)),
        width_(width),
        value_size_(padded(args.value_size)),
        head_units_(tile_units(args.head_size)),
        value_units_(tile_units(all_keys_)),
        weight_units_(tile_units(width)),
        query_(scratch.floats(kBlockRows / kTileSide * head_units_)),
        key_(scratch.floats(sides(keys) * head_units_)),
        value_(scratch.floats(sides(args.value_size) * value_units_)),
        weights_(scratch.floats(kBlockRows / kTileSide * weight_units_)) {
    pack_right([&](int64_t n) { return row_address(args.key, args.dtype, at.b, key_head_, n); }, keys, args.head_size,
               key_);
    pack_values();
  }
  /// Whether no factor of 0 would meet an infinite or NaN value. All of the element's values decide, so that no split
  /// among threads changes a bit.
  __attribute__((always_inline)) bool serves() const { return finite_; }

  __attribute__((always_inline)) void load_queries(int64_t first, int64_t rows) {
    pack_left([&](int64_t i) { return row_address(args_.query, args_.dtype, at_.b, at_.h, first + i); }, rows,
              args_.head_size, query_);
  }
  __attribute__((always_inline)) void multiply_keys(const KeySpan& span, int64_t rows, int64_t diagonal, float,
                                                    float* scores) const {
    const int64_t from = diagonal - span.from;
    for_tiles(
        sides(rows), sides(span.keys), [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          if (kTileSide * (r + 2) - 1 + from < kTileSide * c) return;
          sums.clear();
          sums.add(query_ + r * head_units_, head_units_, key_ + (span.from / kTileSide + c) * head_units_, head_units_,
                   chunks(args_.head_size));
          sums.store(scores + kTileSide * (r * width_ + c) + span.at, width_);
        });
  }
  template <class Support>
  __attribute__((always_inline)) float weigh(int64_t i, const KeySpan& span, const float* scores,
                                             const Support& support, int64_t count, float factor, float shift,
                                             const float* kept) const {
    const float* row = scores + i * width_ + span.at;
    float* target = weights_ + i / kTileSide * weight_units_ + tile_units(span.at) + i % kTileSide * kTileSide;
    const Vec f = broadcast(factor), s = broadcast(shift);
    Vec sums = zero();
    const auto weight = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vec e = support.weighted(j, n, exp2_below_128(fmsub(load(row + j), f, s)));
      sums = add(sums, e);
      if (kept != nullptr) e = mul(e, load(kept + j));
      return e;
    };
    int64_t j = 0;
    for (; j + kChunk <= count; j += kChunk, target += kTileUnits) {
      const Vec first = weight(j, kLanes);
      store(target, pairs_in_order(first, weight(j + kLanes, kLanes)));
    }
    if (j < count) {
      const Vec first = weight(j, smaller(kLanes, count - j));
      store(target, pairs_in_order(first, count - j > kLanes ? weight(j + kLanes, count - j - kLanes) : zero()));
      j += kChunk;
      target += kTileUnits;
    }
    for (; j < span.keys; j += kChunk, target += kTileUnits) store(target, zero());
    return reduce_add(sums);
  }
  __attribute__((always_inline)) void add_values(const KeySpan* spans, int64_t count, int64_t rows, const int64_t* ends,
                                                 bool add, const float*, float* totals) const {
    int64_t most = 0;
    for (int64_t i = 0; i < rows; ++i) most = larger(most, ends[i]);
    for_tiles(
        sides(rows), sides(args_.value_size), [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          float* target = totals + kTileSide * (r * value_size_ + c);
          if (add) {
            sums.load(target, value_size_);
          } else {
            sums.clear();
          }
          for (int64_t k = 0; k < count && spans[k].from < most; ++k) {
            const KeySpan& span = spans[k];
            sums.add(weights_ + r * weight_units_ + tile_units(span.at), weight_units_,
                     value_ + c * value_units_ + tile_units(span.from), value_units_,
                     chunks(smaller(span.keys, most - span.from)));
          }
          sums.store(target, value_size_);
        });
  }

 private:
  __attribute__((always_inline)) void pack_values() {
    const auto row = [&](int64_t j) { return row_address(args_.value, args_.dtype, at_.b, key_head_, j); };
    __m512i largest = _mm512_setzero_si512();  // without their signs; what is not finite is beyond all
    for (int64_t j = 0; j < chunks(all_keys_) * kChunk; j += 2) {
      float* target = value_ + j / kChunk * kTileUnits + j % kChunk / 2 * kTileSide;
      for (int64_t d = 0; d < args_.value_size; d += kLanes, target += value_units_) {
        Vec x = zero();
        if (j < all_keys_) {
          const char *first = row(j) + 2 * d, *second = j + 1 < all_keys_ ? row(j + 1) + 2 * d : first;
          x = load_pairs_of(first, second, smaller(kLanes, args_.value_size - d));
          if (j + 1 >= all_keys_) x = low_half(x);
        }
        largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi16(0x7fff)));
        store(target, x);
      }
    }
    finite_ = _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
  }

  const AttentionArgs& args_;
  const HeadPlace at_;
  const int64_t key_head_, all_keys_, width_, value_size_;
  const int64_t head_units_, value_units_, weight_units_;  // of a row or column of tiles
  float *query_, *key_, *value_, *weights_;
  bool finite_ = false;
  Tiles tiles_;
};

}  // namespace fiak::cpu::FIAK_ISA
