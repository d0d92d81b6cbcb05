// How kernels are defined, described and listed. Each has a C name, takes one plain struct, and runs on a
// one-dimensional grid, so that it can be launched from its PTX alone. The header comment of its .cuh says what the
// struct holds, and what grid, block and dynamic shared memory are. The program fiak_cuda_kernels prints the numbers of
// each: name, threads of a block, bytes of dynamic shared memory and of the struct. More than 48 KiB must be allowed
// first (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
//
// Names are fiak_<op>_<what>_<type>[_d<head size>]: fiak_compact_rows_u16, fiak_prior_forward_f16_d64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fiak::cuda {

/// A kernel and how it is launched; only the number of blocks depends on the arguments.
template <class Parameters>
struct Kernel {
  using Params = Parameters;
  const char* name;
  void (*function)(Params);
  int threads;          ///< of a block
  size_t shared_bytes;  ///< dynamic, of a block
};

}  // namespace fiak::cuda

/// Defines the kernel `name`, which does body(params), and the function that describes it, chosen among others by the
/// types of its arguments. The body, a __device__ function, comes last, since commas may stand between its template
/// arguments; elsewhere such commas need parentheses.
///
///   FIAK_KERNEL(fiak_scale_rows_f16_d64, scale_rows_kernel(Half, Constant<64>), ScaleParams, 128, 0,
///               scale_rows<Half, 64>)
///   launch(scale_rows_kernel(Half{}, Constant<64>{}), blocks, params);
#define FIAK_KERNEL(name, description, Params, threads, shared_bytes, ...)                              \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(Params params) { __VA_ARGS__(params); } \
  inline ::fiak::cuda::Kernel<Params> description { return {#name, name, threads, shared_bytes}; }
