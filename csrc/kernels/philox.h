// The dropout mask: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counted by
// the pair itself, so that every kernel drops the same pairs. Static for the reason given in dtypes.h.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace fiak {

struct PhiloxWords {
  uint32_t word[4];
};

/// Philox with the counter (block, row, head, batch) and the key `seed`.
FIAK_HOST_DEVICE static inline PhiloxWords philox_words(uint64_t seed, int64_t batch, int64_t head, int64_t row,
                                                        int64_t block) {
  uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(row), static_cast<uint32_t>(head),
                         static_cast<uint32_t>(batch)};
  uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key_low;
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key_high;
    counter[1] = static_cast<uint32_t>(product1);
    counter[3] = static_cast<uint32_t>(product0);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return {{counter[0], counter[1], counter[2], counter[3]}};
}

/// The word of the pair (row, key): four keys in a row share a block.
static inline uint32_t philox(uint64_t seed, int64_t batch, int64_t head, int64_t row, int64_t key) {
  return philox_words(seed, batch, head, row, key >> 2).word[key & 3];
}

/// Factors of kept pairs: a pair is dropped, with probability p, where its word lies below p * 2^32.
struct Dropout {
  uint64_t seed, threshold;
  double kept;  ///< 1 / (1 - p), or 0 for p = 1

  __attribute__((always_inline)) bool active() const { return threshold != 0; }
  __attribute__((always_inline)) double factor(int64_t batch, int64_t head, int64_t row, int64_t key) const {
    return philox(seed, batch, head, row, key) < threshold ? 0.0 : kept;
  }
};

static inline Dropout make_dropout(double p, uint64_t seed) {
  return {seed, static_cast<uint64_t>(p * 4294967296.0 + 0.5), p < 1.0 ? 1.0 / (1.0 - p) : 0.0};
}

}  // namespace fiak
