#include "tests/support.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <thread>
#include <utility>

#include "kernels/dtypes.h"

namespace fiak::tests {
namespace {

void run_on_threads(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < tasks; ++i) running.emplace_back(task, context, i);
  for (std::thread& thread : running) thread.join();
}

double load(DType dtype, const unsigned char* place) {
  const auto as = [place](auto x) {
    std::memcpy(&x, place, sizeof x);
    return x;
  };
  switch (dtype) {
    case DType::kFloat64:
      return as(double{});
    case DType::kFloat32:
      return as(float{});
    case DType::kBFloat16:
      return to_float(as(BFloat16{}));
    case DType::kFloat16:
      return to_float(as(Half{}));
  }
  return 0;
}

void store(DType dtype, unsigned char* place, double value) {
  const auto as = [place](auto x) { std::memcpy(place, &x, sizeof x); };
  switch (dtype) {
    case DType::kFloat64:
      return as(value);
    case DType::kFloat32:
      return as(static_cast<float>(value));
    case DType::kBFloat16:
      return as(to_bfloat16(static_cast<float>(value)));
    case DType::kFloat16:
      return as(to_half(static_cast<float>(value)));
  }
}

}  // namespace

Parallel threads(int64_t count) { return {count, run_on_threads}; }

Pattern::Pattern(Random& random, int64_t heads, int64_t queries, int64_t keys, double density, bool causal)
    : heads(heads), queries(queries), keys(keys), crow{0} {
  for (int64_t row = 0; row < heads * queries; ++row) {
    const int64_t end = causal ? std::min(keys, row % queries + 1) : keys;
    for (int64_t j = 0; j < end; ++j) {
      if (random.chance(density)) col.push_back(j);
    }
    crow.push_back(nnz());
  }
  finish();
}

Pattern::Pattern(int64_t heads, int64_t queries, int64_t keys, std::vector<int64_t> crow, std::vector<int64_t> col)
    : heads(heads), queries(queries), keys(keys), crow(std::move(crow)), col(std::move(col)) {
  finish();
}

void Pattern::finish() {
  crow32.assign(crow.begin(), crow.end());
  col32.assign(col.begin(), col.end());
  ASSERT_EQ(check_csr(indices(true), queries, keys), "");
  plan_.resize(plan_layout(heads * queries, queries, keys, nnz()).bytes / 8);
  build_plan(indices(true), queries, keys, plan_.data());
}

CsrIndices Pattern::indices(bool wide) const {
  if (wide) return {crow.data(), col.data(), true, heads * queries, nnz()};
  return {crow32.data(), col32.data(), false, heads * queries, nnz()};
}

Tensor::Tensor(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool rows_first, int64_t gap)
    : dtype(dtype), batch(batch), heads(heads), rows(rows), columns(columns) {
  const int64_t row = columns + gap;
  head_stride = rows_first ? row : rows * row;
  row_stride = rows_first ? heads * row : row;
  batch_stride = heads * rows * row;
  data_.resize(batch * batch_stride * element_size(dtype));
  for (size_t i = 0; i < data_.size(); i += element_size(dtype)) {
    store(dtype, &data_[i], std::numeric_limits<double>::quiet_NaN());
  }
}

double Tensor::at(int64_t b, int64_t h, int64_t n, int64_t d) const {
  return load(dtype, &data_[offset(b, h, n, d) * element_size(dtype)]);
}

void Tensor::set(int64_t b, int64_t h, int64_t n, int64_t d, double value) {
  store(dtype, &data_[offset(b, h, n, d) * element_size(dtype)], value);
}

void Tensor::set_row(int64_t b, int64_t h, int64_t n, double value) {
  for (int64_t d = 0; d < columns; ++d) set(b, h, n, d, value);
}

void Tensor::fill(Random& random, double low, double high) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t d = 0; d < columns; ++d) set(b, h, n, d, random.real(low, high));
      }
    }
  }
}

Tensor Tensor::to(DType other) const {
  Tensor result = *this;
  result.dtype = other;
  const size_t count = data_.size() / element_size(dtype);
  result.data_.resize(count * element_size(other));
  for (size_t i = 0; i < count; ++i) {
    store(other, &result.data_[i * element_size(other)], load(dtype, &data_[i * element_size(dtype)]));
  }
  return result;
}

std::vector<double> Tensor::values() const {
  std::vector<double> all;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t d = 0; d < columns; ++d) all.push_back(at(b, h, n, d));
      }
    }
  }
  return all;
}

void Tensor::expect_gaps_untouched(const std::string& what) const {
  const int64_t size = element_size(dtype);
  const int64_t row = head_stride < row_stride ? head_stride : row_stride;  // both are whole rows with their gaps
  std::vector<unsigned char> untouched(size);
  store(dtype, untouched.data(), std::numeric_limits<double>::quiet_NaN());
  for (int64_t start = 0; start < static_cast<int64_t>(data_.size()) / size; start += row) {
    for (int64_t i = start + columns; i < start + row; ++i) {
      ASSERT_EQ(std::memcmp(&data_[i * size], untouched.data(), size), 0) << what << " was written behind a row";
    }
  }
}

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

double rounding_unit(DType dtype) {
  constexpr double kUnits[] = {0x1p-53, 0x1p-24, 0x1p-8, 0x1p-11};
  return kUnits[static_cast<int>(dtype)];
}

DType weight_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void expect_close(const Tensor& actual, const Tensor& exact, const Tensor& yardstick, const std::string& what) {
  const std::vector<double> a = actual.values(), e = exact.values(), y = yardstick.values();
  ASSERT_EQ(a.size(), e.size());
  double allowed = 0, largest = 0;
  for (size_t i = 0; i < e.size(); ++i) {
    if (!std::isfinite(e[i])) continue;
    largest = std::max(largest, std::abs(e[i]));
    allowed = std::max(allowed, 2 * std::abs(y[i] - e[i]));
  }
  // A yardstick that happens to be exact leaves room for the rounding of terms that cancel, at worst in float32.
  allowed +=
      4 * rounding_unit(actual.dtype) * largest + 256 * rounding_unit(weight_dtype(actual.dtype)) * (1 + largest);
  for (size_t i = 0; i < e.size(); ++i) {
    if (std::isfinite(e[i])) {
      ASSERT_LE(std::abs(a[i] - e[i]), allowed) << what << " element " << i << ": " << a[i] << " for " << e[i];
    } else {
      ASSERT_TRUE(std::isnan(e[i]) ? std::isnan(a[i]) : a[i] == e[i])
          << what << " element " << i << ": " << a[i] << " for " << e[i];
    }
  }
}

void expect_identical(const Tensor& actual, const Tensor& expected, const std::string& what) {
  ASSERT_TRUE(actual.bytes() == expected.bytes()) << what << " differs";
}

namespace {

class BitsRecorder : public testing::EmptyTestEventListener {
 public:
  explicit BitsRecorder(const char* file) : lines_(file, std::ios::app) {}
  void add(const std::vector<double>& numbers) {
    for (const double number : numbers) {
      uint64_t bits = 0;
      const double one_nan = std::isnan(number) ? std::numeric_limits<double>::quiet_NaN() : number;
      std::memcpy(&bits, &one_nan, sizeof bits);
      for (int i = 0; i < 8; ++i, bits >>= 8) hash_ = (hash_ ^ (bits & 255)) * 0x100000001b3;  // FNV-1a
    }
    count_ += numbers.size();
  }
  void OnTestStart(const testing::TestInfo&) override {
    hash_ = 0xcbf29ce484222325;
    count_ = 0;
  }
  void OnTestEnd(const testing::TestInfo& test) override {
    if (count_ == 0) return;
    lines_ << test.test_suite_name() << "." << test.name() << " " << count_ << " " << std::hex << hash_ << std::dec
           << std::endl;
  }

 private:
  std::ofstream lines_;
  uint64_t hash_ = 0;
  size_t count_ = 0;
};

/// Belongs to GoogleTest, and is null where nobody asks for bits.
BitsRecorder* const bits_recorder = []() -> BitsRecorder* {
  const char* file = std::getenv("FIAK_BITS");
  if (file == nullptr || *file == '\0') return nullptr;
  auto* recorder = new BitsRecorder(file);
  testing::UnitTest::GetInstance()->listeners().Append(recorder);
  return recorder;
}();

}  // namespace

void record_bits(const Tensor& result) {
  if (bits_recorder != nullptr) bits_recorder->add(result.values());
}

std::vector<std::tuple<cpu::Isa, DType>> all_kernels() {
  std::vector<std::tuple<cpu::Isa, DType>> all;
  for (int isa = 0; isa <= static_cast<int>(cpu::Isa::kAmxBf16); ++isa) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      if (static_cast<cpu::Isa>(isa) <= cpu::most_isa(dtype)) all.emplace_back(static_cast<cpu::Isa>(isa), dtype);
    }
  }
  return all;
}

bool machine_has(cpu::Isa isa) { return isa <= cpu::machine_isa(); }

}  // namespace fiak::tests
