// Tests of dispatch_plan alone: the exact order of the rows, the tile list and the error words.
#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "cpp/check.h"
#include "harness/harness.h"
#include "kernels/cuda/heuristics.h"
#include "kernels/cuda/kernels.h"

namespace sida::cuda_test {
namespace {

constexpr int32_t none = std::numeric_limits<int32_t>::max();

struct Planned {
  std::vector<cuda::TokenTile> tiles;
  std::vector<int32_t> row_of_position, tickets;
  int32_t wrong_row, missing_row;
};

template <class Value>
Value* upload(const std::vector<Value>& values) {
  auto* const device = static_cast<Value*>(harness::global_allocate(values.size() * sizeof(Value)));
  harness::global_fill(device, values.data(), values.size() * sizeof(Value));
  return device;
}

Planned plan(const std::vector<int32_t>& expert_index, const std::vector<int32_t>& slot_of_expert, int block_t,
             int warps, uint64_t schedule) {
  harness::global_reset();
  harness::seed(schedule);
  const auto rows = static_cast<int32_t>(expert_index.size());
  const auto experts = static_cast<int32_t>(slot_of_expert.size());
  const int64_t tiles = cuda::max_tiles(rows, experts, block_t);
  cuda::PlanParams params{};
  params.routing = {upload(expert_index), upload(slot_of_expert), experts, experts};
  params.rows = rows;
  params.block_t = block_t;
  params.warps = warps;
  // Exactly as large as max_tiles promises: a tile too many is out of bounds.
  params.plan = {
      static_cast<int32_t*>(harness::global_allocate(4)),
      static_cast<cuda::TokenTile*>(harness::global_allocate(static_cast<size_t>(tiles) * sizeof(cuda::TokenTile))),
      static_cast<int32_t*>(harness::global_allocate(expert_index.size() * 4))};
  params.counters = static_cast<int32_t*>(harness::global_allocate(28));
  params.counter_count = 7;
  params.error_rows = upload(std::vector<int32_t>{none, none});
  cuda::launch("dispatch_plan", cuda::dispatch_plan_kernel, {1, warps * 32, (warps + 3) * experts * 4}, params,
               nullptr);
  Planned planned;
  planned.tiles.assign(params.plan.tiles, params.plan.tiles + *params.plan.tile_count);
  int positions = 0;
  for (const auto& tile : planned.tiles) positions = std::max(positions, tile.first + tile.count);
  planned.row_of_position.assign(params.plan.row_of_position, params.plan.row_of_position + positions);
  planned.tickets.assign(params.counters, params.counters + 7);
  planned.wrong_row = params.error_rows[0];
  planned.missing_row = params.error_rows[1];
  return planned;
}

SIDA_TEST(rows_are_sorted_by_expert_and_keep_their_order) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 40; ++i) {
    const int experts = 1 + static_cast<int>(random() % 70);
    const int rows = 1 + static_cast<int>(random() % (i % 4 == 0 ? 2500 : 90));
    const int warps = 1 + static_cast<int>(random() % 32);
    const int block_t = 16 << random() % 4;
    std::vector<int32_t> index(static_cast<size_t>(rows)), slots(static_cast<size_t>(experts));
    for (auto& expert : index) expert = static_cast<int32_t>(random() % static_cast<uint64_t>(experts + 1)) - 1;
    for (int e = 0; e < experts; ++e) slots[static_cast<size_t>(e)] = random() % 5 == 0 ? -1 : experts - 1 - e;
    const Planned planned = plan(index, slots, block_t, warps, random());

    std::vector<int32_t> expected;
    std::vector<cuda::TokenTile> tiles;
    int32_t missing = none;
    for (int e = 0; e < experts; ++e) {
      const auto first = static_cast<int32_t>(expected.size());
      for (int row = 0; row < rows; ++row) {
        if (index[static_cast<size_t>(row)] != e) continue;
        if (slots[static_cast<size_t>(e)] < 0) {
          missing = std::min(missing, row);
        } else {
          expected.push_back(row);
        }
      }
      const auto end = static_cast<int32_t>(expected.size());
      for (int32_t done = first; done < end; done += block_t) {
        tiles.push_back({slots[static_cast<size_t>(e)], done, std::min(block_t, end - done), 0});
      }
    }
    CHECK(planned.row_of_position == expected);
    CHECK_EQ(planned.tiles.size(), tiles.size());
    for (size_t t = 0; t < std::min(tiles.size(), planned.tiles.size()); ++t) {
      CHECK(planned.tiles[t].slot == tiles[t].slot && planned.tiles[t].first == tiles[t].first &&
            planned.tiles[t].count == tiles[t].count);
    }
    CHECK_EQ(planned.wrong_row, none);
    CHECK_EQ(planned.missing_row, missing);
    CHECK(planned.tickets == std::vector<int32_t>(7, 0));
  }
}

SIDA_TEST(wrong_values_reach_the_error_words) {
  const Planned planned = plan({0, 1, 7, -2, 1, 0}, {0, -1}, 16, 2, 5);
  CHECK_EQ(planned.wrong_row, 2);
  CHECK_EQ(planned.missing_row, 1);
  CHECK(planned.row_of_position == std::vector<int32_t>({0, 5}));
  const Planned bad_slot = plan({1, 0}, {5, 1}, 16, 1, 5);
  CHECK_EQ(bad_slot.wrong_row, 1);
  CHECK(bad_slot.row_of_position == std::vector<int32_t>({0}));
}

SIDA_TEST(no_row_has_an_expert) {
  const Planned planned = plan({-1, -1, -1}, {0, 1}, 64, 1, 1);
  CHECK(planned.tiles.empty());
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
