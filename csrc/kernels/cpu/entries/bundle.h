// Rows of several samples side by side, so that one instruction serves all of them: a sparse pattern is the same
// for the whole batch, and so are the indices that the kernels follow.
//
// A bundle of E samples (1, 2 or 4) interleaves their rows in quads of four lanes: quad i of the packed row is quad
// i / E of sample i % E. One sample's row is as it was. A dot product's partial sums then reduce to one sum for each
// sample with fewer steps, and E samples share the decoding of an index and the broadcast of a weight's place.
#pragma once

#include "kernels/cpu/dense/panel.h"
#include "kernels/cpu/isa/quads.h"

namespace fiak::cpu::FIAK_ISA {

constexpr int kMaxVectors = 8;  // vectors of a row that one pass of a kernel handles: what fits into registers

/// Vectors of a packed row.
FIAK_INLINE int64_t row_vectors(int64_t size, Storage storage, int samples) {
  return cpu::row_vectors(size, storage, samples, kLanes);
}

/// Up to four samples whose rows are packed together.
struct SampleBundle {
  int samples;
  int64_t b[4];
};

/// Packed rows. Rows of more than kMaxVectors vectors are cut into parts, each a panel of its own: vector c of row n is
/// at data + part * part_bytes + (first + n) * row_bytes(part) + c % kMaxVectors * kVectorBytes, where part = c /
/// kMaxVectors.
struct BundlePanel {
  char* data;
  int64_t vectors, part_bytes, first;

  __attribute__((always_inline)) int64_t parts() const { return (vectors + kMaxVectors - 1) / kMaxVectors; }
  __attribute__((always_inline)) int64_t part_vectors(int64_t part) const {
    return smaller(kMaxVectors, vectors - part * kMaxVectors);
  }
  __attribute__((always_inline)) char* part(int64_t part) const { return data + part * part_bytes; }
  /// The panel without its first n rows.
  __attribute__((always_inline)) BundlePanel from(int64_t n) const { return {data, vectors, part_bytes, first + n}; }
  __attribute__((always_inline)) char* vector(int64_t n, int64_t c) const {
    const int64_t i = c / kMaxVectors;
    return part(i) + ((first + n) * part_vectors(i) + c % kMaxVectors) * kVectorBytes;
  }
};
FIAK_INLINE BundlePanel bundle_panel(char* data, int64_t rows, int64_t vectors) {
  return {data, vectors, rows * kMaxVectors * kVectorBytes, 0};
}
FIAK_INLINE int64_t bundle_panel_floats(int64_t rows, int64_t vectors) { return rows * vectors * kLanes; }

/// What stands behind the last column of a packed row. For the Gaussian score, which is the dot score plus a bias of
/// each key: q.k - |k|^2/2 = (q, 1).(k, -|k|^2/2). In bfloat16 the latter takes three columns, of 8 bits each, and one
/// of zeros.
enum class Extra { kNone, kOne, kHalfSquare };

FIAK_INLINE int64_t columns_with(Extra extra, int64_t size, Storage storage) {
  return extra == Extra::kNone ? size : size + (storage == Storage::kFloat32 ? 1 : 4);
}

/// Floats of pack_row's scratch.
FIAK_INLINE int64_t pack_scratch(int64_t size) { return kMaxSamples * (padded(size) + kLanes) + padded(size); }

/// A row of one sample as whole vectors with the extra column, in `copy`, of `lanes` lanes.
FIAK_INLINE void complete_row(const char* row, DType dtype, int64_t size, Storage storage, Extra extra, int64_t lanes,
                              float* copy, float* converted) {
  float square = 0;
  if (extra == Extra::kHalfSquare) {
    load_row(row, dtype, size, 1.0f, converted);
    Vec sum = zero();
    for (int64_t d = 0; d < size; d += kLanes) sum = fmadd(load(converted + d), load(converted + d), sum);
    square = -0.5f * reduce_add(sum);
  }
  if (storage == Storage::kBFloat16) {
    auto* target = reinterpret_cast<BFloat16*>(copy);
    std::memcpy(target, row, size * 2);
    std::memset(target + size, 0, lanes * 4 - size * 2);
    if (extra != Extra::kNone) {
      for (int i = 0; i < 3; ++i) {
        target[size + i] = to_bfloat16(extra == Extra::kOne ? 1.0f : square);
        square -= to_float(target[size + i]);
      }
    }
  } else {
    load_row(row, dtype, size, 1.0f, copy);
    for (int64_t d = padded(size); d < lanes; ++d) copy[d] = 0.0f;
    if (extra != Extra::kNone) copy[size] = extra == Extra::kOne ? 1.0f : square;
  }
}

/// Interleaves rows that are whole vectors already.
template <int kSamples, int kVectors>
static void pack_whole_rows(const char* const* source, int64_t step, int64_t count, char* target) {
  const char* rows[kSamples];
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) rows[e] = source[e];
  for (int64_t n = 0; n < count; ++n, target += kVectors * kVectorBytes) {
    const float* row[kSamples];
#pragma GCC unroll 4
    for (int e = 0; e < kSamples; ++e) {
      row[e] = reinterpret_cast<const float*>(rows[e]);
      // Rows of a head are apart, which the processor's own prefetching does not see; beyond the last row this may
      // touch what nobody reads, which is harmless.
      prefetch_row(rows[e] + 8 * step, kVectors * kVectorBytes / kSamples);
      rows[e] += step;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(reinterpret_cast<float*>(target + v * kVectorBytes), interleave<kSamples>(row, v));
    }
  }
}

/// Packs rows [begin, end) of every sample of `bundle` from x into rows 0, 1, ... of `panel`.
template <int kSamples>
static void pack_rows(const Input& x, DType dtype, const SampleBundle& bundle, int64_t h, int64_t begin, int64_t end,
                      int64_t size, Storage storage, Extra extra, const BundlePanel& panel, float* scratch) {
  const int64_t lanes = panel.vectors * kLanes / kSamples;  // of a sample
  const int64_t step = x.row_stride * element_size(dtype), room = padded(size) + kLanes;
  const char* source[kSamples];
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) source[e] = row_address(x, dtype, bundle.b[e], h, begin);
  if ((dtype == DType::kFloat32 || storage == Storage::kBFloat16) && size == lanes * lane_numbers(storage) &&
      panel.vectors <= kMaxVectors) {
    constexpr void (*kPack[kMaxVectors])(const char* const*, int64_t, int64_t, char*) = {
        pack_whole_rows<kSamples, 1>, pack_whole_rows<kSamples, 2>, pack_whole_rows<kSamples, 3>,
        pack_whole_rows<kSamples, 4>, pack_whole_rows<kSamples, 5>, pack_whole_rows<kSamples, 6>,
        pack_whole_rows<kSamples, 7>, pack_whole_rows<kSamples, 8>};
    return kPack[panel.vectors - 1](source, step, end - begin, panel.vector(0, 0));
  }
  const float* rows[kSamples];
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) rows[e] = scratch + e * room;
  for (int64_t n = 0; n < end - begin; ++n) {
    for (int e = 0; e < kSamples; ++e, scratch += room) {
      complete_row(source[e], dtype, size, storage, extra, lanes, scratch, scratch + (kMaxSamples - e) * room);
      source[e] += step;
    }
    scratch -= kSamples * room;
    for (int64_t v = 0; v < panel.vectors; ++v) {
      store(reinterpret_cast<float*>(panel.vector(n, v)), interleave<kSamples>(rows, v));
    }
  }
}

/// Vectors of float32 sums of packed rows: bfloat16 rows are summed as two halves of each block.
FIAK_INLINE int64_t sum_vectors(int64_t vectors, Storage storage) { return vectors * lane_numbers(storage); }

/// Stores float32 sums of packed rows, row n times factors[n * kSamples + e] for sample e, as rows begin, begin + 1,
/// ... of x. `sums` has room for reading kSamples vectors more than a row has.
template <Storage kStorage, int kSamples>
static void unpack_rows(const float* sums, int64_t sums_stride, const float* factors, const Output& x, DType dtype,
                        const SampleBundle& bundle, int64_t h, int64_t begin, int64_t count, int64_t size,
                        float* scratch) {
  const int64_t vectors = (size + kLanes - 1) / kLanes, room = padded(size), width = element_size(dtype);
  const int64_t step = x.row_stride * width;
  const bool whole = size == room && dtype != DType::kFloat16;  // then no row has to pass through `scratch`
  char* target[kSamples];
#pragma GCC unroll 4
  for (int e = 0; e < kSamples; ++e) target[e] = row_address(x, dtype, bundle.b[e], h, begin);
  for (int64_t n = 0; n < count; ++n) {
    Vec factor[kSamples];
#pragma GCC unroll 4
    for (int e = 0; e < kSamples; ++e) {
      factor[e] = broadcast(factors[n * kSamples + e]);
      prefetch_row_for_writing(target[e] + 4 * step, size * width);
    }
    for (int64_t t = 0; t < vectors; ++t) {
      Vec columns[kSamples];
      separate<kStorage, kSamples>(sums + n * sums_stride, t, columns);
#pragma GCC unroll 4
      for (int e = 0; e < kSamples; ++e) {
        const Vec result = mul(columns[e], factor[e]);
        if (!whole) {
          store(scratch + e * room + t * kLanes, result);
        } else if (dtype == DType::kFloat32) {
          store(reinterpret_cast<float*>(target[e]) + t * kLanes, result);
        } else {
          store_bfloat16(target[e] + t * kLanes * width, result);
        }
      }
    }
#pragma GCC unroll 4
    for (int e = 0; e < kSamples; ++e) {
      if (!whole) store_row(scratch + e * room, dtype, size, 1.0f, target[e]);
      target[e] += step;
    }
  }
}

}  // namespace fiak::cpu::FIAK_ISA
