// The CPU kernels without torch, over the cases of cases.csv, on one thread:
//
//   fiak_benchmarks --benchmark_filter=csr_attention.*deit_tiny_paper
//
// Every call is preceded by a matrix product that overwrites the caches, and timed by itself. FIAK_CPU_ISA chooses the
// instruction set.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/dtypes.h"

namespace fiak {
namespace {

struct Case {
  std::string name;
  int64_t batch, query_heads, key_heads, queries, keys, head_size, value_size, is_causal;
};

std::vector<Case> load_cases() {
  std::ifstream file(FIAK_CASES);
  if (!file) throw std::runtime_error("cannot read " FIAK_CASES);
  std::vector<Case> cases;
  std::string line;
  std::getline(file, line);  // names of the columns
  while (std::getline(file, line)) {
    std::replace(line.begin(), line.end(), ',', ' ');
    Case c;
    std::istringstream(line) >> c.name >> c.batch >> c.query_heads >> c.key_heads >> c.queries >> c.keys >>
        c.head_size >> c.value_size >> c.is_causal;
    cases.push_back(c);
  }
  return cases;
}

/// Standard normal numbers in float32 or bfloat16.
class Numbers {
 public:
  Numbers(DType dtype, int64_t count) : bytes_(count * (dtype == DType::kFloat32 ? 4 : 2)) {
    std::mt19937 engine(static_cast<unsigned>(count));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::kFloat32) {
        reinterpret_cast<float*>(bytes_.data())[i] = normal(engine);
      } else {
        reinterpret_cast<BFloat16*>(bytes_.data())[i] = to_bfloat16(normal(engine));
      }
    }
  }
  void* data() { return bytes_.data(); }

 private:
  std::vector<char> bytes_;
};

/// An operand whose heads are a view of [batch, rows, heads * columns], as in a model.
class Operand {
 public:
  Operand(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns)
      : numbers_(dtype, batch * heads * rows * columns), heads_(heads), rows_(rows), columns_(columns) {}
  void* data() { return numbers_.data(); }
  Input input() { return {data(), rows_ * heads_ * columns_, columns_, heads_ * columns_}; }
  Output output() { return {data(), rows_ * heads_ * columns_, columns_, heads_ * columns_}; }

 private:
  Numbers numbers_;
  int64_t heads_, rows_, columns_;
};

/// Everything that a call of either op reads and writes.
struct Operands {
  Operands(const Case& c, DType dtype)
      : query(dtype, c.batch, c.query_heads, c.queries, c.head_size),
        key(dtype, c.batch, c.key_heads, c.keys, c.head_size),
        value(dtype, c.batch, c.key_heads, c.keys, c.value_size),
        output(dtype, c.batch, c.query_heads, c.queries, c.value_size),
        grad_query(query),
        grad_key(key),
        grad_value(value),
        logsumexp(c.batch * c.query_heads * c.queries) {
    args.batch = c.batch;
    args.query_heads = c.query_heads;
    args.key_heads = c.key_heads;
    args.queries = c.queries;
    args.keys = c.keys;
    args.head_size = c.head_size;
    args.value_size = c.value_size;
    args.dtype = dtype;
    args.scale = 1 / std::sqrt(static_cast<double>(c.head_size));
    args.query = query.input();
    args.key = key.input();
    args.value = value.input();
  }
  ForwardResult forward() { return {output.output(), logsumexp.data()}; }
  BackwardArgs backward() {
    return {output.input(),    output.input(),      logsumexp.data(), grad_query.output(),
            grad_key.output(), grad_value.output(), nullptr};
  }

  Operand query, key, value, output, grad_query, grad_key, grad_value;
  std::vector<float> logsumexp;
  AttentionArgs args;
};

constexpr Parallel kOneThread{};

/// Times call() alone, after overwriting the caches.
template <class Call>
void measure(benchmark::State& state, int64_t pairs, Call&& call) {
  constexpr int64_t kSize = 384;
  static std::vector<float> a(kSize * kSize, 1.0f), b(kSize * kSize, 1e-3f), product(kSize * kSize);
  for (auto _ : state) {
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t k = 0; k < kSize; ++k) {
        for (int64_t j = 0; j < kSize; ++j) product[i * kSize + j] += a[i * kSize + k] * b[k * kSize + j];
      }
    }
    benchmark::DoNotOptimize(product.data());
    const auto start = std::chrono::steady_clock::now();
    call();
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  state.SetItemsProcessed(state.iterations() * pairs);  // query-key pairs
}

void prior_attention(benchmark::State& state, const Case& c, DType dtype, bool backward) {
  Operands operands(c, dtype);
  std::vector<float> prior(c.query_heads * c.queries * c.keys, 0.75f);
  PriorArgs args;
  static_cast<AttentionArgs&>(args) = operands.args;
  args.is_causal = c.is_causal != 0;
  args.prior = prior.data();
  args.prior_heads = c.query_heads;
  args.prior_rows = c.queries;
  args.prior_group_stride = c.query_heads * c.queries * c.keys;
  args.prior_head_stride = c.queries * c.keys;
  args.prior_row_stride = c.keys;
  const cpu::Kernels& kernels = cpu::kernels(cpu::kernel_isa(dtype));
  kernels.prior_forward(args, operands.forward(), kOneThread);
  std::vector<float> grad_prior(prior.size());
  BackwardArgs grads = operands.backward();
  grads.grad_weight = grad_prior.data();
  measure(state, c.batch * c.query_heads * c.queries * c.keys / (args.is_causal ? 2 : 1), [&] {
    if (backward) {
      kernels.prior_backward(args, grads, kOneThread);
    } else {
      kernels.prior_forward(args, operands.forward(), kOneThread);
    }
  });
}

void csr_attention(benchmark::State& state, const Case& c, DType dtype, bool backward, double pruned) {
  Operands operands(c, dtype);
  std::mt19937 engine(7);
  std::vector<int32_t> crow{0}, col;
  for (int64_t row = 0; row < c.query_heads * c.queries; ++row) {
    const int64_t end = c.is_causal != 0 ? std::min(row % c.queries + 1, c.keys) : c.keys;
    for (int64_t j = 0; j < end; ++j) {
      if (engine() >= pruned * 4294967296.0) col.push_back(static_cast<int32_t>(j));
    }
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  const CsrIndices indices{crow.data(), col.data(), false, static_cast<int64_t>(crow.size()) - 1,
                           static_cast<int64_t>(col.size())};
  std::vector<int64_t> plan(plan_layout(indices.num_rows, c.queries, c.keys, indices.nnz).bytes / 8);
  build_plan(indices, c.queries, c.keys, plan.data());
  const CsrArgs args{operands.args, view_plan(plan.data()), nullptr, nullptr};
  const cpu::Kernels& kernels = cpu::kernels(cpu::kernel_isa(dtype));
  kernels.csr_forward(args, operands.forward(), kOneThread);
  measure(state, c.batch * indices.nnz, [&] {
    if (backward) {
      kernels.csr_backward(args, operands.backward(), kOneThread);
    } else {
      kernels.csr_forward(args, operands.forward(), kOneThread);
    }
  });
}

/// Keys of 30% of the rows of the case's tokens, from features as wide as all heads together.
void compact_linear(benchmark::State& state, const Case& c, DType dtype, bool backward) {
  CompactLinearArgs args;
  args.batch = c.batch;
  args.heads = c.key_heads;
  args.rows = c.keys;
  args.kept = c.keys * 3 / 10;
  args.in_features = c.query_heads * c.head_size;
  args.head_size = c.head_size;
  args.dtype = dtype;
  std::vector<int64_t> keep(args.heads * args.kept);
  for (size_t i = 0; i < keep.size(); ++i) keep[i] = static_cast<int64_t>(i) % args.kept * 10 / 3;
  args.keep = keep.data();
  Operand input(dtype, args.batch, 1, args.rows, args.in_features), grad_input(input);
  Numbers weight(dtype, args.heads * args.head_size * args.in_features), grad_weight(weight);
  Operand output(dtype, args.batch, args.heads, args.kept, args.head_size);
  args.input = input.input();
  args.weight = weight.data();
  args.weight_stride = args.in_features;
  const CompactLinearGrads grads{output.input(), grad_input.data(), grad_weight.data(), nullptr};
  const cpu::Kernels& kernels = cpu::kernels(cpu::kernel_isa(dtype));
  measure(state, args.batch * args.heads * args.kept, [&] {
    if (backward) {
      kernels.compact_linear_backward(args, grads, kOneThread);
    } else {
      kernels.compact_linear_forward(args, output.output(), kOneThread);
    }
  });
}

template <class... Arguments>
void add(const std::string& name, Arguments... arguments) {
  benchmark::RegisterBenchmark(name.c_str(), arguments...)->UseManualTime()->Unit(benchmark::kMillisecond);
}

void add_all() {
  for (const Case& c : load_cases()) {
    for (const auto& [dtype, dtype_name] : {std::pair(DType::kFloat32, "float32"), {DType::kBFloat16, "bfloat16"}}) {
      for (const bool backward : {false, true}) {
        const std::string suffix = std::string(backward ? "backward/" : "forward/") + c.name + "/" + dtype_name;
        add("prior_attention_" + suffix, prior_attention, c, dtype, backward);
        for (const double pruned : {0.5, 0.7, 0.9}) {
          add("csr_attention_" + suffix + "/pruned:" + std::to_string(std::lround(100 * pruned)), csr_attention, c,
              dtype, backward, pruned);
        }
        add("compact_linear_" + suffix, compact_linear, c, dtype, backward);
      }
    }
  }
}

}  // namespace
}  // namespace fiak

int main(int argc, char** argv) {
  benchmark::AddCustomContext("kernels", fiak::cpu::isa_name(fiak::cpu::kernel_isa(fiak::DType::kFloat32)));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  fiak::add_all();
  benchmark::RunSpecifiedBenchmarks();
}
