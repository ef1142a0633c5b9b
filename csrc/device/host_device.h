// HostDevice: expert memory in RAM. Lanes are threads that read records straight into slots.
#pragma once

#include <memory>

#include "device/device.h"
#include "device/lane_pool.h"

namespace sida {

class HostDevice : public Device {
 public:
  // Reserves address space for `slots` slots; memory is committed when a slot is first filled, that of the first
  // `commit_now` slots at once.
  HostDevice(std::shared_ptr<RecordSource> source, int64_t slots, int64_t slot_bytes, int64_t commit_now = 0);

  void start(int lanes, std::function<void(const JobDone&)> done) override;
  void submit(const LaneJob& job) override;
  bool stop(std::chrono::milliseconds limit) override;
  int64_t lane_restarts() const override;
  void* slot_base() const override;
  int64_t slot_bytes() const override;
  void free_memory() override;

 private:
  struct Work;
  std::shared_ptr<Work> work_;
  LanePool lanes_;
};

}  // namespace sida
