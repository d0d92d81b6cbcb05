// The execution plan of a CSR pattern: validation, compressed offsets, the transpose and, of patterns that are not very
// sparse, the same as bits.
//
// A pattern is one CSR matrix of heads * num_queries rows (heads = groups, times query heads where these do not share
// one pattern) and num_keys columns. sections.h lists what a plan holds of it: its entries in row-major order by their
// columns; its transpose, which says for each key of each head in which row each of its entries stands and where among
// the head's row-major entries; and, where about one pair in 16 is kept, so that a dense kernel may be the faster one
// (cpu/choose), a bit for each pair and the number of tiles that such a kernel cannot skip.
//
// A plan takes at most 10 bytes for each row and each entry beside 1 KiB, that is 2.5 times what the pattern takes as
// int32. Where there are so few rows and entries that an offset for each column of each head would take more, columns
// are found by bisection.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/plan/sections.h"
#include "kernels/types.h"

namespace fiak {

constexpr int64_t kPlanTileRows = 24, kPlanTileKeys = 16;
constexpr int kPlanSamples = 8;

constexpr uint64_t kPlanMagic = 0x33306e616c506946;  // "FiPlan03"

struct PlanHeader {
  uint64_t magic;
  int64_t bytes;
  int64_t num_rows, num_queries, num_keys, nnz;
  int64_t crow_sample[kPlanSamples], col_sample[kPlanSamples];
  PlanLayout layout;
};

/// The layout of a plan for these sizes, which must be within kPlanMostSize and kPlanMostEntries.
template <class Size = int64_t, class Larger = LargerSize>
static inline PlanLayoutOf<Size> plan_layout(const Size& num_rows, const Size& num_queries, const Size& num_keys,
                                             const Size& nnz) {
  return plan_layout_behind<Size, Larger>(sizeof(PlanHeader), num_rows, num_queries, num_keys, nnz);
}

/// Offsets of 32 or 64 bits.
struct PlanOffsets {
  const void* data = nullptr;
  bool is_long = false;
  FIAK_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const uint32_t*>(data)[i];
  }
};

/// Entries [begin, end).
struct PlanRange {
  int64_t begin, end;
};

/// What the kernels read.
struct PlanView {
  const PlanHeader* header = nullptr;
  int64_t heads = 0, num_queries = 0, num_keys = 0, nnz = 0;
  PlanOffsets row_offsets;                 ///< [heads * num_queries + 1], into columns
  const uint16_t* columns = nullptr;       ///< [nnz], or null where they are wide
  const uint32_t* wide_columns = nullptr;  ///< the same
  PlanOffsets column_offsets;              ///< [heads * num_keys + 1], into rows; data is null where there are none
  const uint16_t* rows = nullptr;          ///< [nnz], row in its head modulo 65536: query_of() completes it
  const uint32_t* positions = nullptr;     ///< [nnz], the entry's place among its head's row-major entries
  int64_t row_words = 0;
  const uint64_t* bits = nullptr;  ///< [heads * num_queries, row_words], key j in bit j % 64 of word j / 64, or null
  const int64_t* tiles = nullptr;  ///< [heads], tiles of kPlanTileRows x kPlanTileKeys with an entry, or null

  /// Whether there is a section that not every plan has; of columns, one in 16 bits.
  FIAK_HOST_DEVICE bool has(PlanSection section) const {
    switch (section) {
      case PlanSection::kColumns:
        return columns != nullptr;
      case PlanSection::kColumnOffsets:
        return column_offsets.data != nullptr;
      case PlanSection::kBits:
      case PlanSection::kTiles:
        return bits != nullptr;
      default:
        return true;
    }
  }

  /// The entries of a row of the pattern.
  FIAK_HOST_DEVICE PlanRange row(int64_t row) const { return {row_offsets[row], row_offsets[row + 1]}; }
  FIAK_HOST_DEVICE int64_t first_entry(int64_t head) const { return row_offsets[head * num_queries]; }
  FIAK_HOST_DEVICE int64_t column(int64_t entry) const {
    return columns != nullptr ? columns[entry] : wide_columns[entry];
  }

  /// The places of a key's entries in the transpose.
  FIAK_HOST_DEVICE PlanRange places(int64_t head, int64_t key) const {
    if (column_offsets.data != nullptr) {
      const int64_t column = head * num_keys + key;
      return {column_offsets[column], column_offsets[column + 1]};
    }
    const int64_t begin = first_place(head, key, first_entry(head));
    return {begin, first_place(head, key + 1, begin)};
  }
  /// The row in its head of the entry at a place.
  FIAK_HOST_DEVICE int64_t query_of(int64_t head, int64_t place) const {
    if (num_queries <= kPlanShort) return rows[place];
    return query_of(head, rows[place], first_entry(head) + positions[place]);
  }
  /// The same from what `rows` says at the place, and the entry.
  FIAK_HOST_DEVICE int64_t query_of(int64_t head, uint16_t low_bits, int64_t entry) const {
    if (num_queries <= kPlanShort) return low_bits;
    // Rows of which 16 bits are known are in blocks of 65536: the last one that starts at or before the entry.
    const int64_t first_row = head * num_queries;
    int64_t low = 0, high = (num_queries - 1) / kPlanShort;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (row_offsets[first_row + middle * kPlanShort] <= entry) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low * kPlanShort + low_bits;
  }

 private:
  /// The first place, from `begin` on, of the head's entries in columns from `key` on.
  FIAK_HOST_DEVICE int64_t first_place(int64_t head, int64_t key, int64_t begin) const {
    const int64_t first = first_entry(head);
    int64_t low = begin, high = first_entry(head + 1);
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (column(first + positions[middle]) < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

/// What the kernels of each family have to do for a head, which tells a host that cannot read a plan what to launch.
struct PlanHeadWork {
  int64_t entries;
  int64_t tiles;  ///< of kPlanTileRows x kPlanTileKeys with an entry, or -1 where the plan has no bits
};
struct PlanSummary {
  const PlanHeadWork* heads = nullptr;  ///< [count], or null: not known
  int64_t count = 0;
};

/// A CSR matrix with 32 or 64 bit indices (both arrays alike), num_rows + 1 offsets and nnz columns.
struct CsrIndices {
  const void* crow;
  const void* col;
  bool wide;  ///< int64 instead of int32
  int64_t num_rows, nnz;
};

/// Empty if the indices are a well-formed pattern with num_keys columns, else the broken rule with the value found,
/// starting with the argument's name. Reads nothing out of bounds whatever the content.
std::string check_csr(const CsrIndices& csr, int64_t num_queries, int64_t num_keys, const Parallel& parallel = {});

/// Writes plan_layout(...).bytes bytes at `plan`, every one of them. The indices must have passed check_csr.
void build_plan(const CsrIndices& csr, int64_t num_queries, int64_t num_keys, void* plan,
                const Parallel& parallel = {});

/// Empty if `plan` (`bytes` long) starts with the header of a plan of this size, in O(1); else what is wrong.
std::string check_plan_header(const void* plan, int64_t bytes);

/// Writes the work of each of the plan's heads.
void summarise_plan(const PlanView& plan, PlanHeadWork* heads);

/// Empty if `plan` (`bytes` long) is a plan made by build_plan for these indices, as far as its header and samples of
/// the indices tell, in O(1); else what is wrong. `deep` compares the body with a newly built plan.
std::string check_plan(const void* plan, int64_t bytes, const CsrIndices& csr, bool deep);

FIAK_HOST_DEVICE static inline PlanView view_plan(const void* plan) {
  const auto* header = static_cast<const PlanHeader*>(plan);
  const auto* bytes = static_cast<const char*>(plan);
  const PlanLayout& layout = header->layout;
  const auto section = [&](PlanSection which) { return bytes + layout.start(which); };
  PlanView view;
  view.header = header;
  view.heads = layout.heads;
  view.num_queries = header->num_queries;
  view.num_keys = header->num_keys;
  view.nnz = header->nnz;
  view.row_offsets = {section(PlanSection::kRowOffsets), layout.has_long_offsets != 0};
  if (layout.has_wide_columns != 0) {
    view.wide_columns = reinterpret_cast<const uint32_t*>(section(PlanSection::kColumns));
  } else {
    view.columns = reinterpret_cast<const uint16_t*>(section(PlanSection::kColumns));
  }
  if (layout.has_column_offsets != 0) {
    view.column_offsets = {section(PlanSection::kColumnOffsets), layout.has_long_offsets != 0};
  }
  view.rows = reinterpret_cast<const uint16_t*>(section(PlanSection::kRows));
  view.positions = reinterpret_cast<const uint32_t*>(section(PlanSection::kPositions));
  if (layout.row_words > 0) {
    view.row_words = layout.row_words;
    view.bits = reinterpret_cast<const uint64_t*>(section(PlanSection::kBits));
    view.tiles = reinterpret_cast<const int64_t*>(section(PlanSection::kTiles));
  }
  return view;
}

}  // namespace fiak
