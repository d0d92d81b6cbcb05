#include "simt/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FIAK_SIMT_TSAN)  // this file itself is not instrumented
#include <sanitizer/tsan_interface.h>
#endif

// void fiak_switch_stack(void** save, void* load): saves what a call must preserve on this stack, and goes on on
// another.
asm(R"(
.text
.globl fiak_switch_stack
.type fiak_switch_stack, @function
fiak_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fiak_switch_stack, .-fiak_switch_stack
)");
extern "C" void fiak_switch_stack(void** save, void* load);

namespace fiak::simt {

Indices indices;
std::map<std::string, Counts> counts;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;  // on both sides of shared memory
constexpr unsigned kMostCopies = 256;

/// Does a warp collective, given every lane's arguments.
using Collective = void (*)(void* const* lanes, uint32_t mask);

/// A stack that is switched to and from, with what the sanitizers want to know about it.
struct Context {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

enum class State { kReady, kAtBarrier, kInCollective, kExited };

/// A copy that was put off. Of a type that is this file's own, so that the linker takes no instrumented vector for it.
struct Pending : Copy {
  unsigned group;
};
struct Seen : Site {};

struct Thread : Context {
  State state = State::kReady;
  Site site;                        // where it waits
  Collective collective = nullptr;  // null for __syncwarp
  void* arguments = nullptr;
  uint32_t mask = 0;
  const char* complaint = nullptr;  // an error that the thread itself found
  std::vector<Pending> copies;
  unsigned group = 0;  // the open one
};

/// What ThreadSanitizer knows a barrier by: two tags in turn, since some may reach the next one before all left the
/// last.
struct Barrier {
  unsigned passed = 0;
  char tags[2] = {};
  void* tag() { return &tags[passed % 2]; }
};

struct Warp {
  uint32_t ready = 0;
  Barrier barriers[kWarp];  // of __syncwarp, by the first lane of its mask
};

struct Block {
  unsigned index = 0;
  unsigned char* memory = nullptr;  // guard, shared memory, guard, stacks: fresh pages
  size_t bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned at_barrier = 0, exited = 0;
  Barrier barrier;
};

class Scheduler {
 public:
  Scheduler(const Launch& launch, const Schedule& schedule, void (*kernel)(const void*), const void* params);
  ~Scheduler();
  Sites run();

  // Called by the running thread.
  void start();
  void wait_at_barrier(const Site& site);
  void wait_in_collective(Collective collective, void* arguments, uint32_t mask, const Site& site);
  void pause();
  [[noreturn]] void complain(const char* complaint);
  bool note(const Site& site);
  void* shared() const { return block_->memory + kGuardBytes; }
  Thread& thread() { return *thread_; }
  uint64_t random();
  Counts counts;

 private:
  void open_block();
  void close_block(size_t at);
  void pick();
  void arrive();
  void arrive_at_exit();
  void arrive_at_barrier();
  void arrive_in_collective();
  void switch_to(Context& from, Context& to, bool for_good = false);
  [[noreturn]] void fail(unsigned at, const std::string& what) const;
  [[noreturn]] void fail_for_exit(unsigned at, unsigned exited) const;
  unsigned thread_index() const { return static_cast<unsigned>(thread_ - block_->threads.data()); }
  std::string waiting(unsigned at) const;

  const Launch& launch_;
  const Schedule& schedule_;
  void (*const kernel_)(const void*);
  const void* const params_;
  uint64_t random_state_;
  const bool backwards_;
  const size_t most_open_;
  Context main_;
  std::vector<std::unique_ptr<Block>> open_;
  unsigned opened_ = 0;
  Block* block_ = nullptr;  // of the running thread
  Thread* thread_ = nullptr;
  const Block* favourite_ = nullptr;  // runs ahead, in the warp
  unsigned favourite_warp_ = 0;
  uint64_t phase_ends_ = 0, steps_ = 0;
  std::vector<Seen> sites_;
  char end_tag_ = 0;
};

Scheduler* scheduler = nullptr;

void start_thread() { scheduler->start(); }

void tsan_release([[maybe_unused]] void* tag) {
#if defined(FIAK_SIMT_TSAN)
  __tsan_release(tag);
#endif
}
void tsan_acquire([[maybe_unused]] void* tag) {
#if defined(FIAK_SIMT_TSAN)
  __tsan_acquire(tag);
#endif
}

Scheduler::Scheduler(const Launch& launch, const Schedule& schedule, void (*kernel)(const void*), const void* params)
    : launch_(launch),
      schedule_(schedule),
      kernel_(kernel),
      params_(params),
      random_state_(schedule.seed * 0x9E3779B97F4A7C15u + 0x1234567),
      backwards_(random() % 2 == 1),
      most_open_(1 + random() % 3) {
  sites_.reserve(256);  // threads must not allocate: ThreadSanitizer would watch this memory, too
  scheduler = this;
#if defined(FIAK_SIMT_TSAN)
  main_.tsan_fiber = __tsan_get_current_fiber();
#endif
}

Scheduler::~Scheduler() {
  while (!open_.empty()) close_block(open_.size() - 1);
  tsan_acquire(&end_tag_);
  scheduler = nullptr;
}

/// splitmix64
uint64_t Scheduler::random() {
  uint64_t z = random_state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void Scheduler::open_block() {
  auto block = std::make_unique<Block>();
  block->index = backwards_ ? launch_.blocks - 1 - opened_ : opened_;
  ++opened_;
  const size_t shared_pages = (launch_.shared_bytes + 4095) / 4096 * 4096;
  block->bytes = kGuardBytes + shared_pages + kGuardBytes + launch_.threads * kStackBytes;
  void* memory =
      mmap(nullptr, block->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
  block->memory = static_cast<unsigned char*>(memory);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, block->bytes);
  __asan_poison_memory_region(memory, kGuardBytes);
  __asan_poison_memory_region(block->memory + kGuardBytes + launch_.shared_bytes,
                              shared_pages - launch_.shared_bytes + kGuardBytes);
#endif
  std::fill_n(block->memory + kGuardBytes, launch_.shared_bytes, static_cast<unsigned char>(0xff));  // NaN in any type
  unsigned char* stacks = block->memory + kGuardBytes + shared_pages + kGuardBytes;
  block->warps.resize((launch_.threads + kWarp - 1) / kWarp);
  block->threads.resize(launch_.threads);
  for (unsigned i = 0; i < launch_.threads; ++i) {
    Thread& thread = block->threads[i];
    thread.copies.reserve(kMostCopies);
    thread.bottom = stacks + i * kStackBytes;
    thread.size = kStackBytes;
    // What fiak_switch_stack takes from it: six registers, and where to go. A call leaves 8 bytes more than 16 k.
    auto* top = reinterpret_cast<uint64_t*>(stacks + (i + 1) * kStackBytes) - 8;
    top[6] = reinterpret_cast<uint64_t>(&start_thread);
    thread.stack_pointer = top;
#if defined(FIAK_SIMT_TSAN)
    thread.tsan_fiber = __tsan_create_fiber(0);
#endif
    block->warps[i / kWarp].ready |= 1u << i % kWarp;
  }
  open_.push_back(std::move(block));
}

void Scheduler::close_block(size_t at) {
  Block& block = *open_[at];
#if defined(FIAK_SIMT_TSAN)
  for (Thread& thread : block.threads) __tsan_destroy_fiber(thread.tsan_fiber);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.memory, block.bytes);
#endif
  munmap(block.memory, block.bytes);
  if (favourite_ == &block) favourite_ = nullptr;
  open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(at));
}

Sites Scheduler::run() {
  while (opened_ < launch_.blocks || !open_.empty()) {
    while (opened_ < launch_.blocks && open_.size() < most_open_) open_block();
    pick();
    indices = {{thread_index()}, {block_->index}, {launch_.threads}, {launch_.blocks}};
    switch_to(main_, *thread_);
    arrive();
  }
  return {sites_.begin(), sites_.end()};
}

/// Chooses the thread to run. Phases of all lengths, with or without a favourite, follow each other.
void Scheduler::pick() {
  if (steps_++ >= phase_ends_) {
    phase_ends_ = steps_ + (uint64_t{1} << (4 + random() % 12));
    const uint64_t draw = random();
    favourite_ = draw % 2 == 0 ? nullptr : open_[(draw >> 8) % open_.size()].get();
    favourite_warp_ = static_cast<unsigned>((draw >> 32) % ((launch_.threads + kWarp - 1) / kWarp));
  }
  uint64_t draw = random();
  unsigned warp = favourite_warp_;
  if (favourite_ != nullptr && favourite_->warps[warp].ready != 0) {
    block_ = const_cast<Block*>(favourite_);
  } else {
    // Some thread of every open block is ready: arrive() sees to it.
    block_ = open_[draw % open_.size()].get();
    draw >>= 8;
    const auto warps = static_cast<unsigned>(block_->warps.size());
    for (warp = static_cast<unsigned>(draw % warps); block_->warps[warp].ready == 0;) warp = (warp + 1) % warps;
    draw >>= 8;
  }
  const unsigned turn = static_cast<unsigned>(draw % kWarp);
  const uint32_t ready = block_->warps[warp].ready,
                 turned = turn == 0 ? ready : ready >> turn | ready << (kWarp - turn);
  thread_ = &block_->threads[warp * kWarp + (static_cast<unsigned>(__builtin_ctz(turned)) + turn) % kWarp];
}

/// Deals with what the thread that just ran waits for.
void Scheduler::arrive() {
  const unsigned at = thread_index();
  if (thread_->complaint != nullptr) fail(at, thread_->complaint);
  if (thread_->state != State::kReady) block_->warps[at / kWarp].ready &= ~(1u << at % kWarp);
  switch (thread_->state) {
    case State::kReady:
      return;
    case State::kExited:
      arrive_at_exit();
      break;
    case State::kAtBarrier:
      arrive_at_barrier();
      break;
    case State::kInCollective:
      arrive_in_collective();
      break;
  }
  if (block_->exited == launch_.threads) {
    for (size_t i = 0; i < open_.size(); ++i) {
      if (open_[i].get() == block_) return close_block(i);
    }
  }
  if (std::all_of(block_->warps.begin(), block_->warps.end(), [](const Warp& warp) { return warp.ready == 0; })) {
    unsigned first = 0;
    while (block_->threads[first].state == State::kExited) ++first;
    fail(first, waiting(first) + " for ever: " + std::to_string(block_->exited) + " threads of the block exited, " +
                    std::to_string(block_->at_barrier) + " wait at a barrier");
  }
}

void Scheduler::arrive_at_exit() {
  ++block_->exited;
  const unsigned at = thread_index(), first = at / kWarp * kWarp;
  for (unsigned i = first; i < std::min(first + kWarp, launch_.threads); ++i) {
    const Thread& other = block_->threads[i];
    if (other.state == State::kInCollective && (other.mask >> at % kWarp & 1) != 0) fail_for_exit(i, at);
  }
}

void Scheduler::arrive_at_barrier() {
  if (++block_->at_barrier < launch_.threads) return;
  for (unsigned i = 0; i < launch_.threads; ++i) {
    if (!(block_->threads[i].site == thread_->site)) {
      fail(i, "divergent barrier: it is at " + block_->threads[i].site.text() + " while thread " +
                  std::to_string(thread_index()) + " is at " + thread_->site.text());
    }
  }
  for (unsigned i = 0; i < launch_.threads; ++i) {
    block_->threads[i].state = State::kReady;
    block_->warps[i / kWarp].ready |= 1u << i % kWarp;
  }
  block_->at_barrier = 0;
  ++block_->barrier.passed;
}

void Scheduler::arrive_in_collective() {
  const unsigned at = thread_index(), first = at / kWarp * kWarp;
  if ((thread_->mask >> at % kWarp & 1) == 0) fail(at, waiting(at) + " with a mask that lacks its own lane");
  void* arguments[kWarp] = {};
  bool complete = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread_->mask >> lane & 1) == 0) continue;
    if (first + lane >= launch_.threads) fail(at, waiting(at) + " with a mask of lanes that do not exist");
    const Thread& other = block_->threads[first + lane];
    if (other.state == State::kExited) fail_for_exit(at, first + lane);
    if (other.state == State::kInCollective &&
        (other.mask != thread_->mask || !(other.site == thread_->site) || other.collective != thread_->collective)) {
      fail(at, waiting(at) + ", but thread " + std::to_string(first + lane) + " " + waiting(first + lane));
    }
    complete = complete && other.state == State::kInCollective;
    arguments[lane] = other.arguments;
  }
  if (!complete) return;
  if (thread_->collective != nullptr) thread_->collective(arguments, thread_->mask);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((thread_->mask >> lane & 1) != 0) block_->threads[first + lane].state = State::kReady;
  }
  Warp& warp = block_->warps[at / kWarp];
  warp.ready |= thread_->mask;
  if (thread_->collective == nullptr) ++warp.barriers[__builtin_ctz(thread_->mask)].passed;
}

void Scheduler::fail_for_exit(unsigned at, unsigned exited) const {
  fail(at, waiting(at) + ", but thread " + std::to_string(exited) + " exited");
}

std::string Scheduler::waiting(unsigned at) const {
  const Thread& thread = block_->threads[at];
  char mask[16];
  std::snprintf(mask, sizeof mask, "%08x", thread.mask);
  return thread.state == State::kAtBarrier ? "waits at the barrier of " + thread.site.text()
                                           : "waits for lanes " + std::string(mask) + " at " + thread.site.text();
}

void Scheduler::fail(unsigned at, const std::string& what) const {
  throw Error(std::string(launch_.kernel) + ", block " + std::to_string(block_->index) + ", thread " +
              std::to_string(at) + " (seed " + std::to_string(schedule_.seed) + "): " + what);
}

/// The running thread's code goes on in `to`. No switch orders what the threads do to memory, but the end of the launch
/// comes after all.
void Scheduler::switch_to(Context& from, Context& to, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(FIAK_SIMT_TSAN)
  if (&to == &main_) __tsan_release(&end_tag_);
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  fiak_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

/// The first function on a thread's stack.
void Scheduler::start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_.bottom, &main_.size);
#endif
  kernel_(params_);
  thread_->state = State::kExited;
  switch_to(*thread_, main_, true);
}

void Scheduler::wait_at_barrier(const Site& site) {
  thread_->state = State::kAtBarrier;
  thread_->site = site;
  void* tag = block_->barrier.tag();
  tsan_release(tag);
  switch_to(*thread_, main_);
  tsan_acquire(tag);
}

void Scheduler::wait_in_collective(Collective collective, void* arguments, uint32_t mask, const Site& site) {
  Thread& thread = *thread_;
  thread.state = State::kInCollective;
  thread.site = site;
  thread.collective = collective;
  thread.arguments = arguments;
  thread.mask = mask;
  if (collective != nullptr || mask == 0) return switch_to(thread, main_);
  // __syncwarp, which alone orders memory.
  void* tag = block_->warps[thread_index() / kWarp].barriers[__builtin_ctz(mask)].tag();
  tsan_release(tag);
  switch_to(thread, main_);
  tsan_acquire(tag);
}

void Scheduler::pause() { switch_to(*thread_, main_); }

void Scheduler::complain(const char* complaint) {
  thread_->complaint = complaint;
  switch_to(*thread_, main_, true);
  __builtin_unreachable();
}

bool Scheduler::note(const Site& site) {
  const bool seen = std::any_of(sites_.begin(), sites_.end(), [&](const Seen& other) { return other == site; });
  if (!seen && sites_.size() < sites_.capacity()) sites_.push_back({site});
  return site == schedule_.broken;
}

}  // namespace

Sites run(const Launch& launch, const Schedule& schedule, void (*kernel)(const void*), const void* params) {
  Scheduler launched(launch, schedule, kernel, params);
  Sites sites = launched.run();
  Counts& sum = counts[launch.kernel];
  ++sum.launches;
  sum.blocks += launch.blocks;
  sum.copied_bytes += launched.counts.copied_bytes;
  sum.loaded_bytes += launched.counts.loaded_bytes;
  sum.products += launched.counts.products;
  return sites;
}

bool broken(const Site& site) { return scheduler->note(site); }
void* shared_memory() { return scheduler->shared(); }
void sync_threads(const Site& site) { scheduler->wait_at_barrier(site); }
void sync_warp(uint32_t mask, const Site& site) { scheduler->wait_in_collective(nullptr, nullptr, mask, site); }
void yield() { scheduler->pause(); }
void trap() { scheduler->complain("trapped"); }

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

void count_copy(unsigned bytes) { scheduler->counts.copied_bytes += bytes; }
void count_load(int64_t bytes) { scheduler->counts.loaded_bytes += bytes; }

bool postpone(const Copy& copy) {
  if (scheduler->random() % 2 == 0) return false;
  Thread& thread = scheduler->thread();
  if (thread.copies.size() == kMostCopies) scheduler->complain("has too many asynchronous copies under way");
  thread.copies.push_back({copy, thread.group});
  return true;
}

void commit_copies() { ++scheduler->thread().group; }

bool due_copy(unsigned allowed, Copy* copy) {
  Thread& thread = scheduler->thread();
  if (thread.copies.empty() || thread.copies.front().group + allowed >= thread.group) return false;
  *copy = thread.copies.front();
  for (size_t i = 1; i < thread.copies.size(); ++i) thread.copies[i - 1] = thread.copies[i];
  thread.copies.pop_back();
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Warp collectives

namespace {

template <class Arguments>
Arguments& of(void* const* lanes, unsigned lane) {
  return *static_cast<Arguments*>(lanes[lane]);
}

/// a[i] is the 16-bit half at `place` of a fragment's registers.
uint16_t half_of(const uint32_t* registers, unsigned place) {
  return static_cast<uint16_t>(registers[place / 2] >> 16 * (place % 2));
}

struct Shuffle {
  uint32_t value;
  unsigned source;
  uint32_t result;
};

void do_shuffle(void* const* lanes, uint32_t mask) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Shuffle& mine = of<Shuffle>(lanes, lane);
    // What a lane that takes no part would send is undefined: NaN.
    mine.result = (mask >> mine.source & 1) != 0 ? of<Shuffle>(lanes, mine.source).value : 0xffffffffu;
  }
}

struct Ballot {
  bool predicate;
  uint32_t result;
};

void do_ballot(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && of<Ballot>(lanes, lane).predicate) votes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0) of<Ballot>(lanes, lane).result = votes;
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

/// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". Sums are in float32, in the order of k; the
/// hardware's order is not documented.
template <class Element>
void do_mma(void* const* lanes, uint32_t) {
  ++scheduler->counts.products;
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned group = lane / 4, in_group = lane % 4;
    const Mma& mma = of<Mma>(lanes, lane);
    for (unsigned i = 0; i < 8; ++i) {
      a[group + (i / 2 % 2) * 8][in_group * 2 + i % 2 + i / 4 * 8] = to_float(Element{half_of(mma.a, i)});
    }
    for (unsigned i = 0; i < 4; ++i) b[in_group * 2 + i % 2 + i / 2 * 8][group] = to_float(Element{half_of(mma.b, i)});
  }
  float sums[16][8] = {};
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) of<Mma>(lanes, lane).d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct Matrices {
  const uint16_t* row;
  uint32_t* result;
};

/// PTX ISA, ldmatrix: of each 8 x 8 matrix, lane i gets elements 2 (i % 4) and the next one of row i / 4; transposed,
/// of column i / 4.
template <bool kTransposed>
void do_exchange_matrices(void* const* lanes, uint32_t) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](unsigned i) -> uint32_t {
        const unsigned row = kTransposed ? lane % 4 * 2 + i : lane / 4,
                       column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        return of<Matrices>(lanes, matrix * 8 + row).row[column];
      };
      of<Matrices>(lanes, lane).result[matrix] = element(0) | element(1) << 16;
    }
  }
}

template <class Arguments>
void whole_warp(Collective collective, Arguments arguments, const Site& site) {
  scheduler->wait_in_collective(collective, &arguments, 0xffffffffu, site);
}

}  // namespace

uint32_t shuffle(uint32_t mask, uint32_t value, unsigned source, const Site& site) {
  Shuffle arguments{value, source, 0};
  scheduler->wait_in_collective(do_shuffle, &arguments, mask, site);
  return arguments.result;
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  Ballot arguments{predicate, 0};
  scheduler->wait_in_collective(do_ballot, &arguments, mask, site);
  return arguments.result;
}

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  whole_warp(do_mma<BFloat16>, Mma{d, a, b}, site);
}

void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  whole_warp(do_mma<Half>, Mma{d, a, b}, site);
}

void exchange_matrices(const uint16_t* row, uint32_t* result, bool transposed, const Site& site) {
  whole_warp(transposed ? do_exchange_matrices<true> : do_exchange_matrices<false>, Matrices{row, result}, site);
}

}  // namespace fiak::simt
