// fiak_ext._C: what was built, what this CPU can do, and which kernels a call takes. It includes nothing of torch, so
// that it can be imported, and asked which torch the library was built for, next to any torch.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels/cpu/choose/cost_model.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/entries/packing.h"
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

fiak::DType dtype_of(const std::string& op, const std::string& dtype) {
  constexpr std::pair<const char*, fiak::DType> kDTypes[] = {{"float64", fiak::DType::kFloat64},
                                                             {"float32", fiak::DType::kFloat32},
                                                             {"bfloat16", fiak::DType::kBFloat16},
                                                             {"float16", fiak::DType::kFloat16}};
  for (const auto& [name, value] : kDTypes) {
    if (dtype == name) return value;
  }
  throw std::invalid_argument(op + ": dtype must be float64, float32, bfloat16 or float16 (got " + dtype + ")");
}

std::string kernel_isa(const std::string& dtype) {
  return fiak::cpu::isa_name(fiak::cpu::kernel_isa(dtype_of("kernel_isa", dtype)));
}

/// The place of a name in a list.
template <size_t kCount, class Item, class Name>
int place_of(const std::string& what, const std::string& wanted, const Item (&list)[kCount], Name&& name_of) {
  std::string names;
  for (size_t i = 0; i < kCount; ++i) {
    if (wanted == name_of(list[i])) return static_cast<int>(i);
    names += (i == 0 ? "" : ", ") + std::string(name_of(list[i]));
  }
  throw std::invalid_argument("csr_counts: " + what + " must be one of " + names + " (got " + wanted + ")");
}

py::tuple csr_counts(const std::string& family, bool backward, const std::string& isa, const std::string& machine_isa,
                     const std::string& dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, double nnz,
                     double tiles, int64_t head_dim, int64_t value_dim) {
  using namespace fiak::cpu;
  if (std::min({batch, heads, queries, keys, head_dim, value_dim}) < 1)
    throw std::invalid_argument("csr_counts: batch, heads, queries, keys, head_dim and value_dim must be positive");
  const auto isa_of = [](const std::string& what, const std::string& name) {
    return static_cast<Isa>(place_of(what, name, kIsaNames, [](const char* known) { return known; }));
  };
  const int wanted = place_of("family", family, kFamilies, [](const FamilyCosts& known) { return known.name; });
  const Isa on = isa_of("isa", isa);
  if (on == Isa::kScalar) throw std::invalid_argument("csr_counts: isa must have vectors (got scalar)");
  const int lanes = lanes_of(on);
  const int64_t widest = std::max(head_dim, value_dim);
  const Storage dense = storage_of(on, dtype_of("csr_counts", dtype));
  const Storage entries = entries_storage(dense, widest, bundled_samples(batch, keys, widest, dense, lanes), lanes);
  const int samples = bundled_samples(batch, keys, widest, entries, lanes);
  const auto count = backward ? kFamilies[wanted].backward : kFamilies[wanted].forward;
  const auto all = static_cast<double>(heads);
  CsrHead head{queries, keys, nnz / all, tiles / all, head_dim, value_dim, samples, entries, lanes};
  const CsrCounts bundle = count(head);
  head.samples = 1;
  const CsrCounts single = count(head);
  const auto bundles = static_cast<double>(heads * (batch / samples));
  const auto singles = static_cast<double>(heads * (batch % samples));
  py::dict counts;
#define FIAK_ADD(name) counts[#name] = bundles * bundle.name + singles * single.name;
  FIAK_FOR_COUNTS(FIAK_ADD)
#undef FIAK_ADD
  const Storage storage = wanted == kDense ? dense : entries;
  return py::make_tuple(csr_rates(on, isa_of("machine_isa", machine_isa), storage).name, counts);
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
  module.def("csr_counts", &csr_counts, py::kw_only(), py::arg("family"), py::arg("backward"), py::arg("isa"),
             py::arg("machine_isa"), py::arg("dtype"), py::arg("batch"), py::arg("heads"), py::arg("queries"),
             py::arg("keys"), py::arg("nnz"), py::arg("tiles"), py::arg("head_dim"), py::arg("value_dim"),
             "What the cost model counts of a csr_attention call whose samples share a pattern, with heads that are "
             "alike, on the CPU's kernels of a family (see FIAK_CSR_KERNEL) for an instruction set, on a machine whose "
             "best one is machine_isa: the name of the rates that it costs these counts by, and name -> count. nnz and "
             "tiles are those of all heads; tiles is 0 where the plan has none.");
}
