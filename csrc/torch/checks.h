// One checker per op, called for CPU, CUDA and Meta tensors alike: everything that shapes, dtypes and devices tell.
// Errors read "op: argument rule (got value)". `op` is the op's name, or its backward's.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch/inputs.h"

namespace fiak {

void check_prior_attention(const char* op, const PriorInputs& in);
void check_csr_attention(const char* op, const CsrInputs& in);

/// What both attentions' backward ops take besides the inputs.
void check_attention_backward(const char* op, const at::Tensor& query, const at::Tensor& value,
                              const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& logsumexp);

void check_csr_plan(const at::Tensor& crow_indices, const at::Tensor& col_indices, const c10::SymInt& num_queries,
                    const c10::SymInt& num_keys);

void check_csr_plan_summary(const at::Tensor& plan, const c10::SymInt& heads);

void check_compact_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& keep);
void check_compact_kv_backward(const OptionalTensor& grad_key, const OptionalTensor& grad_value, const at::Tensor& keep,
                               const c10::SymInt& num_keys);

void check_compact_linear(const char* op, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          const at::Tensor& keep);
void check_compact_linear_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                   const at::Tensor& keep);

/// prior and logsumexp: float64 with float64 inputs, else float32.
at::ScalarType weight_dtype(at::ScalarType input_dtype);

}  // namespace fiak
