// Expert slots in GPU memory, and the order between the copies that fill them and the kernels that read them.
//
// The order is made of events alone, the host never waits for a stream:
//   - a kernel's stream waits for the event behind the copy of each slot that it reads;
//   - a copy's lane waits for the events behind all kernels that read the slot's last contents, and behind the last
//   copy
//     into the slot if another lane made it.
// A fill costs at most four runtime calls (wait for its readers, copy, record, and the kernel's wait), and a layer one
// more (the event behind its kernels), whatever the number of its experts.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "device/cuda_runtime_table.h"

namespace sida::cuda {

// Deliberate mistakes for the tests with the recording runtime; none unless a test says so.
enum class SlotPlant {
  none,
  no_copy_wait,        // kernels do not wait for the copy
  no_reader_wait,      // a copy does not wait for the kernels that read the slot
  newest_reader_only,  // of several streams that read the slot only the last one is waited for
  filled_too_early,    // the event is recorded before the copy
  wrong_lane,          // the event is recorded on another lane
  default_stream,      // the copy goes to the default stream
  no_refill_wait,      // a copy does not wait for another lane's copy into the same slot
  stale_wait,          // a stream that waited for the slot once does not wait for its next contents
  event_reused,        // a readers' event is recorded again while slots still count on it
  freed_too_soon,      // memory is freed while copies and kernels are under way
  event_leaked,        // close() forgets an event
  source_too_early,    // a copy's source is given back before the copy is done
};

class CudaSlots {
 public:
  // Throws Error(invalid) for sizes below one and Error(internal) with the runtime's reason, such as too little memory.
  CudaSlots(const RuntimeTable& runtime, int device, int32_t slots, int64_t slot_bytes, int lanes);
  ~CudaSlots();
  CudaSlots(const CudaSlots&) = delete;
  CudaSlots& operator=(const CudaSlots&) = delete;

  void* slot(int32_t slot) const;

  // Queues the copy of `bytes` from pinned host memory into `slot` on `lane`. The source must not change until
  // source_free(slot), and nobody may begin to read the slot's old contents any more.
  void fill(int32_t slot, int lane, const void* pinned, size_t bytes);

  // Whether the last fill of `slot` has read its source to the end. Does not wait.
  bool source_free(int32_t slot);

  // Before and after kernels that read `slots` are launched on `stream`, each of which must have been filled.
  void before_read(Stream stream, std::span<const int32_t> slots);
  void after_read(Stream stream, std::span<const int32_t> slots);

  // Waits for the copies and kernels under way and gives everything back. Twice is once; every other call after it
  // throws Error(closed).
  void close();

  inline static SlotPlant planted = SlotPlant::none;

 private:
  // An event behind kernels of one stream; it may be recorded again once no slot counts on it.
  struct ReadersEvent {
    Event event;
    Stream stream;
  };
  struct Slot {
    Event filled = nullptr;
    int lane = -1;                                       // of the last fill; -1: never filled
    std::vector<Stream> waited;                          // streams that already wait for the last fill
    std::vector<std::shared_ptr<ReadersEvent>> readers;  // since the last fill, one for each stream
  };

  void check(int status, const char* what) const;
  void check_open(const char* call) const;
  Slot& find(int32_t slot, const char* call);
  std::shared_ptr<ReadersEvent> free_event();
  void release();

  const RuntimeTable& runtime_;
  int device_;
  int64_t slot_bytes_;
  std::mutex mutex_;
  bool open_ = true;
  void* memory_ = nullptr;
  std::vector<Stream> lanes_;
  std::vector<Slot> slots_;
  std::vector<std::shared_ptr<ReadersEvent>> events_;
};

}  // namespace sida::cuda
