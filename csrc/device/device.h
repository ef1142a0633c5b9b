// Device: the one seam between the engine and the hardware that holds expert memory. It has memory cut into slots, and
// lanes that fill slots from a source; it decides nothing.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "base/error.h"

namespace sida {

// Where records come from: a file for the first tier, a pool of another tier above it.
class RecordSource {
 public:
  virtual ~RecordSource() = default;
  // Brings record `record` to `into` (host memory), whole and verified, or throws Error. Called from several lanes.
  virtual void read(int64_t record, void* into) = 0;
  // Ends reads that are only waiting, so that lanes can be joined soon. May be called at any time.
  virtual void interrupt() {}
  // Address of the record if it already lies in host memory, kept there until the copy that asked is done: what a
  // device with memory of its own copies from. Null: it must be read.
  virtual const void* address(int64_t) { return nullptr; }
};

// What a lane does: fill a slot, give the memory of slots back to the system, or have a slot backed by memory while
// there is nothing else to do.
struct LaneJob {
  enum class Kind { fill, give_back, populate };
  Kind kind;
  int32_t slot;
  int32_t count = 1;    // slots, 1 to fill
  int64_t record = -1;  // fill only
};

struct LaneError {
  ErrorKind kind;
  std::string why;
};

// Told once for each job but populate, by a lane, with no lock of the device held.
struct JobDone {
  LaneJob job;
  int lane;
  std::optional<LaneError> error;
  double seconds;            // that the lane took
  int64_t begin_ns, end_ns;  // steady clock
};

class Device {
 public:
  virtual ~Device() = default;

  // Starts the lanes. `done` is called by them until stop() returns.
  virtual void start(int lanes, std::function<void(const JobDone&)> done) = 0;
  // Queues a job for the next free lane and returns at once. Jobs may end in any order. A populate waits for all
  // others, and is dropped once its slot is filled or given back.
  virtual void submit(const LaneJob& job) = 0;
  // Ends the lanes: jobs not begun are dropped. False if a lane did not end in time; it is left behind, and
  // what it uses stays alive with it. Twice is once.
  virtual bool stop(std::chrono::milliseconds limit) = 0;
  // Lanes that died of something else than an Error, and were started again.
  virtual int64_t lane_restarts() const = 0;

  virtual void* slot_base() const = 0;  // address of slot 0, in the device's memory
  virtual int64_t slot_bytes() const = 0;
  // Gives all memory back. Only after stop() and when nothing computes from a slot.
  virtual void free_memory() = 0;
};

}  // namespace sida
