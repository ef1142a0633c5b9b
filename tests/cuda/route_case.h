// Random router logits, routed by the kernel and by a plain loop.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace sida::cuda_test {

struct RouteCase {
  DType dtype = DType::f32, rounded = DType::f32;
  int64_t sequences = 2, length = 40, experts = 8, capacity = 4;
  uint64_t seed = 1;
};

struct Routed {
  std::string wrong;  // empty if as expected
  std::vector<int32_t> expert_index;
  std::vector<float> gate;
};

// Routes `logits` ([sequences, length, experts], of values that the dtype holds exactly).
Routed route(const RouteCase& shape, const std::vector<float>& logits, uint64_t schedule);

// Routes random logits from a coarse grid, full of exact ties, and compares with a plain loop.
Routed run(const RouteCase& shape, uint64_t schedule);

}  // namespace sida::cuda_test
