// Faults: what tests make go wrong in the reads of an engine, by a seed. Everything is off by default.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace sida {

// "every n": each n-th system call that reads is hit; 0: none. Counted from 1 over all lanes together.
struct Faults {
  uint64_t seed = 0;
  int64_t delay_us_max = 0;  // each read is delayed by a random time from delay_us_min up to this
  int64_t fail_every = 0;    // EIO
  int64_t delay_us_min = 0;
  int64_t short_every = 0;      // only a part is read
  int64_t interrupt_every = 0;  // EINTR
  int64_t flip_every = 0;       // one bit of what was read is wrong
  int64_t die_every = 0;        // the lane dies of an exception that is no std::exception
  bool operator==(const Faults&) const = default;
};

// The system call that reads, to be replaced by tests.
class FileReader {
 public:
  virtual ~FileReader() = default;
  virtual ssize_t pread(int fd, void* into, size_t bytes, int64_t offset);
  virtual void interrupt() {}  // ends artificial waits
};

// A plain reader if no fault is asked for. Throws Error(invalid) for a negative number.
std::unique_ptr<FileReader> make_reader(const Faults& faults);

class FaultyReader final : public FileReader {
 public:
  explicit FaultyReader(const Faults& faults);
  ssize_t pread(int fd, void* into, size_t bytes, int64_t offset) override;
  void interrupt() override;

 private:
  const Faults faults_;
  std::mutex mutex_;
  std::condition_variable awake_;
  bool interrupted_ = false;
  int64_t calls_ = 0;
};

}  // namespace sida
