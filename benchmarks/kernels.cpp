// The CPU kernels without torch or Python, over the cases of cases.csv, on one thread:
//
//   fiak_benchmarks                                                        all, several minutes
//   fiak_benchmarks --benchmark_filter=csr_attention_forward/deit_tiny_paper/float32/avx512/.*cold
//   fiak_benchmarks --benchmark_list_tests                                 the names
//   fiak_benchmarks --benchmark_out=kernels.json --help                    Google Benchmark's options
//
// A name is op/case/dtype/instruction set/mask:percent pruned/cache. Every instruction set of the machine is there;
// scalar only for the smaller cases. "cold": 8 MB of other data are written before each call, so that nothing is left
// in L1 and L2; "warm": nothing comes between two calls. Each call is timed by itself; figures are of the median call.
//
//   cycles/pair  core cycles for a (query, key) pair of the pattern (prior_attention: that is eligible; compact_linear:
//                for a kept row of a head; csr_plan: for an entry)
//   floor        what the measured peak rates of this core allow at best, in cycles a pair:
//                the larger of arithmetic and loads. A pair takes D + Dv multiply-adds forward and 3 D + 2 Dv backward,
//                and an exponential, which counts as 6 vector operations; CSR kernels load D + Dv numbers of K and V
//                (backward: twice as many), dense ones load little. With bfloat16 instructions, vdpbf16ps does two
//                multiply-adds a lane; with AMX, tiles do them all, before or after the exponentials. Decoding: no less
//                than the time to read its keys and values from memory.
//   share        floor / cycles
//   GFLOP/s      executed: two for each multiply-add above
//   MB           read and written at least: operands, results and the plan's columns, each once
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/dtypes.h"
#include "machine.h"
#include "recorded.h"

namespace fiak {
namespace {

constexpr Parallel kOneThread{};
constexpr int kExpOperations = 6;
constexpr int64_t kScalarPairs = 4000000;  // of all batch elements and heads; larger cases would take seconds a call

/// Memory that starts with a cache line, as torch's does: rows that straddle two lines more than they must cost up to
/// half of a call.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <class Other>
  explicit LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <class T>
using Vector = std::vector<T, LineAllocator<T>>;

struct Case {
  std::string name;
  int64_t batch, query_heads, key_heads, queries, keys, head_dim, value_dim, is_causal;
  std::string recorded;

  bool is_decoding() const { return queries != keys; }
  /// Pairs of one head that may attend.
  int64_t eligible() const { return is_causal ? queries * (queries + 1) / 2 : queries * keys; }
};

std::vector<Case> load_cases() {
  std::ifstream file(FIAK_BENCHMARKS "/cases.csv");
  if (!file) throw std::runtime_error("cannot read " FIAK_BENCHMARKS "/cases.csv");
  std::vector<Case> cases;
  std::string line;
  std::getline(file, line);  // names of the columns
  while (std::getline(file, line)) {
    std::replace(line.begin(), line.end(), ',', ' ');
    Case c;
    std::istringstream(line) >> c.name >> c.batch >> c.query_heads >> c.key_heads >> c.queries >> c.keys >>
        c.head_dim >> c.value_dim >> c.is_causal >> c.recorded;
    cases.push_back(c);
  }
  return cases;
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks

struct Mask {
  std::string kind;  ///< uniform or recorded
  int pruned;        ///< percent of the eligible pairs
  std::string name() const { return kind + ":" + std::to_string(pruned); }
};

std::string recorded_path(const Case& c, int pruned) {
  return FIAK_BENCHMARKS "/masks/" + c.recorded + "_" + std::to_string(pruned) + ".npy";
}

/// A mask as CSR, with its plan.
class Pattern {
 public:
  Pattern(const Case& c, const Mask& mask) : queries_(c.queries), keys_(c.keys) {
    std::mt19937 engine(7);
    const std::unique_ptr<benchmarks::RecordedMask> recorded(
        mask.kind == "recorded" ? new benchmarks::RecordedMask(recorded_path(c, mask.pruned)) : nullptr);
    const double limit = mask.pruned / 100.0 * 4294967296.0;
    std::vector<bool> read(c.key_heads * c.keys);
    for (int64_t row = 0; row < c.query_heads * c.queries; ++row) {
      const int64_t head = row / c.queries, query = row % c.queries;
      const int64_t end = c.is_causal ? query + 1 : c.keys;
      for (int64_t j = 0; j < end; ++j) {
        const bool kept = recorded ? recorded->tiled(head, query + c.keys - c.queries, j) : engine() >= limit;
        if (!kept) continue;
        col_.push_back(static_cast<int32_t>(j));
        read[head * c.key_heads / c.query_heads * c.keys + j] = true;
      }
      crow_.push_back(static_cast<int32_t>(col_.size()));
    }
    read_keys = std::count(read.begin(), read.end(), true);
    indices = {crow_.data(), col_.data(), false, static_cast<int64_t>(crow_.size()) - 1,
               static_cast<int64_t>(col_.size())};
    plan_.resize(plan_layout(indices.num_rows, queries_, keys_, indices.nnz).bytes / 8);
    build();
  }
  void build() { build_plan(indices, queries_, keys_, plan_.data()); }
  PlanView view() const { return view_plan(plan_.data()); }
  int64_t plan_bytes() const { return static_cast<int64_t>(plan_.size()) * 8; }

  CsrIndices indices;
  int64_t read_keys;  ///< rows of key, over all key heads, that some query reads

 private:
  int64_t queries_, keys_;
  Vector<int32_t> crow_{0}, col_;
  Vector<int64_t> plan_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Operands

/// Numbers of mean 0 and variance 1 in float32 or bfloat16.
class Numbers {
 public:
  Numbers(DType dtype, int64_t count) : bytes_(count * (dtype == DType::kFloat32 ? 4 : 2)) {
    uint64_t state = count + 1;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const float x = (static_cast<int64_t>(state) >> 40) * (1.7320508f / (1 << 23));
      if (dtype == DType::kFloat32) {
        reinterpret_cast<float*>(bytes_.data())[i] = x;
      } else {
        reinterpret_cast<BFloat16*>(bytes_.data())[i] = to_bfloat16(x);
      }
    }
  }
  void* data() { return bytes_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  Vector<char> bytes_;
};

/// An operand whose heads are a view of [batch, rows, heads * columns], as in a model.
class Operand {
 public:
  Operand(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns)
      : numbers_(dtype, batch * heads * rows * columns), heads_(heads), rows_(rows), columns_(columns) {}
  void* data() { return numbers_.data(); }
  int64_t bytes() const { return numbers_.bytes(); }
  Input input() { return {data(), rows_ * heads_ * columns_, columns_, heads_ * columns_}; }
  Output output() { return {data(), rows_ * heads_ * columns_, columns_, heads_ * columns_}; }

 private:
  Numbers numbers_;
  int64_t heads_, rows_, columns_;
};

/// Everything that a call of either attention op reads and writes.
struct Operands {
  Operands(const Case& c, DType dtype)
      : query(dtype, c.batch, c.query_heads, c.queries, c.head_dim),
        key(dtype, c.batch, c.key_heads, c.keys, c.head_dim),
        value(dtype, c.batch, c.key_heads, c.keys, c.value_dim),
        output(dtype, c.batch, c.query_heads, c.queries, c.value_dim),
        grad_output(output),
        grad_query(query),
        grad_key(key),
        grad_value(value),
        logsumexp(c.batch * c.query_heads * c.queries) {
    args.batch = c.batch;
    args.query_heads = c.query_heads;
    args.key_heads = c.key_heads;
    args.queries = c.queries;
    args.keys = c.keys;
    args.head_dim = c.head_dim;
    args.value_dim = c.value_dim;
    args.dtype = dtype;
    args.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    args.query = query.input();
    args.key = key.input();
    args.value = value.input();
  }
  ForwardResult forward() { return {output.output(), logsumexp.data()}; }
  BackwardArgs backward() {
    return {grad_output.input(), output.input(),      logsumexp.data(), grad_query.output(),
            grad_key.output(),   grad_value.output(), nullptr};
  }
  int64_t bytes(bool backward) const {
    const int64_t forward = query.bytes() + key.bytes() + value.bytes() + output.bytes();
    return backward ? 2 * forward : forward;
  }

  Operand query, key, value, output, grad_output, grad_query, grad_key, grad_value;
  Vector<float> logsumexp;
  AttentionArgs args;
};

/// What was made last for a key, because benchmarks of the same operands follow each other.
template <class T, class Make>
T& cached(const std::string& key, Make&& make) {
  static std::string made_for;
  static std::unique_ptr<T> made;
  if (made_for != key) {
    made.reset();
    made = make();
    made_for = key;
  }
  return *made;
}

// ---------------------------------------------------------------------------------------------------------------------
// Measuring

/// What one call does, for the counters.
struct Work {
  double pairs = 0;           ///< or rows, or entries
  double multiply_adds = 0;   ///< for each pair
  double exponentials = 0;    ///< for each pair
  double numbers_loaded = 0;  ///< for each pair, that no register can keep
  int64_t bytes = 0;
  int64_t memory_bytes = 0;  ///< that cannot be in any cache
};

struct Variant {
  DType dtype;
  cpu::Isa isa;
  bool cold;
  bool backward;
};

double memory(const Work& work, double hz) {
  return work.memory_bytes > 0 ? work.memory_bytes / read_bandwidth() * hz / work.pairs : 0;
}

/// Cycles a pair; 0 for scalar code.
double floor_cycles(const Work& work, const Variant& variant, double hz) {
  const Rates& peak = rates(variant.isa);
  if (peak.vector_bytes == 0) return 0;
  const double lanes = peak.vector_bytes / 4.0;
  const double multiplies = variant.dtype == DType::kBFloat16 && peak.bfloat16_multiplies > 0
                                ? work.multiply_adds / (2 * lanes * peak.bfloat16_multiplies)
                                : work.multiply_adds / (lanes * peak.multiply_adds);
  const double exponentials = work.exponentials * kExpOperations / (lanes * peak.multiply_adds);
  if (peak.tile_multiply_adds > 0) {  // vectors wait for tiles, and tiles for vectors
    return std::max(work.multiply_adds / peak.tile_multiply_adds + exponentials, memory(work, hz));
  }
  const double arithmetic = multiplies + exponentials;
  const double number_bytes = variant.dtype == DType::kFloat32 ? 4 : 2;
  const double loads = work.numbers_loaded * number_bytes / (peak.vector_bytes * peak.loads);
  return std::max({arithmetic, loads, memory(work, hz)});
}

/// Times call() alone and sets the counters.
template <class Call>
void measure(benchmark::State& state, const Variant& variant, const Work& work, Call&& call) {
  std::vector<double> times;
  const double hz = clock_hz();
  call();
  for (auto _ : state) {
    if (variant.cold) evict_caches();
    const auto start = std::chrono::steady_clock::now();
    call();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    state.SetIterationTime(times.back());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const double seconds = times[times.size() / 2];
  state.counters["MB"] = work.bytes * 1e-6;
  if (work.multiply_adds > 0) state.counters["GFLOP/s"] = 2e-9 * work.pairs * work.multiply_adds / seconds;
  if (hz == 0) return;
  const double cycles = seconds * hz / work.pairs, floor = floor_cycles(work, variant, hz);
  state.counters["cycles/pair"] = cycles;
  if (work.multiply_adds == 0 || floor == 0) return;
  state.counters["floor"] = floor;
  state.counters["share"] = floor / cycles;
}

/// The kernels of a variant. Anything that a kernel asks the environment itself is told the same.
const cpu::Kernels& select(const Variant& variant) {
  setenv("FIAK_CPU_ISA", cpu::isa_name(variant.isa), 1);
  return cpu::kernels(cpu::kernel_isa(variant.dtype));
}

Work attention_work(const Case& c, const Operands& operands, bool backward, double pairs) {
  Work work;
  work.pairs = pairs;
  work.multiply_adds = backward ? 3 * c.head_dim + 2 * c.value_dim : c.head_dim + c.value_dim;
  work.exponentials = 1;
  work.bytes = operands.bytes(backward);
  return work;
}

// ---------------------------------------------------------------------------------------------------------------------
// The ops

std::string operands_key(const Case& c, DType dtype) { return c.name + std::to_string(static_cast<int>(dtype)); }

Operands& operands_of(const Case& c, DType dtype) {
  return cached<Operands>(operands_key(c, dtype), [&] { return std::make_unique<Operands>(c, dtype); });
}

Pattern& pattern_of(const Case& c, const Mask& mask) {
  return cached<Pattern>(c.name + mask.name(), [&] { return std::make_unique<Pattern>(c, mask); });
}

void prior_attention(benchmark::State& state, const Case& c, const Variant& variant) {
  Operands& operands = operands_of(c, variant.dtype);
  PriorArgs args{operands.args};
  args.is_causal = c.is_causal != 0;
  Vector<float> prior(c.query_heads * c.queries * c.keys, 0.5f), grad_prior(variant.backward ? prior.size() : 0);
  args.prior = prior.data();
  args.prior_heads = c.query_heads;
  args.prior_rows = c.queries;
  args.prior_head_stride = c.queries * c.keys;
  args.prior_row_stride = c.keys;
  const cpu::Kernels& kernels = select(variant);
  kernels.prior_forward(args, operands.forward(), kOneThread);
  BackwardArgs grads = operands.backward();
  grads.grad_prior = grad_prior.data();
  Work work = attention_work(c, operands, variant.backward, c.batch * c.query_heads * c.eligible());
  work.bytes += (variant.backward ? 2 : 1) * static_cast<int64_t>(prior.size()) * 4;
  if (c.is_decoding()) work.memory_bytes = work.bytes;
  measure(state, variant, work, [&] {
    if (variant.backward) {
      kernels.prior_backward(args, grads, kOneThread);
    } else {
      kernels.prior_forward(args, operands.forward(), kOneThread);
    }
  });
}

void csr_attention(benchmark::State& state, const Case& c, const Mask& mask, const Variant& variant) {
  Operands& operands = operands_of(c, variant.dtype);
  const Pattern& pattern = pattern_of(c, mask);
  const CsrArgs args{operands.args, pattern.view(), nullptr, nullptr};
  const cpu::Kernels& kernels = select(variant);
  kernels.csr_forward(args, operands.forward(), kOneThread);
  Work work = attention_work(c, operands, variant.backward, c.batch * pattern.indices.nnz);
  work.numbers_loaded = (variant.backward ? 2 : 1) * (c.head_dim + c.value_dim);
  if (c.is_decoding()) {
    const int64_t row_bytes = (operands.key.bytes() + operands.value.bytes()) / (c.key_heads * c.keys);
    work.memory_bytes = pattern.read_keys * row_bytes;
    work.bytes = operands.query.bytes() + operands.output.bytes() + work.memory_bytes;
  }
  work.bytes += 2 * pattern.indices.nnz;
  measure(state, variant, work, [&] {
    if (variant.backward) {
      kernels.csr_backward(args, operands.backward(), kOneThread);
    } else {
      kernels.csr_forward(args, operands.forward(), kOneThread);
    }
  });
}

/// Building the plan alone; check_csr, which the op calls first, is not part of it.
void csr_plan(benchmark::State& state, const Case& c, const Mask& mask, const Variant& variant) {
  Pattern& pattern = pattern_of(c, mask);
  select(variant);
  Work work;
  work.pairs = static_cast<double>(pattern.indices.nnz);
  work.bytes = 4 * (pattern.indices.nnz + pattern.indices.num_rows + 1) + pattern.plan_bytes();
  measure(state, variant, work, [&] { pattern.build(); });
}

/// Keys of 30% of the rows of the case's tokens, from features as wide as all heads together.
void compact_linear(benchmark::State& state, const Case& c, const Variant& variant) {
  CompactLinearArgs args;
  args.batch = c.batch;
  args.heads = c.key_heads;
  args.rows = c.keys;
  args.kept = c.keys * 3 / 10;
  args.in_features = c.query_heads * c.head_dim;
  args.head_dim = c.head_dim;
  args.dtype = variant.dtype;
  Vector<int64_t> keep(args.heads * args.kept);
  for (size_t i = 0; i < keep.size(); ++i) keep[i] = static_cast<int64_t>(i) % args.kept * 10 / 3;
  args.keep = keep.data();
  Operand input(variant.dtype, args.batch, 1, args.rows, args.in_features), grad_input(input);
  Numbers weight(variant.dtype, args.heads * args.head_dim * args.in_features), grad_weight(weight);
  Operand output(variant.dtype, args.batch, args.heads, args.kept, args.head_dim);
  args.input = input.input();
  args.weight = weight.data();
  args.weight_stride = args.in_features;
  const CompactLinearGrads grads{output.input(), grad_input.data(), grad_weight.data(), nullptr};
  const cpu::Kernels& kernels = select(variant);
  Work work;
  work.pairs = static_cast<double>(args.batch * args.heads * args.kept);
  work.multiply_adds = static_cast<double>((variant.backward ? 2 : 1) * args.in_features * args.head_dim);
  work.bytes = (variant.backward ? 2 : 1) * (input.bytes() + weight.bytes()) + output.bytes();
  measure(state, variant, work, [&] {
    if (variant.backward) {
      kernels.compact_linear_backward(args, grads, kOneThread);
    } else {
      kernels.compact_linear_forward(args, output.output(), kOneThread);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Which run

template <class... Arguments>
void add(const std::string& name, Arguments... arguments) {
  benchmark::RegisterBenchmark(name.c_str(), arguments...)->UseManualTime()->Unit(benchmark::kMillisecond);
}

std::vector<cpu::Isa> instruction_sets(const Case& c, DType dtype) {
  std::vector<cpu::Isa> sets;
  const bool small = c.batch * c.query_heads * c.eligible() <= kScalarPairs;
  for (int i = small ? 0 : 1; i <= static_cast<int>(cpu::machine_isa()); ++i) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    setenv("FIAK_CPU_ISA", cpu::isa_name(isa), 1);
    if (cpu::kernel_isa(dtype) == isa) sets.push_back(isa);
  }
  return sets;
}

void add_case(const Case& c) {
  std::vector<Mask> masks{{"uniform", 50}, {"uniform", 70}, {"uniform", 90}};
  if (std::ifstream(recorded_path(c, 70))) masks.push_back({"recorded", 70});
  const std::pair<bool, const char*> caches[] = {{true, "/cold"}, {false, "/warm"}};
  for (const Mask& mask : masks) {
    const Variant variant{DType::kFloat32, cpu::machine_isa(), true, false};
    add("csr_plan/" + c.name + "/" + mask.name() + "/cold", csr_plan, c, mask, variant);
  }
  for (const auto& [dtype, dtype_name] : {std::pair(DType::kFloat32, "float32"), {DType::kBFloat16, "bfloat16"}}) {
    for (const bool backward : {false, true}) {
      if (backward && c.is_decoding()) continue;
      const std::string middle = std::string(backward ? "_backward/" : "_forward/") + c.name + "/" + dtype_name + "/";
      for (const Mask& mask : masks) {
        for (const cpu::Isa isa : instruction_sets(c, dtype)) {
          for (const auto& [cold, cache] : caches) {
            add("csr_attention" + middle + cpu::isa_name(isa) + "/" + mask.name() + cache, csr_attention, c, mask,
                Variant{dtype, isa, cold, backward});
          }
        }
      }
      for (const cpu::Isa isa : instruction_sets(c, dtype)) {
        for (const auto& [cold, cache] : caches) {
          const Variant variant{dtype, isa, cold, backward};
          add("prior_attention" + middle + cpu::isa_name(isa) + cache, prior_attention, c, variant);
          if (!c.is_decoding()) add("compact_linear" + middle + cpu::isa_name(isa) + cache, compact_linear, c, variant);
        }
      }
    }
  }
}

void describe_machine() {
  benchmark::AddCustomContext("clock GHz", std::to_string(clock_hz() * 1e-9));
  benchmark::AddCustomContext("memory GB/s", std::to_string(read_bandwidth() * 1e-9));
  for (int i = 1; i <= static_cast<int>(cpu::machine_isa()); ++i) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    const Rates& peak = rates(isa);
    std::ostringstream text;
    text << peak.multiply_adds << " multiply-adds, " << peak.loads << " loads, " << peak.bfloat16_multiplies
         << " vdpbf16ps of " << peak.vector_bytes << " bytes a cycle";
    benchmark::AddCustomContext(cpu::isa_name(isa), text.str());
  }
}

}  // namespace
}  // namespace fiak

int main(int argc, char** argv) {
  std::string min_time = "--benchmark_min_time=0.05";  // unless the command line says otherwise
  std::vector<char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + 1, min_time.data());
  argc = static_cast<int>(arguments.size());
  argv = arguments.data();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  fiak::describe_machine();
  for (const fiak::Case& c : fiak::load_cases()) fiak::add_case(c);
  benchmark::RunSpecifiedBenchmarks();
}
