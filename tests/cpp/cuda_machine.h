// The two tiers of a GPU machine over a recording runtime that executes copies at once, and a layer whose kernel looks
// whether each expert's bytes are in its slot.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../cuda/recording_runtime.h"
#include "check.h"
#include "serve.h"
#include "serving/cuda_serving.h"
#include "store_file.h"

namespace sida::test {

using cuda::CudaServing;
using cuda::Pin;
using cuda::ServingOptions;
using cuda_test::Recording;

inline constexpr int32_t layers = 3, experts = 8, all = layers * experts;

inline ServingOptions options(int64_t slots, int64_t host_slots) {
  ServingOptions chosen{};
  chosen.slots = slots;
  chosen.host_slots = host_slots;
  return chosen;
}

struct Machine {
  Recording recording{1};
  StoreFile file{layers, experts};
  cuda::Stream stream = nullptr;
  std::vector<int32_t> table = std::vector<int32_t>(experts);  // "device" memory
  Machine() {
    recording.eager = true;
    recording.replayed = false;
    recording.pinned_only = true;
    stream = recording.user_stream();
  }
  std::unique_ptr<CudaServing> serve(const ServingOptions& chosen) {
    return std::make_unique<CudaServing>(recording.table(), file.open(), chosen);
  }
  // Everything given back, nothing unordered.
  void finish() {
    recording.finish();
    for (const std::string& problem : recording.problems()) report(__FILE__, __LINE__, problem);
  }
};

// A layer whose kernel looks whether each expert's bytes are in its slot.
inline void forward(Machine& machine, CudaServing& serving, int32_t layer, const std::vector<int32_t>& wanted,
                    BatchId batch = 0, cuda::Stream stream = nullptr) {
  cuda::LayerForward call{};
  call.layer = layer;
  call.batch = batch;
  call.stream = stream != nullptr ? stream : machine.stream;
  call.args.num_experts = experts;
  call.args.d_model = serving.engine().format().d_model;
  std::vector<int32_t> table(experts);
  call.slot_table = table.data();
  call.experts = wanted;
  std::set<int32_t> seen;
  serving.forward(call, [&](const MoeFfnArgs& args, cuda::Stream on) {
    const auto bytes = static_cast<size_t>(serving.engine().format().record_bytes());
    std::vector<cuda_test::Range> reads{{table.data(), table.size() * 4}};
    for (int32_t expert = 0; expert < experts; ++expert) {
      if (table[expert] < 0) continue;
      const auto* const record = static_cast<const char*>(args.wi.data) + table[expert] * static_cast<int64_t>(bytes);
      reads.push_back({record, bytes});
      CHECK(machine.file.holds(record, {layer, expert}));
      CHECK(seen.insert(expert).second);
    }
    machine.recording.kernel(on, reads, {}, [] {});
  });
  CHECK(seen == std::set<int32_t>(wanted.begin(), wanted.end()));
}

// While a thread captures parts of the model, the lanes go on: they take memory, wait for copies, make events.
inline std::vector<std::string> problems_of_lanes_during_a_capture() {
  Machine machine;
  auto serving = machine.serve(options(8, all));
  forward(machine, *serving, 0, range(0, 4));
  CHECK(eventually([&] { return machine.recording.calls("event_synchronize") == 4; }));
  const cuda::Stream captured = machine.recording.user_stream();
  machine.recording.begin_capture(captured);
  AnnouncedBatch batch;
  batch.layers.push_back({1, range(0, 4)});
  const BatchId number = serving->announce(batch);
  CHECK(eventually([&] { return machine.recording.calls("event_synchronize") == 8; }));
  machine.recording.end_capture();
  forward(machine, *serving, 1, range(0, 4), number);
  serving->retire(number);
  serving.reset();
  return machine.recording.problems();
}

}  // namespace sida::test
