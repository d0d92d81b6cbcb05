// Runs CUDA kernels on the CPU, for tests. Include this before a .cuh; g++ then compiles the code that nvcc compiles.
//
// Every CUDA thread is a fiber. A thread runs until it waits for others, at a barrier or a warp collective; then the
// scheduler picks another one, by a seeded random choice that now and then lets one warp run far ahead of all others.
// Several blocks run at a time. What a kernel computes must not depend on any of it.
//  - Shared memory starts as NaN. cp.async copies at once or when it is waited for, by the toss of a coin.
//  - Barriers that not all threads reach, collectives whose lanes disagree on mask or place, threads that exited where
//    others wait for them: simt::Error names the kernel, the block, the thread and the line.
//  - ThreadSanitizer takes each CUDA thread for a thread, ordered by barriers, __syncwarp and atomics alone. It reports
//    a missing one of these as a data race, within a block and across blocks. AddressSanitizer sees accesses out of
//    bounds, of global and of shared memory.
//  - Faults on purpose: `Schedule::broken` names a line whose barrier or wait is left out, whose atomic is torn apart,
//    or whose cp.async copies bytes that it should have zeroed. Tests show that each such fault is noticed.
//
// Kernels take one struct and run on one-dimensional grids. Instructions without a C++ name are wrapped by
// kernels/cuda/ptx.cuh, whose host versions are in this header.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "kernels/cuda/kernel.h"
#include "kernels/dtypes.h"

#define __device__
#define __global__ inline
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fiak::simt {

/// A line of device code.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
  bool operator<(const Site& other) const {
    return line != other.line ? line < other.line : std::strcmp(file, other.file) < 0;
  }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Schedule {
  uint64_t seed = 0;
  Site broken{};
};

struct Launch {
  const char* kernel;  ///< its name in errors
  unsigned blocks, threads;
  size_t shared_bytes = 0;
};

/// A kernel did what CUDA leaves undefined, or trapped.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// It takes about half a millisecond for every CUDA thread: tests do less with it.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

/// What launches did: bytes that cp.async copied, bytes of rows that were loaded into registers, matrix products of
/// m16n8k16 (4096 operations each).
struct Counts {
  int64_t launches = 0, blocks = 0, copied_bytes = 0, loaded_bytes = 0, products = 0;
};
/// Of all launches until it is cleared, by the kernel's name.
extern std::map<std::string, Counts> counts;

/// What a launch executed of what can be broken: its barriers, waits, atomics and asynchronous copies.
using Sites = std::set<Site>;

Sites run(const Launch& launch, const Schedule& schedule, void (*kernel)(const void*), const void* params);

template <class Params>
Sites run(const Launch& launch, const Schedule& schedule, void (*kernel)(Params), const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  };
  const Call call{kernel, params};
  return run(
      launch, schedule,
      [](const void* pointer) {
        const auto* c = static_cast<const Call*>(pointer);
        c->kernel(c->params);
      },
      static_cast<const void*>(&call));
}

template <class Params>
Sites run(const cuda::Kernel<Params>& kernel, int64_t blocks, const Schedule& schedule, const Params& params) {
  return run({kernel.name, static_cast<unsigned>(blocks), static_cast<unsigned>(kernel.threads), kernel.shared_bytes},
             schedule, kernel.function, params);
}

// ---------------------------------------------------------------------------------------------------------------------
// The running thread's view. All but what touches the kernel's own memory is in simt.cpp, which ThreadSanitizer does
// not see: the fibers' bookkeeping is not the kernel's.

struct Index {
  unsigned x;
};
struct Indices {
  Index thread, block, block_size, grid_size;
};
extern Indices indices;
inline unsigned lane() { return indices.thread.x % 32; }

/// Notes an execution of the site and tells whether it is to be broken.
bool broken(const Site& site);
void* shared_memory();
void sync_threads(const Site& site);
void sync_warp(uint32_t mask, const Site& site);
void yield();
[[noreturn]] void trap();

uint32_t shuffle(uint32_t mask, uint32_t value, unsigned source, const Site& site);
uint32_t ballot(uint32_t mask, bool predicate, const Site& site);
/// D += A B of m16n8k16, each lane with its fragments as PTX documents them.
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const Site& site);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const Site& site);
/// Hands out four 8 x 8 matrices, of which lane i brings row i % 8 of matrix i / 8.
void exchange_matrices(const uint16_t* row, uint32_t* result, bool transposed, const Site& site);

struct Copy {
  void* target;
  const void* source;
  unsigned bytes;
};
void count_copy(unsigned bytes);
void count_load(int64_t bytes);
/// Whether the copy was put off, to be done by the thread itself when it waits.
bool postpone(const Copy& copy);
void commit_copies();
/// The next copy of all but the `allowed` latest groups.
bool due_copy(unsigned allowed, Copy* copy);
inline void perform(const Copy& copy) {
  unsigned char bytes[16] = {};
  std::memcpy(bytes, copy.source, copy.bytes);
  std::memcpy(copy.target, bytes, sizeof bytes);
}

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fiak::simt

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's names

#define threadIdx ::fiak::simt::indices.thread
#define blockIdx ::fiak::simt::indices.block
#define blockDim ::fiak::simt::indices.block_size
#define gridDim ::fiak::simt::indices.grid_size

inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

[[noreturn]] inline void __trap() { fiak::simt::trap(); }

inline void __syncthreads(fiak::simt::Site site = fiak::simt::Site::here()) {
  if (!fiak::simt::broken(site)) fiak::simt::sync_threads(site);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, fiak::simt::Site site = fiak::simt::Site::here()) {
  if (!fiak::simt::broken(site)) fiak::simt::sync_warp(mask, site);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, fiak::simt::Site site = fiak::simt::Site::here()) {
  return fiak::simt::bit_cast<T>(
      fiak::simt::shuffle(mask, fiak::simt::bit_cast<uint32_t>(value), static_cast<unsigned>(source) % 32, site));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, fiak::simt::Site site = fiak::simt::Site::here()) {
  return __shfl_sync(mask, value, static_cast<int>(fiak::simt::lane()) ^ lanes, site);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, fiak::simt::Site site = fiak::simt::Site::here()) {
  for (int lanes = 1; lanes < 32; lanes *= 2) value |= __shfl_xor_sync(mask, value, lanes, site);
  return value;
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, fiak::simt::Site site = fiak::simt::Site::here()) {
  return fiak::simt::ballot(mask, predicate, site);
}
inline bool __any_sync(uint32_t mask, bool predicate, fiak::simt::Site site = fiak::simt::Site::here()) {
  return fiak::simt::ballot(mask, predicate, site) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, fiak::simt::Site site = fiak::simt::Site::here()) {
  return fiak::simt::ballot(mask, predicate, site) == mask;
}

template <class T>
T atomicAdd(T* target, T value, fiak::simt::Site site = fiak::simt::Site::here()) {
  if (fiak::simt::broken(site)) {
    const T old = *target;
    fiak::simt::yield();
    *target = old + value;
    return old;
  }
  fiak::simt::yield();
  T old, sum;
  __atomic_load(target, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(target, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// ---------------------------------------------------------------------------------------------------------------------
// The host versions of kernels/cuda/ptx.cuh, where they are described

namespace fiak::cuda {

template <class T>
T& shared_memory() {
  return *static_cast<T*>(simt::shared_memory());
}

inline int min(int x, int y) { return x < y ? x : y; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline uint32_t pack(float low, float high, Half) { return to_half(low).bits | uint32_t{to_half(high).bits} << 16; }
inline uint32_t pack(float low, float high, BFloat16) {
  return to_bfloat16(low).bits | uint32_t{to_bfloat16(high).bits} << 16;
}
inline float widen(float x) { return x; }
inline float widen(Half x) { return to_float(x); }
inline float widen(BFloat16 x) { return to_float(x); }

inline void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, Half, simt::Site site = simt::Site::here()) {
  simt::mma_f16(d, a, b, site);
}
inline void mma(float (&d)[4], const uint32_t* a, const uint32_t* b, BFloat16, simt::Site site = simt::Site::here()) {
  simt::mma_bf16(d, a, b, site);
}
inline void ldmatrix(uint32_t (&d)[4], const void* row, simt::Site site = simt::Site::here()) {
  uint16_t elements[8];
  std::memcpy(elements, row, sizeof elements);
  simt::exchange_matrices(elements, d, false, site);
}
inline void ldmatrix_transposed(uint32_t (&d)[4], const void* row, simt::Site site = simt::Site::here()) {
  uint16_t elements[8];
  std::memcpy(elements, row, sizeof elements);
  simt::exchange_matrices(elements, d, true, site);
}

inline float as_float(uint32_t bits) { return bits_to_float(bits); }
inline void load_16_bytes(uint32_t* words, const void* source, bool is_read) {
  std::memset(words, 0, 16);
  if (!is_read) return;
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) simt::trap();
  simt::count_load(16);
  std::memcpy(words, source, 16);
}
template <class Element>
void load_elements(uint32_t* words, const Element* source, int count) {
  constexpr int kMost = 16 / sizeof(Element);
  std::memset(words, 0, 16);
  if (count <= 0) return;
  const int64_t bytes = (count < kMost ? count : kMost) * static_cast<int64_t>(sizeof(Element));
  simt::count_load(bytes);
  std::memcpy(words, source, bytes);
}

inline void copy_async(void* target, const void* source, unsigned bytes, simt::Site site = simt::Site::here()) {
  const simt::Copy copy{target, source, simt::broken(site) ? 16 : bytes};
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) simt::trap();
  simt::count_copy(bytes);
  if (!simt::postpone(copy)) simt::perform(copy);
}
inline void copy_async_commit() { simt::commit_copies(); }
template <unsigned kAllowed>
void copy_async_wait(simt::Site site = simt::Site::here()) {
  if (simt::broken(site)) return;
  for (simt::Copy copy; simt::due_copy(kAllowed, &copy);) simt::perform(copy);
}

}  // namespace fiak::cuda
