#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fiak::cpu {
namespace {

#if defined(__x86_64__)
/// Whether there are AMX tiles that multiply bfloat16 and the system lets this process use them, which Linux wants to
/// be asked for.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Isa::kScalar;
  }
#if defined(FIAK_EMULATED)
  return Isa::kAmxBf16;  // csrc/emulated has what the machine lacks
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return may_use_amx() ? Isa::kAmxBf16 : Isa::kAvx512Bf16;
#else
  return Isa::kScalar;
#endif
}

}  // namespace

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa selected_isa() {
  const char* wanted = std::getenv("FIAK_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return machine_isa();
  const auto* name = std::find(std::begin(kIsaNames), std::end(kIsaNames), std::string(wanted));
  if (name == std::end(kIsaNames)) {
    std::string names;
    for (const char* known : kIsaNames) names += names.empty() ? known : std::string(", ") + known;
    throw std::invalid_argument("FIAK_CPU_ISA must be one of " + names + " (got " + wanted + ")");
  }
  return std::min(machine_isa(), static_cast<Isa>(name - std::begin(kIsaNames)));
}

Isa most_isa(DType dtype) {
  if (dtype == DType::kFloat64) return Isa::kScalar;
  return dtype == DType::kBFloat16 ? Isa::kAmxBf16 : Isa::kAvx512;
}

Isa kernel_isa(DType dtype) { return std::min(selected_isa(), most_isa(dtype)); }

const Kernels& kernels(Isa isa) {
#define FIAK_KERNEL(name, parameters) name,
#define FIAK_TABLE(isa, value)              \
  []() -> Kernels {                         \
    using namespace isa;                    \
    return {FIAK_FOR_KERNELS(FIAK_KERNEL)}; \
  }(),
  static const Kernels kTables[] = {FIAK_FOR_BUILT_ISAS(FIAK_TABLE)};
#undef FIAK_TABLE
#undef FIAK_KERNEL
  return kTables[static_cast<int>(isa)];
}

}  // namespace fiak::cpu
