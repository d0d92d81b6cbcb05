// Prints what simt counted. Include it after simt/simt.h.
#pragma once

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace fiak::tests {

/// A line of JSON for each kernel that ran, marked for benchmarks/cuda_roofline.py; clears the counts.
inline void print_counts(const std::string& op, const std::vector<std::pair<std::string, int64_t>>& sizes) {
  for (const auto& [kernel, counts] : simt::counts) {
    std::printf("COUNTS {\"op\": \"%s\", \"kernel\": \"%s\"", op.c_str(), kernel.c_str());
    for (const auto& [name, size] : sizes) std::printf(", \"%s\": %lld", name.c_str(), static_cast<long long>(size));
    std::printf(", \"blocks\": %lld, \"copied_bytes\": %lld, \"loaded_bytes\": %lld, \"products\": %lld}\n",
                static_cast<long long>(counts.blocks), static_cast<long long>(counts.copied_bytes),
                static_cast<long long>(counts.loaded_bytes), static_cast<long long>(counts.products));
  }
  simt::counts.clear();
}

}  // namespace fiak::tests
