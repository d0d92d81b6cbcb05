// bfloat16 and float16 conversions, and the dropout mask's generator against its published test vectors.
#include <cmath>
#include <limits>

#include "kernels/dtypes.h"
#include "kernels/philox.h"
#include "tests/support.h"

namespace fiak::tests {
namespace {

TEST(Numbers, EveryLowPrecisionNumberSurvivesFloat32) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto bits16 = static_cast<uint16_t>(bits);
    const float bfloat = to_float(BFloat16{bits16}), half = to_float(Half{bits16});
    if (std::isnan(bfloat)) {
      EXPECT_TRUE(std::isnan(to_float(to_bfloat16(bfloat))));
    } else {
      ASSERT_EQ(to_bfloat16(bfloat).bits, bits16);
    }
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(to_float(to_half(half))));
    } else {
      ASSERT_EQ(to_half(half).bits, bits16);
    }
  }
}

TEST(Numbers, HalfIsIeee) {
  EXPECT_EQ(to_float(Half{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(Half{0x7bff}), 65504.0f);
  EXPECT_EQ(to_float(Half{0x0001}), 0x1p-24f);
  EXPECT_EQ(to_float(Half{0xfc00}), -std::numeric_limits<float>::infinity());
}

TEST(Numbers, RoundToNearestEven) {
  EXPECT_EQ(to_half(1.0f + 0x1p-11f).bits, 0x3c00);      // halfway: to even
  EXPECT_EQ(to_half(1.0f + 3 * 0x1p-11f).bits, 0x3c02);  // halfway: to even
  EXPECT_EQ(to_half(1.0f + 0x1.004p-11f).bits, 0x3c01);  // above halfway
  EXPECT_EQ(to_half(0x1p-25f).bits, 0);                  // halfway to the smallest subnormal
  EXPECT_EQ(to_half(0x1.8p-25f).bits, 1);
  EXPECT_EQ(to_half(65519.0f).bits, 0x7bff);
  EXPECT_EQ(to_half(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_half(-1e10f).bits, 0xfc00);
  EXPECT_EQ(to_bfloat16(1.0f + 0x1p-8f).bits, 0x3f80);      // halfway: to even
  EXPECT_EQ(to_bfloat16(1.0f + 3 * 0x1p-8f).bits, 0x3f82);  // halfway: to even
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
}

TEST(Philox, GivesThePublishedVectors) {
  // Philox4x32-10 of the kat_vectors file of Random123.
  const uint32_t zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  const uint32_t ones[4] = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  const uint32_t digits_of_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (int64_t word = 0; word < 4; ++word) {
    EXPECT_EQ(philox(0, 0, 0, 0, word), zeros[word]);
    EXPECT_EQ(philox(~uint64_t{0}, 0xffffffff, 0xffffffff, 0xffffffff, (int64_t{0xffffffff} << 2) + word), ones[word]);
    EXPECT_EQ(philox(0x299f31d0a4093822, 0x03707344, 0x13198a2e, 0x85a308d3, (int64_t{0x243f6a88} << 2) + word),
              digits_of_pi[word]);
  }
}

TEST(Philox, DropsTheAskedShare) {
  for (const double p : {0.0, 0.1, 0.5, 0.999, 1.0}) {
    const Dropout dropout = make_dropout(p, 42);
    EXPECT_EQ(dropout.active(), p > 0);
    int64_t dropped = 0;
    for (int64_t key = 0; key < 20000; ++key) {
      const double factor = dropout.factor(1, 2, 3, key);
      EXPECT_EQ(factor == 0 ? 0 : 1 / (1 - p), factor);
      dropped += factor == 0;
    }
    EXPECT_NEAR(dropped, p * 20000, 4 * std::sqrt(p * (1 - p) * 20000));
  }
}

}  // namespace
}  // namespace fiak::tests
