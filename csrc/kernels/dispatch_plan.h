// DispatchPlan: which tokens go to which expert, and how the work is cut for the threads. Plain host code: no kernel,
// no thread, no pointer to a weight.
//
// The tokens of one expert form blocks of at most `max_block_tokens`. A block is worked on in two phases: "up" makes
// rows of the hidden layer (rows of wi), "down" makes rows of the output (rows of wo) and needs the whole hidden layer.
// Most blocks are one task for one thread. The smallest ones at the end are split into tasks of a few rows, so that
// the threads end together; a layer with fewer blocks than threads is split altogether. No cut goes through a sum:
// every output element is one dot product computed by one thread, so results do not depend on the plan.
#pragma once

#include <cstdint>
#include <vector>

namespace sida {

struct TokenBlock {
  int32_t expert, slot;
  int64_t first;  // into DispatchPlan::entries
  int64_t tokens;
};

enum class Phase : int32_t { whole, up, down };

struct Task {
  Phase phase;
  int32_t block;               // into DispatchPlan::blocks
  int64_t row_begin, row_end;  // rows of the hidden layer (up) or of the output (down); whole: unused
};

struct PlanRequest {
  int64_t tokens, top_k, num_experts, d_model, d_ff;
  const int32_t* expert_index;    // [tokens, top_k]
  const int32_t* slot_of_expert;  // [num_experts]
  int threads;
  int64_t max_block_tokens;
  int64_t up_granularity, down_granularity;  // rows of a split task are multiples of these
};

// Tasks are taken in order. An up or down task waits only for tasks before it, so any number of threads, one
// included, gets through without deadlock:
//   a down task of split block i waits for all `up_tasks` of block i;
//   an up task of split block i waits for all `down_tasks` of split block i - split_buffers, whose hidden layer it
//   overwrites.
struct DispatchPlan {
  static constexpr int split_buffers = 3;

  std::vector<int64_t> entries;    // t * top_k + k, by expert, in ascending order within an expert
  std::vector<TokenBlock> blocks;  // by falling number of tokens; the split ones are the last `split_blocks`
  std::vector<Task> tasks;
  int64_t split_blocks = 0;
  int64_t up_tasks = 0, down_tasks = 0;  // for each split block
  int64_t largest_block = 0;             // tokens
};

DispatchPlan make_dispatch_plan(const PlanRequest& request);

}  // namespace sida
