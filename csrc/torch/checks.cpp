#include "torch/checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <string>
#include <utility>

#include "kernels/plan/plan.h"

namespace fiak {
namespace {

using at::Tensor;
using c10::SymInt;

std::string dtype_name(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

bool known_zero(const SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(0)); }

void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* shape) {
  TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have the shape ", shape, " (got ", tensor.sym_sizes(), ")");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of ", like_name, ", ",
              like.device(), " (got ", tensor.device(), ")");
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name, ", ",
              dtype_name(like.scalar_type()), " (got ", dtype_name(tensor.scalar_type()), ")");
}

/// A size of one argument that another one's shape fixes.
void check_size(const char* op, const char* name, const Tensor& tensor, int64_t dim, const SymInt& size,
                const char* meaning) {
  TORCH_SYM_CHECK(tensor.sym_size(dim).sym_eq(size), op, ": ", name, " must have size ", size, " in dimension ", dim,
                  ", ", meaning, " (got ", tensor.sym_sizes(), ")");
}

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op, ": ",
              name, " must be torch.float64, torch.float32, torch.bfloat16 or torch.float16 (got ", dtype_name(dtype),
              ")");
}

void check_indices(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, op, ": ", name,
              " must be torch.int32 or torch.int64 (got ", dtype_name(tensor.scalar_type()), ")");
}

void check_long(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong, op, ": ", name, " must be torch.int64 (got ",
              dtype_name(tensor.scalar_type()), ")");
}

/// Weights and what is computed from them.
void check_weight_dtype(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  const at::ScalarType wanted = weight_dtype(query.scalar_type());
  TORCH_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted), " with ",
              dtype_name(query.scalar_type()), " inputs (got ", dtype_name(tensor.scalar_type()), ")");
}

void check_per_element(const char* op, const char* name, const OptionalTensor& tensor, const Tensor& query) {
  if (!tensor.has_value()) return;
  check_dim(op, name, *tensor, 1, "[B]");
  check_indices(op, name, *tensor);
  check_device(op, name, *tensor, "query", query);
  check_size(op, name, *tensor, 0, query.sym_size(0), "query's batch");
}

/// What both attentions have in common.
template <class Inputs>
void check_attention(const char* op, const Inputs& in) {
  const Tensor &query = in.query, &key = in.key, &value = in.value;
  check_dim(op, "query", query, 4, "[B, Hq, N, D]");
  check_dim(op, "key", key, 4, "[B, H, M, D]");
  check_dim(op, "value", value, 4, "[B, H, M, Dv]");
  check_floating(op, "query", query);
  check_dtype(op, "key", key, "query", query);
  check_dtype(op, "value", value, "query", query);
  check_device(op, "key", key, "query", query);
  check_device(op, "value", value, "query", query);
  TORCH_SYM_CHECK(query.sym_size(3).sym_ge(1), op, ": query must have D >= 1 (got ", query.sym_sizes(), ")");
  TORCH_SYM_CHECK(value.sym_size(3).sym_ge(1), op, ": value must have Dv >= 1 (got ", value.sym_sizes(), ")");
  check_size(op, "key", key, 0, query.sym_size(0), "query's batch");
  check_size(op, "key", key, 3, query.sym_size(3), "query's D");
  check_size(op, "value", value, 0, query.sym_size(0), "query's batch");
  check_size(op, "value", value, 1, key.sym_size(1), "key's heads");
  check_size(op, "value", value, 2, key.sym_size(2), "key's rows");
  const SymInt query_heads = query.sym_size(1), key_heads = key.sym_size(1);
  const auto multiple = known_zero(key_heads) ? query_heads.sym_eq(0) : (query_heads % key_heads).sym_eq(0);
  TORCH_SYM_CHECK(multiple, op, ": query must have a multiple of key's ", key_heads, " heads (got ", query_heads, ")");
  check_per_element(op, "kv_lens", in.kv_lens, query);
  TORCH_CHECK(in.dropout_p >= 0.0 && in.dropout_p <= 1.0, op, ": dropout_p must lie in 0..1 (got ", in.dropout_p, ")");
  TORCH_CHECK(in.dropout_p == 0.0 || in.seed.has_value(), op, ": seed must be given with dropout_p > 0 (got None)");
  if (in.seed.has_value()) {
    check_long(op, "seed", *in.seed);
    TORCH_SYM_CHECK(in.seed->sym_numel().sym_eq(1), op, ": seed must have one element (got ", in.seed->sym_sizes(),
                    ")");
    check_device(op, "seed", *in.seed, "query", query);
  }
  TORCH_CHECK(in.score == "dot" || in.score == "gaussian", op, ": score must be \"dot\" or \"gaussian\" (got \"",
              in.score, "\")");
}

/// G groups of weights for B batch elements.
void check_groups(const char* op, const char* name, const SymInt& groups, const SymInt& batch) {
  TORCH_SYM_CHECK(groups.sym_ge(1), op, ": ", name, " must have G >= 1 groups (got ", groups, ")");
  TORCH_SYM_CHECK((batch % groups).sym_eq(0), op, ": ", name,
                  " must have a number of groups G that divides B = ", batch, " (got ", groups, ")");
}

void check_pattern(const char* op, const Tensor& crow_indices, const Tensor& col_indices) {
  check_dim(op, "crow_indices", crow_indices, 1, "[rows + 1]");
  check_dim(op, "col_indices", col_indices, 1, "[nnz]");
  check_indices(op, "crow_indices", crow_indices);
  check_dtype(op, "col_indices", col_indices, "crow_indices", crow_indices);
  check_device(op, "col_indices", col_indices, "crow_indices", crow_indices);
  TORCH_SYM_CHECK(crow_indices.sym_size(0).sym_ge(1), op, ": crow_indices must have rows + 1 elements (got 0)");
}

void check_keep(const char* op, const Tensor& keep, const char* like_name, const Tensor& like) {
  check_dim(op, "keep", keep, 2, "[H, K]");
  check_long(op, "keep", keep);
  check_device(op, "keep", keep, like_name, like);
}

}  // namespace

at::ScalarType weight_dtype(at::ScalarType input_dtype) {
  return input_dtype == at::kDouble ? at::kDouble : at::kFloat;
}

void check_prior_attention(const char* op, const PriorInputs& in) {
  check_attention(op, in);
  if (!in.prior.has_value()) return;
  const Tensor &prior = *in.prior, &query = in.query;
  check_dim(op, "prior", prior, 4, "[G, 1|Hq, 1|N, M]");
  check_weight_dtype(op, "prior", prior, query);
  check_device(op, "prior", prior, "query", query);
  check_groups(op, "prior", prior.sym_size(0), query.sym_size(0));
  for (const int64_t dim : {1, 2}) {
    const SymInt size = prior.sym_size(dim);
    TORCH_SYM_CHECK(size.sym_eq(1).sym_or(size.sym_eq(query.sym_size(dim))), op, ": prior must have size 1 or ",
                    query.sym_size(dim), " in dimension ", dim, ", query's ", dim == 1 ? "heads" : "rows", " (got ",
                    prior.sym_sizes(), ")");
  }
  check_size(op, "prior", prior, 3, in.key.sym_size(2), "key's rows");
}

namespace {

void check_plan_bytes(const char* op, const Tensor& plan) {
  check_dim(op, "plan", plan, 1, "[bytes]");
  TORCH_CHECK(plan.scalar_type() == at::kByte, op, ": plan must be torch.uint8 (got ", dtype_name(plan.scalar_type()),
              ")");
}

/// What is in it only csr_plan_summary knows.
void check_summary(const char* op, const Tensor& summary, const SymInt& rows) {
  check_dim(op, "summary", summary, 2, "[heads, 2]");
  check_size(op, "summary", summary, 1, 2, "entries and tiles");
  TORCH_CHECK(summary.scalar_type() == at::kLong, op, ": summary must be torch.int64 (got ",
              dtype_name(summary.scalar_type()), ")");
  TORCH_CHECK(summary.is_cpu() || summary.is_meta(), op, ": summary must be on the CPU, for the host to read (got ",
              summary.device(), ")");
  const SymInt heads = summary.sym_size(0);
  TORCH_SYM_CHECK(known_zero(heads) ? rows.sym_eq(0) : (rows % heads).sym_eq(0), op,
                  ": summary must have a row for each head of crow_indices' ", rows, " rows (got ", heads, " rows)");
}

}  // namespace

void check_csr_attention(const char* op, const CsrInputs& in) {
  const Tensor& query = in.query;
  check_attention(op, in);
  check_pattern(op, in.crow_indices, in.col_indices);
  check_device(op, "crow_indices", in.crow_indices, "query", query);
  if (in.prior.has_value()) {
    check_dim(op, "prior", *in.prior, 1, "[nnz]");
    check_weight_dtype(op, "prior", *in.prior, query);
    check_device(op, "prior", *in.prior, "query", query);
    check_size(op, "prior", *in.prior, 0, in.col_indices.sym_size(0), "the number of col_indices");
  }
  check_per_element(op, "query_offsets", in.query_offsets, query);
  if (in.plan.has_value()) {  // which holds the number of rows a head has
    check_plan_bytes(op, *in.plan);
    check_device(op, "plan", *in.plan, "query", query);
    if (in.summary.has_value()) check_summary(op, *in.summary, in.crow_indices.sym_size(0) - 1);
    return;
  }
  TORCH_CHECK(!in.summary.has_value(), op, ": plan must be given with its summary (got None)");
  TORCH_CHECK(!in.query_offsets.has_value(), op,
              ": plan must be given with query_offsets; torch.ops.fiak.csr_plan makes it (got None)");
  const SymInt rows = in.crow_indices.sym_size(0) - 1, heads = query.sym_size(1), queries = query.sym_size(2);
  const bool empty = known_zero(heads * queries);
  TORCH_SYM_CHECK(empty ? rows.sym_eq(0) : (rows % queries).sym_eq(0), op,
                  ": crow_indices must have G * Hq * N + 1 elements, or G * N + 1 that all heads share, with Hq = ",
                  heads, " and N = ", queries, " (got ", rows + 1, ")");
  if (empty) return;
  // As PatternHeads has it (attention.h): one head for each query head of a group, or one for all.
  const SymInt of_group = heads - (heads - 1) * ((rows / queries) % heads).min(1);
  check_groups(op, "crow_indices", rows / queries / of_group, query.sym_size(0));
}

void check_attention_backward(const char* op, const Tensor& query, const Tensor& value, const Tensor& grad_output,
                              const Tensor& output, const Tensor& logsumexp) {
  const auto check = [&](const char* name, const Tensor& tensor, bool per_feature) {
    check_dim(op, name, tensor, per_feature ? 4 : 3, per_feature ? "[B, Hq, N, Dv]" : "[B, Hq, N]");
    for (const int64_t dim : {0, 1, 2}) check_size(op, name, tensor, dim, query.sym_size(dim), "as query");
    if (per_feature) check_size(op, name, tensor, 3, value.sym_size(3), "value's Dv");
    check_device(op, name, tensor, "query", query);
  };
  check("grad_output", grad_output, true);
  check("output", output, true);
  check("logsumexp", logsumexp, false);
  check_dtype(op, "grad_output", grad_output, "query", query);
  check_dtype(op, "output", output, "query", query);
  check_weight_dtype(op, "logsumexp", logsumexp, query);
}

void check_csr_plan_summary(const Tensor& plan, const SymInt& heads) {
  check_plan_bytes("csr_plan_summary", plan);
  TORCH_SYM_CHECK(heads.sym_ge(0), "csr_plan_summary: heads must not be negative (got ", heads, ")");
}

void check_csr_plan(const Tensor& crow_indices, const Tensor& col_indices, const SymInt& num_queries,
                    const SymInt& num_keys) {
  const char* op = "csr_plan";
  check_pattern(op, crow_indices, col_indices);
  for (const auto& [name, size] : {std::pair("num_queries", num_queries), std::pair("num_keys", num_keys)}) {
    TORCH_SYM_CHECK(size.sym_ge(0), op, ": ", name, " must not be negative (got ", size, ")");
    TORCH_SYM_CHECK(size.sym_le(kPlanMostSize), op, ": ", name, " must be at most ", kPlanMostSize, " (got ", size,
                    ")");
  }
  const SymInt rows = crow_indices.sym_size(0) - 1, nnz = col_indices.sym_size(0);
  TORCH_SYM_CHECK(rows.sym_le(kPlanMostEntries), op, ": crow_indices must have at most 2^48 elements (got ", rows + 1,
                  ")");
  TORCH_SYM_CHECK(nnz.sym_le(kPlanMostEntries), op, ": col_indices must have at most 2^48 elements (got ", nnz, ")");
  TORCH_SYM_CHECK(known_zero(num_queries) ? rows.sym_eq(0) : (rows % num_queries).sym_eq(0), op,
                  ": crow_indices must have G * Hq * num_queries + 1 elements with num_queries = ", num_queries,
                  " (got ", rows + 1, ")");
}

void check_compact_kv(const Tensor& key, const Tensor& value, const Tensor& keep) {
  const char* op = "compact_kv";
  check_dim(op, "key", key, 4, "[B, H, M, D]");
  check_dim(op, "value", value, 4, "[B, H, M, Dv]");
  check_floating(op, "key", key);
  check_dtype(op, "value", value, "key", key);
  check_device(op, "value", value, "key", key);
  check_size(op, "value", value, 0, key.sym_size(0), "key's batch");
  check_size(op, "value", value, 1, key.sym_size(1), "key's heads");
  check_size(op, "value", value, 2, key.sym_size(2), "key's rows");
  check_keep(op, keep, "key", key);
  check_size(op, "keep", keep, 0, key.sym_size(1), "key's heads");
}

void check_compact_kv_backward(const OptionalTensor& grad_key, const OptionalTensor& grad_value, const Tensor& keep,
                               const SymInt& num_keys) {
  const char* op = "compact_kv_backward";
  TORCH_SYM_CHECK(num_keys.sym_ge(0), op, ": num_keys must not be negative (got ", num_keys, ")");
  const auto check = [&](const char* name, const OptionalTensor& grad) {
    if (!grad.has_value()) return;
    check_dim(op, name, *grad, 4, "[B, H, K, *]");
    check_floating(op, name, *grad);
    check_keep(op, keep, name, *grad);
    check_size(op, name, *grad, 1, keep.sym_size(0), "keep's heads");
    check_size(op, name, *grad, 2, keep.sym_size(1), "keep's columns");
  };
  check("grad_key", grad_key);
  check("grad_value", grad_value);
}

void check_compact_linear(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& keep) {
  check_dim(op, "input", input, 3, "[B, M, Dx]");
  check_dim(op, "weight", weight, 2, "[H * D, Dx]");
  check_floating(op, "input", input);
  check_dtype(op, "weight", weight, "input", input);
  check_device(op, "weight", weight, "input", input);
  check_size(op, "weight", weight, 1, input.sym_size(2), "input's features");
  if (bias.has_value()) {
    check_dim(op, "bias", *bias, 1, "[H * D]");
    check_dtype(op, "bias", *bias, "input", input);
    check_device(op, "bias", *bias, "input", input);
    check_size(op, "bias", *bias, 0, weight.sym_size(0), "weight's rows");
  }
  check_keep(op, keep, "input", input);
  const SymInt heads = keep.sym_size(0);
  TORCH_SYM_CHECK(known_zero(heads) ? weight.sym_size(0).sym_eq(0) : (weight.sym_size(0) % heads).sym_eq(0), op,
                  ": weight must have a multiple of keep's ", heads, " rows (got ", weight.sym_size(0), ")");
}

void check_compact_linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                   const Tensor& keep) {
  const char* op = "compact_linear_backward";
  check_compact_linear(op, input, weight, std::nullopt, keep);
  check_dim(op, "grad_output", grad_output, 4, "[B, H, K, D]");
  check_dtype(op, "grad_output", grad_output, "input", input);
  check_device(op, "grad_output", grad_output, "input", input);
  check_size(op, "grad_output", grad_output, 0, input.sym_size(0), "input's batch");
  check_size(op, "grad_output", grad_output, 1, keep.sym_size(0), "keep's heads");
  check_size(op, "grad_output", grad_output, 2, keep.sym_size(1), "keep's columns");
  TORCH_SYM_CHECK((grad_output.sym_size(1) * grad_output.sym_size(3)).sym_eq(weight.sym_size(0)), op,
                  ": grad_output must have H * D = ", weight.sym_size(0), " (got ", grad_output.sym_sizes(), ")");
}

}  // namespace fiak
