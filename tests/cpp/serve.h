// What a layer does with the engine, for tests: demands experts and checks the bytes of each wave before it releases
// it. And a gate before the reads, so that a test decides what has arrived instead of betting on a delay.
#pragma once

#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "device/host_device.h"
#include "experts/transfer.h"
#include "store_file.h"

namespace sida::test {

// Ends the demand however the test goes on.
struct Demanded {
  TransferEngine& engine;
  DemandId id;
  Demanded(TransferEngine& engine, int32_t layer, const std::vector<int32_t>& experts, BatchId batch = 0)
      : engine(engine), id(engine.demand(layer, experts, batch)) {}
  ~Demanded() { engine.finish(id); }
  Demanded(const Demanded&) = delete;
  Demanded& operator=(const Demanded&) = delete;
};

inline const void* slot_of(const TransferEngine& engine, int32_t slot) {
  return static_cast<const char*>(engine.slot_base()) + slot * engine.format().record_bytes();
}

// Number of waves. Fails the test if an expert comes twice, not at all, or with another's bytes.
inline int serve(TransferEngine& engine, const StoreFile& file, int32_t layer, const std::vector<int32_t>& experts,
                 BatchId batch = 0) {
  const Demanded demand(engine, layer, experts, batch);
  std::set<int32_t> left(experts.begin(), experts.end());
  int waves = 0;
  while (true) {
    const Wave wave = engine.next_wave(demand.id);
    if (wave.experts.empty()) break;
    ++waves;
    for (size_t i = 0; i < wave.experts.size(); ++i) {
      CHECK_EQ(left.erase(wave.experts[i]), 1u);
      CHECK(file.holds(slot_of(engine, wave.slots[i]), {layer, wave.experts[i]}));
    }
    engine.release(demand.id, wave);
  }
  CHECK(left.empty());
  return waves;
}

inline std::vector<int32_t> range(int32_t begin, int32_t end) {
  std::vector<int32_t> all;
  for (int32_t i = begin; i < end; ++i) all.push_back(i);
  return all;
}

inline LayerCounters total(const EngineStats& stats) {
  LayerCounters sum;
  for (const LayerCounters& layer : stats.layers) {
    for_each_counter(layer_counters, [&](const auto& counter) { sum.*counter.member += layer.*counter.member; });
  }
  return sum;
}

// Waits until `holds` is true; false after 20 s.
template <class Condition>
bool eventually(const Condition& holds) {
  for (int i = 0; i < 20'000; ++i) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// Reads the records of a store, but no more of them than it was told to let through, and none that is held.
class Gate final : public RecordSource {
 public:
  explicit Gate(const StoreFile& file) : store_(file.open()) {}

  void read(int64_t record, void* into) override {
    {
      std::unique_lock lock(mutex_);
      ++begun_;
      changed_.wait(lock, [&] { return interrupted_ || (allowed_ > 0 && held_.count(record) == 0); });
      if (interrupted_) fail(ErrorKind::closed, "interrupted before the gate");
      --allowed_;
    }
    const int32_t experts = store_->layout().experts;
    store_->read({static_cast<int32_t>(record / experts), static_cast<int32_t>(record % experts)}, into);
  }
  void interrupt() override {
    change([&] { interrupted_ = true; });
  }
  void let(int64_t reads) {
    change([&] { allowed_ += reads; });
  }
  void open() {
    change([&] { allowed_ = std::numeric_limits<int64_t>::max(); });
  }
  void hold(int64_t record) {
    change([&] { held_.insert(record); });
  }
  void let_go(int64_t record) {
    change([&] { held_.erase(record); });
  }
  int64_t begun() const {
    const std::lock_guard lock(mutex_);
    return begun_;
  }

 private:
  template <class Change>
  void change(const Change& make) {
    {
      const std::lock_guard lock(mutex_);
      make();
    }
    changed_.notify_all();
  }

  const std::shared_ptr<ExpertStore> store_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int64_t allowed_ = 0, begun_ = 0;
  std::set<int64_t> held_;
  bool interrupted_ = false;
};

// An engine whose reads wait at a gate.
struct GatedEngine {
  const std::shared_ptr<Gate> gate;
  TransferEngine engine;
  GatedEngine(const StoreFile& file, const EngineOptions& options)
      : gate(std::make_shared<Gate>(file)),
        engine(file.open(),
               std::make_shared<HostDevice>(gate, int64_t{file.layout().layers} * file.layout().experts,
                                            file.layout().format.record_bytes()),
               options) {}
};

// The next wave of an engine whose deadline is short: waits on when it passes.
inline Wave patient_wave(TransferEngine& engine, DemandId demand) {
  for (int tries = 0; tries < 1000; ++tries) {
    try {
      return engine.next_wave(demand);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::timeout) throw;
    }
  }
  return engine.next_wave(demand);
}

}  // namespace sida::test
