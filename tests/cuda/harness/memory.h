// The shadows of the emulated memories: who wrote and read each piece, and when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "harness/harness.h"

namespace sida::harness {

// A place in a thread's life: accesses of one thread, before an older barrier of the block or of the warp, are ordered.
struct Moment {
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
  const void* site = nullptr;  // return address inside the kernel
};

// Whether a barrier, or being the same thread, orders `earlier` before `now`.
bool ordered(const Moment& earlier, const Moment& now);

// Shared memory of the running block, in granules of four bytes.
class SharedShadow {
 public:
  static constexpr size_t capacity = 228 * 1024;

  unsigned char* base() { return memory_; }
  bool holds(const void* address) const { return address >= memory_ && address < memory_ + capacity; }
  void start_block(size_t bytes);
  void read(const void* address, size_t bytes, const Moment& now);
  void write(const void* address, size_t bytes, const Moment& now);
  void start_copy(const void* address, size_t bytes, const Moment& now);  // of a cp.async
  void finish_copy(const void* address, size_t bytes, const Moment& now);

 private:
  struct Granule {
    Moment writer;
    // Enough readers to find every conflict: the last one, the last one of another warp, the last other lane of its
    // warp.
    Moment reader, other_warp, other_lane;
    Moment copy;  // thread >= 0: a cp.async is under way
    uint32_t written_in = 0;
  };
  // The granules of an access; reports those outside the block's memory.
  Granule* find(const void* address, size_t bytes, const Moment& now, size_t& count);
  void check_writers(const Granule& granule, const void* address, const Moment& now, const char* what);
  void check_readers(const Granule& granule, const void* address, const Moment& now, const char* what);

  alignas(1024) unsigned char memory_[capacity];
  std::vector<Granule> granules_ = std::vector<Granule>(capacity / 4);
  size_t bytes_ = 0;
  uint32_t block_serial_ = 0;
};

// Emulated global memory: one range with guard zones, and for each four bytes the blocks that touched them.
class GlobalShadow {
 public:
  static constexpr size_t capacity = 64u << 20;

  GlobalShadow();
  bool holds(const void* address) const { return address >= base_ && address < base_ + capacity; }
  void* allocate(size_t bytes, size_t misalignment);
  void fill(void* target, const void* source, size_t bytes);
  void read_only(void* begin, size_t bytes);
  void reset();
  void start_launch();
  void start_block(int block);
  // Before an atomic operation: `fenced` says whether all of the block's writes are behind a fence.
  void atomic(const void* address, size_t bytes, bool fenced, const void* site);
  void read(const void* address, size_t bytes, const void* site);
  void write(const void* address, size_t bytes, const void* site);

 private:
  enum : uint8_t { valid = 1, initialised = 2, constant = 4 };
  struct Granule {
    uint32_t write_launch = 0, read_launch = 0;
    int32_t writer = -1, reader = -1, other_reader = -1;
    const void* write_site = nullptr;
  };
  void check(const void* address, size_t bytes, uint8_t needed, const void* site, const char* what);
  bool acquired(int block) const;

  unsigned char* base_;
  std::vector<uint8_t> state_ = std::vector<uint8_t>(capacity);
  std::vector<Granule> granules_;
  std::vector<int> acquired_;                                       // blocks whose writes this block may read
  std::vector<std::pair<const void*, std::vector<int>>> released_;  // by address of the atomic
  size_t used_ = 0;
  uint32_t launch_ = 0;
  int block_ = -1;
};

// Ends the launch with a KernelError. `first` and `second` are places in the kernel, null if there is none.
[[noreturn]] void report(Fault fault, const std::string& what, const void* first, const void* second = nullptr);

}  // namespace sida::harness
