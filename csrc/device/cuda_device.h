// CudaDevice: expert memory in a GPU. Lanes are threads with a CUDA stream each; they copy records that lie in pinned
// host memory into slots.
//
// A fill is told as done when its copy is queued: what reads the slot afterwards is ordered behind the copy by events
// (slots().before_read), and nobody on the host waits for it. A lane waits for its own older copies, which bounds how
// far copies run ahead of a demand, and gives each lent record back when its copy has read it.
#pragma once

#include <memory>

#include "device/cuda_slots.h"
#include "device/device.h"
#include "device/lane_pool.h"

namespace sida::cuda {

class CudaDevice final : public Device {
 public:
  // Throws as CudaSlots.
  CudaDevice(const RuntimeTable& runtime, int device, std::shared_ptr<RecordLender> lender, int64_t slots,
             int64_t slot_bytes, int lanes);
  ~CudaDevice() override;

  void start(int lanes, std::function<void(const JobDone&)> done) override;
  void submit(const LaneJob& job) override;
  bool stop(std::chrono::milliseconds limit) override;
  int64_t lane_restarts() const override;
  void* slot_base() const override;
  int64_t slot_bytes() const override;
  void free_memory() override;

  CudaSlots& slots();
  // Throws what a copy failed of after it was told as done: the failure belongs to no demand any more.
  void check_healthy() const;
  // Kernels read slots and no event could be recorded behind them: from now on check_healthy() throws this error, no
  // slot is filled again, and their memory is never given back.
  void condemn(const Error& why);

 private:
  struct Work;
  std::shared_ptr<Work> work_;
  LanePool lanes_;
};

}  // namespace sida::cuda
