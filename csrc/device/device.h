// Device: the one seam between the engine and the hardware that holds expert memory. It has memory cut into slots, and
// lanes that fill slots from a source; it decides nothing.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
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
};

// A record that lies in host memory and stays there, unchanged, for as long as this object lives.
class LentRecord {
 public:
  virtual ~LentRecord() = default;
  virtual const void* data() const = 0;
};

// Records that lie in host memory, or come there when they are asked for: what a device with memory of its own copies
// from.
class RecordLender {
 public:
  virtual ~RecordLender() = default;
  // Waits until record `record` is there, or throws Error. Called from several lanes. A lane must hold no other record
  // meanwhile unless holds_all().
  [[nodiscard]] virtual std::unique_ptr<LentRecord> lend(int64_t record) = 0;
  // Whether every record has a place of its own, so that none ever waits for another's to be given back.
  virtual bool holds_all() const = 0;
  virtual void interrupt() = 0;                           // as RecordSource's
  virtual std::string name_of(int64_t record) const = 0;  // for errors
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
  [[nodiscard]] virtual bool stop(std::chrono::milliseconds limit) = 0;
  // Lanes that died of something else than an Error, and were started again.
  virtual int64_t lane_restarts() const = 0;

  virtual void* slot_base() const = 0;  // address of slot 0, in the device's memory
  virtual int64_t slot_bytes() const = 0;
  // Gives all memory back. Only after stop() and when nothing computes from a slot.
  virtual void free_memory() = 0;
};

}  // namespace sida
