// Tiles of queries and keys, and their matrix products, that attention's kernels are made of. A tile lies in shared
// memory by rows, padded with zeros to a multiple of 16 columns. A warp multiplies 16 rows of its own.
//
// float16 and bfloat16 are multiplied on tensor cores, with sums in float32. float32 is multiplied exactly, by FMA:
// each thread has the same elements of the products as with tensor cores, so that all else is the same code.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_common.cuh"

namespace fiak::cuda {

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};

/// Of a product's 16 x 8 tiles, a thread has elements e = 0..3: rows fragment_row() + 8 (e / 2), columns
/// fragment_column() + e % 2. Four neighbouring lanes, a quad, share rows.
__device__ __forceinline__ int fragment_row() { return lane_index() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_index() % 4 * 2; }

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

/// Starts to copy rows [first, first + kRows) of a head to shared memory. Rows from `end` on, those whose bit in `used`
/// is not set, and columns from `columns` on to a multiple of 16, become zero; they are not read.
template <int kThreads, class Element, int kRows, int kStride>
__device__ __forceinline__ void load_rows(Element (&tile)[kRows][kStride], const Element* head, int64_t row_stride,
                                          int first, int end, int columns, uint64_t used = ~uint64_t{0}) {
  constexpr int kPiece = 16 / sizeof(Element);
  constexpr int kPieces = kStride / kPiece - 1;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    if (column >= (columns + 15) / 16 * 16) continue;
    const bool inside = first + row < end && column < columns && (used >> row & 1) != 0;
    const int count = !inside ? 0 : columns - column < kPiece ? columns - column : kPiece;
    const Element* source = inside ? head + (first + row) * row_stride + column : head;
    Element* target = &tile[row][column];
    if (reinterpret_cast<uintptr_t>(source) % 16 == 0) {
      copy_async(target, source, static_cast<unsigned>(count * sizeof(Element)));
    } else {
      for (int e = 0; e < kPiece; ++e) target[e] = e < count ? source[e] : Element{};
    }
  }
}

/// consume(i, stage), after load(i, stage), for those i in [0, count) that `next` leaves: next(i) is the first of them
/// from i on. Loading runs one step ahead where there are two stages. What is loaded before, by asynchronous copies, is
/// there for the first consume, too.
template <int kStages, class Next, class Load, class Consume>
__device__ __forceinline__ void stream(int count, Next&& next, Load&& load, Consume&& consume) {
  int i = next(0);
  if (kStages == 2 && i < count) load(i, 0);
  copy_async_commit();
  for (int stage = 0; i < count; stage = (stage + 1) % kStages) {
    const int following = kStages == 2 ? next(i + 1) : i;
    if (following < count) load(following, (stage + kStages - 1) % kStages);
    copy_async_commit();
    copy_async_wait<kStages - 1>();
    __syncthreads();
    consume(i, stage);
    __syncthreads();  // all have read what the next load writes to
    i = kStages == 2 ? following : next(i + 1);
  }
}

/// The same for all i.
template <int kStages, class Load, class Consume>
__device__ __forceinline__ void stream(int count, Load&& load, Consume&& consume) {
  stream<kStages>(
      count, [](int i) { return i; }, load, consume);
}

/// sums (16 x 8 kTiles) += a b^T, of 16 rows of a and 8 kTiles rows of b, over their columns.
template <int kTiles, class Element, int kStride>
__device__ __forceinline__ void multiply_by_rows(float (&sums)[kTiles][4], const Element (*a)[kStride],
                                                 const Element (*b)[kStride], int columns) {
  const int lane = lane_index();
  if constexpr (sizeof(Element) == 2) {
    for (int k = 0; k < columns; k += 16) {
      uint32_t a_fragment[4];
      ldmatrix(a_fragment, &a[lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t b_fragments[4];  // of tiles t and t + 1
        ldmatrix(b_fragments, &b[8 * t + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
        mma(sums[t], a_fragment, b_fragments, Element{});
        mma(sums[t + 1], a_fragment, b_fragments + 2, Element{});
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < columns; k += 4) {
      const auto add = [](float& sum, const Float4& x, const Float4& y) {
        sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
      };
      const auto four = [k](const float* row) { return *reinterpret_cast<const Float4*>(row + k); };
      const Float4 a0 = four(a[fragment_row()]), a1 = four(a[fragment_row() + 8]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const Float4 b0 = four(b[8 * t + fragment_column()]), b1 = four(b[8 * t + fragment_column() + 1]);
        add(sums[t][0], a0, b0);
        add(sums[t][1], a0, b1);
        add(sums[t][2], a1, b0);
        add(sums[t][3], a1, b1);
      }
    }
  }
}

/// sums (16 x 8 kColumnTiles) += weights (16 x 8 kTiles, a product's elements) b, of 8 kTiles rows of b. Columns from
/// `columns` on, rounded up to 16, are left out.
template <int kColumnTiles, int kTiles, class Element, int kStride>
__device__ __forceinline__ void multiply_by_columns(float (&sums)[kColumnTiles][4], const float (&weights)[kTiles][4],
                                                    const Element (*b)[kStride], int columns) {
  const int lane = lane_index();
  if constexpr (sizeof(Element) == 2) {
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      const float(&left)[4] = weights[t], (&right)[4] = weights[t + 1];
      const uint32_t a_fragment[4] = {pack(left[0], left[1], Element{}), pack(left[2], left[3], Element{}),
                                      pack(right[0], right[1], Element{}), pack(right[2], right[3], Element{})};
#pragma unroll
      for (int d = 0; d < kColumnTiles; d += 2) {
        if (8 * d < columns) {
          uint32_t b_fragments[4];
          ldmatrix_transposed(b_fragments, &b[8 * t + lane % 16][8 * d + lane / 16 * 8]);
          mma(sums[d], a_fragment, b_fragments, Element{});
          mma(sums[d + 1], a_fragment, b_fragments + 2, Element{});
        }
      }
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll(kColumnTiles < 32 ? 8 : 2)
      for (int k = 0; k < 8; ++k) {
        const int source = lane / 4 * 4 + k / 2;
        const float w0 = __shfl_sync(kAllLanes, weights[t][k % 2], source);
        const float w1 = __shfl_sync(kAllLanes, weights[t][2 + k % 2], source);
#pragma unroll
        for (int d = 0; d < kColumnTiles; ++d) {
          if (8 * d < columns) {
            const Float2 y = *reinterpret_cast<const Float2*>(&b[8 * t + k][8 * d + fragment_column()]);
            sums[d][0] = fmaf(w0, y.x, sums[d][0]);
            sums[d][1] = fmaf(w0, y.y, sums[d][1]);
            sums[d][2] = fmaf(w1, y.x, sums[d][2]);
            sums[d][3] = fmaf(w1, y.y, sums[d][3]);
          }
        }
      }
    }
  }
}

/// Writes columns `column` and the next of a row, as far as it has them.
template <class Element>
__device__ __forceinline__ void store_pair(Element* row, int column, int columns, float x, float y) {
  Element* target = row + column;
  if constexpr (sizeof(Element) == 2) {
    const uint32_t bits = pack(x, y, Element{});
    if (column + 1 < columns && reinterpret_cast<uintptr_t>(target) % 4 == 0) {
      *reinterpret_cast<uint32_t*>(target) = bits;
      return;
    }
    if (column < columns) target[0] = Element{static_cast<uint16_t>(bits)};
    if (column + 1 < columns) target[1] = Element{static_cast<uint16_t>(bits >> 16)};
  } else {
    if (column < columns) target[0] = x;
    if (column + 1 < columns) target[1] = y;
  }
}

/// Writes a warp's 16 rows from `first` on, times factors[0] (rows up to 8) and factors[1]; rows from `end` on are left
/// out, and a factor of 0 gives 0 whatever the sums are.
template <int kColumnTiles, class Element>
__device__ __forceinline__ void store_rows(const float (&sums)[kColumnTiles][4], const float (&factors)[2],
                                           Element* head, int64_t row_stride, int first, int end, int columns) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + fragment_row() + 8 * r;
    if (row >= end) continue;
#pragma unroll
    for (int d = 0; d < kColumnTiles; ++d) {
      const float x = factors[r] == 0 ? 0 : factors[r] * sums[d][2 * r];
      const float y = factors[r] == 0 ? 0 : factors[r] * sums[d][2 * r + 1];
      store_pair(head + row * row_stride, 8 * d + fragment_column(), columns, x, y);
    }
  }
}

}  // namespace fiak::cuda
