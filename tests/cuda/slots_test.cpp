// Tests of CudaSlots on the recording runtime: random programs of fills and readers, every legal order, planted bugs.
#include "device/cuda_slots.h"

#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "cpp/check.h"
#include "recording_runtime.h"

namespace sida::cuda_test {
namespace {

using cuda::CudaSlots;
using cuda::SlotPlant;

constexpr size_t slot_bytes = 64;

struct Program {
  int slots = 3, lanes = 2, streams = 2, steps = 60;
  uint64_t seed = 1;
};

// What a recorded program wanted: the value that each kernel must have seen in each slot it read.
struct Wanted {
  std::vector<std::unique_ptr<std::vector<uint8_t>>> seen;  // one buffer for each kernel, slot by slot
  std::vector<std::vector<uint8_t>> expected;
};

// Records a random program as a transfer engine makes it: sources in a few pinned buffers that are filled again once
// they are free, slots filled and read by kernels on the caller's streams, also read twice, by both streams, or not at
// all.
void record(Recording& recording, const Program& program, Wanted& wanted) {
  std::mt19937_64 random(program.seed);
  CudaSlots slots(recording.table(), 0, program.slots, slot_bytes, program.lanes);
  std::vector<cuda::Stream> streams;
  for (int i = 0; i < program.streams; ++i) streams.push_back(recording.user_stream());
  static uint8_t pinned[16][slot_bytes];
  constexpr int unused = -1, retired = -2;
  std::vector<int> busy(16, unused);  // the slot whose copy reads this buffer
  std::vector<int> value(static_cast<size_t>(program.slots), -1);
  uint8_t next = 1;
  for (int step = 0; step < program.steps; ++step) {
    if (random() % 16 == 0) {
      const auto slot = static_cast<int32_t>(random() % static_cast<uint64_t>(program.slots));
      slots.give_back(slot, 1);
      value[static_cast<size_t>(slot)] = -1;
      // The copies into the slot are over, and so are those into its earlier contents.
      for (int& other : busy) {
        if (other == slot) other = CudaSlots::planted == SlotPlant::none ? unused : retired;
      }
    } else if (random() % 2 == 0) {
      const auto buffer = random() % busy.size();
      if (busy[buffer] == retired || (busy[buffer] >= 0 && !slots.source_free(busy[buffer]))) continue;
      const auto slot = static_cast<int32_t>(random() % static_cast<uint64_t>(program.slots));
      // Once the slot is filled again, nobody can tell whether its older source is free: such a buffer is not used
      // again.
      for (int& other : busy) {
        if (other == slot) other = random() % 2 == 0 && slots.source_free(slot) ? unused : retired;
      }
      recording.host_write(pinned[buffer], next, slot_bytes);
      slots.fill(slot, static_cast<int>(random() % static_cast<uint64_t>(program.lanes)), pinned[buffer], slot_bytes);
      busy[buffer] = slot;
      value[static_cast<size_t>(slot)] = next++;
    } else {
      std::vector<int32_t> read;
      for (int32_t slot = 0; slot < program.slots; ++slot) {
        if (value[static_cast<size_t>(slot)] >= 0 && random() % 2 == 0) read.push_back(slot);
      }
      if (read.empty()) continue;
      const cuda::Stream stream = streams[random() % streams.size()];
      wanted.seen.push_back(std::make_unique<std::vector<uint8_t>>(read.size() * slot_bytes));
      wanted.expected.emplace_back();
      std::vector<Range> reads;
      std::vector<const void*> from;
      for (const int32_t slot : read) {
        reads.push_back({slots.slot(slot), slot_bytes});
        from.push_back(slots.slot(slot));
        wanted.expected.back().insert(wanted.expected.back().end(), slot_bytes,
                                      static_cast<uint8_t>(value[static_cast<size_t>(slot)]));
      }
      uint8_t* const into = wanted.seen.back()->data();
      slots.before_read(stream, read);
      recording.kernel(stream, reads, {{into, read.size() * slot_bytes}}, [=] {
        for (size_t i = 0; i < from.size(); ++i) std::memcpy(into + i * slot_bytes, from[i], slot_bytes);
      });
      slots.after_read(stream, read);
    }
  }
  slots.close();
  recording.finish();
}

bool as_wanted(const Wanted& wanted) {
  for (size_t i = 0; i < wanted.seen.size(); ++i) {
    if (*wanted.seen[i] != wanted.expected[i]) return false;
  }
  return true;
}

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

// How a planted bug shows: a problem that the recording names, or a wrong value in some order.
std::string how_caught(SlotPlant plant) {
  std::string caught;
  for (uint64_t seed = 1; seed <= 20 && caught.empty(); ++seed) {
    Recording recording(seed);
    Wanted wanted;
    Program program;
    program.seed = seed;
    CudaSlots::planted = plant;
    record(recording, program, wanted);
    CudaSlots::planted = SlotPlant::none;
    if (!recording.problems().empty()) caught = recording.problems().front();
  }
  return caught;
}

struct Planted {
  SlotPlant plant;
  const char* name;
  const char* expected;  // part of the message
};

SIDA_TEST(every_planted_bug_is_caught) {
  const std::vector<Planted> all = {
      {SlotPlant::no_copy_wait, "no_copy_wait", "kernel"},
      {SlotPlant::no_reader_wait, "no_reader_wait", "copy"},
      {SlotPlant::newest_reader_only, "newest_reader_only", "is not ordered after kernel"},
      {SlotPlant::filled_too_early, "filled_too_early", "is not ordered after copy"},
      {SlotPlant::wrong_lane, "wrong_lane", "is not ordered after copy"},
      {SlotPlant::default_stream, "default_stream", "default stream"},
      {SlotPlant::no_refill_wait, "no_refill_wait", "copy"},
      {SlotPlant::stale_wait, "stale_wait", "kernel"},
      {SlotPlant::one_lane_waited, "one_lane_waited", "kernel"},
      {SlotPlant::oldest_of_lane, "oldest_of_lane", "is not ordered after copy"},
      {SlotPlant::given_back_early, "given_back_early", "is not ordered after"},
      {SlotPlant::page_given_back, "page_given_back", "given back, or never taken"},
      {SlotPlant::event_reused, "event_reused", "is not ordered after kernel"},
      {SlotPlant::freed_too_soon, "freed_too_soon", "free"},
      {SlotPlant::event_leaked, "event_leaked", "an event was never destroyed"},
      {SlotPlant::source_too_early, "source_too_early", "host write"},
  };
  for (const Planted& planted : all) {
    const std::string caught = how_caught(planted.plant);
    std::cout << planted.name << ": " << caught << std::endl;
    if (caught.find(planted.expected) == std::string::npos) {
      test::report(__FILE__, __LINE__,
                   std::string(planted.name) + " gave '" + caught + "', expected " + planted.expected);
    }
  }
}

// A hazard is not only named: some order of the replay gives a wrong value.
SIDA_TEST(a_hazard_gives_wrong_values_in_some_order) {
  for (const SlotPlant plant : {SlotPlant::no_copy_wait, SlotPlant::no_reader_wait}) {
    bool wrong = false;
    for (uint64_t seed = 1; seed <= 10 && !wrong; ++seed) {
      Recording recording(seed);
      Wanted wanted;
      Program program;
      program.seed = seed;
      CudaSlots::planted = plant;
      record(recording, program, wanted);
      CudaSlots::planted = SlotPlant::none;
      for (uint64_t order = 0; order < 20 && !wrong; ++order) {
        recording.replay(order);
        wrong = !as_wanted(wanted);
      }
    }
    CHECK(wrong);
  }
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
    CHECK_THROWS(slots.source_free(0), Error, "after close()");
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
