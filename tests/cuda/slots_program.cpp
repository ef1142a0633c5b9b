#include "slots_program.h"

#include <cstring>
#include <random>

#include "device/cuda_slots.h"

namespace sida::cuda_test {

void record(Recording& recording, const Program& program, Wanted& wanted) {
  std::mt19937_64 random(program.seed);
  cuda::CudaSlots slots(recording.table(), 0, program.slots, slot_bytes, program.lanes);
  std::vector<cuda::Stream> streams;
  for (int i = 0; i < program.streams; ++i) streams.push_back(recording.user_stream());
  static uint8_t pinned[16][slot_bytes];
  constexpr int unused = -1, retired = -2;
  std::vector<int> busy(16, unused);  // the slot whose copy reads this buffer
  std::vector<int> value(static_cast<size_t>(program.slots), -1);
  const auto any_slot = [&] { return static_cast<int32_t>(random() % static_cast<uint64_t>(program.slots)); };
  uint8_t next = 1;
  for (int step = 0; step < program.steps; ++step) {
    if (random() % 32 == 0) {
      recording.make_anew(streams[random() % streams.size()]);
    } else if (random() % 16 == 0) {
      const int32_t slot = any_slot();
      slots.give_back(slot, 1);
      value[static_cast<size_t>(slot)] = -1;
      // The copies into the slot are over, and so are those into its earlier contents.
      for (int& other : busy) {
        if (other == slot) other = program.reuse_given_back ? unused : retired;
      }
    } else if (random() % 2 == 0) {
      const auto buffer = random() % busy.size();
      if (busy[buffer] == retired || (busy[buffer] >= 0 && random() % 2 == 0)) continue;
      if (busy[buffer] >= 0) slots.wait_source(busy[buffer]);
      const int32_t slot = any_slot();
      // Once the slot is filled again, nobody can tell whether its older source is free: such a buffer is not used
      // again.
      for (int& other : busy) {
        if (other != slot) continue;
        const bool waited = random() % 4 == 0;
        if (waited) slots.wait_source(slot);
        other = waited ? unused : retired;
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

}  // namespace sida::cuda_test
