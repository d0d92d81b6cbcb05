#include "torch/attention_cuda.h"

#include <c10/util/Exception.h>

#include <limits>
#include <utility>

#include "kernels/cuda/prior_attention.h"

namespace fiak {

void check_cuda_limits(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  TORCH_CHECK(query.scalar_type() != at::kDouble, op,
              ": query must be torch.float32, torch.bfloat16 or torch.float16 on CUDA (got torch.float64)");
  for (const auto& [name, tensor] : {std::pair("query", query), std::pair("value", value)}) {
    TORCH_CHECK(tensor.size(3) <= cuda::kMaximumHeadDim, op, ": ", name, " must have at most ", cuda::kMaximumHeadDim,
                " columns on CUDA (got ", tensor.sizes(), ")");
  }
  for (const auto& [name, tensor] : {std::pair("query", query), std::pair("key", key)}) {
    for (const int64_t size : tensor.sizes()) {
      TORCH_CHECK(size <= std::numeric_limits<int>::max() / 2, op, ": ", name,
                  " must have sizes below 2^30 on CUDA (got ", tensor.sizes(), ")");
    }
  }
}

}  // namespace fiak
