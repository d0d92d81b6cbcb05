#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "tests/support.h"

namespace fiak::tests {
namespace {

using cpu::Isa;

class Dispatch : public testing::Test {
 protected:
  void TearDown() override { unsetenv("FIAK_CPU_ISA"); }
};

TEST_F(Dispatch, TakesTheBestOfTheMachine) {
  unsetenv("FIAK_CPU_ISA");
  EXPECT_EQ(cpu::selected_isa(), cpu::machine_isa());
  EXPECT_EQ(cpu::kernel_isa(DType::kFloat64), Isa::kScalar);
  EXPECT_EQ(cpu::kernel_isa(DType::kFloat32), std::min(cpu::machine_isa(), Isa::kAvx512));
  EXPECT_EQ(cpu::kernel_isa(DType::kBFloat16), cpu::machine_isa());
}

TEST_F(Dispatch, IsLoweredAndNeverRaised) {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16}) {
    setenv("FIAK_CPU_ISA", cpu::isa_name(isa), 1);
    EXPECT_EQ(cpu::selected_isa(), std::min(isa, cpu::machine_isa()));
    EXPECT_LE(cpu::kernel_isa(DType::kFloat32), isa);
  }
}

TEST_F(Dispatch, RefusesUnknownNames) {
  setenv("FIAK_CPU_ISA", "avx9", 1);
  try {
    cpu::selected_isa();
    FAIL() << "accepted avx9";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "FIAK_CPU_ISA must be one of scalar, avx2, avx512, avx512_bf16, amx_bf16 (got avx9)");
  }
  setenv("FIAK_CPU_ISA", "", 1);
  EXPECT_EQ(cpu::selected_isa(), cpu::machine_isa());
}

}  // namespace
}  // namespace fiak::tests
