// The model of serving_case.h under many budgets and schedules. The result must be, bit for bit, that of the same
// kernels with every expert in a slot of its own, and within the stated bound of the CPU's.
#include "serving_case.h"

#include <algorithm>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "harness/harness.h"

namespace sida::cuda_test {
namespace {

std::string described(const Setting& setting) {
  return std::to_string(setting.slots) + " slots, pool of " + std::to_string(setting.host_slots) + ", " +
         std::to_string(setting.lanes) + " lanes, " + std::to_string(setting.streams) + " streams, " +
         setting.eviction + ", seed " + std::to_string(setting.seed);
}

Setting random_setting(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto up_to = [&](int most) { return 1 + static_cast<int>(random() % static_cast<uint64_t>(most)); };
  Setting setting;
  setting.slots = up_to(6);
  setting.host_slots = random() % 2 == 0 ? 15 : up_to(15);
  setting.lanes = up_to(3);
  setting.host_lanes = up_to(3);
  setting.streams = up_to(2);
  setting.announced = random() % 2 == 0;
  setting.resized = random() % 3 == 0;
  setting.eviction = std::vector<std::string>{"fifo", "lru", "lfu", "next_use"}[random() % 4];
  setting.seed = seed;
  return setting;
}

SIDA_TEST(every_budget_and_schedule_gives_the_same_bits) {
  for (const DType dtype : {DType::bf16, DType::i8, DType::int4, DType::mxfp4}) {
    const Model model(7, dtype);
    const std::vector<unsigned char> expected = reference(model);
    CHECK(std::count(expected.begin(), expected.end(), 0) < static_cast<long>(expected.size() / 8));
    for (uint64_t seed = 1; seed <= (is_grouped(dtype) ? 6 : 16); ++seed) {
      const Setting setting = random_setting(seed);
      harness::global_reset();
      Recording recording(seed, harness_memory());
      prepare(recording);
      Forward forward(recording, model, setting);
      const Served served = forward.run();
      for (const std::string& problem : recording.problems()) {
        test::report(__FILE__, __LINE__, described(setting) + ": " + problem);
      }
      if (!same(served, expected)) test::report(__FILE__, __LINE__, described(setting) + ": other bits");
      if (seed == 1) {
        const auto* input = model.x.data();
        for (int layer = 0; layer < model.layers; ++layer) {
          const auto* const out = reinterpret_cast<const uint16_t*>(served.outs[0][static_cast<size_t>(layer)]);
          check_layer(model, layer, input, out);
          input = out;
        }
      }
      for (uint64_t order = 1; order <= 2; ++order) {
        recording.replay(order);
        if (!same(served, expected)) test::report(__FILE__, __LINE__, described(setting) + ": other bits in a replay");
      }
    }
  }
}

SIDA_TEST(calls_are_counted_in_the_steady_state) {
  const Model model(7, DType::bf16);
  for (const int64_t slots : {2, 5}) {
    Setting setting;
    setting.slots = slots;
    setting.passes = 4;
    harness::global_reset();
    Recording recording(1, harness_memory());
    prepare(recording);
    Forward forward(recording, model, setting);
    const Served served = forward.run();
    // For an expert: its readers' event, copy, event, and the lane's wait for an older copy. For a wave: slot numbers,
    // one look at their buffer, one wait for each lane, one event, and the stream's number, twice. For a layer: the
    // indices' copy, event and wait, a look at their buffer, and the choice of device and the question about capture,
    // twice each. Besides, what the lanes still had under way when the counting began.
    const auto lanes = static_cast<size_t>(setting.lanes);
    const size_t most = 4 * served.loads + (5 + lanes) * served.waves + 8 * served.layers + 2 * lanes;
    const size_t steady = served.calls - served.buffers;
    std::cout << slots << " slots: " << steady << " calls for " << served.loads << " experts loaded, " << served.waves
              << " waves, " << served.layers << " layers; at most " << most << "; " << served.buffers
              << " more to make buffers and events" << std::endl;
    CHECK(served.loads > 20);
    CHECK(steady <= most);
    // Nothing is waited for but a layer's indices, by its caller, and older copies, by the lanes. Functions that wait
    // for a stream or a device are not even in the table.
    CHECK(served.synchronisations <= served.layers + served.loads + 2 * lanes);
  }
}

// Where waves are under way for as long as that takes, a bounded number of buffers and events serves them.
SIDA_TEST(buffers_and_events_are_bounded_however_long_it_runs) {
  const Model model(7, DType::bf16);
  const std::vector<unsigned char> expected = reference(model);
  Setting setting;
  setting.slots = 2;
  setting.passes = 6;
  setting.most_staging = 4;
  harness::global_reset();
  Recording recording(1, harness_memory());
  prepare(recording);
  Forward forward(recording, model, setting);
  const Served served = forward.run();
  CHECK(same(served, expected));
  CHECK(recording.problems().empty());
  // A buffer has an event; the events behind waves are held by buffers and by the slots, one for each stream.
  const size_t most = static_cast<size_t>(3 * setting.most_staging) +
                      static_cast<size_t>(setting.slots) * static_cast<size_t>(setting.streams) + 1;
  CHECK(served.waves > 2 * most);
  CHECK(served.buffers <= most);
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
