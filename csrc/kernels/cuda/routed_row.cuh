// What a (token, choice) row asks for in this wave: one place that judges indices and slots, for the plan, which sorts
// the rows, and for the output phase, which counts how many rows of a token there are.
#pragma once

#include "kernels/cuda/params.h"

namespace sida::cuda {

enum class Found {
  none,      // expert -1: the row contributes nothing
  resident,  // the expert has a slot
  missing,   // the expert has slot -1
  wrong      // the index or the slot is out of range
};

struct RoutedRow {
  Found found;
  int expert;
};

__device__ inline RoutedRow locate_expert(const Routing& routing, int row) {
  if (routing.expert_index == nullptr) return {Found::resident, 0};
  const int expert = routing.expert_index[row];
  if (expert == -1) return {Found::none, -1};
  if (expert < -1 || expert >= routing.num_experts) return {Found::wrong, -1};
  const int slot = routing.slot_of_expert[expert];
  if (slot < -1 || slot >= routing.num_slots) return {Found::wrong, -1};
  return {slot < 0 ? Found::missing : Found::resident, expert};
}

}  // namespace sida::cuda
