// What a plan consists of: the one table of its sections, from which fall out where each starts, how large the plan is,
// what kernels see of it (plan.h) and what Python does (fiak_ext._C.read_plan).
//
// A section is an array of numbers of one size. Whether a plan has it, and in which form, is decided by the pattern's
// sizes alone, so that a plan's size is known without its content. Sections start at multiples of 64 bytes:
//
//   | header | row_offsets | columns | column_offsets | rows | positions | bits | tiles |
//
// Sizes are int64_t, or what stands for one before it is known (c10::SymInt).
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace fiak {

constexpr int64_t kPlanShort = 65536;  ///< what 16 bits tell apart
constexpr int64_t kPlanMostShortOffset = 0xffffffff;
constexpr int64_t kPlanPadding = 32;  ///< readable numbers behind a section's last one, where the table says so
constexpr int64_t kPlanAlignment = 64;
constexpr int64_t kPlanMostSize = 0x7fffffff;           ///< of num_queries and num_keys
constexpr int64_t kPlanMostEntries = int64_t{1} << 48;  ///< and rows: nothing that is computed of sizes overflows

/// In the order in which they lie in a plan, behind its header.
enum class PlanSection : int {
  kRowOffsets,     ///< [heads * num_queries + 1], into columns: uint32, or int64 where there are more entries
  kColumns,        ///< [nnz], of each row ascending: uint16, or uint32 where there are more columns
  kColumnOffsets,  ///< [heads * num_keys + 1], into rows, like row_offsets; none where they would take too many bytes
  kRows,           ///< uint16 [nnz], of each column ascending: the row in its head, modulo 65,536
  kPositions,      ///< uint32 [nnz], of the same entry: its place among its head's row-major entries
  kBits,           ///< uint64 [heads * num_queries, row_words], key j in bit j % 64 of word j / 64; none of sparse ones
  kTiles,          ///< int64 [heads], tiles of kPlanTileRows x kPlanTileKeys with an entry; none without bits
  kCount
};
constexpr int kPlanSections = static_cast<int>(PlanSection::kCount);
constexpr const char* kPlanSectionNames[kPlanSections] = {"row_offsets", "columns", "column_offsets", "rows",
                                                          "positions",   "bits",    "tiles"};

struct LargerSize {
  FIAK_HOST_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

/// Where the sections of a plan start, in bytes, and which forms they have. Part of the plan's header.
template <class Size>
struct PlanLayoutOf {
  Size heads, bytes;
  Size starts[kPlanSections];
  Size row_words;           ///< 64-bit words of a row of bits; 0 where there are none
  Size has_long_offsets;    ///< 0 or 1: offsets are of 64 bits, not 32
  Size has_wide_columns;    ///< 0 or 1: columns are of 32 bits, not 16
  Size has_column_offsets;  ///< 0 or 1

  FIAK_HOST_DEVICE const Size& start(PlanSection section) const { return starts[static_cast<int>(section)]; }
};
using PlanLayout = PlanLayoutOf<int64_t>;

/// A row of the table: `count` numbers of `bytes` bytes each, and `padding` more that may be read.
template <class Size>
struct PlanSectionSize {
  Size bytes, count;
  int64_t padding;
};

/// The table. Of the layout, all but `bytes` and `starts` must be there.
template <class Size>
static inline void plan_section_sizes(const PlanLayoutOf<Size>& layout, const Size& num_rows, const Size& num_keys,
                                      const Size& nnz, const Size& has_bits,
                                      PlanSectionSize<Size> (&sizes)[kPlanSections]) {
  const auto set = [&](PlanSection section, const Size& bytes, const Size& count, int64_t padding = 0) {
    sizes[static_cast<int>(section)] = {bytes, count, padding};
  };
  const Size one = 1, two = 2, four = 4, eight = 8;
  const Size offset_bytes = layout.has_long_offsets * 4 + 4, column_bytes = layout.has_wide_columns * 2 + 2;
  set(PlanSection::kRowOffsets, offset_bytes, num_rows + one);
  set(PlanSection::kColumns, column_bytes, nnz, kPlanPadding);
  set(PlanSection::kColumnOffsets, offset_bytes, layout.heads * (layout.has_column_offsets * num_keys) + one);
  set(PlanSection::kRows, two, nnz, kPlanPadding);
  set(PlanSection::kPositions, four, nnz);
  set(PlanSection::kBits, eight, num_rows * layout.row_words);
  set(PlanSection::kTiles, eight, layout.heads * has_bits);
}

/// The sizes must be within kPlanMostSize and kPlanMostEntries. Larger()(a, b) is the larger one of two sizes;
/// `header_bytes` is what comes before the first section.
template <class Size, class Larger>
static inline PlanLayoutOf<Size> plan_layout_behind(int64_t header_bytes, const Size& num_rows, const Size& num_queries,
                                                    const Size& num_keys, const Size& nnz) {
  const Larger larger;
  const Size zero = 0, one = 1;
  const auto is_positive = [&](const Size& x) -> Size { return larger(x, zero) - larger(x - one, zero); };
  PlanLayoutOf<Size> layout{};
  layout.heads = num_rows / larger(num_queries, one);  // there are no rows where there are no queries
  layout.has_long_offsets = is_positive(nnz - kPlanMostShortOffset);
  layout.has_wide_columns = is_positive(num_keys - kPlanShort);
  // Of 10 bytes for each row and each entry, offsets of rows take 4, entries 8 or 10; bits may take 2 of each, if
  // columns leave as many; columns' offsets what is left. By division: products might overflow.
  const Size words = (num_keys + 63) / 64;
  const Size is_narrow = one - layout.has_wide_columns;
  layout.row_words = is_narrow * words * is_positive((num_rows + nnz) * 2 / (larger(words, one) * 8) - num_rows + one);
  const Size left = num_rows * 6 + nnz * 2 * is_narrow - num_rows * layout.row_words * 8;
  layout.has_column_offsets = is_positive(left / (larger(num_keys, one) * 4) - layout.heads + one);
  PlanSectionSize<Size> sizes[kPlanSections];
  plan_section_sizes(layout, num_rows, num_keys, nnz, is_positive(layout.row_words), sizes);
  const auto aligned = [](const Size& bytes) -> Size {
    return (bytes + (kPlanAlignment - 1)) / kPlanAlignment * kPlanAlignment;
  };
  layout.bytes = aligned(Size(header_bytes));
  for (int i = 0; i < kPlanSections; ++i) {
    layout.starts[i] = layout.bytes;
    layout.bytes = layout.bytes + aligned((sizes[i].count + Size(sizes[i].padding)) * sizes[i].bytes);
  }
  return layout;
}

}  // namespace fiak
