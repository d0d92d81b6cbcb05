// The arguments of the attention ops as structs, in their schemas' order, and how a function that takes such a struct
// is registered as an op's kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace fiak {

using OptionalTensor = std::optional<at::Tensor>;
using OutputMask = std::array<bool, 4>;
using ForwardTensors = std::tuple<at::Tensor, at::Tensor>;                       ///< output, logsumexp
using GradTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  ///< of query, key, value, weight

struct PriorInputs {
  at::Tensor query, key, value;
  OptionalTensor prior;
  bool is_causal;
  OptionalTensor kv_lens;
  double dropout_p;
  OptionalTensor seed;
  std::optional<double> scale;
  std::string_view score;
  bool log_prior;

  template <class Result>
  using Signature = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool,
                           const OptionalTensor&, double, const OptionalTensor&, std::optional<double>,
                           std::string_view, bool);
};

struct PriorGradInputs {
  at::Tensor grad_output, query, key, value;
  OptionalTensor prior;
  at::Tensor output, logsumexp;
  bool is_causal;
  OptionalTensor kv_lens;
  double dropout_p;
  OptionalTensor seed;
  std::optional<double> scale;
  std::string_view score;
  bool log_prior;
  OutputMask output_mask;

  using Signature = GradTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const OptionalTensor&, const at::Tensor&, const at::Tensor&, bool,
                                const OptionalTensor&, double, const OptionalTensor&, std::optional<double>,
                                std::string_view, bool, OutputMask);

  PriorInputs inputs() const {
    return {query, key, value, prior, is_causal, kv_lens, dropout_p, seed, scale, score, log_prior};
  }
};

struct CsrInputs {
  at::Tensor query, key, value, crow_indices, col_indices;
  OptionalTensor prior, plan, summary, query_offsets, kv_lens;
  double dropout_p;
  OptionalTensor seed;
  std::optional<double> scale;
  std::string_view score;
  bool log_prior;

  template <class Result>
  using Signature = Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                           const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
                           std::optional<double>, std::string_view, bool);
};

struct CsrGradInputs {
  at::Tensor grad_output, query, key, value, crow_indices, col_indices;
  OptionalTensor prior;
  at::Tensor output, logsumexp;
  OptionalTensor plan, summary, query_offsets, kv_lens;
  double dropout_p;
  OptionalTensor seed;
  std::optional<double> scale;
  std::string_view score;
  bool log_prior;
  OutputMask output_mask;

  using Signature = GradTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, double, const OptionalTensor&, std::optional<double>,
                                std::string_view, bool, OutputMask);

  CsrInputs inputs() const {
    return {query,         key,     value,     crow_indices, col_indices, prior, plan,     summary,
            query_offsets, kv_lens, dropout_p, seed,         scale,       score, log_prior};
  }
};

/// Kernel<function, Signature>::call is `function` with its struct's fields as parameters.
template <auto function, class Signature>
struct Kernel;

template <auto function, class Result, class... Parameters>
struct Kernel<function, Result(Parameters...)> {
  static Result call(Parameters... parameters) { return function({parameters...}); }
};

}  // namespace fiak
