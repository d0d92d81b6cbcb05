// compact_linear, scalar: the reference, the float64 path and the counted one (see attention_scalar.h).
#pragma once

#include "kernels/compact.h"
#include "kernels/cpu/scalar/attention_scalar.h"

namespace fiak::cpu {

/// call(k, row) for the kept rows of head h.
template <class Call>
void for_kept(const CompactLinearArgs& args, int64_t h, Call&& call) {
  for (int64_t k = 0; k < args.kept; ++k) {
    const int64_t row = args.keep[h * args.kept + k];
    if (row < 0) return;  // padding stands at the end
    call(k, row);
  }
}

template <class T>
void compact_linear_forward(const CompactLinearArgs& args, const Output& output, const Parallel& parallel) {
  using N = Number<T>;
  parallel_range(parallel, args.batch * args.heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.heads, h = i % args.heads;
      const T* weight = static_cast<const T*>(args.weight) + h * args.head_dim * args.weight_stride;
      const T* bias = args.bias != nullptr ? static_cast<const T*>(args.bias) + h * args.head_dim : nullptr;
      int64_t written = 0;
      for_kept(args, h, [&](int64_t k, int64_t row) {
        T* target = row_of<T>(output, b, h, k);
        for (int64_t d = 0; d < args.head_dim; ++d) {
          typename N::Acc sum =
              dot(row_of<T>(args.input, b, 0, row), weight + d * args.weight_stride, args.in_features);
          if (bias != nullptr) sum = sum + N::load(bias[d]);
          target[d] = N::store(N::real(sum));
        }
        written = k + 1;
      });
      for (int64_t k = written; k < args.kept; ++k) {
        std::fill_n(row_of<T>(output, b, h, k), args.head_dim, N::store(0));
      }
    }
  });
}

template <class T>
void compact_linear_backward(const CompactLinearArgs& args, const CompactLinearGrads& grads, const Parallel& parallel) {
  using N = Number<T>;
  using Real = typename N::Real;
  const auto grad_output = [&](int64_t b, int64_t h, int64_t k) { return row_of<T>(grads.grad_output, b, h, k); };

  if (grads.grad_input != nullptr) {
    parallel_range(parallel, args.batch, [&](int64_t begin, int64_t end) {
      std::vector<Real> sum(args.rows * args.in_features);
      for (int64_t b = begin; b < end; ++b) {
        std::fill(sum.begin(), sum.end(), Real{0});
        for (int64_t h = 0; h < args.heads; ++h) {
          const T* weight = static_cast<const T*>(args.weight) + h * args.head_dim * args.weight_stride;
          for_kept(args, h, [&](int64_t k, int64_t row) {
            for (int64_t d = 0; d < args.head_dim; ++d) {
              const Real g = N::real(N::load(grad_output(b, h, k)[d]));
              for (int64_t x = 0; x < args.in_features; ++x) {
                sum[row * args.in_features + x] += g * N::real(N::load(weight[d * args.weight_stride + x]));
              }
            }
          });
        }
        T* target = static_cast<T*>(grads.grad_input) + b * args.rows * args.in_features;
        for (size_t i = 0; i < sum.size(); ++i) target[i] = N::store(sum[i]);
      }
    });
  }

  if (grads.grad_weight != nullptr || grads.grad_bias != nullptr) {
    parallel_range(parallel, args.heads * args.head_dim, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(args.in_features);  // of any number of rows
      for (int64_t row = begin; row < end; ++row) {
        const int64_t h = row / args.head_dim, d = row % args.head_dim;
        std::fill(sum.begin(), sum.end(), 0.0);
        double bias = 0;
        for (int64_t b = 0; b < args.batch; ++b) {
          for_kept(args, h, [&](int64_t k, int64_t kept) {
            const Real g = N::real(N::load(grad_output(b, h, k)[d]));
            const T* x = row_of<T>(args.input, b, 0, kept);
            for (int64_t i = 0; i < args.in_features; ++i)
              sum[i] += static_cast<double>(g) * static_cast<double>(N::real(N::load(x[i])));
            bias += static_cast<double>(g);
          });
        }
        if (grads.grad_weight != nullptr) {
          T* target = static_cast<T*>(grads.grad_weight) + row * args.in_features;
          for (int64_t i = 0; i < args.in_features; ++i) target[i] = N::store(static_cast<Real>(sum[i]));
        }
        if (grads.grad_bias != nullptr) static_cast<T*>(grads.grad_bias)[row] = N::store(static_cast<Real>(bias));
      }
    });
  }
}

}  // namespace fiak::cpu
