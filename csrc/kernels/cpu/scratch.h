// Working memory of a thread, kept between calls and handed out in pieces that nobody measures first.
#pragma once

#include <cstddef>

namespace fiak::cpu {

/// Memory to hand out pieces of.
struct ScratchRange {
  char *next, *end;
};

/// What is left of this thread's memory. Whoever hands out pieces of it moves `next`, which must stay aligned to 64,
/// and gives them back by return_scratch with what borrow_scratch returned at first.
ScratchRange& borrow_scratch();
/// Makes this thread's memory have at least `bytes` bytes left, elsewhere; what was handed out stays valid. Throws
/// std::bad_alloc.
void extend_scratch(std::size_t bytes);
/// When the last borrower returns, all memory becomes one range, which later calls find; of more than 64 MiB only what
/// was used.
void return_scratch(const ScratchRange& borrowed);

/// Working memory that the threads of one call share, aligned to 64.
class SharedScratch {
 public:
  explicit SharedScratch(std::size_t bytes);  ///< throws std::bad_alloc
  ~SharedScratch();
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;
  void* data() const { return data_; }

 private:
  char* data_;
};

}  // namespace fiak::cpu
