// Orders copies and kernels on slots by events; see cuda_slots.h for the rules.
#include "device/cuda_slots.h"

#include <algorithm>

#include "base/error.h"

namespace sida::cuda {

CudaSlots::CudaSlots(const RuntimeTable& runtime, int device, int32_t slots, int64_t slot_bytes, int lanes)
    : runtime_(runtime), device_(device), slot_bytes_(slot_bytes) {
  if (slots < 1 || slot_bytes < 1 || lanes < 1) {
    fail(ErrorKind::invalid, "CudaSlots: ", slots, " slots of ", slot_bytes, " bytes and ", lanes,
         " lanes, expected at least one of each");
  }
  try {
    check(runtime_.set_device(device_), "choosing the device");
    check(runtime_.device_alloc(&memory_, static_cast<size_t>(slots) * static_cast<size_t>(slot_bytes)),
          "allocating the slots");
    const int priority = runtime_.copy_priority();
    for (int lane = 0; lane < lanes; ++lane) {
      Stream stream = nullptr;
      check(runtime_.stream_create(&stream, priority), "creating a copy lane");
      lanes_.push_back(stream);
    }
    slots_.resize(static_cast<size_t>(slots));
    for (Slot& slot : slots_) check(runtime_.event_create(&slot.filled), "creating an event");
  } catch (...) {
    release();
    throw;
  }
}

CudaSlots::~CudaSlots() {
  try {
    close();
  } catch (const Error&) {
    // close() reports to who calls it; a destructor has nobody to tell, and everything was given back all the same.
  }
}

void CudaSlots::check(int status, const char* what) const {
  if (status != RuntimeTable::success) {
    fail(ErrorKind::internal, "CUDA device ", device_, ": ", what, " failed: ", runtime_.error_text(status),
         " (status ", status, ")");
  }
}

void CudaSlots::check_open(const char* call) const {
  if (!open_) fail(ErrorKind::closed, "CudaSlots::", call, " after close()");
}

CudaSlots::Slot& CudaSlots::find(int32_t slot, const char* call) {
  check_open(call);
  if (slot < 0 || static_cast<size_t>(slot) >= slots_.size()) {
    fail(ErrorKind::invalid, "CudaSlots::", call, ": slot ", slot, ", expected 0 to ", slots_.size() - 1);
  }
  return slots_[static_cast<size_t>(slot)];
}

void* CudaSlots::slot(int32_t slot) const {
  return static_cast<std::byte*>(memory_) + slot * slot_bytes_;
}

void CudaSlots::fill(int32_t slot, int lane, const void* pinned, size_t bytes) {
  const std::lock_guard lock(mutex_);
  Slot& own = find(slot, "fill");
  if (lane < 0 || static_cast<size_t>(lane) >= lanes_.size() || static_cast<int64_t>(bytes) > slot_bytes_) {
    fail(ErrorKind::invalid, "CudaSlots::fill: lane ", lane, " and ", bytes, " bytes, expected a lane below ",
         lanes_.size(), " and at most ", slot_bytes_, " bytes");
  }
  check(runtime_.set_device(device_), "choosing the device");
  const Stream stream = planted == SlotPlant::default_stream ? nullptr : lanes_[static_cast<size_t>(lane)];
  if (own.readers.empty()) {
    // Nobody read the last contents, so no reader orders this copy behind another lane's.
    if (own.lane >= 0 && own.lane != lane && planted != SlotPlant::no_refill_wait) {
      check(runtime_.stream_wait(stream, own.filled), "waiting for the slot's last copy");
    }
  } else if (planted != SlotPlant::no_reader_wait) {
    // Readers waited for the last copy themselves: behind them is behind it too.
    for (const auto& reader : own.readers) {
      check(runtime_.stream_wait(stream, reader->event), "waiting for the slot's readers");
    }
  }
  own.readers.clear();
  if (planted != SlotPlant::stale_wait) own.waited.clear();
  const Stream record_on =
      planted == SlotPlant::wrong_lane ? lanes_[(static_cast<size_t>(lane) + 1) % lanes_.size()] : stream;
  if (planted == SlotPlant::filled_too_early) check(runtime_.event_record(own.filled, record_on), "recording a copy");
  check(runtime_.copy_to_device(this->slot(slot), pinned, bytes, stream), "copying an expert");
  if (planted != SlotPlant::filled_too_early) check(runtime_.event_record(own.filled, record_on), "recording a copy");
  own.lane = lane;
}

bool CudaSlots::source_free(int32_t slot) {
  const std::lock_guard lock(mutex_);
  const Slot& own = find(slot, "source_free");
  if (own.lane < 0 || planted == SlotPlant::source_too_early) return true;
  const int status = runtime_.event_query(own.filled);
  if (status == RuntimeTable::not_ready) return false;
  check(status, "a copy");
  return true;
}

void CudaSlots::before_read(Stream stream, std::span<const int32_t> slots) {
  const std::lock_guard lock(mutex_);
  for (const int32_t slot : slots) {
    Slot& own = find(slot, "before_read");
    if (own.lane < 0) fail(ErrorKind::internal, "CudaSlots::before_read: slot ", slot, " was never filled");
    if (std::find(own.waited.begin(), own.waited.end(), stream) != own.waited.end()) continue;
    if (planted != SlotPlant::no_copy_wait) check(runtime_.stream_wait(stream, own.filled), "waiting for a copy");
    own.waited.push_back(stream);
  }
}

std::shared_ptr<CudaSlots::ReadersEvent> CudaSlots::free_event() {
  for (const auto& event : events_) {
    if (event.use_count() == 1 || planted == SlotPlant::event_reused) return event;
  }
  auto fresh = std::make_shared<ReadersEvent>();
  check(runtime_.event_create(&fresh->event), "creating an event");
  events_.push_back(fresh);
  return fresh;
}

void CudaSlots::after_read(Stream stream, std::span<const int32_t> slots) {
  const std::lock_guard lock(mutex_);
  check_open("after_read");
  const std::shared_ptr<ReadersEvent> behind = free_event();
  behind->stream = stream;
  check(runtime_.event_record(behind->event, stream), "recording the readers");
  for (const int32_t slot : slots) {
    Slot& own = find(slot, "after_read");
    // A later event of the same stream covers the earlier ones.
    std::erase_if(own.readers, [&](const auto& earlier) {
      return earlier->stream == stream || planted == SlotPlant::newest_reader_only;
    });
    own.readers.push_back(behind);
  }
}

void CudaSlots::close() {
  const std::lock_guard lock(mutex_);
  if (!open_) return;
  open_ = false;
  int worst = RuntimeTable::success;
  const auto wait = [&](Event event) {
    const int status = runtime_.event_synchronize(event);
    if (worst == RuntimeTable::success) worst = status;
  };
  if (planted != SlotPlant::freed_too_soon) {
    for (const Slot& slot : slots_) {
      if (slot.lane >= 0) wait(slot.filled);
      for (const auto& reader : slot.readers) wait(reader->event);
    }
  }
  release();
  check(worst, "work that was still under way");
}

void CudaSlots::release() {
  for (Slot& slot : slots_) {
    slot.readers.clear();
    if (slot.filled != nullptr) runtime_.event_destroy(slot.filled);
  }
  slots_.clear();
  for (size_t i = planted == SlotPlant::event_leaked ? 1 : 0; i < events_.size(); ++i) {
    runtime_.event_destroy(events_[i]->event);
  }
  events_.clear();
  for (const Stream lane : lanes_) runtime_.stream_destroy(lane);
  lanes_.clear();
  if (memory_ != nullptr) runtime_.device_free(memory_);
  memory_ = nullptr;
}

}  // namespace sida::cuda
