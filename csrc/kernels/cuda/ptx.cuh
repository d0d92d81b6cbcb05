// Every line of PTX, one instruction a function. On the CPU the same functions come from simt/simt.h, which says what
// the instructions do, and is included before any .cuh.
//
// Fragments are PTX's: of a 16 x 8 accumulator, lane i holds columns 2 (i % 4) and the next of rows i / 4 (d[0], d[1])
// and i / 4 + 8 (d[2], d[3]). From sm_80 on.
#pragma once

#include <cstdint>

#include "kernels/dtypes.h"

#if defined(__CUDACC__)

namespace fiak::cuda {

/// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(128) unsigned char fiak_shared_memory[];
  return *reinterpret_cast<T*>(fiak_shared_memory);
}

/// 2^x, within 2 units in the last place.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2(x), within 2^-22 of it absolutely (x in 0.5..2) or relatively.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers rounded to the last argument's type, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high, Half) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

/// d (16 x 8) += a (16 x 16) b (16 x 8), the element type being the last argument's.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory, one a register. Lane i brings the address of row i % 8 of
/// matrix i / 8; of each matrix it gets elements 2 (i % 4) and the next of row i / 4, or of column i / 4.
__device__ __forceinline__ void ldmatrix(uint32_t (&d)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&d)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

/// 16 aligned bytes of global memory that the kernel does not write to; zeros where they are not to be read.
__device__ __forceinline__ void load_16_bytes(uint32_t* words, const void* source, bool is_read) {
  asm("{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n"
      "mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
      : "l"(source), "r"(static_cast<uint32_t>(is_read)));
}
/// The same of elements anywhere, of which only the first `count` are read.
template <class Element>
__device__ __forceinline__ void load_elements(uint32_t* words, const Element* source, int count) {
  static_assert(sizeof(Element) == 2, "");
  asm("{\n .reg .pred p;\n .reg .b16 x<8>;\n"
      "setp.gt.s32 p, %5, 0;\n mov.b16 x0, 0;\n @p ld.global.b16 x0, [%4 + 0];\n"
      "setp.gt.s32 p, %5, 1;\n mov.b16 x1, 0;\n @p ld.global.b16 x1, [%4 + 2];\n"
      "setp.gt.s32 p, %5, 2;\n mov.b16 x2, 0;\n @p ld.global.b16 x2, [%4 + 4];\n"
      "setp.gt.s32 p, %5, 3;\n mov.b16 x3, 0;\n @p ld.global.b16 x3, [%4 + 6];\n"
      "setp.gt.s32 p, %5, 4;\n mov.b16 x4, 0;\n @p ld.global.b16 x4, [%4 + 8];\n"
      "setp.gt.s32 p, %5, 5;\n mov.b16 x5, 0;\n @p ld.global.b16 x5, [%4 + 10];\n"
      "setp.gt.s32 p, %5, 6;\n mov.b16 x6, 0;\n @p ld.global.b16 x6, [%4 + 12];\n"
      "setp.gt.s32 p, %5, 7;\n mov.b16 x7, 0;\n @p ld.global.b16 x7, [%4 + 14];\n"
      "mov.b32 %0, {x0, x1};\n mov.b32 %1, {x2, x3};\n mov.b32 %2, {x4, x5};\n mov.b32 %3, {x6, x7};\n}"
      : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
      : "l"(source), "r"(count));
}
__device__ __forceinline__ void load_elements(uint32_t* words, const float* source, int count) {
  asm("{\n .reg .pred p;\n"
      "setp.gt.s32 p, %5, 0;\n mov.b32 %0, 0;\n @p ld.global.b32 %0, [%4 + 0];\n"
      "setp.gt.s32 p, %5, 1;\n mov.b32 %1, 0;\n @p ld.global.b32 %1, [%4 + 4];\n"
      "setp.gt.s32 p, %5, 2;\n mov.b32 %2, 0;\n @p ld.global.b32 %2, [%4 + 8];\n"
      "setp.gt.s32 p, %5, 3;\n mov.b32 %3, 0;\n @p ld.global.b32 %3, [%4 + 12];\n"
      "}"
      : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
      : "l"(source), "r"(count));
}

/// Copies up to 16 bytes from global to shared memory, both 16-byte aligned, and zeroes the rest of the 16.
__device__ __forceinline__ void copy_async(void* target, const void* source, unsigned bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}
/// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for all but the latest kAllowed groups of this thread.
template <unsigned kAllowed>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kAllowed) : "memory");
}

}  // namespace fiak::cuda

#elif !defined(threadIdx)
#error "include simt/simt.h before device code that is not compiled by nvcc"
#endif
