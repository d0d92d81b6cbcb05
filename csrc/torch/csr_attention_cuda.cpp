// fiak::csr_attention and fiak::csr_plan on CUDA. Schemas and shapes are in library.cpp; everything else of the ops is
// in csr_attention.cpp.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels/cpu/choose/cost_model.h"
#include "kernels/cuda/csr_attention.h"
#include "kernels/cuda/csr_cost.h"
#include "torch/attention_cuda.h"
#include "torch/checks.h"
#include "torch/csr_attention.h"

namespace fiak {
namespace {

using at::Tensor;

/// As the environment variable FIAK_CSR_KERNEL has it, which the CPU's kernels heed, too: there the tiles' is dense,
/// and all others go by entries.
cuda::CsrKernel selected_kernel() {
  const int family = cpu::selected_family();
  if (family < 0) return cuda::CsrKernel::kAuto;
  return family == cpu::kDense ? cuda::CsrKernel::kTiles : cuda::CsrKernel::kEntries;
}

/// The kernels' arguments.
struct CsrOperands {
  Operands<AttentionArgs> operands;
  cuda::CsrWeights weights;
  PlanSummary summary;
};

/// Checks what the host knows of pattern and plan; the kernels check that one is of the other.
CsrOperands csr_operands(const char* op, const CsrInputs& in) {
  check_cuda_limits(op, in.query, in.key, in.value);
  TORCH_CHECK(in.plan.has_value(), op,
              ": plan must be given with CUDA tensors; torch.ops.fiak.csr_plan makes it (got None)");
  CsrOperands result{attention_operands<AttentionArgs>(op, in), {}, {}};
  auto& [operands, weights, summary] = result;
  const int64_t rows = in.crow_indices.numel() - 1, heads = operands.args.query_heads;
  TORCH_CHECK(
      heads > 0 ? rows >= operands.args.queries : rows == 0, op,
      ": crow_indices must have G * Hq * num_queries + 1 elements, or G * num_queries + 1 that all heads share, "
      "with Hq = ",
      heads, " and num_queries >= N = ", operands.args.queries, " (got ", rows + 1, ")");
  const Tensor plan = operands.own(in.plan->contiguous());
  TORCH_CHECK(plan.numel() >= static_cast<int64_t>(sizeof(PlanHeader)), op,
              ": plan must come from csr_plan; it is too short (got ", plan.numel(), ")");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(plan.const_data_ptr()) % alignof(int64_t) == 0, op,
              ": plan must be aligned to ", alignof(int64_t), " bytes");
  weights.plan = plan.const_data_ptr();
  weights.plan_bytes = plan.numel();
  weights.num_rows = rows;
  weights.nnz = in.col_indices.numel();
  weights.selected = static_cast<int32_t>(selected_kernel());
  if (in.prior.has_value()) weights.prior = operands.own(in.prior->contiguous()).const_data_ptr<float>();
  if (in.query_offsets.has_value()) {
    weights.query_offsets = operands.own(in.query_offsets->to(at::kLong).contiguous()).const_data_ptr<int64_t>();
  }
  if (in.summary.has_value()) {
    const Tensor heads = operands.own(in.summary->contiguous());
    summary = {static_cast<const PlanHeadWork*>(heads.const_data_ptr()), heads.size(0)};
    int64_t entries = 0;
    for (int64_t head = 0; head < summary.count; ++head) entries += summary.heads[head].entries;
    TORCH_CHECK(entries == weights.nnz, op, ": summary must be of this pattern's plan, of ", weights.nnz,
                " entries (got ", entries, ")");
  }
  return result;
}

ForwardTensors forward_cuda(const CsrInputs& in) {
  const char* op = "csr_attention";
  check_csr_attention(op, in);
  const c10::cuda::CUDAGuard device(in.query.device());
  const auto [operands, weights, summary] = csr_operands(op, in);
  return run_forward(
      operands.args, in.query, in.value,
      [&, &weights = weights, &summary = summary](const AttentionArgs& args, const ForwardResult& result) {
        cuda::csr_attention_forward(args, weights, summary, seed_address(in.seed), result,
                                    c10::cuda::getCurrentCUDAStream().stream());
      });
}

GradTensors backward_cuda(const CsrGradInputs& in) {
  GradTensors grads = csr_backward_meta(in);  // the same checks and results
  const c10::cuda::CUDAGuard device(in.query.device());
  const auto [operands, weights, summary] = csr_operands("csr_attention_backward", in.inputs());
  const Tensor delta = at::empty_like(in.logsumexp, at::MemoryFormat::Contiguous);
  run_backward(operands.args, in.grad_output, in.output, in.logsumexp, grads,
               [&, &weights = weights, &summary = summary](const AttentionArgs& args, const BackwardArgs& backward) {
                 cuda::csr_attention_backward(args, weights, summary, seed_address(in.seed), backward,
                                              delta.mutable_data_ptr<float>(),
                                              c10::cuda::getCurrentCUDAStream().stream());
               });
  return grads;
}

/// Validates and plans on the CPU, and therefore waits for the device.
Tensor plan_cuda(const Tensor& crow_indices, const Tensor& col_indices, int64_t num_queries, int64_t num_keys) {
  check_csr_plan(crow_indices, col_indices, num_queries, num_keys);
  return csr_plan_cpu(crow_indices.cpu(), col_indices.cpu(), num_queries, num_keys).to(crow_indices.device());
}

/// Waits, too: whoever wants a summary makes it with the plan.
Tensor summary_cuda(const Tensor& plan, int64_t heads) { return csr_plan_summary_cpu(plan.cpu(), heads); }

}  // namespace

TORCH_LIBRARY_IMPL(fiak, CUDA, m) {
  m.impl("csr_attention_forward", Kernel<forward_cuda, CsrInputs::Signature<ForwardTensors>>::call);
  m.impl("csr_attention_backward", Kernel<backward_cuda, CsrGradInputs::Signature>::call);
  m.impl("csr_plan", plan_cuda);
  m.impl("csr_plan_summary", summary_cuda);
}

}  // namespace fiak
