// TransferEngine: runs a Residency's commands on a Device. The one object through which the rest of the program reaches
// expert memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "experts/expert.h"
#include "experts/faults.h"
#include "experts/residency.h"
#include "experts/stats.h"
#include "experts/store.h"
#include "experts/trace.h"

namespace sida {

struct EngineOptions {
  int64_t slots;                                    // the budget, in records
  int lanes = 4;                                    // copies under way at once
  std::string eviction = "next_use";                // fifo, lru, lfu, next_use
  std::chrono::milliseconds wait_deadline{60'000};  // no wait is longer; passing it raises timeout with the reason
  Faults faults{};                                  // for tests
  // Largest single read, a multiple of 4096; 0: a record at once. A direct read pins all its pages before the first
  // byte moves, so that a few lanes keep a disk busier with parts of a record.
  int64_t read_bytes = 4 << 20;
  int prefetch_layers = 1;  // announced layers ahead whose prefetches begin as early as they can
  // The budget's memory is asked of the system at the start, by lanes with nothing else to do: the first loads then do
  // not wait for pages to be made. Counts as committed at once.
  bool populate = false;
};

// The records of a store as what a device's lanes read from; `read_bytes` and `faults` as in EngineOptions.
std::shared_ptr<RecordSource> store_source(std::shared_ptr<ExpertStore> store, const Faults& faults,
                                           int64_t read_bytes);

// Thread-safe. A caller holds at most the waves that it has not released; it must not ask for the next wave while it
// holds as many as there are slots.
class TransferEngine {
 public:
  // Expert memory in RAM, filled from the store.
  TransferEngine(std::shared_ptr<ExpertStore> store, EngineOptions options);
  // Expert memory of another device with as many slots as the store has experts; its lanes bring record
  // layer * experts + index to a slot. `options.faults` and `read_bytes` are of no effect.
  TransferEngine(std::shared_ptr<ExpertStore> store, std::shared_ptr<Device> device, EngineOptions options);
  ~TransferEngine();  // close()
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  // A queued batch and the experts it is predicted to want: prefetched and protected in order of use.
  // Batches are used in the order in which they were announced. begin: false: no read begins before the engine's next
  // event. Who is about to demand a layer announces the later ones so, and the layer's own reads come first.
  BatchId announce(AnnouncedBatch batch, bool begin = true);
  // The batch is over, or will never be used: what it announced no longer counts.
  void retire(BatchId batch);

  // Starts a demand for distinct experts of a layer; returns at once. Every demand is ended by finish().
  // `choices` as in Residency::demand.
  [[nodiscard]] DemandId demand(int32_t layer, std::span<const int32_t> experts, BatchId batch = 0,
                                std::span<const int64_t> choices = {});
  // Waits for experts of the demand that are ready and not yet handed out. Where it would wait, and the share allows
  // it, it hands out experts that are to be computed from their low-bit copies instead. `interrupted` is polled about
  // every 50 ms, with no lock held; when it returns true the wait throws Error(closed, "interrupted ...").
  [[nodiscard]] Wave next_wave(DemandId demand, const std::function<bool()>& interrupted = {});
  void release(DemandId demand, const Wave& wave);
  void finish(DemandId demand) noexcept;  // releases what is left, cancels what is not needed by others

  void* slot_base() const;  // address of slot 0; slot s lies at s * record_bytes
  const ExpertFormat& format() const;
  std::string name_of(ExpertKey expert) const;  // for errors: the layer's name and the expert's number
  int64_t capacity() const;                     // slots of the reserved range: the largest budget there can be
  int64_t budget() const;                       // slots
  // Grows at once; shrinks as soon as pinned slots are released, giving memory back to the system.
  void set_budget(int64_t slots);

  // Share of the choices that low-bit copies may serve from now on; 0, as at the start: none, every layer waits.
  void set_max_low_bit(double share);
  // Residency::set_early_prefetch: what is announced for the next layer is read as early as can be.
  void set_early_prefetch(bool early);
  // For tests and measurements, one caller at a time: a demand begins when no read is under way, and what is not there
  // then counts as not there in time. With one lane, which experts low-bit copies serve depends on the demands alone.
  void set_settled(bool settled);
  // Reads every expert, where all have a slot. `interrupted` as in next_wave.
  void load_all(const std::function<bool()>& interrupted = {});

  EngineStats stats() const;
  void reset_stats();
  std::vector<ExpertStanding> standings() const;  // [layers * experts]: what is in memory at this moment
  // Of all layers and lanes together; cheap enough to be asked at every layer.
  Pace pace() const;
  Trace& trace();
  // Ends every wait with Error(closed), joins the lanes, gives the memory back. Twice is once. In a forked child
  // it does nothing: nothing of the engine is there.
  void close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sida
