// The execution plan of a CSR pattern: validation, compressed offsets, the transpose and, of patterns that are not very
// sparse, the same as bits.
//
// A pattern is one CSR matrix of heads * num_queries rows (heads = groups * query heads) and num_keys columns.
// Column indices are stored in 16 bits, relative to blocks of 65536 keys; a row is therefore a run of one segment for
// each key block. The transpose holds, for each key of each head, its rows (16 bits, relative to blocks of 65536
// queries) and where in the head's row-major entries each one stands.
//
// Where at least one pair in 16 is kept, a dense kernel may be the faster one (cpu/cost_model.h). For it there is a bit
// for each pair, and the number of each head's tiles of 24 queries and 16 keys that have an entry: what such a kernel
// cannot skip.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/types.h"

namespace fiak {

constexpr int64_t kPlanBlock = 65536;
constexpr int64_t kPlanPadding = 32;    ///< readable 16-bit indices behind the last entry
constexpr int64_t kPlanBitsShare = 16;  ///< plans have bits where nnz * kPlanBitsShare >= rows * keys
constexpr int64_t kPlanTileRows = 24, kPlanTileKeys = 16;
constexpr int kPlanSamples = 8;

constexpr uint64_t kPlanMagic = 0x32306e616c506946;  // "FiPlan02"

struct PlanHeader {
  uint64_t magic;
  int64_t bytes;
  int64_t num_rows, num_queries, num_keys, nnz;
  int64_t crow_sample[kPlanSamples], col_sample[kPlanSamples];
};

/// Byte offsets of the sections; a function of the sizes alone, so that a plan's size is known without its content.
struct PlanLayout {
  int64_t heads, key_blocks, query_blocks;
  int64_t row_segments, columns, column_segments, rows, positions, bits, tiles, bytes;
  int64_t row_words;  ///< 64-bit words of a row of bits; 0 where there are none
};
FIAK_HOST_DEVICE static inline PlanLayout plan_layout(int64_t num_rows, int64_t num_queries, int64_t num_keys,
                                                      int64_t nnz) {
  struct Sections {
    int64_t end;
    FIAK_HOST_DEVICE int64_t add(int64_t bytes) {
      const int64_t start = end;
      end += (bytes + 63) / 64 * 64;
      return start;
    }
  };
  PlanLayout layout{};
  layout.heads = num_queries > 0 ? num_rows / num_queries : 0;
  layout.key_blocks = num_keys > kPlanBlock ? (num_keys + kPlanBlock - 1) / kPlanBlock : 1;
  layout.query_blocks = num_queries > kPlanBlock ? (num_queries + kPlanBlock - 1) / kPlanBlock : 1;
  const bool has_bits = nnz * kPlanBitsShare >= num_rows * num_keys;
  layout.row_words = has_bits ? (num_keys + 63) / 64 : 0;
  Sections sections{0};
  sections.add(sizeof(PlanHeader));
  layout.row_segments = sections.add((num_rows * layout.key_blocks + 1) * 8);
  layout.columns = sections.add((nnz + kPlanPadding) * 2);
  layout.column_segments = sections.add((layout.heads * num_keys * layout.query_blocks + 1) * 8);
  layout.rows = sections.add((nnz + kPlanPadding) * 2);
  layout.positions = sections.add(nnz * 4);
  layout.bits = sections.add(num_rows * layout.row_words * 8);
  layout.tiles = sections.add(has_bits ? layout.heads * 8 : 0);
  layout.bytes = sections.end;
  return layout;
}

/// What the kernels read.
struct PlanView {
  const PlanHeader* header = nullptr;
  int64_t heads = 0, num_queries = 0, num_keys = 0, nnz = 0, key_blocks = 1, query_blocks = 1;
  const int64_t* row_segments = nullptr;     ///< [heads * num_queries * key_blocks + 1], offsets into columns
  const uint16_t* columns = nullptr;         ///< [nnz], column - 65536 * block
  const int64_t* column_segments = nullptr;  ///< [heads * num_keys * query_blocks + 1], offsets into rows
  const uint16_t* rows = nullptr;            ///< [nnz], row in its head - 65536 * block
  const uint32_t* positions = nullptr;       ///< [nnz], the entry's place among its head's row-major entries
  int64_t row_words = 0;
  const uint64_t* bits = nullptr;  ///< [heads * num_queries, row_words], key j in bit j % 64 of word j / 64, or null
  const int64_t* tiles = nullptr;  ///< [heads], tiles of kPlanTileRows x kPlanTileKeys with an entry, or null
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

/// Empty if `plan` (`bytes` long) is a plan made by build_plan for these indices, as far as its header and samples of
/// the indices tell, in O(1); else what is wrong. `deep` compares the body with a newly built plan.
std::string check_plan(const void* plan, int64_t bytes, const CsrIndices& csr, int64_t num_keys, bool deep);

FIAK_HOST_DEVICE static inline PlanView view_plan(const void* plan) {
  const auto* header = static_cast<const PlanHeader*>(plan);
  const auto* bytes = static_cast<const char*>(plan);
  const PlanLayout layout = plan_layout(header->num_rows, header->num_queries, header->num_keys, header->nnz);
  PlanView view;
  view.header = header;
  view.heads = layout.heads;
  view.num_queries = header->num_queries;
  view.num_keys = header->num_keys;
  view.nnz = header->nnz;
  view.key_blocks = layout.key_blocks;
  view.query_blocks = layout.query_blocks;
  view.row_segments = reinterpret_cast<const int64_t*>(bytes + layout.row_segments);
  view.columns = reinterpret_cast<const uint16_t*>(bytes + layout.columns);
  view.column_segments = reinterpret_cast<const int64_t*>(bytes + layout.column_segments);
  view.rows = reinterpret_cast<const uint16_t*>(bytes + layout.rows);
  view.positions = reinterpret_cast<const uint32_t*>(bytes + layout.positions);
  if (layout.row_words > 0) {
    view.row_words = layout.row_words;
    view.bits = reinterpret_cast<const uint64_t*>(bytes + layout.bits);
    view.tiles = reinterpret_cast<const int64_t*>(bytes + layout.tiles);
  }
  return view;
}

}  // namespace fiak
