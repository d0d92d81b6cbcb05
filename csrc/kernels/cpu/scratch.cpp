#include "kernels/cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace fiak::cpu {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

constexpr std::size_t kKept = std::size_t{64} << 20;  // more than this is given back at the next smaller request

}  // namespace

void* thread_scratch(std::size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t size = 0;
  if (bytes > size || (size > kKept && bytes <= kKept)) {
    memory.reset();
    size = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded > 0 ? rounded : 4096));
    if (!memory) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

SharedScratch::SharedScratch(std::size_t bytes) : data_(std::malloc(bytes > 0 ? bytes : 1)) {
  if (data_ == nullptr) throw std::bad_alloc();
}

SharedScratch::~SharedScratch() { std::free(data_); }

}  // namespace fiak::cpu
