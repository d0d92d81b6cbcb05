// Working memory of a thread, kept between calls.
#pragma once

#include <cstddef>

namespace fiak::cpu {

/// At least `bytes` bytes aligned to 64, uninitialised, valid until this thread's next call. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes);

/// Working memory that the threads of one call share.
class SharedScratch {
 public:
  explicit SharedScratch(std::size_t bytes);  ///< throws std::bad_alloc
  ~SharedScratch();
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace fiak::cpu
