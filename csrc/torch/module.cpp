// fiak_ext._C: what was built, what this CPU can do, and which kernels a call takes. It includes nothing of torch, so
// that it can be imported, and asked which torch the library was built for, next to any torch.
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/cpu/dispatch.h"
#include "kernels/plan/plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list isas;
  for (const char* name : fiak::cpu::kBuiltIsaNames) isas.append(name);
  py::dict info;
  info["torch"] = FIAK_TORCH_VERSION;
  info["compiler"] = FIAK_COMPILER;
  info["isas"] = isas;
#if defined(FIAK_CUDA_VERSION)
  info["cuda"] = FIAK_CUDA_VERSION;
  info["cuda_architectures"] = FIAK_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

std::string cpu_model() {
#if defined(__x86_64__)
  std::array<unsigned int, 12> words{};
  if (__get_cpuid_max(0x80000000, nullptr) >= 0x80000004) {
    for (unsigned int i = 0; i < 3; ++i) {
      __get_cpuid(0x80000002 + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]);
    }
    char text[sizeof words + 1] = {};
    std::memcpy(text, words.data(), sizeof words);
    return text;
  }
#endif
  return "unknown";
}

py::dict cpu_capabilities() {
  py::dict flags;
#if defined(__x86_64__)
  __builtin_cpu_init();
  flags["avx2"] = __builtin_cpu_supports("avx2") != 0;
  flags["fma"] = __builtin_cpu_supports("fma") != 0;
  flags["f16c"] = __builtin_cpu_supports("f16c") != 0;
  flags["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  flags["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  flags["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  flags["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  flags["avx512bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
#endif
  py::dict capabilities;
  capabilities["model"] = cpu_model();
  capabilities["machine_isa"] = fiak::cpu::isa_name(fiak::cpu::machine_isa());
  capabilities["selected_isa"] = fiak::cpu::isa_name(fiak::cpu::selected_isa());
  capabilities["flags"] = flags;
  return capabilities;
}

std::string kernel_isa(const std::string& dtype) {
  constexpr std::pair<const char*, fiak::DType> kDTypes[] = {{"float64", fiak::DType::kFloat64},
                                                             {"float32", fiak::DType::kFloat32},
                                                             {"bfloat16", fiak::DType::kBFloat16},
                                                             {"float16", fiak::DType::kFloat16}};
  for (const auto& [name, value] : kDTypes) {
    if (dtype == name) return fiak::cpu::isa_name(fiak::cpu::kernel_isa(value));
  }
  throw std::invalid_argument("kernel_isa: dtype must be float64, float32, bfloat16 or float16 (got " + dtype + ")");
}

py::dict read_plan(const py::bytes& bytes) {
  const auto plan = static_cast<std::string_view>(bytes);
  fiak::PlanHeader header;
  if (plan.size() < sizeof header)
    throw std::invalid_argument("read_plan: plan must hold a header of " + std::to_string(sizeof header) +
                                " bytes (got " + std::to_string(plan.size()) + ")");
  std::memcpy(&header, plan.data(), sizeof header);
  if (header.magic != fiak::kPlanMagic)
    throw std::invalid_argument(
        "read_plan: plan must come from csr_plan of this version; its first bytes are not a plan's");
  fiak::PlanSectionSize<int64_t> sizes[fiak::kPlanSections];
  fiak::plan_section_sizes<int64_t>(header.layout, header.num_rows, header.num_keys, header.nnz,
                                    header.layout.row_words > 0, sizes);
  py::dict sections, found;
  for (int i = 0; i < fiak::kPlanSections; ++i) {
    sections[fiak::kPlanSectionNames[i]] = py::make_tuple(header.layout.starts[i], sizes[i].bytes, sizes[i].count);
  }
  found["num_rows"] = header.num_rows;
  found["num_queries"] = header.num_queries;
  found["num_keys"] = header.num_keys;
  found["nnz"] = header.nnz;
  found["bytes"] = header.bytes;
  found["sections"] = sections;
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info,
             "What the library was built with: torch and compiler (versions), isas (with kernels of their own), cuda "
             "(nvcc's version, or None) and, where there are CUDA kernels, cuda_architectures: '80-real 80-virtual' is "
             "code for sm_80, and PTX for what is newer.");
  module.def("cpu_capabilities", &cpu_capabilities,
             "This machine: model, machine_isa, selected_isa (lowered by FIAK_CPU_ISA), flags (name -> bool).");
  module.attr("PLAN_HEADER_BYTES") = sizeof(fiak::PlanHeader);
  module.def(
      "read_plan", &read_plan, py::arg("plan"),
      "What a plan's first PLAN_HEADER_BYTES bytes say: num_rows, num_queries, num_keys, nnz, bytes, and sections: "
      "name -> (start in bytes, bytes of a number, numbers).");
  module.def("kernel_isa", &kernel_isa, py::arg("dtype"),
             "The instruction set of the kernels that a call with this dtype ('float32', ...) runs on.");
}
