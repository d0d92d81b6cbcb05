// compact_linear, vectorised: the kept rows are gathered in blocks and multiplied by the head's rows of the weight.
// bfloat16 runs on pairs where the instruction set has them (gemm.h): sums are float32, nothing is rounded before the
// results.
#include "kernels/cpu/linear/gemm.h"
#if defined(FIAK_ISA_AMX_BF16)
#include "kernels/cpu/isa/amx.h"
#endif
#include "kernels/cpu/isa/list.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kBlockRows = 48;            // a multiple of kTileRows
constexpr int64_t kSumRows = 4 * kBlockRows;  // that a float32 chain sums up; their sums are added up in float64
constexpr int64_t kWeightBytes = 192 * 1024;  // of packed weights at a time, so that they stay in the L2 cache
static_assert(kBlockRows % kTileRows == 0);

/// How many rows of head h are kept: padding stands at the end.
int64_t kept_rows(const CompactLinearArgs& args, int64_t h) {
  int64_t kept = args.kept;
  while (kept > 0 && args.keep[h * args.kept + kept - 1] < 0) --kept;
  return kept;
}

/// The weight as one [head_dim, in_features] operand for each head.
Input weight_of(const CompactLinearArgs& args) {
  return {args.weight, 0, args.head_dim * args.weight_stride, args.weight_stride};
}

// Operands of products, in units of 32 bits: numbers, or with kVnni two bfloat16 numbers that follow each other along
// the depth.

template <bool kVnni>
constexpr int64_t units(int64_t numbers) {
  return kVnni ? (numbers + 1) / 2 : numbers;
}

/// A row along which the depth runs: whole vectors.
template <bool kVnni>
FIAK_INLINE void load_units(const char* row, DType dtype, int64_t size, float* target) {
  if constexpr (!kVnni) return load_row(row, dtype, size, 1.0f, target);
#if defined(FIAK_ISA_AVX512_BF16)
  for (int64_t d = 0; d < size; d += 2 * kLanes) {
    store(target + d / 2, load_vnni_in_order(row + 2 * d, smaller(2 * kLanes, size - d)));
  }
#endif
}

/// Two rows across which the depth runs, or with kVnni == false only the first; `second` may be null.
template <bool kVnni>
FIAK_INLINE void load_across(const char* first, [[maybe_unused]] const char* second, DType dtype, int64_t size,
                             float* target) {
  if constexpr (!kVnni) return load_row(first, dtype, size, 1.0f, target);
#if defined(FIAK_ISA_AVX512_BF16)
  for (int64_t d = 0; d < size; d += kLanes) {
    const int64_t width = smaller(kLanes, size - d);
    const Vec pairs = load_vnni_of(first + 2 * d, (second != nullptr ? second : first) + 2 * d, width);
    store(target + d, second != nullptr ? pairs : low_half(pairs));
  }
#endif
}

/// The transpose of the head's rows of the weight: the depth runs along in_features. `rows` holds head_dim rows of
/// padded units.
template <bool kVnni>
Columns weight_columns(const CompactLinearArgs& args, int64_t h, float* rows, float* target) {
  if constexpr (!kVnni) {
    const Panel panel = make_panel(weight_of(args), args.dtype, 0, h, args.head_dim, args.in_features, rows);
    return transpose(panel, args.head_dim, args.in_features, target);
  }
  const Panel panel{rows, padded(units<kVnni>(args.in_features))};
  for (int64_t d = 0; d < args.head_dim; ++d) {
    load_units<kVnni>(row_address(weight_of(args), args.dtype, 0, h, d), args.dtype, args.in_features,
                      rows + d * panel.stride);
  }
  return transpose(panel, args.head_dim, units<kVnni>(args.in_features), target);
}

/// The head's rows of the weight, with the depth across its rows: units(head_dim) rows.
template <bool kVnni>
Panel weight_panel(const CompactLinearArgs& args, int64_t h, float* scratch) {
  if constexpr (!kVnni) return make_panel(weight_of(args), args.dtype, 0, h, args.head_dim, args.in_features, scratch);
  const int64_t stride = padded(args.in_features);
  for (int64_t d = 0; d < args.head_dim; d += 2) {
    const char* row = row_address(weight_of(args), args.dtype, 0, h, d);
    load_across<kVnni>(row, d + 1 < args.head_dim ? row + 2 * args.weight_stride : nullptr, args.dtype,
                       args.in_features, scratch + d / 2 * stride);
  }
  return {scratch, stride};
}

/// Gathers the kept rows [first, first + count) of the input, zero rows up to whole tiles: the depth runs along them.
template <bool kVnni>
void gather(const CompactLinearArgs& args, int64_t b, const int64_t* keep, int64_t count, float* target) {
  const int64_t stride = padded(units<kVnni>(args.in_features));
  for (int64_t i = 0; i < count; ++i) {
    load_units<kVnni>(row_address(args.input, args.dtype, b, 0, keep[i]), args.dtype, args.in_features,
                      target + i * stride);
  }
  std::memset(target + count * stride, 0, (tile_rows(count) - count) * stride * sizeof(float));
}

#if defined(FIAK_ISA_AMX_BF16)
/// The product of kept rows and a head's weight by AMX tiles (amx.h).
class TileProduct {
 public:
  static int64_t weight_floats(const CompactLinearArgs& args) {
    return sides(args.head_dim) * tile_units(args.in_features);
  }
  TileProduct(const CompactLinearArgs& args, ScratchArena& scratch)
      : args_(args), units_(tile_units(args.in_features)), rows_(scratch.floats(sides(kBlockRows) * units_)) {}

  __attribute__((always_inline)) void pack_weight(int64_t h, float* weight) {
    pack_right([&](int64_t d) { return row_address(weight_of(args_), args_.dtype, 0, h, d); }, args_.head_dim,
               args_.in_features, weight);
  }
  /// Of rows keep[0, count), of `left` that there still are, and a packed weight, in rows of `width`.
  __attribute__((always_inline)) void multiply(int64_t b, const int64_t* keep, int64_t count, int64_t,
                                               const float* weight, float* out, int64_t width) {
    pack_left([&](int64_t i) { return row_address(args_.input, args_.dtype, b, 0, keep[i]); }, count, args_.in_features,
              rows_);
    for_tiles(
        sides(count), sides(args_.head_dim), [&](auto sums, int64_t r, int64_t c) __attribute__((always_inline)) {
          sums.clear();
          sums.add(rows_ + r * units_, units_, weight + c * units_, units_, chunks(args_.in_features));
          sums.store(out + kTileSide * (r * width + c), width);
        });
  }

 private:
  const CompactLinearArgs& args_;
  int64_t units_;
  float* rows_;
  Tiles tiles_;
};
#endif

/// Makes pairs of rows 2 i and 2 i + 1 of [count, kTileRows] numbers, which bfloat16 holds; in place.
template <bool kVnni>
void pair_rows(float* rows, int64_t count) {
  if constexpr (!kVnni) return;
  for (int64_t k = 0; k < count; k += 2) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const uint32_t low = float_to_bits(rows[k * kTileRows + r]) >> 16;
      const uint32_t high = k + 1 < count ? float_to_bits(rows[(k + 1) * kTileRows + r]) & 0xffff0000u : 0;
      rows[k / 2 * kTileRows + r] = bits_to_float(low | high);
    }
  }
}

/// The same by vectors.
template <bool kVnni>
class VectorProduct {
 public:
  static int64_t weight_floats(const CompactLinearArgs& args) {
    return units<kVnni>(args.in_features) * tile_columns(args.head_dim);
  }
  VectorProduct(const CompactLinearArgs& args, ScratchArena& scratch)
      : args_(args),
        depth_(units<kVnni>(args.in_features)),
        panel_(scratch.floats(args.head_dim * padded(args.in_features))),
        rows_(scratch.floats(kBlockRows * padded(depth_))) {}

  __attribute__((always_inline)) void pack_weight(int64_t h, float* weight) {
    weight_columns<kVnni>(args_, h, panel_, weight);
  }
  __attribute__((always_inline)) void multiply(int64_t b, const int64_t* keep, int64_t count, int64_t left,
                                               const float* weight, float* out, int64_t width) {
    const Columns columns{weight, kTileWidth, depth_ * kTileWidth};  // as transpose leaves them
    if (args_.dtype == DType::kFloat32) {
      // No need to gather.
      const float* rows[kBlockRows + kTileRows];
      for (int64_t i = 0; i < tile_rows(count) + kTileRows; ++i) {
        const int64_t row = keep[i < left ? i : 0];  // beyond, results are not wanted
        rows[i] = reinterpret_cast<const float*>(row_address(args_.input, args_.dtype, b, 0, row));
      }
      return matrix_product<false>(ScatteredRows{rows, args_.in_features * 4}, columns, tile_rows(count),
                                   padded(args_.head_dim), depth_, out, width);
    }
    gather<kVnni>(args_, b, keep, count, rows_);
    matrix_product<false, kVnni>(StridedRows{rows_, padded(depth_), 1}, columns, tile_rows(count),
                                 padded(args_.head_dim), depth_, out, width);
  }

 private:
  const CompactLinearArgs& args_;
  int64_t depth_;
  float *panel_, *rows_;
};

/// Floats of whole cache lines.
constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

/// Heads whose packed weights, of `weight_floats` each, are kept.
int64_t heads_at_once(const CompactLinearArgs& args, int64_t weight_floats) {
  return larger(1, smaller(args.heads, kWeightBytes / larger(1, weight_floats * 4)));
}

template <class Product>
void count_blocks(const CompactLinearArgs& args, BlockCounts& blocks) {
  blocks.add(args.heads, heads_at_once(args, whole_lines(Product::weight_floats(args))));
  blocks.add(args.kept, kBlockRows);
  blocks.add(args.kept, kTileRows);
  for (const int64_t size : {args.head_dim, args.in_features}) {
    blocks.add(size, kTileWidth);
    blocks.add(size, kTileRows);
    blocks.add(size, kLanes);
  }
}

template <class Product>
void forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) {
  // A few heads at a time, whose packed weights stay in the cache, for one batch element after the other, whose rows
  // then come from there for all but the first of them.
  const int64_t weight_floats = whole_lines(Product::weight_floats(args));
  const int64_t at_once = heads_at_once(args, weight_floats);
  parallel_range(parallel, args.heads * args.batch, [&](int64_t begin, int64_t end) {
    const int64_t head_dim = padded(args.head_dim), width = tile_columns(args.head_dim);
    ThreadArena scratch;
    float* weights = scratch.floats(at_once * weight_floats);
    Product product(args, scratch);
    float* out = scratch.floats(kBlockRows * width);
    float* bias = scratch.floats(head_dim);
    for (int64_t i = begin; i < end;) {
      const int64_t first_head = i / (at_once * args.batch) * at_once,
                    heads = smaller(at_once, args.heads - first_head);
      const int64_t from = i - first_head * args.batch, to = smaller(end - first_head * args.batch, heads * args.batch);
      for (int64_t k = from; k < to; ++k) {
        const int64_t b = k / heads, h = first_head + k % heads;
        float* weight = weights + k % heads * weight_floats;
        if (k - from < heads) product.pack_weight(h, weight);
        const int64_t kept = kept_rows(args, h);
        if (args.bias != nullptr) {
          load_row(static_cast<const char*>(args.bias) + h * args.head_dim * element_size(args.dtype), args.dtype,
                   args.head_dim, 1.0f, bias);
        }
        for (int64_t first = 0; first < args.kept; first += kBlockRows) {
          const int64_t left = larger(0, kept - first), count = smaller(kBlockRows, left);
          for (int64_t r = 0; r < count; ++r) {
            prefetch_row_for_writing(row_address(output, args.dtype, b, h, first + r),
                                     args.head_dim * element_size(args.dtype));
          }
          if (count > 0) product.multiply(b, args.keep + h * args.kept + first, count, left, weight, out, width);
          for (int64_t r = 0; r < count; ++r) {
            if (args.bias != nullptr) {
              for (int64_t d = 0; d < head_dim; d += kLanes) {
                store(out + r * width + d, add(load(out + r * width + d), load(bias + d)));
              }
            }
            store_row(out + r * width, args.dtype, args.head_dim, 1.0f,
                      row_address(output, args.dtype, b, h, first + r));
          }
          for (int64_t r = first + count; r < smaller(args.kept, first + kBlockRows); ++r) {
            std::memset(row_address(output, args.dtype, b, h, r), 0, args.head_dim * element_size(args.dtype));
          }
        }
      }
      i = first_head * args.batch + to;
    }
  });
}

template <bool kVnni>
void backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) {
  const int64_t features = padded(args.in_features), head_dim = padded(args.head_dim);
  const int64_t element = element_size(args.dtype);
  const int64_t depth = units<kVnni>(args.head_dim), stride = padded(depth);

  if (grads.grad_input != nullptr) {
    parallel_range(parallel, args.batch, [&](int64_t begin, int64_t end) {
      ThreadArena scratch;
      float* weight_scratch = scratch.floats(args.head_dim * features);
      float* grad_rows = scratch.floats(kBlockRows * head_dim);
      float* product = scratch.floats(kBlockRows * features);
      float* sums = scratch.floats(args.rows * features);
      for (int64_t b = begin; b < end; ++b) {
        std::memset(sums, 0, args.rows * features * sizeof(float));
        for (int64_t h = 0; h < args.heads; ++h) {
          const Columns weight = columns_of(weight_panel<kVnni>(args, h, weight_scratch));
          const int64_t* keep = args.keep + h * args.kept;
          const int64_t kept = kept_rows(args, h);
          for (int64_t first = 0; first < kept; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, kept - first);
            for (int64_t k = 0; k < count; ++k) {
              load_units<kVnni>(row_address(grads.grad_output, args.dtype, b, h, first + k), args.dtype, args.head_dim,
                                grad_rows + k * stride);
            }
            std::memset(grad_rows + count * stride, 0, (tile_rows(count) - count) * stride * sizeof(float));
            matrix_product<false, kVnni>(StridedRows{grad_rows, stride, 1}, weight, tile_rows(count), features, depth,
                                         product, features);
            for (int64_t k = 0; k < count; ++k) {
              float* sum = sums + keep[first + k] * features;
              for (int64_t x = 0; x < features; x += kLanes) {
                store(sum + x, add(load(sum + x), load(product + k * features + x)));
              }
            }
          }
        }
        char* target = static_cast<char*>(grads.grad_input) + b * args.rows * args.in_features * element;
        for (int64_t row = 0; row < args.rows; ++row) {
          store_row(sums + row * features, args.dtype, args.in_features, 1.0f,
                    target + row * args.in_features * element);
        }
      }
    });
  }

  if (grads.grad_weight != nullptr || grads.grad_bias != nullptr) {
    // A thread owns whole tiles of a head's rows of the weight and sums over the batch in order.
    const int64_t tiles = (args.head_dim + kTileRows - 1) / kTileRows;
    parallel_range(parallel, args.heads * tiles, [&](int64_t begin, int64_t end) {
      ThreadArena scratch;
      float* rows = scratch.floats(kBlockRows * features);
      float* grad_columns = scratch.floats(kBlockRows * kTileRows);  // [row, kTileRows], this tile's columns of dY
      float* grad_row = scratch.floats(head_dim);
      float* sums = scratch.floats(kTileRows * features);
      auto* totals = reinterpret_cast<double*>(scratch.floats(2 * kTileRows * features));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i / tiles, d = i % tiles * kTileRows, wide = smaller(kTileRows, args.head_dim - d);
        const int64_t kept = kept_rows(args, h);
        double bias[kTileRows] = {};
        int64_t summed = 0;
        std::memset(sums, 0, kTileRows * features * sizeof(float));
        std::memset(totals, 0, kTileRows * features * sizeof(double));
        // Takes the sums into the totals.
        const auto add_up = [&] {
          for (int64_t x = 0; x < kTileRows * features; ++x) {
            totals[x] += static_cast<double>(sums[x]);
            sums[x] = 0.0f;
          }
          summed = 0;
        };
        for (int64_t b = 0; b < args.batch; ++b) {
          for (int64_t first = 0; first < kept; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, kept - first);
            const int64_t* keep = args.keep + h * args.kept + first;
            constexpr int64_t kStep = kVnni ? 2 : 1;
            for (int64_t k = 0; k < count; k += kStep) {
              const auto row = [&](int64_t i) { return row_address(args.input, args.dtype, b, 0, keep[i]); };
              load_across<kVnni>(row(k), kVnni && k + 1 < count ? row(k + 1) : nullptr, args.dtype, args.in_features,
                                 rows + units<kVnni>(k) * features);
            }
            for (int64_t k = 0; k < count; ++k) {
              load_row(row_address(grads.grad_output, args.dtype, b, h, first + k), args.dtype, args.head_dim, 1.0f,
                       grad_row);
              for (int64_t r = 0; r < kTileRows; ++r) {
                grad_columns[k * kTileRows + r] = r < wide ? grad_row[d + r] : 0.0f;
                bias[r] += static_cast<double>(grad_columns[k * kTileRows + r]);
              }
            }
            pair_rows<kVnni>(grad_columns, count);
            matrix_product<true, kVnni>(StridedRows{grad_columns, 1, kTileRows}, Columns{rows, features, kTileWidth},
                                        kTileRows, features, units<kVnni>(count), sums, features);
            summed += count;
            if (summed >= kSumRows) add_up();
          }
        }
        add_up();
        for (int64_t x = 0; x < kTileRows * features; ++x) sums[x] = static_cast<float>(totals[x]);
        for (int64_t r = 0; r < wide; ++r) {
          const int64_t row = h * args.head_dim + d + r;
          if (grads.grad_weight != nullptr) {
            store_row(sums + r * features, args.dtype, args.in_features, 1.0f,
                      static_cast<char*>(grads.grad_weight) + row * args.in_features * element);
          }
          if (grads.grad_bias != nullptr) {
            const auto sum = static_cast<float>(bias[r]);
            store_row(&sum, args.dtype, 1, 1.0f, static_cast<char*>(grads.grad_bias) + row * element);
          }
        }
      }
    });
  }
}

}  // namespace

void compact_linear_forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) {
#if defined(FIAK_ISA_AMX_BF16)
  if (args.dtype == DType::kBFloat16) return forward<TileProduct>(args, output, parallel);
#endif
  if (kHasVnni && args.dtype == DType::kBFloat16) return forward<VectorProduct<kHasVnni>>(args, output, parallel);
  forward<VectorProduct<false>>(args, output, parallel);
}

void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) {
  if (kHasVnni && args.dtype == DType::kBFloat16) return backward<kHasVnni>(args, grads, parallel);
  backward<false>(args, grads, parallel);
}

void compact_linear_blocks(const CompactLinearArgs& args, BlockCounts& blocks) {
#if defined(FIAK_ISA_AMX_BF16)
  if (args.dtype == DType::kBFloat16) return count_blocks<TileProduct>(args, blocks);
#endif
  if (kHasVnni && args.dtype == DType::kBFloat16) return count_blocks<VectorProduct<kHasVnni>>(args, blocks);
  count_blocks<VectorProduct<false>>(args, blocks);
}

}  // namespace fiak::cpu::FIAK_ISA
