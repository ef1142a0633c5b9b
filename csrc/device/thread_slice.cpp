#include "device/thread_slice.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace sida {
namespace {

constexpr uint64_t shortest_ns = 100'000;  // what the kernel allows

// struct sched_attr of the kernel's interface, in its first version: the C library has no name for it before 2.41.
struct SchedulerAttributes {
  uint32_t size = sizeof(SchedulerAttributes), policy = 0;
  uint64_t flags = 0;
  int32_t nice = 0;
  uint32_t priority = 0;
  uint64_t runtime = 0, deadline = 0, period = 0;
};

bool read_attributes(SchedulerAttributes* attributes) {
  return ::syscall(SYS_sched_getattr, 0, attributes, sizeof(*attributes), 0) == 0;
}

}  // namespace

void take_short_slice() {
  SchedulerAttributes attributes;
  // A policy that the program's user chose is left alone, and the nice value goes back as it was.
  if (!read_attributes(&attributes) || attributes.policy != SCHED_OTHER) return;
  attributes.runtime = shortest_ns;
  (void)::syscall(SYS_sched_setattr, 0, &attributes, 0);  // advice: refused, the thread runs as any other
}

std::optional<std::chrono::nanoseconds> thread_slice() {
  SchedulerAttributes attributes;
  if (!read_attributes(&attributes) || attributes.runtime == 0) return std::nullopt;
  return std::chrono::nanoseconds(attributes.runtime);
}

}  // namespace sida
