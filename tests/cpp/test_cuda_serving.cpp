// The two-tier engine of a GPU machine over a recording runtime that executes copies at once: bytes from the store
// reach the device's slots, budgets hold in both tiers, failures of the runtime come out where they belong. The kernels
// are left out here (tests/cuda/serving_test.cpp has them), so that this runs under sanitizers too.
#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_machine.h"

namespace sida::test {
namespace {

SIDA_TEST(records_reach_the_device_from_the_store) {
  for (const int64_t host_slots : {1, 5, all}) {
    Machine machine;
    auto serving = machine.serve(options(3, host_slots));
    for (int pass = 0; pass < 2; ++pass) {
      for (int32_t layer = 0; layer < layers; ++layer) forward(machine, *serving, layer, {0, 2, 3, 5, 7});
    }
    const int64_t record = serving->engine().format().record_bytes();
    CHECK(serving->memory_bytes() <= 3 * record);  // 16 KiB records on pages of 4 KiB: exact
    CHECK(serving->pinned_bytes() <= host_slots * record + (2 << 20));
    CHECK(serving->pinned_bytes() >= host_slots * record);
    CHECK_EQ(static_cast<int64_t>(machine.recording.pinned_bytes()), serving->pinned_bytes());
    CHECK(serving->pin_obstacle().empty());
    CHECK_EQ(serving->engine().stats().peak_slots, 3);
    CHECK(serving->pool().stats().peak_slots <= host_slots);
    // A pool that holds everything reads each record once.
    if (host_slots == all) CHECK_EQ(total(serving->pool().stats()).loads, 15);
    serving->close();
    serving->close();
    CHECK_THROWS(forward(machine, *serving, 0, {1}), Error, "closed");
    serving.reset();
    machine.finish();
  }
}

SIDA_TEST(announced_batches_are_brought_in_through_both_tiers) {
  Machine machine;
  auto serving = machine.serve(options(all, all));
  AnnouncedBatch batch;
  for (int32_t layer = 0; layer < layers; ++layer) batch.layers.push_back({layer, {1, 4, 6}});
  const BatchId number = serving->announce(batch);
  CHECK(eventually([&] { return total(serving->engine().stats()).loads == 9; }));
  for (int32_t layer = 0; layer < layers; ++layer) forward(machine, *serving, layer, {1, 4, 6}, number);
  serving->retire(number);
  CHECK_EQ(total(serving->engine().stats()).hits, 9);
  CHECK_EQ(total(serving->engine().stats()).useful_prefetches, 9);
  serving.reset();
  machine.finish();
}

SIDA_TEST(a_budget_shrinks_and_grows_and_gives_memory_back) {
  Machine machine;
  auto serving = machine.serve(options(8, all));
  const int64_t record = serving->engine().format().record_bytes();
  forward(machine, *serving, 0, range(0, 8));
  CHECK_EQ(serving->memory_bytes(), 8 * record);
  serving->engine().set_budget(2);
  CHECK(eventually([&] { return serving->memory_bytes() == 2 * record; }));
  forward(machine, *serving, 1, range(0, 8));
  CHECK(serving->memory_bytes() <= 2 * record);
  serving->engine().set_budget(6);
  forward(machine, *serving, 2, range(0, 8));
  CHECK(serving->memory_bytes() <= 6 * record);
  serving.reset();
  machine.finish();
}

SIDA_TEST(several_threads_compute_on_streams_of_their_own) {
  Machine machine;
  ServingOptions chosen = options(9, 10);
  chosen.lanes = 3;
  auto serving = machine.serve(chosen);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i, stream = machine.recording.user_stream()] {
      std::mt19937_64 random(static_cast<uint64_t>(i));
      for (int step = 0; step < 12; ++step) {
        const auto first = static_cast<int32_t>(random() % 6);
        const std::vector<int32_t> wanted = range(first, first + 1 + static_cast<int32_t>(random() % 3));
        forward(machine, *serving, static_cast<int32_t>(random() % layers), wanted, 0, stream);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  serving.reset();
  machine.finish();
}

SIDA_TEST(memory_that_cannot_be_pinned_is_named) {
  Machine machine;
  machine.recording.fail("host_register", 2);
  CHECK_THROWS(machine.serve(options(2, 4)), Error, "cannot pin 65536 bytes of host memory, 4 experts of 16384 bytes");
  machine.recording.fail("host_register", 2);
  CHECK_THROWS(machine.serve(options(2, 4)), Error, "locked memory (ulimit -l) is ");
  machine.recording.fail("host_register", 2);
  CHECK_THROWS(machine.serve(options(2, 4)), Error, "pin='try'");
  machine.recording.fail("host_register", 2);
  ServingOptions chosen = options(2, 4);
  chosen.pin = Pin::attempt;
  machine.recording.pinned_only = false;
  auto serving = machine.serve(chosen);
  CHECK_EQ(serving->pinned_bytes(), 0);
  CHECK(serving->pin_obstacle().find("locked memory (ulimit -l) is ") != std::string::npos);
  forward(machine, *serving, 1, {0, 1, 2});
  serving.reset();
  machine.finish();
}

SIDA_TEST(a_machine_without_a_device_says_so) {
  Machine machine;
  machine.recording.fail("device_count", 35);
  CHECK_THROWS(machine.serve(options(2, 4)), Error, "CUDA cannot be used on this machine: ");
  ServingOptions chosen = options(2, 4);
  chosen.device = 1;
  CHECK_THROWS(machine.serve(chosen), Error, "device is cuda:1, but CUDA finds 1 devices");
  machine.recording.compute_capability = 75;
  CHECK_THROWS(machine.serve(options(2, 4)), Error, "compute capability 7.5, expected 8.0 or later");
  machine.recording.compute_capability = 90;
  CHECK_THROWS(machine.serve(options(0, 4)), Error, "expert_memory is 0 experts, expected 1 to 24");
  CHECK_THROWS(machine.serve(options(1, 25)), Error, "host_memory is 25 experts");
  machine.finish();
}

SIDA_TEST(memory_that_runs_out_fails_the_demand_and_nothing_else) {
  Machine machine;
  auto serving = machine.serve(options(4, all));
  forward(machine, *serving, 0, {0});
  machine.recording.fail("map_page", 2);
  CHECK_THROWS(forward(machine, *serving, 0, {1}), Error, "no memory for expert slot");
  forward(machine, *serving, 0, {1});
  serving.reset();
  machine.finish();
}

SIDA_TEST(a_damaged_record_fails_the_demand_in_the_caller) {
  Machine machine;
  machine.file.flip_bit(machine.file.offset_of({1, 3}) + 100);
  auto serving = machine.serve(options(4, all));
  CHECK_THROWS(forward(machine, *serving, 1, {3}), Error, "encoder.block.1 expert 3");
  forward(machine, *serving, 1, {2, 4});
  serving.reset();
  machine.finish();
}

// What a copy fails of after it was queued belongs to no demand: the next call raises it.
SIDA_TEST(a_failure_of_the_device_is_raised_by_a_later_call) {
  Machine machine;
  auto serving = machine.serve(options(4, all));
  machine.recording.fail("event_synchronize", 700, 1);
  CHECK(eventually([&] {
    try {
      forward(machine, *serving, 0, {0, 1, 2});
    } catch (const Error& error) {
      return std::string(error.what()).find("a copy failed") != std::string::npos;
    }
    return false;
  }));
  CHECK_THROWS(forward(machine, *serving, 1, {0}), Error, "a copy failed");
  serving.reset();
  machine.finish();
}

// The call's own kernels cannot be ordered behind: the caller is told, the slot is not given to another expert
// meanwhile.
SIDA_TEST(an_event_that_cannot_be_recorded_is_raised_by_its_call) {
  Machine machine;
  auto serving = machine.serve(options(1, all));
  forward(machine, *serving, 0, {0});
  machine.recording.fail("event_record", 700, 1);
  CHECK_THROWS(forward(machine, *serving, 0, {0}), Error, "recording the readers failed");
  forward(machine, *serving, 0, {1});  // evicts: its copy waits for the kernels of both calls
  serving.reset();
  machine.finish();
}

// If that fails twice, no order is to be had: nothing is computed any more, and what the kernels use stays.
SIDA_TEST(kernels_that_cannot_be_ordered_end_the_engine) {
  Machine machine;
  auto serving = machine.serve(options(1, all));
  forward(machine, *serving, 0, {0});
  machine.recording.fail("event_record", 700, 2);
  CHECK_THROWS(forward(machine, *serving, 0, {0}), Error, "recording the readers failed");
  CHECK_THROWS(forward(machine, *serving, 0, {0}), Error, "recording the readers failed");
  serving.reset();
  machine.recording.finish();
  // The slot's memory, its addresses and the buffer of slot numbers: left behind, not pulled away.
  for (const std::string& problem : machine.recording.problems()) {
    CHECK(problem.find("never freed") != std::string::npos || problem.find("never given back") != std::string::npos);
  }
  CHECK(!machine.recording.problems().empty());
}

// With `blocking` a failure of the device comes out of the call that it belongs to.
SIDA_TEST(a_blocking_engine_raises_failures_where_they_arise) {
  Machine machine;
  ServingOptions chosen = options(4, all);
  chosen.blocking = true;
  auto serving = machine.serve(chosen);
  forward(machine, *serving, 1, {2});
  forward(machine, *serving, 1, {3});
  CHECK(eventually([&] { return machine.recording.calls("event_synchronize") == 4; }));  // two calls' and two copies'
  machine.recording.fail("event_synchronize", 700, 1);
  CHECK_THROWS(forward(machine, *serving, 1, {2, 3}), Error, "the kernels of encoder.block.1 expert 2 and 1 other");
  forward(machine, *serving, 1, {2, 3});
  serving.reset();
  machine.finish();
}

SIDA_TEST(a_failed_copy_is_named_by_its_expert) {
  Machine machine;
  auto serving = machine.serve(options(4, all));
  machine.recording.fail("event_synchronize", 700, 1);
  std::string said;  // by the call that wanted the copy or, if it was through by then, by a later one
  CHECK(eventually([&] {
    try {
      forward(machine, *serving, 2, {5});
    } catch (const Error& error) {
      said = error.what();
    }
    return !said.empty();
  }));
  CHECK(said.find("encoder.block.2 expert 5: ") != std::string::npos);
  serving.reset();
  machine.finish();
}

// Indices that lie on the host, and every expert in a slot: the caller waits for nothing and the lanes have no work.
SIDA_TEST(a_layer_with_all_its_experts_resident_waits_for_nothing) {
  Machine machine;
  auto serving = machine.serve(options(all, all));
  const auto pass = [&] {
    for (int32_t layer = 0; layer < layers; ++layer) forward(machine, *serving, layer, range(0, experts));
  };
  pass();
  CHECK(eventually([&] { return machine.recording.calls("event_synchronize") == all; }));
  std::map<std::string, size_t> before;
  const std::vector<std::string> calls = {"event_synchronize", "event_create", "host_alloc", "map_page", "stream_wait"};
  for (const std::string& call : calls) before[call] = machine.recording.calls(call);
  const size_t recorded = machine.recording.calls("event_record"), asked = machine.recording.calls("event_query");
  constexpr int passes = 5;
  for (int i = 0; i < passes; ++i) pass();
  CHECK_EQ(machine.recording.calls("event_synchronize"), before["event_synchronize"]);
  CHECK_EQ(machine.recording.calls("map_page"), before["map_page"]);
  CHECK_EQ(machine.recording.calls("stream_wait"), before["stream_wait"]);  // the stream has waited for those copies
  CHECK_EQ(machine.recording.calls("event_record"), recorded + passes * layers);
  CHECK(machine.recording.calls("event_query") <= asked + passes * layers);  // is a buffer free again? never waits
  // A buffer and an event more for each layer whose answer was no.
  CHECK(machine.recording.calls("event_create") <= before["event_create"] + passes * layers);
  CHECK(machine.recording.calls("host_alloc") <= before["host_alloc"] + passes * layers);
  serving.reset();
  machine.finish();
}

// A layer cannot be captured, and asks for nothing more than whether it would be.
SIDA_TEST(capture_into_a_graph_is_refused) {
  Machine machine;
  auto serving = machine.serve(options(4, all));
  forward(machine, *serving, 0, {1});
  machine.recording.begin_capture(machine.stream);
  CHECK_THROWS(forward(machine, *serving, 0, {0}), Error, "captured into a CUDA graph");
  const std::vector<int32_t> indices{0, 1};
  CHECK_THROWS(serving->fetch_indices(indices.data(), 2, machine.stream), Error, "captured into a CUDA graph");
  machine.recording.end_capture();
  forward(machine, *serving, 0, {0});
  serving.reset();
  machine.finish();
}

SIDA_TEST(lanes_leave_another_threads_capture_alone) {
  CHECK(problems_of_lanes_during_a_capture().empty());
}

// A forward in the middle of a wait ends with close(), and nothing is left.
SIDA_TEST(closing_ends_waits) {
  Machine machine;
  ServingOptions chosen = options(4, all);
  chosen.faults.delay_us_min = chosen.faults.delay_us_max = 60'000'000;
  auto serving = machine.serve(chosen);
  std::string said;
  std::thread waiting([&] {
    try {
      forward(machine, *serving, 0, {0});
    } catch (const Error& error) {
      said = error.what();
    }
  });
  CHECK(eventually([&] { return total(serving->pool().stats()).requested == 1; }));
  serving->close();
  waiting.join();
  CHECK(!said.empty());
  serving.reset();
  machine.finish();
}

}  // namespace
}  // namespace sida::test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
