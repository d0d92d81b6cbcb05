// How the family over entries packs rows of K and V and bundles samples: what its kernels go by, and the cost model,
// which is compiled once for all instruction sets.
#pragma once

#include "kernels/cpu/isa/list.h"

namespace fiak::cpu {

/// How packed rows are stored: float32, or bfloat16 where the instruction set multiplies that.
enum class Storage { kFloat32, kBFloat16 };

static constexpr int lane_numbers(Storage storage) { return storage == Storage::kFloat32 ? 1 : 2; }
static constexpr Storage storage_of(Isa isa, DType dtype) {
  return isa >= Isa::kAvx512Bf16 && dtype == DType::kBFloat16 ? Storage::kBFloat16 : Storage::kFloat32;
}
/// float32 numbers of a vector.
static constexpr int lanes_of(Isa isa) { return isa == Isa::kAvx2 ? 8 : 16; }

constexpr int kQuad = 4;                         // lanes of one sample side by side
constexpr int64_t kWholePanelBytes = 64 * 1024;  // up to this a head's packed rows are one slice
constexpr int64_t kSliceBytes = 40 * 1024;       // of packed rows, to fit into the L1 cache
constexpr int64_t kBundleBytes = 52 * 1024;

/// Vectors of a packed row of `size` numbers of each of `samples` samples.
static constexpr int64_t row_vectors(int64_t size, Storage storage, int samples, int lanes) {
  const int64_t numbers = kQuad * lane_numbers(storage), quads = lanes / kQuad;
  return ((size + numbers - 1) / numbers * samples + quads - 1) / quads;
}

/// How many of `alike` samples, which share a pattern, to bundle: as many as keep the rows of about 200 keys, of at
/// most `widest` numbers, in the L1 cache.
static constexpr int bundled_samples(int64_t alike, int64_t keys, int64_t widest, Storage storage, int lanes) {
  for (int samples = lanes / kQuad; samples > 1; samples /= 2) {
    const int64_t bytes = row_vectors(widest, storage, samples, lanes) * lanes * 4;
    if (alike >= samples && (keys < 200 ? keys : 200) * bytes <= kBundleBytes) return samples;
  }
  return 1;
}

/// The storage of rows for which storage_of says `storage`, and bundled_samples then `samples`. bfloat16 rows that fill
/// half a register or less are faster as float32, which takes no more of it.
static constexpr Storage entries_storage(Storage storage, int64_t widest, int samples, int lanes) {
  return widest * samples <= lanes ? Storage::kFloat32 : storage;
}

}  // namespace fiak::cpu
