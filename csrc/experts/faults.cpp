#include "experts/faults.h"

#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "base/error.h"

namespace sida {
namespace {

struct LaneDeath {};

// A well-mixed number for each (seed, call): the same faults whatever the order of the lanes.
uint64_t mixed(uint64_t seed, uint64_t call) {
  uint64_t value = seed * 0x9E3779B97F4A7C15u + call * 0xD1B54A32D192ED03u + 0x8CB92BA72F3D8DD7u;
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

bool hits(int64_t every, int64_t call) {
  return every > 0 && call % every == 0;
}

}  // namespace

ssize_t FileReader::pread(int fd, void* into, size_t bytes, int64_t offset) {
  return ::pread(fd, into, bytes, offset);
}

std::unique_ptr<FileReader> make_reader(const Faults& faults) {
  if (faults == Faults{faults.seed}) return std::make_unique<FileReader>();
  return std::make_unique<FaultyReader>(faults);
}

FaultyReader::FaultyReader(const Faults& faults) : faults_(faults) {
  for (const int64_t value : {faults.delay_us_min, faults.delay_us_max, faults.fail_every, faults.short_every,
                              faults.interrupt_every, faults.flip_every, faults.die_every}) {
    if (value < 0) fail(ErrorKind::invalid, "faults: found ", value, ", expected 0 or more");
  }
  if (faults.delay_us_min > faults.delay_us_max) {
    fail(ErrorKind::invalid, "faults: delay_us_min is ", faults.delay_us_min, ", expected at most delay_us_max, ",
         faults.delay_us_max);
  }
}

ssize_t FaultyReader::pread(int fd, void* into, size_t bytes, int64_t offset) {
  std::unique_lock lock(mutex_);
  const int64_t call = ++calls_;
  const uint64_t random = mixed(faults_.seed, static_cast<uint64_t>(call));
  if (faults_.delay_us_max > 0) {
    const auto spread = static_cast<uint64_t>(faults_.delay_us_max - faults_.delay_us_min);
    const std::chrono::microseconds delay(faults_.delay_us_min + static_cast<int64_t>(random % (spread + 1)));
    awake_.wait_for(lock, delay, [&] { return interrupted_; });
  }
  lock.unlock();
  if (hits(faults_.die_every, call)) throw LaneDeath{};
  if (hits(faults_.fail_every, call) || hits(faults_.interrupt_every, call)) {
    errno = hits(faults_.fail_every, call) ? EIO : EINTR;
    return -1;
  }
  // Less than half, so that a record takes several; and not a multiple of a block.
  if (hits(faults_.short_every, call) && bytes > 1) bytes = 1 + random % (bytes / 2);
  const ssize_t got = FileReader::pread(fd, into, bytes, offset);
  if (got > 0 && hits(faults_.flip_every, call)) {
    static_cast<unsigned char*>(into)[random % static_cast<uint64_t>(got)] ^= 1u << random % 8;
  }
  return got;
}

void FaultyReader::interrupt() {
  {
    const std::lock_guard lock(mutex_);
    interrupted_ = true;
  }
  awake_.notify_all();
}

}  // namespace sida
