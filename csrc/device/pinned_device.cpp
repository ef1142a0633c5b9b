#include "device/pinned_device.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <utility>

namespace sida::cuda {
namespace {

// Asks for memory of the device's own node, and says what came of it; where the system refuses, the memory is merely
// farther away. Before a page is touched: it decides where pages are made.
std::string prefer_node(void* base, int64_t bytes, int node) {
  constexpr int prefer = 1;  // MPOL_PREFERRED
  constexpr int most = 1024;
  if (node < 0 || node >= most) return "anywhere: the system does not say which node is the device's";
  unsigned long nodes[most / (8 * sizeof(unsigned long))] = {};
  nodes[static_cast<size_t>(node) / (8 * sizeof(unsigned long))] = 1ul << node % (8 * sizeof(unsigned long));
  const std::string name = "node " + std::to_string(node) + ", the device's";
  if (::syscall(SYS_mbind, base, static_cast<unsigned long>(bytes), prefer, nodes, static_cast<unsigned long>(most),
                0u) != 0) {
    return "anywhere: the system refused memory of " + name + ": " + std::strerror(errno);
  }
  return "on " + name + ", as far as it has room";
}

// The limit that usually stands in the way.
std::string locked_memory() {
  rlimit locked{};
  if (::getrlimit(RLIMIT_MEMLOCK, &locked) != 0) return std::string("which is not known: ") + std::strerror(errno);
  return locked.rlim_cur == RLIM_INFINITY ? "not limited" : "limited to " + std::to_string(locked.rlim_cur) + " bytes";
}

}  // namespace

Pin parse_pin(const std::string& name) {
  if (name != "require" && name != "try") {
    fail(ErrorKind::invalid, "pin is '", name, "', expected 'require' or 'try'");
  }
  return name == "require" ? Pin::require : Pin::attempt;
}

PinnedDevice::PinnedDevice(const RuntimeTable& runtime, int device, std::shared_ptr<RecordSource> source, int64_t slots,
                           int64_t reserved, int64_t slot_bytes, Pin pin)
    : HostDevice(std::move(source), reserved, slot_bytes, slots), runtime_(runtime), bytes_(slots * slot_bytes) {
  int status = runtime_.set_device(device);
  DeviceFacts facts{};
  if (status == RuntimeTable::success) status = runtime_.device_facts(device, &facts);
  if (status != RuntimeTable::success) {
    fail(ErrorKind::internal, "CUDA device ", device, ": choosing the device failed: ", runtime_.error_text(status),
         " (status ", status, ")");
  }
  placement_ = prefer_node(slot_base(), bytes_, facts.numa_node);
  status = runtime_.host_register(slot_base(), static_cast<size_t>(bytes_));
  pinned_ = status == RuntimeTable::success;
  if (pinned_) return;
  std::ostringstream text;
  text << "cannot pin " << bytes_ << " bytes of host memory, " << slots << " experts of " << slot_bytes
       << " bytes: " << runtime_.error_text(status) << " (status " << status << "); locked memory (ulimit -l) is "
       << locked_memory();
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
  runtime_.host_unregister(slot_base());
}

void PinnedDevice::free_memory() {
  unpin();
  HostDevice::free_memory();
}

}  // namespace sida::cuda
