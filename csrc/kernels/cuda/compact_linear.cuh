// Device code of compact_linear and its backward: matrix products whose rows are gathered by `keep` while they are
// loaded, so that nothing is computed for rows that nobody keeps, and no copy of the kept rows is made. Keeps to what
// both nvcc and csrc/simt compile.
//
// A block computes kLinearTile x kLinearTile elements of the result, a warp 16 rows of them. What is multiplied streams
// through shared memory, 128 bytes' worth of the summed dimension at a time. Sums are in float32 and in a fixed order,
// without atomics: the same bits every time. Where they run over all kept rows of a batch, in the gradients of weight
// and bias, they are sums of blocks of rows: the error of one chain would grow with the rows.
//
//   fiak_compact_linear_forward_<type>      output[b, h, k]     = weight[h] input[b, keep[h, k]] + bias[h]; 0 where -1
//       grid: batch * heads * ceil(kept / kLinearTile) * ceil(head_dim / kLinearTile)
//   fiak_compact_linear_grad_input_<type>   grad_input[b, m]    = sum of grad_output[b, h, k] weight[h], keep[h, k] = m
//       grid: batch * ceil(rows / kLinearTile) * ceil(in_features / kLinearTile)
//   fiak_compact_linear_grad_weight_<type>  grad_weight[h]      = sum of grad_output[b, h, k]^T input[b, keep[h, k]]
//       grid: heads * ceil(head_dim / kLinearTile) * ceil(in_features / kLinearTile)
//   fiak_compact_linear_grad_bias_<type>    grad_bias[h]        = sum of grad_output[b, h, k], keep[h, k] >= 0
//       grid: heads * ceil(head_dim / 32)
//
// <type>: f32, f16 or bf16. parameters: CompactLinearParams, 21 fields of 8 bytes in the order below; block:
// kLinearThreads, of grad_bias kBiasThreads; dynamic shared memory: sizeof(LinearForwardShared<Element>),
// sizeof(LinearGradInputShared<Element>), sizeof(LinearGradWeightShared<Element>), sizeof(LinearBiasShared).
#pragma once

#include <cstdint>

#include "kernels/compact.h"
#include "kernels/cuda/attention_params.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/keep.cuh"
#include "kernels/cuda/kernel.h"

namespace fiak::cuda {

/// Strides are in elements; last dimensions are contiguous.
struct CompactLinearParams {
  const int64_t* keep;  ///< [heads, kept], ascending, padded at the end with -1
  const void* input;    ///< [batch, rows, in_features]
  int64_t input_batch_stride, input_row_stride;
  const void* weight;  ///< [heads * head_dim, in_features]
  int64_t weight_stride;
  const void* bias;           ///< [heads * head_dim], or null
  const void* grad_output;    ///< [batch, heads, kept, head_dim]; not read by forward
  int64_t grad_strides[3];    ///< batch, head, row
  void* result;               ///< forward: [batch, heads, kept, head_dim]; else contiguous, in the input's own shape
  int64_t result_strides[3];  ///< batch, head, row; of forward
  int64_t batch, heads, rows, kept, in_features, head_dim;
};
static_assert(sizeof(CompactLinearParams) == 21 * 8);

constexpr int kLinearTile = 64;
constexpr int kLinearThreads = 2 * kLinearTile;
constexpr int kBiasWarps = 16, kBiasThreads = 32 * kBiasWarps;
constexpr int kSumRows = 256;  // of a chain in float32

/// How much of the summed dimension a tile holds.
template <class Element>
constexpr int kLinearDepth = 128 / sizeof(Element);

/// A tile in shared memory; rows start 4 banks apart.
template <class Element, int kRows, int kColumns>
struct alignas(16) LinearTile {
  static constexpr int kTileRows = kRows, kTileColumns = kColumns;
  Element rows[kRows][kColumns + 16 / sizeof(Element)];
};

template <class Element>
struct LinearForwardShared {
  LinearTile<Element, kLinearTile, kLinearDepth<Element>> input[2], weight[2];
  int64_t kept_rows[kLinearTile];  // of input, or -1
};
template <class Element>
struct LinearGradInputShared {
  LinearTile<Element, kLinearTile, kLinearDepth<Element>> grad[2];
  LinearTile<Element, kLinearDepth<Element>, kLinearTile> weight[2];
  int64_t places[2][kLinearTile];  // of heads in turn: the k with keep[h, k] == row, or -1
};
template <class Element>
struct LinearGradWeightShared {
  LinearTile<Element, kLinearDepth<Element>, kLinearTile> grad[2], input[2];
};
struct LinearBiasShared {
  double sums[kBiasWarps][32];
};

/// The input row that head h keeps at place k, or -1.
__device__ __forceinline__ int64_t kept_row(const CompactLinearParams& params, int64_t h, int64_t k) {
  return kept_row(params.keep, params.kept, params.rows, h, k);
}

template <class Element>
__device__ __forceinline__ const Element* input_row(const CompactLinearParams& params, int64_t b, int64_t row) {
  return static_cast<const Element*>(params.input) + b * params.input_batch_stride + row * params.input_row_stride;
}
template <class Element>
__device__ __forceinline__ const Element* weight_row(const CompactLinearParams& params, int64_t h, int64_t d) {
  return static_cast<const Element*>(params.weight) + (h * params.head_dim + d) * params.weight_stride;
}
template <class Element>
__device__ __forceinline__ const Element* grad_row(const CompactLinearParams& params, int64_t b, int64_t h, int64_t k) {
  return static_cast<const Element*>(params.grad_output) + b * params.grad_strides[0] + h * params.grad_strides[1] +
         k * params.grad_strides[2];
}

/// Starts to copy columns [first, end) of the rows that row_of(row) points to, zeros where that is null; what the tile
/// has beyond them becomes zero.
template <class Element, int kRows, int kColumns, class RowOf>
__device__ __forceinline__ void load_gathered(LinearTile<Element, kRows, kColumns>& tile, int64_t first, int64_t end,
                                              RowOf&& row_of) {
  constexpr int kPiece = 16 / sizeof(Element);
  constexpr int kPieces = kColumns / kPiece;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kLinearThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    Element* target = &tile.rows[row][column];
    const int64_t left = end - first - column;
    const Element* source = left > 0 ? row_of(row) : nullptr;
    const int count = source == nullptr ? 0 : left < kPiece ? static_cast<int>(left) : kPiece;
    source += count > 0 ? first + column : 0;
    if (count > 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
      copy_async(target, source, static_cast<unsigned>(count * sizeof(Element)));
    } else {
      for (int e = 0; e < kPiece; ++e) target[e] = e < count ? source[e] : Element{};
    }
  }
}

/// sums (16 x 8 kTiles) += a b, of 16 rows of a, a tile by rows or, transposed, by columns, from column `first` on, and
/// all rows of b.
template <bool kTransposed, int kTiles, class Element, int kStrideA, int kStrideB>
__device__ __forceinline__ void multiply_tile(float (&sums)[kTiles][4], const Element (*a)[kStrideA], int first,
                                              const Element (*b)[kStrideB], int depth) {
  const int lane = lane_index();
  if constexpr (sizeof(Element) == 2) {
    for (int k = 0; k < depth; k += 16) {
      uint32_t a_fragment[4];
      if constexpr (kTransposed) {
        ldmatrix_transposed(a_fragment, &a[k + lane / 16 * 8 + lane % 8][first + lane / 8 % 2 * 8]);
      } else {
        ldmatrix(a_fragment, &a[first + lane % 16][k + lane / 16 * 8]);
      }
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t b_fragments[4];  // of tiles t and t + 1
        ldmatrix_transposed(b_fragments, &b[k + lane % 16][8 * t + lane / 16 * 8]);
        mma(sums[t], a_fragment, b_fragments, Element{});
        mma(sums[t + 1], a_fragment, b_fragments + 2, Element{});
      }
    }
  } else {
    const int row = first + fragment_row();
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const float a0 = kTransposed ? a[k][row] : a[row][k], a1 = kTransposed ? a[k][row + 8] : a[row + 8][k];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const Float2 y = *reinterpret_cast<const Float2*>(&b[k][8 * t + fragment_column()]);
        sums[t][0] = fmaf(a0, y.x, sums[t][0]);
        sums[t][1] = fmaf(a0, y.y, sums[t][1]);
        sums[t][2] = fmaf(a1, y.x, sums[t][2]);
        sums[t][3] = fmaf(a1, y.y, sums[t][3]);
      }
    }
  }
}

/// The block's index, taken apart from its last part on.
struct BlockIndex {
  int64_t rest = blockIdx.x;
  __device__ __forceinline__ int64_t part(int64_t size) {
    const int64_t part = rest % size;
    rest /= size;
    return part;
  }
};

template <class Element>
__device__ inline void linear_forward_block(const CompactLinearParams& params) {
  constexpr int kStep = kLinearDepth<Element>;
  auto& shared = shared_memory<LinearForwardShared<Element>>();
  BlockIndex index;
  const int64_t first_d = index.part(tiles_of(params.head_dim, kLinearTile)) * kLinearTile;
  const int64_t first_k = index.part(tiles_of(params.kept, kLinearTile)) * kLinearTile;
  const int64_t h = index.part(params.heads), b = index.rest;
  for (int row = static_cast<int>(threadIdx.x); row < kLinearTile; row += kLinearThreads) {
    shared.kept_rows[row] = first_k + row < params.kept ? kept_row(params, h, first_k + row) : -1;
  }
  __syncthreads();

  float sums[kLinearTile / 8][4] = {};
  stream<2>(
      static_cast<int>(tiles_of(params.in_features, kStep)),
      [&](int step, int stage) {
        load_gathered(shared.input[stage], int64_t{step} * kStep, params.in_features, [&](int row) -> const Element* {
          const int64_t kept = shared.kept_rows[row];
          return kept < 0 ? nullptr : input_row<Element>(params, b, kept);
        });
        load_gathered(shared.weight[stage], int64_t{step} * kStep, params.in_features, [&](int row) -> const Element* {
          return first_d + row < params.head_dim ? weight_row<Element>(params, h, first_d + row) : nullptr;
        });
      },
      [&](int, int stage) {
        multiply_by_rows(sums, &shared.input[stage].rows[16 * warp_index()], shared.weight[stage].rows, kStep);
      });

  const auto* bias = static_cast<const Element*>(params.bias);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * warp_index() + fragment_row() + 8 * r;
    if (first_k + row >= params.kept) continue;
    const bool keeps = shared.kept_rows[row] >= 0;
    Element* target = static_cast<Element*>(params.result) + b * params.result_strides[0] +
                      h * params.result_strides[1] + (first_k + row) * params.result_strides[2];
#pragma unroll
    for (int t = 0; t < kLinearTile / 8; ++t) {
      const int64_t d = first_d + 8 * t + fragment_column();
      const auto biased = [&](int64_t at, float sum) {
        if (!keeps) return 0.0f;
        return bias != nullptr && at < params.head_dim ? sum + widen(bias[h * params.head_dim + at]) : sum;
      };
      store_pair(target, static_cast<int>(d), static_cast<int>(params.head_dim), biased(d, sums[t][2 * r]),
                 biased(d + 1, sums[t][2 * r + 1]));
    }
  }
}

/// Writes a block's tile of a contiguous matrix from (first_row, first_column) on.
template <class Element>
__device__ __forceinline__ void store_linear_tile(const float (&sums)[kLinearTile / 8][4], Element* matrix,
                                                  int64_t rows, int64_t columns, int64_t first_row,
                                                  int64_t first_column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first_row + 16 * warp_index() + fragment_row() + 8 * r;
    if (row >= rows) continue;
#pragma unroll
    for (int t = 0; t < kLinearTile / 8; ++t) {
      store_pair(matrix + row * columns, static_cast<int>(first_column) + 8 * t + fragment_column(),
                 static_cast<int>(columns), sums[t][2 * r], sums[t][2 * r + 1]);
    }
  }
}

/// A head that does not keep a row adds 0 times its weights.
template <class Element>
__device__ inline void linear_grad_input_block(const CompactLinearParams& params) {
  constexpr int kStep = kLinearDepth<Element>;
  auto& shared = shared_memory<LinearGradInputShared<Element>>();
  BlockIndex index;
  const int64_t first_x = index.part(tiles_of(params.in_features, kLinearTile)) * kLinearTile;
  const int64_t first_row = index.part(tiles_of(params.rows, kLinearTile)) * kLinearTile;
  const int64_t b = index.rest;
  const int steps = static_cast<int>(tiles_of(params.head_dim, kStep));

  float sums[kLinearTile / 8][4] = {};
  stream<2>(
      static_cast<int>(params.heads) * steps,
      [&](int step, int stage) {
        const int64_t h = step / steps, first_d = int64_t{step % steps} * kStep;
        int64_t(&places)[kLinearTile] = shared.places[h % 2];
        if (first_d == 0) {
          for (int row = static_cast<int>(threadIdx.x); row < kLinearTile; row += kLinearThreads) {
            places[row] = first_row + row < params.rows ? find_row(params.keep, params.kept, h, first_row + row) : -1;
          }
          __syncthreads();
        }
        load_gathered(shared.grad[stage], first_d, params.head_dim, [&](int row) -> const Element* {
          const int64_t k = places[row];
          return k < 0 ? nullptr : grad_row<Element>(params, b, h, k);
        });
        load_gathered(shared.weight[stage], first_x, params.in_features, [&](int row) -> const Element* {
          return first_d + row < params.head_dim ? weight_row<Element>(params, h, first_d + row) : nullptr;
        });
      },
      [&](int, int stage) {
        multiply_tile<false>(sums, shared.grad[stage].rows, 16 * warp_index(), shared.weight[stage].rows, kStep);
      });
  store_linear_tile(sums, static_cast<Element*>(params.result) + b * params.rows * params.in_features, params.rows,
                    params.in_features, first_row, first_x);
}

template <class Element>
__device__ inline void linear_grad_weight_block(const CompactLinearParams& params) {
  constexpr int kStep = kLinearDepth<Element>;
  auto& shared = shared_memory<LinearGradWeightShared<Element>>();
  BlockIndex index;
  const int64_t first_x = index.part(tiles_of(params.in_features, kLinearTile)) * kLinearTile;
  const int64_t first_d = index.part(tiles_of(params.head_dim, kLinearTile)) * kLinearTile;
  const int64_t h = index.rest;
  const auto kept = static_cast<unsigned>(params.kept), total = static_cast<unsigned>(params.batch) * kept;

  float sums[kLinearTile / 8][4] = {}, totals[kLinearTile / 8][4] = {};
  const auto add_up = [&] {
#pragma unroll
    for (int t = 0; t < kLinearTile / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[t][i] += sums[t][i];
        sums[t][i] = 0;
      }
    }
  };
  stream<2>(
      static_cast<int>(tiles_of(total, kStep)),
      [&](int step, int stage) {
        const unsigned first = static_cast<unsigned>(step) * kStep;
        const auto load = [&](auto& tile, int64_t first_column, int64_t columns, auto&& row_of) {
          load_gathered(tile, first_column, columns, [&](int row) -> const Element* {
            const unsigned at = first + static_cast<unsigned>(row);
            if (at >= total) return nullptr;
            const unsigned b = at / kept, k = at % kept;
            const int64_t input = kept_row(params, h, k);
            return input < 0 ? nullptr : row_of(int64_t{b}, int64_t{k}, input);
          });
        };
        load(shared.grad[stage], first_d, params.head_dim,
             [&](int64_t b, int64_t k, int64_t) { return grad_row<Element>(params, b, h, k); });
        load(shared.input[stage], first_x, params.in_features,
             [&](int64_t b, int64_t, int64_t row) { return input_row<Element>(params, b, row); });
      },
      [&](int step, int stage) {
        multiply_tile<true>(sums, shared.grad[stage].rows, 16 * warp_index(), shared.input[stage].rows, kStep);
        if ((step + 1) % (kSumRows / kStep) == 0) add_up();
      });
  add_up();
  store_linear_tile(totals, static_cast<Element*>(params.result) + h * params.head_dim * params.in_features,
                    params.head_dim, params.in_features, first_d, first_x);
}

/// Of 32 columns, a warp sums every kBiasWarps-th row.
template <class Element>
__device__ inline void linear_grad_bias_block(const CompactLinearParams& params) {
  auto& shared = shared_memory<LinearBiasShared>();
  BlockIndex index;
  const int64_t d = index.part(tiles_of(params.head_dim, 32)) * 32 + lane_index();
  const int64_t h = index.rest;
  const auto kept = static_cast<unsigned>(params.kept), total = static_cast<unsigned>(params.batch) * kept;
  double total_sum = 0;
  if (d < params.head_dim) {
    for (unsigned first = static_cast<unsigned>(warp_index()); first < total;) {
      const unsigned end = total - first > kSumRows * kBiasWarps ? first + kSumRows * kBiasWarps : total;
      float sum = 0;
#pragma unroll 4
      for (; first < end; first += kBiasWarps) {
        const unsigned b = first / kept, k = first % kept;
        if (kept_row(params, h, k) >= 0) sum += widen(grad_row<Element>(params, b, h, k)[d]);
      }
      total_sum += static_cast<double>(sum);
    }
  }
  shared.sums[warp_index()][lane_index()] = total_sum;
  __syncthreads();
  if (warp_index() > 0 || d >= params.head_dim) return;
  for (int warp = 1; warp < kBiasWarps; ++warp) total_sum += shared.sums[warp][lane_index()];
  const auto sum = static_cast<float>(total_sum);
  auto* target = static_cast<Element*>(params.result) + h * params.head_dim;
  if constexpr (sizeof(Element) == 2) {
    target[d] = Element{static_cast<uint16_t>(pack(sum, sum, Element{}))};
  } else {
    target[d] = sum;
  }
}

#define FIAK_LINEAR_KERNELS(type, Element)                                                                             \
  FIAK_KERNEL(fiak_compact_linear_forward_##type, linear_forward_kernel(Element), CompactLinearParams, kLinearThreads, \
              sizeof(LinearForwardShared<Element>), linear_forward_block<Element>)                                     \
  FIAK_KERNEL(fiak_compact_linear_grad_input_##type, linear_grad_input_kernel(Element), CompactLinearParams,           \
              kLinearThreads, sizeof(LinearGradInputShared<Element>), linear_grad_input_block<Element>)                \
  FIAK_KERNEL(fiak_compact_linear_grad_weight_##type, linear_grad_weight_kernel(Element), CompactLinearParams,         \
              kLinearThreads, sizeof(LinearGradWeightShared<Element>), linear_grad_weight_block<Element>)              \
  FIAK_KERNEL(fiak_compact_linear_grad_bias_##type, linear_grad_bias_kernel(Element), CompactLinearParams,             \
              kBiasThreads, sizeof(LinearBiasShared), linear_grad_bias_block<Element>)
FIAK_LINEAR_KERNELS(f32, float)
FIAK_LINEAR_KERNELS(f16, Half)
FIAK_LINEAR_KERNELS(bf16, BFloat16)
#undef FIAK_LINEAR_KERNELS

/// visit(Kernel) for all of them.
template <class Visit>
void for_each_compact_linear_kernel(Visit&& visit) {
  const auto all = [&](auto element) {
    visit(linear_forward_kernel(element));
    visit(linear_grad_input_kernel(element));
    visit(linear_grad_weight_kernel(element));
    visit(linear_grad_bias_kernel(element));
  };
  all(float{});
  all(Half{});
  all(BFloat16{});
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

inline CompactLinearParams linear_params(const CompactLinearArgs& args) {
  CompactLinearParams params{};
  params.keep = args.keep;
  params.input = args.input.data;
  params.input_batch_stride = args.input.batch_stride;
  params.input_row_stride = args.input.row_stride;
  params.weight = args.weight;
  params.weight_stride = args.weight_stride;
  params.bias = args.bias;
  params.batch = args.batch;
  params.heads = args.heads;
  params.rows = args.rows;
  params.kept = args.kept;
  params.in_features = args.in_features;
  params.head_dim = args.head_dim;
  return params;
}

template <class Call>
void with_linear_element(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kFloat16:
      return call(Half{});
    case DType::kBFloat16:
      return call(BFloat16{});
    default:
      return call(float{});
  }
}

/// Does launch(kernel, blocks, params) of what computes `output`, if that has elements.
template <class Launch>
void linear_forward(const CompactLinearArgs& args, const Output& output, Launch&& launch) {
  CompactLinearParams params = linear_params(args);
  params.result = output.data;
  params.result_strides[0] = output.batch_stride;
  params.result_strides[1] = output.head_stride;
  params.result_strides[2] = output.row_stride;
  const int64_t blocks =
      args.batch * args.heads * tiles_of(args.kept, kLinearTile) * tiles_of(args.head_dim, kLinearTile);
  if (blocks == 0) return;
  with_linear_element(args.dtype, [&](auto element) { launch(linear_forward_kernel(element), blocks, params); });
}

/// The same of the gradients that are wanted.
template <class Launch>
void linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, Launch&& launch) {
  CompactLinearParams params = linear_params(args);
  params.grad_output = grads.grad_output.data;
  params.grad_strides[0] = grads.grad_output.batch_stride;
  params.grad_strides[1] = grads.grad_output.head_stride;
  params.grad_strides[2] = grads.grad_output.row_stride;
  const auto run = [&](const auto& kernel, void* result, int64_t blocks) {
    if (result == nullptr || blocks == 0) return;
    params.result = result;
    launch(kernel, blocks, params);
  };
  const int64_t x_tiles = tiles_of(args.in_features, kLinearTile);
  with_linear_element(args.dtype, [&](auto element) {
    run(linear_grad_input_kernel(element), grads.grad_input, args.batch * tiles_of(args.rows, kLinearTile) * x_tiles);
    run(linear_grad_weight_kernel(element), grads.grad_weight,
        args.heads * tiles_of(args.head_dim, kLinearTile) * x_tiles);
    run(linear_grad_bias_kernel(element), grads.grad_bias, args.heads * tiles_of(args.head_dim, 32));
  });
}

}  // namespace fiak::cuda
