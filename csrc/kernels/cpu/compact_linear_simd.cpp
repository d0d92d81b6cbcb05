// compact_linear, vectorised: the kept rows are gathered in blocks and multiplied by the head's slice of the weight.
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tables.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kBlockRows = 48;  // a multiple of kTileRows
static_assert(kBlockRows % kTileRows == 0);

/// How many rows of head h are kept: padding stands at the end.
int64_t kept_rows(const CompactLinearArgs& args, int64_t h) {
  int64_t kept = args.kept;
  while (kept > 0 && args.keep[h * args.kept + kept - 1] < 0) --kept;
  return kept;
}

/// The head's slice of the weight, [head_size, in_features].
Panel weight_panel(const CompactLinearArgs& args, int64_t h, float* scratch) {
  const Input weight{args.weight, 0, args.head_size * args.weight_stride, args.weight_stride};
  return make_panel(weight, args.dtype, 0, h, args.head_size, args.in_features, scratch);
}

/// Gathers the kept rows [first, first + count) of the input, zero rows up to whole tiles.
void gather(const CompactLinearArgs& args, int64_t b, const int64_t* keep, int64_t count, float* target) {
  const int64_t stride = padded(args.in_features);
  for (int64_t i = 0; i < count; ++i) {
    load_row(row_address(args.input, args.dtype, b, 0, keep[i]), args.dtype, args.in_features, 1.0f,
             target + i * stride);
  }
  std::memset(target + count * stride, 0, (tile_rows(count) - count) * stride * sizeof(float));
}

}  // namespace

void compact_linear_forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) {
  // Heads outside: a thread transposes a head's weight once and runs its share of the batch.
  parallel_range(parallel, args.heads * args.batch, [&](int64_t begin, int64_t end) {
    const int64_t features = padded(args.in_features), head_size = padded(args.head_size);
    const int64_t width = tile_columns(args.head_size);
    Carver scratch{static_cast<char*>(thread_scratch(carved(args.head_size * features) + carved(features * width) +
                                                     carved(kBlockRows * features) + carved(kBlockRows * width) +
                                                     carved(head_size)))};
    float* weight_scratch = scratch.floats(args.head_size * features);
    float* columns_scratch = scratch.floats(features * width);
    float* rows = scratch.floats(kBlockRows * features);
    float* out = scratch.floats(kBlockRows * width);
    float* bias = scratch.floats(head_size);
    Columns weight{};
    int64_t kept = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / args.batch, b = i % args.batch;
      if (i == begin || b == 0) {
        weight = transpose(weight_panel(args, h, weight_scratch), args.head_size, features, columns_scratch);
        kept = kept_rows(args, h);
        if (args.bias != nullptr) {
          load_row(static_cast<const char*>(args.bias) + h * args.head_size * element_size(args.dtype), args.dtype,
                   args.head_size, 1.0f, bias);
        }
      }
      for (int64_t first = 0; first < args.kept; first += kBlockRows) {
        const int64_t count = larger(0, smaller(kBlockRows, kept - first));
        gather(args, b, args.keep + h * args.kept + first, count, rows);
        matrix_product<false>(rows, features, 1, weight, tile_rows(count), head_size, features, out, width);
        for (int64_t k = 0; k < count; ++k) {
          if (args.bias != nullptr) {
            for (int64_t d = 0; d < head_size; d += kLanes) {
              store(out + k * width + d, add(load(out + k * width + d), load(bias + d)));
            }
          }
          store_row(out + k * width, args.dtype, args.head_size, 1.0f,
                    row_address(output, args.dtype, b, h, first + k));
        }
        for (int64_t k = first + count; k < smaller(args.kept, first + kBlockRows); ++k) {
          std::memset(row_address(output, args.dtype, b, h, k), 0, args.head_size * element_size(args.dtype));
        }
      }
    }
  });
}

void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) {
  const int64_t features = padded(args.in_features), head_size = padded(args.head_size);
  const int64_t element = element_size(args.dtype);

  if (grads.grad_input != nullptr) {
    parallel_range(parallel, args.batch, [&](int64_t begin, int64_t end) {
      Carver scratch{
          static_cast<char*>(thread_scratch(carved(args.head_size * features) + carved(kBlockRows * head_size) +
                                            carved(kBlockRows * features) + carved(args.rows * features)))};
      float* weight_scratch = scratch.floats(args.head_size * features);
      float* grad_rows = scratch.floats(kBlockRows * head_size);
      float* product = scratch.floats(kBlockRows * features);
      float* sums = scratch.floats(args.rows * features);
      for (int64_t b = begin; b < end; ++b) {
        std::memset(sums, 0, args.rows * features * sizeof(float));
        for (int64_t h = 0; h < args.heads; ++h) {
          const Columns weight = columns_of(weight_panel(args, h, weight_scratch));
          const int64_t* keep = args.keep + h * args.kept;
          const int64_t kept = kept_rows(args, h);
          for (int64_t first = 0; first < kept; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, kept - first);
            for (int64_t k = 0; k < count; ++k) {
              load_row(row_address(grads.grad_output, args.dtype, b, h, first + k), args.dtype, args.head_size, 1.0f,
                       grad_rows + k * head_size);
            }
            std::memset(grad_rows + count * head_size, 0, (tile_rows(count) - count) * head_size * sizeof(float));
            matrix_product<false>(grad_rows, head_size, 1, weight, tile_rows(count), features, args.head_size, product,
                                  features);
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
    const int64_t tiles = (args.head_size + kTileRows - 1) / kTileRows;
    parallel_range(parallel, args.heads * tiles, [&](int64_t begin, int64_t end) {
      Carver scratch{static_cast<char*>(thread_scratch(carved(kBlockRows * features) + carved(kBlockRows * kTileRows) +
                                                       carved(head_size) + carved(kTileRows * features)))};
      float* rows = scratch.floats(kBlockRows * features);
      float* slice = scratch.floats(kBlockRows * kTileRows);  // [row, kTileRows], this tile's columns of dY
      float* grad_row = scratch.floats(head_size);
      float* sums = scratch.floats(kTileRows * features);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i / tiles, d = i % tiles * kTileRows, wide = smaller(kTileRows, args.head_size - d);
        const int64_t kept = kept_rows(args, h);
        float bias[kTileRows] = {};
        std::memset(sums, 0, kTileRows * features * sizeof(float));
        for (int64_t b = 0; b < args.batch; ++b) {
          for (int64_t first = 0; first < kept; first += kBlockRows) {
            const int64_t count = smaller(kBlockRows, kept - first);
            gather(args, b, args.keep + h * args.kept + first, count, rows);
            for (int64_t k = 0; k < count; ++k) {
              load_row(row_address(grads.grad_output, args.dtype, b, h, first + k), args.dtype, args.head_size, 1.0f,
                       grad_row);
              for (int64_t r = 0; r < kTileRows; ++r) {
                slice[k * kTileRows + r] = r < wide ? grad_row[d + r] : 0.0f;
                bias[r] += slice[k * kTileRows + r];
              }
            }
            matrix_product<true>(slice, 1, kTileRows, Columns{rows, features, kTileWidth}, kTileRows, features, count,
                                 sums, features);
          }
        }
        for (int64_t r = 0; r < wide; ++r) {
          const int64_t row = h * args.head_size + d + r;
          if (grads.grad_weight != nullptr) {
            store_row(sums + r * features, args.dtype, args.in_features, 1.0f,
                      static_cast<char*>(grads.grad_weight) + row * args.in_features * element);
          }
          if (grads.grad_bias != nullptr) {
            store_row(bias + r, args.dtype, 1, 1.0f, static_cast<char*>(grads.grad_bias) + row * element);
          }
        }
      }
    });
  }
}

}  // namespace fiak::cpu::FIAK_ISA
