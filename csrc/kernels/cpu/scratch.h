// Working memory of a thread, kept between calls.
#pragma once

#include <cstddef>

namespace fiak::cpu {

/// At least `bytes` bytes aligned to 64, uninitialised, valid until this thread's next call. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes);

}  // namespace fiak::cpu
