// The dispatch plan: every entry in one block, every row in one task, and an order without deadlock.
#include <map>
#include <random>
#include <set>

#include "check.h"
#include "kernels/dispatch_plan.h"

using namespace sida;

namespace {

struct Tokens {
  std::vector<int32_t> index, slots;
  PlanRequest request(int64_t top_k, int threads, int64_t block = 32) const {
    return {static_cast<int64_t>(index.size()) / top_k,
            top_k,
            static_cast<int64_t>(slots.size()),
            768,
            3072,
            index.data(),
            slots.data(),
            threads,
            block,
            96,
            24};
  }
};

Tokens uniform(int64_t entries, int64_t experts, uint64_t seed) {
  std::mt19937_64 random(seed);
  Tokens tokens;
  for (int64_t e = 0; e < experts; ++e) tokens.slots.push_back(random() % 5 == 0 ? -1 : static_cast<int32_t>(e));
  for (int64_t i = 0; i < entries; ++i) tokens.index.push_back(static_cast<int32_t>(random() % (experts + 1)) - 1);
  return tokens;
}

// Blocks hold each resident entry once, in order; tasks cover each block once.
void check_complete(const Tokens& tokens, const PlanRequest& request, const DispatchPlan& plan) {
  std::set<int64_t> seen;
  std::map<int32_t, int64_t> last_of_expert;
  for (const TokenBlock& block : plan.blocks) {
    CHECK(block.tokens >= 1 && block.tokens <= request.max_block_tokens && block.tokens <= plan.largest_block);
    CHECK_EQ(block.slot, tokens.slots[block.expert]);
    for (int64_t i = block.first; i < block.first + block.tokens; ++i) {
      CHECK(seen.insert(plan.entries[i]).second);
      CHECK_EQ(tokens.index[plan.entries[i]], block.expert);
      if (i > block.first) CHECK(plan.entries[i] > plan.entries[i - 1]);
    }
  }
  for (size_t i = 0; i < tokens.index.size(); ++i) {
    const bool resident = tokens.index[i] >= 0 && tokens.slots[tokens.index[i]] >= 0;
    CHECK_EQ(seen.contains(static_cast<int64_t>(i)), resident);
  }
  // Rows of a block in each phase; whole counts as both.
  std::map<std::pair<int32_t, Phase>, int64_t> next_row, tasks;
  std::set<int32_t> whole;
  const int64_t first_split = static_cast<int64_t>(plan.blocks.size()) - plan.split_blocks;
  for (const Task& task : plan.tasks) {
    if (task.phase == Phase::whole) {
      CHECK(whole.insert(task.block).second);
      CHECK(task.block < first_split);
      continue;
    }
    CHECK(task.block >= first_split);
    const auto key = std::pair(task.block, task.phase);
    CHECK_EQ(task.row_begin, next_row[key]);
    CHECK(task.row_end > task.row_begin);
    next_row[key] = task.row_end;
    // A down task comes after all up tasks of its block; an up task after the down tasks of the buffer's last user.
    if (task.phase == Phase::down) CHECK_EQ((next_row[{task.block, Phase::up}]), request.d_ff);
    const int32_t before = task.block - DispatchPlan::split_buffers;
    if (task.phase == Phase::up && before >= first_split) {
      CHECK_EQ((next_row[{before, Phase::down}]), request.d_model);
    }
    ++tasks[key];
  }
  CHECK_EQ(static_cast<int64_t>(whole.size()), first_split);
  for (int64_t b = first_split; b < static_cast<int64_t>(plan.blocks.size()); ++b) {
    const auto block = static_cast<int32_t>(b);
    CHECK_EQ((next_row[{block, Phase::up}]), request.d_ff);
    CHECK_EQ((next_row[{block, Phase::down}]), request.d_model);
    CHECK_EQ((tasks[{block, Phase::up}]), plan.up_tasks);
    CHECK_EQ((tasks[{block, Phase::down}]), plan.down_tasks);
  }
}

}  // namespace

SIDA_TEST(plans_are_complete) {
  for (const int64_t experts : {1, 2, 7, 128}) {
    for (const int64_t entries : {0, 1, 2, 30, 200, 3000}) {
      for (const int64_t top_k : {1, 2}) {
        for (const int threads : {1, 2, 7, 64}) {
          for (const int64_t block : {1, 32}) {
            const Tokens tokens = uniform(entries * top_k, experts, entries * 7 + threads);
            const PlanRequest request = tokens.request(top_k, threads, block);
            check_complete(tokens, request, make_dispatch_plan(request));
          }
        }
      }
    }
  }
}

SIDA_TEST(one_token_keeps_two_threads_busy) {
  const Tokens tokens{{3}, {0, 1, 2, 3}};
  const DispatchPlan plan = make_dispatch_plan(tokens.request(1, 2));
  CHECK_EQ(plan.split_blocks, 1);
  CHECK(plan.up_tasks >= 8 && plan.down_tasks >= 8);
}

SIDA_TEST(a_hot_expert_is_cut_into_even_blocks) {
  const Tokens tokens{std::vector<int32_t>(1000, 0), {0}};
  const DispatchPlan plan = make_dispatch_plan(tokens.request(1, 2));
  CHECK_EQ(plan.blocks.size(), size_t(32));
  for (const TokenBlock& block : plan.blocks) CHECK(block.tokens == 31 || block.tokens == 32);
  CHECK(plan.split_blocks >= 1 && plan.split_blocks <= 3);
}

SIDA_TEST(one_thread_splits_nothing) {
  const Tokens tokens = uniform(200, 16, 1);
  const DispatchPlan plan = make_dispatch_plan(tokens.request(1, 1));
  CHECK_EQ(plan.split_blocks, 0);
  CHECK_EQ(plan.tasks.size(), plan.blocks.size());
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
