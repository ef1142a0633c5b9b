// LanePool: the threads behind a device's lanes: they take jobs in order, tell how each ended, survive whatever a job
// throws, and are left behind if one hangs.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "device/device.h"

namespace sida {

// What a device does on its lanes. Shared with the lanes, so that one that hangs keeps what it uses.
class LaneWork {
 public:
  virtual ~LaneWork() = default;
  virtual void begin(int /*lane*/) {}  // on the lane's thread, before its first job
  virtual void run(const LaneJob& job, int lane) = 0;
  // Called while no job waits, and again after wake(); true if there was something to do. Errors are kept by the work
  // itself.
  virtual bool idle(int /*lane*/) { return false; }
  virtual void interrupt() = 0;  // ends waits inside run()
};

class LanePool {
 public:
  explicit LanePool(std::shared_ptr<LaneWork> work);
  ~LanePool();  // stop()
  LanePool(const LanePool&) = delete;
  LanePool& operator=(const LanePool&) = delete;

  // As the functions of Device.
  void start(int lanes, std::function<void(const JobDone&)> done);
  void submit(const LaneJob& job);
  void wake();  // lanes that wait ask idle() again
  [[nodiscard]] bool stop(std::chrono::milliseconds limit);
  int64_t lane_restarts() const;

 private:
  struct Shared;
  static void run_lane(std::shared_ptr<Shared> shared, int lane);

  std::shared_ptr<Shared> shared_;
};

}  // namespace sida
