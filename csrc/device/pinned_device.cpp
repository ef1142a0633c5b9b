#include "device/pinned_device.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <utility>

namespace sida::cuda {
namespace {

// Asks for memory of the device's own node; where the system refuses, the memory is merely farther away.
void prefer_node(void* base, int64_t bytes, int node) {
  constexpr int prefer = 1;  // MPOL_PREFERRED
  constexpr int most = 1024;
  if (node < 0 || node >= most) return;
  unsigned long nodes[most / (8 * sizeof(unsigned long))] = {};
  nodes[static_cast<size_t>(node) / (8 * sizeof(unsigned long))] = 1ul << node % (8 * sizeof(unsigned long));
  ::syscall(SYS_mbind, base, static_cast<unsigned long>(bytes), prefer, nodes, static_cast<unsigned long>(most), 0u);
}

std::string limits() {
  std::ostringstream text;
  rlimit locked{};
  if (::getrlimit(RLIMIT_MEMLOCK, &locked) == 0) {
    text << "locked memory (ulimit -l) is limited to ";
    if (locked.rlim_cur == RLIM_INFINITY) {
      text << "nothing";
    } else {
      text << locked.rlim_cur << " bytes";
    }
  }
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) text << ", " << line;
  }
  std::string group;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> group) text << ", the control group allows " << group << " bytes";
  return text.str();
}

}  // namespace

PinnedDevice::PinnedDevice(const RuntimeTable& runtime, int device, std::shared_ptr<RecordSource> source, int64_t slots,
                           int64_t reserved, int64_t slot_bytes, Pin pin)
    : runtime_(runtime), host_(std::move(source), reserved, slot_bytes, slots), bytes_(slots * slot_bytes) {
  int status = runtime_.set_device(device);
  DeviceFacts facts{};
  if (status == RuntimeTable::success) status = runtime_.device_facts(device, &facts);
  if (status != RuntimeTable::success) {
    fail(ErrorKind::internal, "CUDA device ", device, ": choosing the device failed: ", runtime_.error_text(status),
         " (status ", status, ")");
  }
  prefer_node(host_.slot_base(), bytes_, facts.numa_node);
  status = runtime_.host_register(host_.slot_base(), static_cast<size_t>(bytes_));
  pinned_ = status == RuntimeTable::success;
  if (pinned_) return;
  std::ostringstream text;
  text << "cannot pin " << bytes_ << " bytes of host memory, " << slots << " experts of " << slot_bytes
       << " bytes: " << runtime_.error_text(status) << " (status " << status << "); " << limits();
  obstacle_ = text.str();
  if (pin == Pin::require) {
    fail(ErrorKind::io, obstacle_,
         "; make host_memory smaller, raise the limit (ulimit -l, a container's --ulimit memlock=-1), or go on with "
         "slower copies from memory that is not pinned: pin='try'");
  }
}

PinnedDevice::~PinnedDevice() {
  if (stop(std::chrono::milliseconds(1000))) unpin();  // a lane that hangs may still read into it
}

void PinnedDevice::unpin() {
  if (!pinned_) return;
  pinned_ = false;
  runtime_.host_unregister(host_.slot_base());
}

void PinnedDevice::start(int lanes, std::function<void(const JobDone&)> done) {
  host_.start(lanes, std::move(done));
}
void PinnedDevice::submit(const LaneJob& job) {
  host_.submit(job);
}
bool PinnedDevice::stop(std::chrono::milliseconds limit) {
  return host_.stop(limit);
}
int64_t PinnedDevice::lane_restarts() const {
  return host_.lane_restarts();
}
void* PinnedDevice::slot_base() const {
  return host_.slot_base();
}
int64_t PinnedDevice::slot_bytes() const {
  return host_.slot_bytes();
}
void PinnedDevice::free_memory() {
  unpin();
  host_.free_memory();
}

}  // namespace sida::cuda
