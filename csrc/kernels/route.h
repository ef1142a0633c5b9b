// Expert capacity of top-1 routing.
#pragma once

#include <cstdint>

namespace sida {

// Drops the tokens over capacity: within each sequence, in token order and padding included, a token keeps its expert
// while its 1-based count within that expert is at most `capacity`.
//   expert        [batch, sequence] in [0, num_experts)
//   expert_index  [batch, sequence], the expert or -1
void apply_capacity(const int64_t* expert, int64_t batch, int64_t sequence, int64_t num_experts, int64_t capacity,
                    int32_t* expert_index);

}  // namespace sida
