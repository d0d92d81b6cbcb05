// Splitting work among the caller's threads. Static for the reason given in dtypes.h.
#pragma once

#include "kernels/types.h"

namespace fiak::cpu {

/// body(begin, end) over contiguous parts of [0, count), at most one for each thread.
template <class Body>
static void parallel_range(const Parallel& parallel, int64_t count, Body&& body) {
  if (count <= 0) return;
  const int64_t tasks = parallel.threads < count ? parallel.threads : count;
  if (tasks <= 1) return body(int64_t{0}, count);
  struct Context {
    Body& body;
    int64_t count, tasks;
  } context{body, count, tasks};
  parallel.run(
      tasks,
      [](void* opaque, int64_t index) {
        const Context& c = *static_cast<Context*>(opaque);
        // Multiplying first would overflow for no good reason; the first count % tasks parts get one more.
        const int64_t each = c.count / c.tasks, rest = c.count % c.tasks;
        const int64_t begin = each * index + (index < rest ? index : rest);
        c.body(begin, begin + each + (index < rest ? 1 : 0));
      },
      &context);
}

}  // namespace fiak::cpu
