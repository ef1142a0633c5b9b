// Cuts one call's tokens into blocks and tasks.
#include "kernels/dispatch_plan.h"

#include <algorithm>

#include "base/rounding.h"

namespace sida {
namespace {

// Split tasks for each thread and matrix: enough that waiting for the slowest is a few per cent of the block.
constexpr int64_t tasks_per_thread = 8;

// The time of a block in units of one token's arithmetic. Streaming the weights costs as much as some eight tokens'
// arithmetic, whatever the number of tokens.
int64_t cost(const TokenBlock& block) {
  return std::max<int64_t>(block.tokens, 8);
}

// Rows of a split task: about `tasks_per_thread` tasks for each thread, in multiples of `granularity`.
int64_t task_rows(int64_t rows, int threads, int64_t granularity) {
  const int64_t wanted = divide_up(rows, threads * tasks_per_thread);
  return std::max<int64_t>(divide_up(wanted, granularity), 1) * granularity;
}

void add_tasks(std::vector<Task>& tasks, Phase phase, int64_t block, int64_t rows, int64_t rows_per_task) {
  for (int64_t row = 0; row < rows; row += rows_per_task) {
    tasks.push_back({phase, static_cast<int32_t>(block), row, std::min(row + rows_per_task, rows)});
  }
}

void sort_entries(const PlanRequest& request, DispatchPlan& plan) {
  const int64_t entries = request.tokens * request.top_k;
  const auto is_resident = [&](int32_t expert) { return expert >= 0 && request.slot_of_expert[expert] >= 0; };
  std::vector<int64_t> next(request.num_experts + 1, 0);
  for (int64_t i = 0; i < entries; ++i) {
    if (is_resident(request.expert_index[i])) ++next[request.expert_index[i] + 1];
  }
  for (int64_t e = 0; e < request.num_experts; ++e) next[e + 1] += next[e];
  plan.entries.resize(next[request.num_experts]);
  for (int64_t e = 0; e < request.num_experts; ++e) {
    const int64_t count = next[e + 1] - next[e];
    if (count == 0) continue;
    // Blocks of nearly equal size: a last block of one token would cost as much as one of eight.
    const int64_t blocks = divide_up(count, request.max_block_tokens);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = count * b / blocks, end = count * (b + 1) / blocks;
      plan.blocks.push_back({static_cast<int32_t>(e), request.slot_of_expert[e], next[e] + begin, end - begin});
    }
  }
  for (int64_t i = 0; i < entries; ++i) {
    const int32_t expert = request.expert_index[i];
    if (is_resident(expert)) plan.entries[next[expert]++] = i;
  }
}

// How many blocks at the end are split: their cost must cover what one thread may lag behind the others, the
// cost of the largest block.
int64_t count_split_blocks(const std::vector<TokenBlock>& blocks, int threads) {
  if (threads <= 1 || blocks.empty()) return 0;
  int64_t tail = 0, split = 0;
  const int64_t enough = threads * cost(blocks.front());
  while (split < static_cast<int64_t>(blocks.size()) && tail < enough) {
    ++split;
    tail += cost(blocks[blocks.size() - split]);
  }
  return split;
}

}  // namespace

DispatchPlan make_dispatch_plan(const PlanRequest& request) {
  DispatchPlan plan;
  sort_entries(request, plan);
  if (plan.blocks.empty()) return plan;
  std::stable_sort(plan.blocks.begin(), plan.blocks.end(),
                   [](const TokenBlock& a, const TokenBlock& b) { return a.tokens > b.tokens; });
  plan.largest_block = plan.blocks.front().tokens;
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
  plan.split_blocks = count_split_blocks(plan.blocks, request.threads);
  const int64_t first_split = blocks - plan.split_blocks;
  for (int64_t b = 0; b < first_split; ++b) plan.tasks.push_back({Phase::whole, static_cast<int32_t>(b), 0, 0});
  if (plan.split_blocks == 0) return plan;

  const int64_t up_rows = task_rows(request.d_ff, request.threads, request.up_granularity);
  const int64_t down_rows = task_rows(request.d_model, request.threads, request.down_granularity);
  plan.up_tasks = divide_up(request.d_ff, up_rows);
  plan.down_tasks = divide_up(request.d_model, down_rows);
  // The up tasks of the next block come before the down tasks of this one: a thread that would have to wait for the
  // last up task finds other work first.
  add_tasks(plan.tasks, Phase::up, first_split, request.d_ff, up_rows);
  for (int64_t b = first_split; b < blocks; ++b) {
    if (b + 1 < blocks) add_tasks(plan.tasks, Phase::up, b + 1, request.d_ff, up_rows);
    add_tasks(plan.tasks, Phase::down, b, request.d_model, down_rows);
  }
  return plan;
}

}  // namespace sida
