#include "kernels/plan/plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/cpu/parallel.h"

namespace fiak {
namespace {

int64_t at(const void* data, bool wide, int64_t index) {
  return wide ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
}

int64_t sample_index(int sample, int64_t count) { return count * sample / kPlanSamples; }

/// The sampled offset or column, or 0 where there is none.
int64_t sampled(const void* data, bool wide, int sample, int64_t count) {
  return count > 0 ? at(data, wide, sample_index(sample, count)) : 0;
}

std::string got(const char* rule, int64_t value) { return std::string(rule) + " (got " + std::to_string(value) + ")"; }

/// Whether a row's columns ascend within 0..num_keys - 1. Without an early end, so that the compiler makes vectors of
/// it.
template <class Index>
bool well_formed(const Index* columns, int64_t count, int64_t num_keys) {
  if (count == 0) return true;
  unsigned wrong = columns[0] < 0 || columns[count - 1] >= num_keys;
  for (int64_t i = 1; i < count; ++i) wrong |= columns[i] <= columns[i - 1];
  return wrong == 0;
}

template <class Index>
std::string check(const Index* crow, const Index* col, int64_t num_rows, int64_t nnz, int64_t num_queries,
                  int64_t num_keys, const Parallel& parallel) {
  if (crow[0] != 0) return got("crow_indices must start with 0", crow[0]);
  for (int64_t row = 0; row < num_rows; ++row) {
    if (crow[row + 1] < crow[row]) {
      return "crow_indices must not decrease (got " + std::to_string(crow[row + 1]) + " after " +
             std::to_string(crow[row]) + " at row " + std::to_string(row) + ")";
    }
  }
  if (crow[num_rows] != nnz) {
    return "crow_indices must end with the number of col_indices, " + std::to_string(nnz) + " (got " +
           std::to_string(crow[num_rows]) + ")";
  }
  std::atomic<int64_t> first_wrong = num_rows;
  cpu::parallel_range(parallel, num_rows, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    while (row < end && well_formed(col + crow[row], crow[row + 1] - crow[row], num_keys)) ++row;
    int64_t found = first_wrong;
    while (row < end && row < found && !first_wrong.compare_exchange_weak(found, row)) {
    }
  });
  if (const int64_t row = first_wrong; row < num_rows) {
    int64_t previous = -1;
    for (int64_t entry = crow[row]; entry < crow[row + 1]; ++entry) {
      const int64_t column = col[entry];
      if (column < 0 || column >= num_keys) {
        return "col_indices must lie in 0.." + std::to_string(num_keys - 1) + " (got " + std::to_string(column) +
               " in row " + std::to_string(row) + ")";
      }
      if (column <= previous) {
        return "col_indices must ascend within a row, without duplicates (got " + std::to_string(column) + " after " +
               std::to_string(previous) + " in row " + std::to_string(row) + ")";
      }
      previous = column;
    }
  }
  for (int64_t row = 0; row < num_rows; row += num_queries) {
    const int64_t entries = crow[row + num_queries] - crow[row];
    if (entries > std::numeric_limits<uint32_t>::max()) return got("a head must have fewer than 2^32 entries", entries);
  }
  return {};
}

void prefetch_for_writing(const void* p) { __builtin_prefetch(p, 1); }

/// The places of a section of offsets.
class OffsetsOut {
 public:
  OffsetsOut(void* data, bool is_long) : data_(data), is_long_(is_long) {}
  void set(int64_t i, int64_t offset) const {
    if (is_long_) {
      static_cast<int64_t*>(data_)[i] = offset;
    } else {
      static_cast<uint32_t*>(data_)[i] = static_cast<uint32_t>(offset);
    }
  }

 private:
  void* data_;
  bool is_long_;
};

/// Writes what a plan has of a head besides bits.
template <class Index, class Column>
void build_head(const Index* crow, const Index* col, const PlanHeader& header, int64_t head, Column* columns,
                char* plan) {
  const PlanLayout& layout = header.layout;
  const int64_t num_queries = header.num_queries, num_keys = header.num_keys, first_row = head * num_queries;
  const int64_t first = crow[first_row], end = crow[first_row + num_queries];
  const OffsetsOut row_offsets(plan + layout.start(PlanSection::kRowOffsets), layout.has_long_offsets != 0);
  auto* rows = reinterpret_cast<uint16_t*>(plan + layout.start(PlanSection::kRows));
  auto* positions = reinterpret_cast<uint32_t*>(plan + layout.start(PlanSection::kPositions));
  for (int64_t row = first_row; row < first_row + num_queries; ++row) row_offsets.set(row + 1, crow[row + 1]);
  for (int64_t entry = first; entry < end; ++entry) columns[entry] = static_cast<Column>(col[entry]);

  if (layout.has_column_offsets == 0) {  // far more columns than entries
    std::vector<uint16_t> row_of(end - first);
    for (int64_t query = 0; query < num_queries; ++query) {
      const auto begin = row_of.begin() + (crow[first_row + query] - first);
      std::fill(begin, row_of.begin() + (crow[first_row + query + 1] - first), static_cast<uint16_t>(query));
    }
    std::iota(positions + first, positions + end, uint32_t{0});
    std::sort(positions + first, positions + end, [&](uint32_t a, uint32_t b) {
      return col[first + a] != col[first + b] ? col[first + a] < col[first + b] : a < b;
    });
    for (int64_t place = first; place < end; ++place) rows[place] = row_of[positions[place]];
    return;
  }
  // The transpose by counting: entries of a column come out with ascending rows.
  const OffsetsOut column_offsets(plan + layout.start(PlanSection::kColumnOffsets), layout.has_long_offsets != 0);
  std::vector<int64_t> next(num_keys);  // first how many entries a column has, then where its next one goes
  for (int64_t entry = first; entry < end; ++entry) ++next[col[entry]];
  int64_t place = first;
  for (int64_t j = 0; j < num_keys; ++j) {
    place += std::exchange(next[j], place);
    column_offsets.set(head * num_keys + j + 1, place);
  }
  for (int64_t query = 0; query < num_queries; ++query) {
    const int64_t row = first_row + query;
    for (int64_t entry = crow[row]; entry < crow[row + 1]; ++entry) {
      const int64_t to = next[col[entry]]++;
      if (to % 16 == 0) {  // a column's next lines are wanted soon, and the hardware cannot foresee them
        prefetch_for_writing(rows + to + 32);
        prefetch_for_writing(positions + to + 16);
      }
      rows[to] = static_cast<uint16_t>(query);
      positions[to] = static_cast<uint32_t>(entry - first);
    }
  }
}

/// The row's entries as bits.
template <class Index>
void fill_bits(const Index* col, int64_t begin, int64_t end, int64_t row_words, uint64_t* words) {
  int64_t entry = begin;
  for (int64_t word = 0; word < row_words; ++word) {
    uint64_t bits = 0;
    for (; entry < end && col[entry] < (word + 1) * 64; ++entry) bits |= uint64_t{1} << (col[entry] % 64);
    words[word] = bits;
  }
}

/// How many tiles of one row of tiles have an entry; `any` is scratch for row_words words.
int64_t count_tiles(const uint64_t* bits, int64_t rows, int64_t row_words, uint64_t* any) {
  static_assert(64 % kPlanTileKeys == 0, "a tile lies in one word");
  std::copy(bits, bits + row_words, any);
  for (int64_t row = 1; row < rows; ++row) {
    for (int64_t word = 0; word < row_words; ++word) any[word] |= bits[row * row_words + word];
  }
  int64_t tiles = 0;
  for (int64_t word = 0; word < row_words; ++word) {
    for (uint64_t left = any[word]; left != 0; left >>= kPlanTileKeys) {
      tiles += (left & ((uint64_t{1} << kPlanTileKeys) - 1)) != 0;
    }
  }
  return tiles;
}

template <class Index>
void build_bits(const Index* crow, const Index* col, const PlanHeader& header, int64_t head, char* plan) {
  const PlanLayout& layout = header.layout;
  auto* bits = reinterpret_cast<uint64_t*>(plan + layout.start(PlanSection::kBits));
  std::vector<uint64_t> any(layout.row_words);
  int64_t tiles = 0;
  for (int64_t first = 0; first < header.num_queries; first += kPlanTileRows) {
    const int64_t rows = std::min(kPlanTileRows, header.num_queries - first);
    const int64_t row = head * header.num_queries + first;
    uint64_t* words = bits + row * layout.row_words;
    for (int64_t r = 0; r < rows; ++r) {
      fill_bits(col, crow[row + r], crow[row + r + 1], layout.row_words, words + r * layout.row_words);
    }
    tiles += count_tiles(words, rows, layout.row_words, any.data());
  }
  reinterpret_cast<int64_t*>(plan + layout.start(PlanSection::kTiles))[head] = tiles;
}

/// Zeros all that no head writes: what is behind the header and the sections, and the first offsets.
void zero_gaps(const PlanHeader& header, char* plan) {
  const PlanLayout& layout = header.layout;
  PlanSectionSize<int64_t> sizes[kPlanSections];
  plan_section_sizes<int64_t>(layout, header.num_rows, header.num_keys, header.nnz, layout.row_words > 0, sizes);
  int64_t written = sizeof(PlanHeader);
  for (int i = 0; i < kPlanSections; ++i) {
    std::memset(plan + written, 0, layout.starts[i] - written);
    written = layout.starts[i] + sizes[i].count * sizes[i].bytes;
  }
  std::memset(plan + written, 0, layout.bytes - written);
  for (const PlanSection offsets : {PlanSection::kRowOffsets, PlanSection::kColumnOffsets}) {
    std::memset(plan + layout.start(offsets), 0, sizes[static_cast<int>(offsets)].bytes);
  }
}

/// Sizes that are out of bounds, as check_csr says it.
std::string check_sizes(const CsrIndices& csr, int64_t num_queries, int64_t num_keys) {
  for (const auto& [name, size] : {std::pair("num_queries", num_queries), std::pair("num_keys", num_keys)}) {
    if (size < 0 || size > kPlanMostSize) {
      return got((std::string(name) + " must lie in 0.." + std::to_string(kPlanMostSize)).c_str(), size);
    }
  }
  for (const auto& [name, size] : {std::pair("crow_indices", csr.num_rows), std::pair("col_indices", csr.nnz)}) {
    if (size > kPlanMostEntries) {
      return got((std::string(name) + " must have at most 2^48 elements").c_str(), size);
    }
  }
  if (num_queries > 0 ? csr.num_rows % num_queries != 0 : csr.num_rows != 0) {
    return "crow_indices must hold a multiple of num_queries rows, " + std::to_string(num_queries) + " (got " +
           std::to_string(csr.num_rows) + " rows)";
  }
  return {};
}

/// Reads a plan's header; empty if it is one and names the plan's size.
std::string read_header(const void* plan, int64_t bytes, PlanHeader& header) {
  if (bytes < static_cast<int64_t>(sizeof header)) return got("plan must come from csr_plan; it is too short", bytes);
  std::memcpy(&header, plan, sizeof header);
  if (header.magic != kPlanMagic)
    return "plan must come from csr_plan of this version; its first bytes are not a plan's";
  if (header.bytes != bytes) return got("plan must have the size that its header names", bytes);
  return {};
}

/// Empty if the header's sizes are some that csr_plan takes, and its layout is theirs.
std::string check_layout(const PlanHeader& header) {
  const CsrIndices csr{nullptr, nullptr, false, header.num_rows, header.nnz};
  if (header.num_rows < 0 || header.nnz < 0)
    return got("plan must have no negative sizes", header.num_rows < 0 ? header.num_rows : header.nnz);
  if (std::string error = check_sizes(csr, header.num_queries, header.num_keys); !error.empty()) {
    return "plan must be of sizes that csr_plan takes; " + error;
  }
  const PlanLayout layout = plan_layout(header.num_rows, header.num_queries, header.num_keys, header.nnz);
  if (layout.bytes != header.bytes || std::memcmp(&layout, &header.layout, sizeof layout) != 0) {
    return got("plan must have the size and layout of its pattern's plan", header.bytes);
  }
  return {};
}

}  // namespace

std::string check_csr(const CsrIndices& csr, int64_t num_queries, int64_t num_keys, const Parallel& parallel) {
  if (std::string error = check_sizes(csr, num_queries, num_keys); !error.empty()) return error;
  return csr.wide ? check(static_cast<const int64_t*>(csr.crow), static_cast<const int64_t*>(csr.col), csr.num_rows,
                          csr.nnz, num_queries, num_keys, parallel)
                  : check(static_cast<const int32_t*>(csr.crow), static_cast<const int32_t*>(csr.col), csr.num_rows,
                          csr.nnz, num_queries, num_keys, parallel);
}

void build_plan(const CsrIndices& csr, int64_t num_queries, int64_t num_keys, void* plan, const Parallel& parallel) {
  const PlanLayout layout = plan_layout(csr.num_rows, num_queries, num_keys, csr.nnz);
  PlanHeader header{kPlanMagic, layout.bytes, csr.num_rows, num_queries, num_keys, csr.nnz, {}, {}, layout};
  for (int i = 0; i < kPlanSamples; ++i) {
    header.crow_sample[i] = sampled(csr.crow, csr.wide, i, csr.num_rows + 1);
    header.col_sample[i] = sampled(csr.col, csr.wide, i, csr.nnz);
  }
  std::memcpy(plan, &header, sizeof header);
  auto* bytes = static_cast<char*>(plan);
  zero_gaps(header, bytes);
  const auto build_heads = [&](const auto* crow, const auto* col, auto* columns) {
    cpu::parallel_range(parallel, layout.heads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        build_head(crow, col, header, head, columns, bytes);
        if (layout.row_words > 0) build_bits(crow, col, header, head, bytes);
      }
    });
  };
  const auto build_from = [&](const auto* crow, const auto* col) {
    if (layout.has_wide_columns != 0) {
      build_heads(crow, col, reinterpret_cast<uint32_t*>(bytes + layout.start(PlanSection::kColumns)));
    } else {
      build_heads(crow, col, reinterpret_cast<uint16_t*>(bytes + layout.start(PlanSection::kColumns)));
    }
  };
  if (csr.wide) {
    build_from(static_cast<const int64_t*>(csr.crow), static_cast<const int64_t*>(csr.col));
  } else {
    build_from(static_cast<const int32_t*>(csr.crow), static_cast<const int32_t*>(csr.col));
  }
}

void summarise_plan(const PlanView& plan, PlanHeadWork* heads) {
  for (int64_t head = 0; head < plan.heads; ++head) {
    heads[head] = {plan.first_entry(head + 1) - plan.first_entry(head),
                   plan.has(PlanSection::kTiles) ? plan.tiles[head] : -1};
  }
}

std::string check_plan_header(const void* plan, int64_t bytes) {
  PlanHeader header;
  std::string error = read_header(plan, bytes, header);
  return error.empty() ? check_layout(header) : error;
}

std::string check_plan(const void* plan, int64_t bytes, const CsrIndices& csr, bool deep) {
  PlanHeader header;
  if (std::string error = read_header(plan, bytes, header); !error.empty()) return error;
  if (header.num_rows != csr.num_rows || header.nnz != csr.nnz) {
    return "plan must be made for this pattern of " + std::to_string(csr.num_rows) + " rows and " +
           std::to_string(csr.nnz) + " entries (got one for " + std::to_string(header.num_rows) + " and " +
           std::to_string(header.nnz) + ")";
  }
  if (std::string error = check_layout(header); !error.empty()) return error;
  for (int i = 0; i < kPlanSamples; ++i) {
    if (header.crow_sample[i] != sampled(csr.crow, csr.wide, i, csr.num_rows + 1)) {
      return "plan must be made for these crow_indices; they differ at index " +
             std::to_string(sample_index(i, csr.num_rows + 1));
    }
    if (header.col_sample[i] != sampled(csr.col, csr.wide, i, csr.nnz)) {
      return "plan must be made for these col_indices; they differ at index " +
             std::to_string(sample_index(i, csr.nnz));
    }
  }
  if (!deep) return {};
  if (std::string error = check_csr(csr, header.num_queries, header.num_keys); !error.empty()) return error;
  std::vector<char> expected(bytes);
  build_plan(csr, header.num_queries, header.num_keys, expected.data());
  if (std::memcmp(expected.data(), plan, bytes) != 0)
    return "plan must be what csr_plan makes of this pattern; its body differs";
  return {};
}

}  // namespace fiak
