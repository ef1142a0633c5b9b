// The shadows of the emulated memories: who wrote and read each piece, and when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
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
  // The guards on both sides too, so that an access just outside is seen.
  bool holds(const void* address) const { return address >= before_ && address < behind_ + guard; }
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

  static constexpr size_t guard = 4096;
  alignas(1024) unsigned char before_[guard];
  unsigned char memory_[capacity];
  unsigned char behind_[guard];
  std::vector<Granule> granules_ = std::vector<Granule>(capacity / 4);
  size_t bytes_ = 0;
  uint32_t block_serial_ = 0;
};

// What a block may rely on in global memory. Its writes before its n-th release (a fence of all its threads, then an
// atomic) carry epoch n; another block may use them after an atomic on the same word that came later.
struct BlockView {
  int block = -1;
  uint32_t epoch = 0;
  std::vector<uint32_t> acquired;  // by block: its writes of epochs below this are visible; empty: none of anybody's
};

// Emulated global memory: one range with guard zones, and for each four bytes the blocks that touched them.
class GlobalShadow {
 public:
  explicit GlobalShadow(size_t capacity);
  ~GlobalShadow();
  GlobalShadow(const GlobalShadow&) = delete;
  GlobalShadow& operator=(const GlobalShadow&) = delete;
  bool holds(const void* address) const { return address >= base_ && address < base_ + capacity_; }
  void* allocate(size_t bytes, size_t misalignment);
  void fill(void* target, const void* source, size_t bytes);
  void read_only(void* begin, size_t bytes);
  void reset();
  void start_launch(size_t blocks);
  void run_as(BlockView* view) { view_ = view; }
  // Before an atomic operation: `fenced` says whether all of the block's writes are behind a fence.
  void atomic(const void* address, size_t bytes, bool fenced, const void* site);
  void read(const void* address, size_t bytes, const void* site);
  void write(const void* address, size_t bytes, const void* site);
  // Distinct bytes that the present launch has read and written, in whole granules.
  int64_t bytes_read() const { return bytes_read_; }
  int64_t bytes_written() const { return bytes_written_; }

 private:
  enum : uint8_t { valid = 1, initialised = 2, constant = 4 };
  struct Granule {  // all zero at first
    uint32_t write_launch, read_launch, atomic_launch;
    uint32_t write_epoch;
    int32_t writer, reader, other_reader;
    const void* write_site;
    const void* atomic_site;
  };
  void check(const void* address, size_t bytes, uint8_t needed, const void* site, const char* what);
  bool visible(int block, uint32_t epoch) const;
  void check_atomics(const Granule& granule, const void* address, size_t bytes, const void* site, const char* what);

  size_t capacity_;
  // Mapped, not allocated: untouched pages cost nothing.
  unsigned char* base_;
  uint8_t* state_;
  Granule* granules_;
  // By address of the atomic: who released there, and at which epoch.
  std::unordered_map<const void*, std::vector<std::pair<int, uint32_t>>> released_;
  size_t used_ = 0, blocks_ = 0;
  uint32_t launch_ = 0;
  BlockView* view_ = nullptr;
  int64_t bytes_read_ = 0, bytes_written_ = 0;
};

// Ends the launch with a KernelError. `first` and `second` are places in the kernel, null if there is none.
[[noreturn]] void report(Fault fault, const std::string& what, const void* first, const void* second = nullptr);

}  // namespace sida::harness
