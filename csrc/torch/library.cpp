// The schemas of torch.ops.fiak, in one place, and what tensors of a device without kernels get.
//
// query [B, Hq, N, D], key [B, H, M, D], value [B, H, M, Dv], output [B, Hq, N, Dv] in [B, N, Hq, Dv] memory order,
// logsumexp [B, Hq, N] (not differentiable). X is X_forward's output; X_forward and X_backward are what autograd, the
// compiler and FLOP counters see. A backward op returns None where output_mask is false, and refuses, by name, to be
// differentiated itself.
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>

namespace fiak {
namespace {

constexpr const char* kOps[] = {"prior_attention_forward",
                                "prior_attention_backward",
                                "csr_attention_forward",
                                "csr_attention_backward",
                                "csr_plan",
                                "csr_plan_summary",
                                "compact_kv",
                                "compact_kv_backward",
                                "compact_linear",
                                "compact_linear_backward"};

/// Runs where a device has no kernel of its own, and says so in the op's name.
void refuse_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!argument.isTensor() || !argument.toTensor().defined()) continue;
    const at::Tensor& tensor = argument.toTensor();
    if (tensor.is_cpu() && tensor.layout() == at::kStrided) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                                ": has kernels for strided CPU tensors only in this build (got ", tensor.layout(),
                                " on ", tensor.device(), ")");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": at least one argument must be a tensor");
}

}  // namespace

TORCH_LIBRARY(fiak, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const auto def = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  const std::string options =
      "float dropout_p=0.0, Tensor? seed=None, float? scale=None, str score=\"dot\", bool log_prior=False";
  const std::string forward_results = " -> (Tensor output, Tensor logsumexp)";
  const std::string qkv = "Tensor query, Tensor key, Tensor value, ";

  // Attention with a weight w for every pair (Eq. 12 of the paper): a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij').
  // prior [G, 1|Hq, 1|N, M] is w, or None for all ones; its gradient comes in its own shape. With log_prior it, or
  // csr_attention's, is ln w, and -inf is what w = 0 is without. Weights are relative: what multiplies all of a
  // row's changes nothing.
  const std::string prior_options = "*, bool is_causal=False, Tensor? kv_lens=None, " + options;
  const std::string prior_inputs = "(" + qkv + "Tensor? prior=None, " + prior_options + ")";
  def("prior_attention" + prior_inputs + " -> Tensor");
  def("prior_attention_forward" + prior_inputs + forward_results);
  def("prior_attention_backward(Tensor grad_output, " + qkv + "Tensor? prior, Tensor output, Tensor logsumexp, " +
      prior_options +
      ", bool[4] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_prior)");

  // The same over the pairs of a CSR pattern of G * Hq * num_queries rows only (the pruned attention of Sec. 3).
  const std::string indices = "Tensor crow_indices, Tensor col_indices, ";
  const std::string csr_options =
      "*, Tensor? plan=None, Tensor? summary=None, Tensor? query_offsets=None, Tensor? kv_lens=None, " + options;
  const std::string csr_inputs = "(" + qkv + indices + "Tensor? prior=None, " + csr_options + ")";
  def("csr_attention" + csr_inputs + " -> Tensor");
  def("csr_attention_forward" + csr_inputs + forward_results);
  def("csr_attention_backward(Tensor grad_output, " + qkv + indices +
      "Tensor? prior, Tensor output, Tensor logsumexp, " + csr_options +
      ", bool[4] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_prior)");

  // Validates a pattern and returns, as uint8, all that csr_attention wants to know about it.
  def("csr_plan(" + indices + "SymInt num_queries, SymInt num_keys) -> Tensor");

  // What each head of a plan has to do, int64 [heads, 2] on the CPU: entries, and tiles of 24 queries x 16 keys with
  // one, or -1 where the plan has no bits. csr_attention on CUDA then launches what its heads need, without waiting.
  def("csr_plan_summary(Tensor plan, SymInt heads) -> Tensor");

  // Key pruning (Algorithms 2 and 3): keep [H, K] names the kept rows of each key head, ascending, padded with -1.
  def("compact_kv(Tensor key, Tensor value, Tensor keep) -> (Tensor, Tensor)");
  def("compact_kv_backward(Tensor? grad_key, Tensor? grad_value, Tensor keep, SymInt num_keys) -> (Tensor, Tensor)");
  def("compact_linear(Tensor input, Tensor weight, Tensor? bias, Tensor keep) -> Tensor");
  def("compact_linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor keep, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_prior, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(fiak, CompositeExplicitAutograd, m) {
  for (const char* op : kOps) m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_device>());
}

TORCH_LIBRARY_IMPL(fiak, Autograd, m) {
  for (const char* op :
       {"prior_attention_backward", "csr_attention_backward", "compact_kv_backward", "compact_linear_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace fiak
