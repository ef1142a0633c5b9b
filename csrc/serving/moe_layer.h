// What the forward of a MoE layer over an engine's slots has in common on every device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "experts/transfer.h"
#include "kernels/moe_ffn.h"

namespace sida {

// Sets the fields of `args` that are the store's and the slots': sizes, types, and where the matrices of slot 0 lie
// with the strides from one slot's to the next one's.
void set_slots(MoeFfnArgs& args, const TransferEngine& engine);

// The experts that a layer's rows name, each once, in the order of their first rows; -1 names none. Every index must be
// below `num_experts`.
[[nodiscard]] std::vector<int32_t> distinct_experts(std::span<const int32_t> expert_index, int64_t num_experts);

// How many of the rows name each of `experts`, which are all that any of them names.
[[nodiscard]] std::vector<int64_t> choices_of(std::span<const int32_t> experts, std::span<const int32_t> expert_index,
                                              int64_t num_experts);

}  // namespace sida
