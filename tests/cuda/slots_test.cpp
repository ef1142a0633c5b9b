// Tests of CudaSlots on the recording runtime: random programs of fills and readers, in every legal order.
#include "device/cuda_slots.h"

#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "cpp/check.h"
#include "recording_runtime.h"
#include "slots_program.h"

namespace sida::cuda_test {
namespace {

using cuda::CudaSlots;

SIDA_TEST(random_programs_are_right_in_every_order_tried) {
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    Program program;
    program.seed = seed;
    program.slots = 1 + static_cast<int>(seed % 4);
    program.lanes = 1 + static_cast<int>(seed % 3);
    program.streams = 1 + static_cast<int>(seed / 3 % 3);
    Recording recording(seed);
    Wanted wanted;
    record(recording, program, wanted);
    for (const std::string& problem : recording.problems()) {
      test::report(__FILE__, __LINE__, "seed " + std::to_string(seed) + ": " + problem);
    }
    for (uint64_t order = 0; order < 10; ++order) {
      recording.replay(order);
      if (!as_wanted(wanted)) {
        test::report(__FILE__, __LINE__, "seed " + std::to_string(seed) + ", order " + std::to_string(order));
      }
    }
  }
}

SIDA_TEST(small_programs_are_right_in_every_order) {
  size_t orders = 0, programs = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Program program;
    program.seed = seed;
    program.slots = 2;
    program.steps = 5;
    Recording recording(seed);
    Wanted wanted;
    record(recording, program, wanted);
    constexpr size_t most = 5000;
    const size_t own = recording.replay_all(most, [&] { CHECK(as_wanted(wanted)); });
    if (own < most) ++programs;  // all of them
    orders += own;
  }
  std::cout << orders << " orders; all of them for " << programs << " of 60 programs" << std::endl;
  CHECK(programs >= 30 && orders > 1000);
}

SIDA_TEST(at_most_three_calls_for_an_expert_and_one_wait_for_a_lane) {
  Recording recording(1);
  {
    constexpr int lanes = 2;
    CudaSlots slots(recording.table(), 0, 8, slot_bytes, lanes);
    const cuda::Stream stream = recording.user_stream();
    static uint8_t pinned[8][slot_bytes];
    const std::vector<int32_t> read{0, 1, 2, 3, 4, 5, 6, 7};
    const int layers = 5;
    for (int layer = 0; layer < layers; ++layer) {
      for (const int32_t slot : read) slots.fill(slot, slot % lanes, pinned[slot], slot_bytes);
      slots.before_read(stream, read);
      slots.after_read(stream, read);
    }
    const size_t experts = read.size() * layers;
    CHECK_EQ(recording.calls("copy_to_device"), experts);
    const size_t calls =
        recording.calls("copy_to_device") + recording.calls("stream_wait") + recording.calls("event_record");
    CHECK(calls <= 3 * experts + static_cast<size_t>(layers * (lanes + 1)));
    CHECK_EQ(recording.calls("event_synchronize"), 0u);
  }
  recording.finish();
  CHECK(recording.problems().empty());
}

// A stream that was destroyed while its kernels ran, and another one with its handle: the new one has waited for
// nothing, and is behind none of the old one's kernels.
SIDA_TEST(a_stream_with_the_handle_of_another_is_another) {
  Recording recording(1);
  {
    CudaSlots slots(recording.table(), 0, 1, slot_bytes, 1);
    const cuda::Stream stream = recording.user_stream();
    static uint8_t pinned[slot_bytes];
    const std::vector<int32_t> read{0};
    slots.fill(0, 0, pinned, slot_bytes);
    for (int kernel = 0; kernel < 2; ++kernel) {
      slots.before_read(stream, read);
      recording.kernel(stream, {{slots.slot(0), slot_bytes}}, {}, [] {});
      slots.after_read(stream, read);
      recording.make_anew(stream);
    }
    slots.fill(0, 0, pinned, slot_bytes);
    for (int other = 0; other < 200; ++other) {  // more than are remembered
      slots.before_read(stream, read);
      recording.kernel(stream, {{slots.slot(0), slot_bytes}}, {}, [] {});
      slots.after_read(stream, read);
      recording.make_anew(stream);
    }
  }
  recording.finish();
  for (const std::string& problem : recording.problems()) test::report(__FILE__, __LINE__, problem);
}

SIDA_TEST(memory_is_taken_and_given_back_by_the_page) {
  Recording recording(1);
  {
    // Three slots on two pages: the second slot lies on both.
    constexpr size_t bytes = Recording::page_bytes / 2 + 1024;
    static uint8_t pinned[bytes];
    CudaSlots slots(recording.table(), 0, 3, bytes, 1);
    CHECK_EQ(slots.memory_bytes(), 0);
    slots.fill(0, 0, pinned, bytes);
    CHECK_EQ(recording.calls("map_page"), 1u);
    slots.fill(1, 0, pinned, bytes);
    slots.fill(1, 0, pinned, bytes);
    CHECK_EQ(slots.memory_bytes(), static_cast<int64_t>(2 * Recording::page_bytes));
    slots.give_back(0, 1);
    CHECK_EQ(recording.calls("unmap_page"), 0u);
    slots.give_back(1, 2);
    CHECK_EQ(slots.memory_bytes(), 0);
    // A page that the device refuses: the error says what is there, and nothing of the slot stays.
    recording.fail("map_page", 2, 1, 1);
    CHECK_THROWS(slots.fill(1, 0, pinned, bytes), Error, "no memory for expert slot 1");
    CHECK_EQ(slots.memory_bytes(), 0);
    slots.fill(1, 0, pinned, bytes);
    slots.close();
  }
  recording.finish();
  CHECK(recording.problems().empty());
}

SIDA_TEST(wrong_use_is_refused) {
  Recording recording(1);
  {
    CHECK_THROWS(CudaSlots(recording.table(), 0, 0, slot_bytes, 1), Error, "at least one");
    CudaSlots slots(recording.table(), 0, 2, slot_bytes, 1);
    const cuda::Stream stream = recording.user_stream();
    uint8_t pinned[slot_bytes * 2];
    const std::vector<int32_t> first{0}, beyond{2};
    CHECK_THROWS(slots.before_read(stream, first), Error, "never filled");
    CHECK_THROWS(slots.before_read(stream, beyond), Error, "expected 0 to 1");
    CHECK_THROWS(slots.fill(2, 0, pinned, slot_bytes), Error, "slot 2");
    CHECK_THROWS(slots.fill(0, 1, pinned, slot_bytes), Error, "lane 1");
    CHECK_THROWS(slots.fill(0, 0, pinned, slot_bytes * 2), Error, "at most 64 bytes");
    slots.close();
    slots.close();
    CHECK_THROWS(slots.fill(0, 0, pinned, slot_bytes), Error, "after close()");
    CHECK_THROWS(slots.wait_source(0), Error, "after close()");
    CHECK_THROWS(slots.after_read(stream, first), Error, "after close()");
  }
  recording.finish();
  CHECK(recording.problems().empty());
}

// The recording itself notices what a careless caller does.
SIDA_TEST(the_recording_reports_misuse) {
  Recording recording(1);
  const cuda::RuntimeTable& runtime = recording.table();
  cuda::Event event = nullptr;
  runtime.event_create(&event, false);
  const cuda::Stream stream = recording.user_stream();
  runtime.stream_wait(stream, event);
  CHECK(recording.problems().back().find("never recorded") != std::string::npos);
  runtime.event_destroy(event);
  runtime.event_record(event, stream);
  CHECK(recording.problems().back().find("does not exist") != std::string::npos);
  void* memory = nullptr;
  runtime.reserve(&memory, Recording::page_bytes);
  runtime.copy_to_device(memory, &event, sizeof event, stream);
  CHECK(recording.problems().back().find("never taken") != std::string::npos);
  runtime.map_page(memory, Recording::page_bytes, 0);
  runtime.unreserve(memory, Recording::page_bytes);
  CHECK(recording.problems().back().find("never freed") != std::string::npos);
  recording.pinned_only = true;
  runtime.copy_to_device(memory, &event, sizeof event, stream);
  CHECK(recording.problems().back().find("not pinned") != std::string::npos);
  runtime.host_alloc(&memory, 16);
  recording.finish();
  CHECK(recording.problems().back().find("pinned memory was never freed") != std::string::npos);
}

}  // namespace
}  // namespace sida::cuda_test

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
