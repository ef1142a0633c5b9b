// Expert capacity of top-1 routing.
#include "kernels/route.h"

#include <algorithm>
#include <vector>

namespace sida {

void apply_capacity(const int64_t* expert, int64_t batch, int64_t sequence, int64_t num_experts, int64_t capacity,
                    int32_t* expert_index) {
  std::vector<int64_t> taken(num_experts);
  for (int64_t b = 0; b < batch; ++b) {
    std::fill(taken.begin(), taken.end(), 0);
    for (int64_t i = b * sequence; i < (b + 1) * sequence; ++i) {
      const bool kept = ++taken[expert[i]] <= capacity;
      expert_index[i] = kept ? static_cast<int32_t>(expert[i]) : -1;
    }
  }
}

}  // namespace sida
