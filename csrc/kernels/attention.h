// Arguments of the attention kernels, shared by all implementations.
#pragma once

#include "kernels/plan/plan.h"
#include "kernels/types.h"

namespace fiak {

/// What prior_attention and csr_attention have in common. Shapes: query [batch, query_heads, queries, head_dim],
/// key [batch, key_heads, keys, head_dim], value [batch, key_heads, keys, value_dim]; query head h reads key head
/// h / (query_heads / key_heads).
struct AttentionArgs {
  int64_t batch = 0, query_heads = 0, key_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  DType dtype = DType::kFloat32;
  Score score = Score::kDot;
  double scale = 1.0;
  double dropout_p = 0.0;
  bool log_prior = false;  ///< whether the weights are given as ln w
  uint64_t seed = 0;
  const int64_t* kv_lens = nullptr;  ///< [batch], each in 0..keys, or null: what lies behind is never read
  Input query, key, value;
};

struct PriorArgs : AttentionArgs {
  bool is_causal = false;  ///< top-left aligned: query i sees keys j <= i
  const void* prior =
      nullptr;  ///< weights [groups, 1|query_heads, 1|queries, keys], float (double with double), or null
  int64_t prior_groups = 1, prior_heads = 1, prior_rows = 1;
  int64_t prior_group_stride = 0, prior_head_stride = 0, prior_row_stride = 0;  ///< 0 where broadcast
};

/// Which head of a pattern a query head reads. A pattern of G * query_heads heads has G groups of them; one of any
/// other number of heads has that many groups, each of one head that all query heads share. Element b uses group b %
/// groups.
struct PatternHeads {
  int64_t groups, heads;  ///< heads of a group: query_heads or 1
  FIAK_HOST_DEVICE PatternHeads(int64_t plan_heads, int64_t query_heads) {
    heads = query_heads > 0 && plan_heads % query_heads == 0 ? query_heads : 1;
    groups = plan_heads / heads;
  }
  FIAK_HOST_DEVICE int64_t head_of(int64_t b, int64_t h) const {
    return heads == 1 ? b % groups : b % groups * heads + h;
  }
};

struct CsrArgs : AttentionArgs {
  PlanView plan;
  const void* prior = nullptr;             ///< weights [nnz], float (double with double), or null for all ones
  const int64_t* query_offsets = nullptr;  ///< [batch]: query n is row n + offset of its head, or null for 0

  /// How many heads of the plan a batch element reads: all query heads share one, or each has its own (PatternHeads).
  int64_t pattern_heads() const { return PatternHeads(plan.heads, query_heads).heads; }
  int64_t groups() const { return PatternHeads(plan.heads, query_heads).groups; }
  /// The plan's head that query head h of element b reads.
  int64_t plan_head(int64_t b, int64_t h) const { return PatternHeads(plan.heads, query_heads).head_of(b, h); }
};

struct ForwardResult {
  Output output;              ///< [batch, query_heads, queries, value_dim]
  void* logsumexp = nullptr;  ///< contiguous [batch, query_heads, queries], float (double with double)
};

/// Beyond this size a logsumexp, rounded, may be off by more than the scores' own rounding, and every probability by as
/// much: backward on the CPU then computes the row's maximum and sum once more.
constexpr float kLargeLogsumexp = 64.0f;

struct BackwardArgs {
  Input grad_output, output;
  const void* logsumexp = nullptr;
  Output grad_query, grad_key, grad_value;
  void* grad_prior = nullptr;  ///< contiguous, in the prior's own shape or [nnz]; null: not wanted
};

}  // namespace fiak
