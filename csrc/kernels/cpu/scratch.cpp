#include "kernels/cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace fiak::cpu {
namespace {

constexpr std::size_t kKept = std::size_t{64} << 20;

struct Free {
  void operator()(char* p) const { std::free(p); }
};

class Thread {
 public:
  ScratchRange& borrow() {
    if (pieces_.empty() && wanted_ > 0) add(wanted_);  // only the first borrower can find none
    ++borrowers_;                                      // not where memory is out
    return left_;
  }
  void extend(std::size_t bytes) {
    used_ += left_.next - start_;
    add(bytes);
  }
  void give_back(const ScratchRange& borrowed) {
    if (--borrowers_ > 0) {
      // A piece that was added meanwhile stays where it is until all is given back.
      if (borrowed.end == left_.end) left_.next = borrowed.next;
      return;
    }
    std::size_t all = 0;
    for (const Piece& piece : pieces_) all += piece.size;
    const std::size_t used = used_ + (left_.next - start_);
    if (pieces_.size() > 1 || (all > kKept && used <= kKept)) {
      pieces_.clear();
      left_ = {nullptr, nullptr};
      start_ = nullptr;
      wanted_ = all > kKept ? used : all;
    }
    left_.next = start_;
    used_ = 0;
  }

 private:
  struct Piece {
    std::unique_ptr<char, Free> memory;
    std::size_t size;
  };
  void add(std::size_t bytes) {
    const std::size_t size = (bytes + 4095) / 4096 * 4096;
    std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(64, size > 0 ? size : 4096)));
    if (!memory) throw std::bad_alloc();
    start_ = memory.get();
    left_ = {start_, start_ + size};
    pieces_.push_back({std::move(memory), size});
  }

  std::vector<Piece> pieces_;
  ScratchRange left_{nullptr, nullptr};
  char* start_ = nullptr;  // of the last piece
  std::size_t borrowers_ = 0, used_ = 0, wanted_ = 0;
};

Thread& thread() {
  thread_local Thread mine;
  return mine;
}

}  // namespace

ScratchRange& borrow_scratch() { return thread().borrow(); }
void extend_scratch(std::size_t bytes) { thread().extend(bytes); }
void return_scratch(const ScratchRange& borrowed) { thread().give_back(borrowed); }

SharedScratch::SharedScratch(std::size_t bytes)
    : data_(static_cast<char*>(std::aligned_alloc(64, bytes > 0 ? (bytes + 63) / 64 * 64 : 64))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

SharedScratch::~SharedScratch() { std::free(data_); }

}  // namespace fiak::cpu
