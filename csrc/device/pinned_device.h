// PinnedDevice: a HostDevice whose slots are pinned, so that a GPU copies straight from them: the middle tier.
#pragma once

#include <memory>
#include <string>

#include "device/cuda_runtime_table.h"
#include "device/host_device.h"

namespace sida::cuda {

enum class Pin {
  require,  // an error if the memory cannot be pinned
  attempt,  // goes on with memory that is not: copies then pass through the driver's own buffers
};

// "require" or "try"; Error(invalid) for anything else.
Pin parse_pin(const std::string& name);

class PinnedDevice final : public HostDevice {
 public:
  // A slab of exactly `slots` slots, near the CUDA device where the system says which memory that is, in huge pages
  // where it has them; the range of `reserved` slots is addresses alone. Error(io) with what was asked for and what
  // the limits are if it cannot be pinned.
  PinnedDevice(const RuntimeTable& runtime, int device, std::shared_ptr<RecordSource> source, int64_t slots,
               int64_t reserved, int64_t slot_bytes, Pin pin);
  ~PinnedDevice() override;

  void free_memory() override;

  int64_t pinned_bytes() const { return pinned_ ? bytes_ : 0; }
  // Why the memory is not pinned; empty if it is.
  const std::string& obstacle() const { return obstacle_; }
  // Where the memory lies: "on node 1, the device's", or why that is not known.
  const std::string& placement() const { return placement_; }

 private:
  void unpin();

  const RuntimeTable& runtime_;
  const int64_t bytes_;
  bool pinned_ = false;
  std::string obstacle_, placement_;
};

}  // namespace sida::cuda
