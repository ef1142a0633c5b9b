// Expert slots in GPU memory, and the order between the copies that fill them and the kernels that read them.
//
// The order is made of events alone, the host never waits for a stream:
//   - a kernel's stream waits for the copies of the slots that it reads: copies of one lane end in their order, so the
//     event behind the newest of them answers for all;
//   - a copy's lane waits for the events behind all kernels that read the slot's last contents, and behind the last
//     copy into the slot if another lane made it.
// A fill costs at most three runtime calls (wait for its readers, copy, record), and a group of kernels one more for
// each lane (the wait for its copies) and one (the event behind them), whatever the number of its experts.
//
// Addresses are reserved for all slots; a page has memory while a slot on it is filled or has not been given back.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "device/cuda_runtime_table.h"

namespace sida::cuda {

class CudaSlots {
 public:
  // An event behind kernels of one stream; it may be recorded again once nobody holds it any more.
  struct Readers {
    Event event;
    uint64_t stream;  // its number
  };

  // Throws Error(invalid) for sizes below one and Error(internal) with the runtime's reason.
  CudaSlots(const RuntimeTable& runtime, int device, int64_t slots, int64_t slot_bytes, int lanes);
  ~CudaSlots();
  CudaSlots(const CudaSlots&) = delete;
  CudaSlots& operator=(const CudaSlots&) = delete;

  void* slot(int32_t slot) const;
  int64_t slot_bytes() const { return slot_bytes_; }
  int lanes() const { return lane_count_; }
  int device() const { return device_; }
  const RuntimeTable& runtime() const { return runtime_; }
  int64_t memory_bytes() const;  // of the device, taken now

  // Makes the device the calling thread's own; every thread does it before its first other call.
  void use_device() const;
  // The same for a lane's thread, which works on while others capture graphs.
  void use_device_on_lane() const;

  // Queues the copy of `bytes` from pinned host memory into `slot` on `lane`. The source must not change until
  // wait_source(slot) has returned, and nobody may begin to read the slot's old contents any more. The first fill of a
  // slot takes its memory: Error(io) if there is none.
  void fill(int32_t slot, int lane, const void* pinned, size_t bytes);

  // Waits until the last fill of `slot` has read its source to the end. Throws Error(internal) if the device reports a
  // failure, of whatever came before.
  void wait_source(int32_t slot);

  // Before and after kernels that read `slots` are launched on `stream`, each of which must have been filled.
  void before_read(Stream stream, std::span<const int32_t> slots);
  // The event behind those kernels; a holder may ask for it and wait for it.
  std::shared_ptr<const Readers> after_read(Stream stream, std::span<const int32_t> slots);

  // Waits for the copies and kernels of these slots and gives their memory back.
  void give_back(int32_t slot, int32_t count);

  // Something reads slots that no event stands behind: close() leaves their memory to the end of the process.
  void keep_memory();
  // Waits for the copies and kernels under way and gives everything back. Twice is once; every other call after it
  // throws Error(closed).
  void close();

 private:
  struct Slot {
    Event filled = nullptr;
    int lane = -1;        // of the last fill; -1: not filled
    uint64_t number = 0;  // of the last fill among those of its lane
    bool has_memory = false;
    std::vector<std::shared_ptr<Readers>> readers;  // since the last fill, one for each stream
  };
  struct Lane {
    Stream stream;
    uint64_t fills = 0;
  };

  void check(int status, const char* what) const;
  void check_open(const char* call) const;
  uint64_t number_of(Stream stream) const;
  Slot& find(int32_t slot, const char* call);
  std::shared_ptr<Readers> free_event();
  void take_memory(int32_t slot);
  int drop_memory(int32_t slot);
  std::pair<int64_t, int64_t> pages_of(int32_t slot) const;
  void release();

  const RuntimeTable& runtime_;
  const int device_;
  const int64_t slot_bytes_;
  const int lane_count_;
  mutable std::mutex mutex_;
  bool open_ = true, memory_kept_ = false;
  size_t page_bytes_ = 0, reserved_bytes_ = 0;
  void* base_ = nullptr;
  std::vector<int32_t> page_users_;  // slots with memory on each page
  int64_t pages_ = 0;                // with memory
  std::vector<Lane> lanes_;
  std::vector<Slot> slots_;
  std::map<uint64_t, std::vector<uint64_t>> waited_;  // by a stream's number: the newest fill of each lane it waits for
  std::vector<std::shared_ptr<Readers>> events_;
};

}  // namespace sida::cuda
