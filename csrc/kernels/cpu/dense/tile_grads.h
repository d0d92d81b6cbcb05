// The products of dense attention's backward pass in bfloat16 by AMX tiles (amx.h). Only dense_grads.h includes this.
//
// P and dS of a wave are right operands: their depth runs along the queries, as vectors of scores do. dK and dV
// therefore add up transposed, as dK^T = Q^T dS and dV^T = dO^T P, in tiles of 16 features and 16 keys.
#pragma once

#include "kernels/cpu/dense/tile_products.h"

namespace fiak::cpu::FIAK_ISA {

/// Rows [0, count) as the depth of the left operand, whose rows are their columns; a row of tiles is tile_units(room)
/// long.
static void pack_columns(const RowAddresses& row, int64_t count, int64_t size, int64_t room, float* target) {
  pack_depth(row, count, size, room, target);
  for (int64_t s = 0; s < sides(size); ++s) transpose_tiles(target + s * tile_units(room), chunks(count));
}

/// What VectorGrads is, by tiles.
class TileGrads {
 public:
  static constexpr int64_t kKeys = kTileDepth;
  static constexpr bool kScaled = false;
  using Multiplier = Tiles;
  static_assert(kGradRows == kTileDepth);

  /// Whether no factor of 0 would meet an infinite or NaN number of the key head's.
  __attribute__((always_inline)) static bool serves(const AttentionArgs& args, const Input& grad_output, int64_t b,
                                                    int64_t key_head) {
    FiniteCheck finite;
    const auto check = [&](const Input& x, int64_t h, int64_t count, int64_t size) {
      const RowAddresses row(x, {b, h}, 0);
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t d = 0; d < size; d += kTileDepth) {
          finite(load_vnni_in_order(row(n) + 2 * d, smaller(kTileDepth, size - d)));
        }
      }
    };
    check(args.key, key_head, keys_of(args, b), args.head_dim);
    for (int64_t h = key_head * shared_heads(args); h < (key_head + 1) * shared_heads(args); ++h) {
      check(args.query, h, args.queries, args.head_dim);
      check(grad_output, h, args.queries, args.value_dim);
    }
    return finite.passed();
  }

  TileGrads(const AttentionArgs& args, const Input& grad_output, int64_t queries, int64_t keys)
      : args_(args),
        grad_output_(grad_output),
        queries_(queries),
        width_(keys),
        head_units_(tile_units(args.head_dim)),
        value_units_(tile_units(args.value_dim)) {}
  int64_t wave_units() const { return sides(width_) * tile_units(queries_); }

  struct Keys {
    float *key, *value;  // their features are the depth
    float* key_depth;    // the keys are
    int64_t depth_units;
  };
  __attribute__((always_inline)) Keys make_keys(int64_t all_keys, ScratchArena& arena) const {
    float* key = arena.floats(sides(all_keys) * head_units_);
    float* value = arena.floats(sides(all_keys) * value_units_);
    return {key, value, arena.floats(sides(args_.head_dim) * tile_units(all_keys)), tile_units(all_keys)};
  }
  __attribute__((always_inline)) void load_keys(int64_t b, int64_t key_head, int64_t keys, int64_t all_keys,
                                                Keys& x) const {
    const RowAddresses key(args_.key, {b, key_head}, 0), value(args_.value, {b, key_head}, 0);
    pack_right(key, keys, args_.head_dim, x.key);
    pack_right(value, keys, args_.value_dim, x.value);
    pack_depth(key, keys, args_.head_dim, all_keys, x.key_depth);
  }

  struct Task {
    float *query, *grad_output, *scores, *products;
    float* grads;  // dS, whose depth are the keys
    int64_t count;
  };
  __attribute__((always_inline)) Task load_task(int64_t b, int64_t h, int64_t first, int64_t count, int64_t,
                                                const float*, const float*, ScratchArena& arena) const {
    const Task x{arena.floats(2 * head_units_),        arena.floats(2 * value_units_),
                 arena.floats(kGradRows * width_),     arena.floats(kGradRows * width_),
                 arena.floats(2 * tile_units(width_)), count};
    pack_left(RowAddresses(args_.query, {b, h}, first), count, args_.head_dim, x.query);
    pack_left(RowAddresses(grad_output_, {b, h}, first), count, args_.value_dim, x.grad_output);
    return x;
  }
  __attribute__((always_inline)) void multiply_keys(const Keys& keys, const Task& task, int64_t key, int64_t seen,
                                                    int64_t at, int64_t, float) const {
    const auto multiply = [&](const float* left, const float* right, int64_t units, float* target) {
      right += key / kTileSide * units;
      for_tiles(
          sides(task.count), sides(seen), [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
            sums.clear();
            sums.add(left + r * units, units, right + c * units, units, units / kTileUnits);
            sums.store(target + kTileSide * (r * width_ + c) + at, width_);
          });
    };
    multiply(task.query, keys.key, head_units_, task.scores);
    multiply(task.grad_output, keys.value, value_units_, task.products);
  }
  __attribute__((always_inline)) void wait() const { keep_awake(); }
  __attribute__((always_inline)) void keep_grads(const Task& task, int64_t row, int64_t begin, int64_t end,
                                                 float* wave_attention, float* wave_grads) const {
    const int64_t column = tile_units(queries_), first = begin / kTileSide * column + row / kTileDepth * kTileUnits;
    const auto keep = [&](const float* numbers, float* target) {
      for (int64_t r = 0; r < kGradRows; r += 2) {
        const float* p = numbers + r * width_;
        float* to = target + first + r / 2 * kTileSide;
        for (int64_t j = begin; j < end; j += kTileSide, to += column) {
          const Vec low = r < task.count ? load(p + j) : zero();
          store(to, vnni_of(low, r + 1 < task.count ? load(p + width_ + j) : zero()));
        }
      }
    };
    keep(task.scores, wave_attention);
    keep(task.products, wave_grads);
    for (int64_t r = 0; r < task.count; ++r) {
      const float* ds = task.products + r * width_;
      float* to = grads_at(task, begin) + r / kTileSide * tile_units(width_) + r % kTileSide * kTileSide;
      for (int64_t j = begin; j < end; j += kTileDepth, to += kTileUnits) {
        store(to, vnni_in_order(load(ds + j), load(ds + j + kLanes)));
      }
    }
  }
  __attribute__((always_inline)) void add_keys(const Keys& keys, const Task& task, int64_t key, int64_t seen,
                                               int64_t at, float* sums) const {
    const float *left = grads_at(task, at), *right = keys.key_depth + key / kTileDepth * kTileUnits;
    const int64_t row = padded(args_.head_dim);
    for_tiles(
        sides(task.count), sides(args_.head_dim), [&](auto tiles, int64_t r, int64_t c) __attribute__((always_inline)) {
          float* target = sums + kTileSide * (r * row + c);
          tiles.load(target, row);
          tiles.add(left + r * tile_units(width_), tile_units(width_), right + c * keys.depth_units, keys.depth_units,
                    chunks(seen));
          tiles.store(target, row);
        });
  }

  struct Queries {
    const float* columns;  // the queries are the depth of the left operand
    int64_t size;
  };
  __attribute__((always_inline)) Queries load_queries(int64_t b, int64_t h, int64_t first, int64_t count,
                                                      ScratchArena& arena) const {
    return load_columns_of(args_.query, args_.head_dim, {b, h}, first, count, arena);
  }
  __attribute__((always_inline)) Queries load_grad_output(int64_t b, int64_t h, int64_t first, int64_t count,
                                                          ScratchArena& arena) const {
    return load_columns_of(grad_output_, args_.value_dim, {b, h}, first, count, arena);
  }
  __attribute__((always_inline)) void add_queries(const Queries& x, const float* wave_numbers, int64_t from, int64_t to,
                                                  int64_t at, int64_t key, int64_t keys, float* sums) const {
    const int64_t units = tile_units(queries_), first = from / kTileDepth * kTileUnits;
    const int64_t next_key = sides(x.size) * kTileUnits;  // from a column of the sums to the next
    const float* right = wave_numbers + at / kTileSide * units + first;
    sums += key / kTileSide * next_key;
    for_tiles(
        sides(x.size), sides(keys), [&](auto tile_sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          float* target = sums + c * next_key + r * kTileUnits;
          tile_sums.load(target, kTileSide, kTileUnits, next_key);
          tile_sums.add(x.columns + r * units + first, units, right + c * units, units, (to - from) / kTileDepth);
          tile_sums.store(target, kTileSide, kTileUnits, next_key);
        });
  }
  __attribute__((always_inline)) void add_scores(const float* wave_grads, int64_t from, int64_t to, int64_t, int64_t at,
                                                 int64_t keys, float* sums) const {
    for (int64_t c = 0; c < sides(keys); ++c) {
      const float* pairs = wave_grads + (at / kTileSide + c) * tile_units(queries_) + from / kTileDepth * kTileUnits;
      Vec sum = load(sums + c * kTileSide);
      for (int64_t k = 0; k < (to - from) / 2; ++k) {
        const Vec x = load(pairs + k * kTileSide);
        sum = add(add(sum, even_bfloat16(x)), odd_bfloat16(x));
      }
      store(sums + c * kTileSide, sum);
    }
  }
  __attribute__((always_inline)) float* sums_of(const float* sums, int64_t key, int64_t count, int64_t size,
                                                float* rows) const {
    const float* tile = sums + key / kTileSide * sides(size) * kTileUnits;
    for (int64_t s = 0; s < sides(size); ++s, tile += kTileUnits) {
      Vec square[kTileSide];
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) square[i] = load(tile + i * kTileSide);
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) {
        if (i < count) store(rows + i * padded(size) + s * kTileSide, square[i]);
      }
    }
    return rows;
  }

 private:
  __attribute__((always_inline)) float* grads_at(const Task& task, int64_t at) const {
    return task.grads + at / kTileDepth * kTileUnits;
  }
  __attribute__((always_inline)) Queries load_columns_of(const Input& x, int64_t size, HeadPlace at, int64_t first,
                                                         int64_t count, ScratchArena& arena) const {
    float* target = arena.floats(sides(size) * tile_units(queries_));
    pack_columns(RowAddresses(x, at, first), count, size, queries_, target);
    return {target, size};
  }

  const AttentionArgs& args_;
  const Input& grad_output_;
  const int64_t queries_, width_, head_units_, value_units_;
};

}  // namespace fiak::cpu::FIAK_ISA
