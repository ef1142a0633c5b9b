// Orders copies and kernels on slots by events; see cuda_slots.h for the rules.
#include "device/cuda_slots.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace sida::cuda {
namespace {

// Streams come and go: a program that makes one for each request must not be remembered for ever.
constexpr size_t most_streams_remembered = 64;

}  // namespace

CudaSlots::CudaSlots(const RuntimeTable& runtime, int device, int64_t slots, int64_t slot_bytes, int lanes)
    : runtime_(runtime), device_(device), slot_bytes_(slot_bytes), lane_count_(lanes) {
  if (slots < 1 || slot_bytes < 1 || lanes < 1) {
    fail(ErrorKind::invalid, "CudaSlots: ", slots, " slots of ", slot_bytes, " bytes and ", lanes,
         " lanes, expected at least one of each");
  }
  try {
    use_device();
    check(runtime_.page_bytes(device_, &page_bytes_), "asking for the size of a page");
    const size_t bytes = static_cast<size_t>(slots) * static_cast<size_t>(slot_bytes);
    const size_t pages = (bytes + page_bytes_ - 1) / page_bytes_;
    check(runtime_.reserve(&base_, pages * page_bytes_), "reserving addresses for the slots");
    reserved_bytes_ = pages * page_bytes_;
    page_users_.assign(pages, 0);
    const int priority = runtime_.copy_priority();
    for (int lane = 0; lane < lanes; ++lane) {
      Stream stream = nullptr;
      check(runtime_.stream_create(&stream, priority), "creating a copy lane");
      lanes_.push_back({stream});
    }
    slots_.resize(static_cast<size_t>(slots));
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

uint64_t CudaSlots::number_of(Stream stream) const {
  uint64_t number = 0;
  check(runtime_.stream_number(stream, &number), "asking for a stream's number");
  return number;
}

CudaSlots::Slot& CudaSlots::find(int32_t slot, const char* call) {
  check_open(call);
  if (slot < 0 || static_cast<size_t>(slot) >= slots_.size()) {
    fail(ErrorKind::invalid, "CudaSlots::", call, ": slot ", slot, ", expected 0 to ", slots_.size() - 1);
  }
  return slots_[static_cast<size_t>(slot)];
}

void* CudaSlots::slot(int32_t slot) const {
  return static_cast<std::byte*>(base_) + slot * slot_bytes_;
}

int64_t CudaSlots::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  return pages_ * static_cast<int64_t>(page_bytes_);
}

void CudaSlots::use_device() const {
  check(runtime_.set_device(device_), "choosing the device");
}

void CudaSlots::use_device_on_lane() const {
  use_device();
  check(runtime_.ignore_captures(), "leaving other threads' captures alone");
}

std::pair<int64_t, int64_t> CudaSlots::pages_of(int32_t slot) const {
  const auto page = static_cast<int64_t>(page_bytes_);
  return {slot * slot_bytes_ / page, ((slot + int64_t{1}) * slot_bytes_ - 1) / page + 1};
}

void CudaSlots::take_memory(int32_t slot) {
  const auto [begin, end] = pages_of(slot);
  for (int64_t page = begin; page < end; ++page) {
    if (page_users_[static_cast<size_t>(page)] == 0) {
      void* const at = static_cast<std::byte*>(base_) + page * static_cast<int64_t>(page_bytes_);
      const int status = runtime_.map_page(at, page_bytes_, device_);
      if (status != RuntimeTable::success) {
        // What this slot has taken so far goes back.
        slots_[static_cast<size_t>(slot)].has_memory = false;
        for (int64_t taken = begin; taken < page; ++taken) {
          if (--page_users_[static_cast<size_t>(taken)] > 0) continue;
          runtime_.unmap_page(static_cast<std::byte*>(base_) + taken * static_cast<int64_t>(page_bytes_), page_bytes_);
          --pages_;
        }
        fail(ErrorKind::io, "CUDA device ", device_, ": no memory for expert slot ", slot, " of ", slot_bytes_,
             " bytes: ", runtime_.error_text(status), " (status ", status, "); the slots hold ",
             pages_ * static_cast<int64_t>(page_bytes_), " bytes now; make expert_memory smaller");
      }
      ++pages_;
    }
    ++page_users_[static_cast<size_t>(page)];
  }
  slots_[static_cast<size_t>(slot)].has_memory = true;
}

int CudaSlots::drop_memory(int32_t slot) {
  int worst = RuntimeTable::success;
  const auto [begin, end] = pages_of(slot);
  for (int64_t page = begin; page < end; ++page) {
    int32_t& users = page_users_[static_cast<size_t>(page)];
    if (--users > 0) continue;
    users = 0;
    const int status =
        runtime_.unmap_page(static_cast<std::byte*>(base_) + page * static_cast<int64_t>(page_bytes_), page_bytes_);
    if (worst == RuntimeTable::success) worst = status;
    --pages_;
  }
  slots_[static_cast<size_t>(slot)].has_memory = false;
  return worst;
}

void CudaSlots::fill(int32_t slot, int lane, const void* pinned, size_t bytes) {
  const std::lock_guard lock(mutex_);
  Slot& own = find(slot, "fill");
  if (lane < 0 || static_cast<size_t>(lane) >= lanes_.size() || static_cast<int64_t>(bytes) > slot_bytes_) {
    fail(ErrorKind::invalid, "CudaSlots::fill: lane ", lane, " and ", bytes, " bytes, expected a lane below ",
         lanes_.size(), " and at most ", slot_bytes_, " bytes");
  }
  if (!own.has_memory) take_memory(slot);
  if (own.filled == nullptr) check(runtime_.event_create(&own.filled, true), "creating an event");
  const Stream stream = lanes_[static_cast<size_t>(lane)].stream;
  if (own.readers.empty()) {
    // Nobody read the last contents, so no reader orders this copy behind another lane's.
    if (own.lane >= 0 && own.lane != lane) {
      check(runtime_.stream_wait(stream, own.filled), "waiting for the slot's last copy");
    }
  } else {
    // Readers waited for the last copy themselves: behind them is behind it too.
    for (const auto& reader : own.readers) {
      check(runtime_.stream_wait(stream, reader->event), "waiting for the slot's readers");
    }
  }
  own.readers.clear();
  check(runtime_.copy_to_device(this->slot(slot), pinned, bytes, stream), "copying an expert");
  check(runtime_.event_record(own.filled, stream), "recording a copy");
  own.number = ++lanes_[static_cast<size_t>(lane)].fills;
  own.lane = lane;
}

void CudaSlots::wait_source(int32_t slot) {
  Event filled;
  {
    const std::lock_guard lock(mutex_);
    const Slot& own = find(slot, "wait_source");
    if (own.lane < 0) return;
    filled = own.filled;
  }
  // If the slot is filled again meanwhile, the newer copy is behind the older one.
  check(runtime_.event_synchronize(filled), "a copy");
}

void CudaSlots::before_read(Stream stream, std::span<const int32_t> slots) {
  const std::lock_guard lock(mutex_);
  check_open("before_read");
  if (waited_.size() >= most_streams_remembered) waited_.clear();  // costs each of them a wait for what it waited for
  std::vector<uint64_t>& waited = waited_[number_of(stream)];
  waited.resize(lanes_.size(), 0);
  std::vector<const Slot*> newest(lanes_.size(), nullptr);  // that the stream does not wait for yet
  for (const int32_t slot : slots) {
    const Slot& own = find(slot, "before_read");
    if (own.lane < 0) fail(ErrorKind::internal, "CudaSlots::before_read: slot ", slot, " was never filled");
    const auto lane = static_cast<size_t>(own.lane);
    if (own.number <= waited[lane]) continue;
    if (newest[lane] == nullptr || newest[lane]->number < own.number) newest[lane] = &own;
  }
  for (size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (newest[lane] == nullptr) continue;
    check(runtime_.stream_wait(stream, newest[lane]->filled), "waiting for copies");
    waited[lane] = newest[lane]->number;
  }
}

std::shared_ptr<CudaSlots::Readers> CudaSlots::free_event() {
  for (const auto& event : events_) {
    if (event.use_count() == 1) return event;
  }
  auto fresh = std::make_shared<Readers>();
  check(runtime_.event_create(&fresh->event, true), "creating an event");
  events_.push_back(fresh);
  return fresh;
}

std::shared_ptr<const CudaSlots::Readers> CudaSlots::after_read(Stream stream, std::span<const int32_t> slots) {
  const std::lock_guard lock(mutex_);
  check_open("after_read");
  const uint64_t number = number_of(stream);
  std::shared_ptr<Readers> behind = free_event();
  behind->stream = number;
  check(runtime_.event_record(behind->event, stream), "recording the readers");
  for (const int32_t slot : slots) {
    Slot& own = find(slot, "after_read");
    // A later event of the same stream covers the earlier ones.
    std::erase_if(own.readers, [&](const auto& earlier) { return earlier->stream == number; });
    own.readers.push_back(behind);
  }
  return behind;
}

void CudaSlots::give_back(int32_t slot, int32_t count) {
  std::vector<Event> events;
  std::vector<std::shared_ptr<Readers>> held;
  {
    const std::lock_guard lock(mutex_);
    for (int32_t i = slot; i < slot + count; ++i) {
      Slot& own = find(i, "give_back");
      if (own.lane >= 0) events.push_back(own.filled);
      for (auto& reader : own.readers) {
        events.push_back(reader->event);
        held.push_back(reader);
      }
    }
  }
  // Without the lock: callers go on with other slots meanwhile.
  for (const Event event : events) check(runtime_.event_synchronize(event), "work on a slot that is given back");
  const std::lock_guard lock(mutex_);
  for (int32_t i = slot; i < slot + count; ++i) {
    Slot& own = find(i, "give_back");
    own.lane = -1;
    own.readers.clear();
    if (own.has_memory) check(drop_memory(i), "giving a slot's memory back");
  }
}

void CudaSlots::keep_memory() {
  const std::lock_guard lock(mutex_);
  memory_kept_ = true;
}

void CudaSlots::close() {
  const std::lock_guard lock(mutex_);
  if (!open_) return;
  open_ = false;
  int worst = runtime_.set_device(device_);  // whatever thread closes
  const auto wait = [&](Event event) {
    const int status = runtime_.event_synchronize(event);
    if (worst == RuntimeTable::success) worst = status;
  };
  for (const Slot& slot : slots_) {
    if (slot.lane >= 0) wait(slot.filled);
    for (const auto& reader : slot.readers) wait(reader->event);
  }
  release();
  check(worst, "work that was still under way");
}

void CudaSlots::release() {
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.readers.clear();
    if (slot.has_memory && !memory_kept_) drop_memory(static_cast<int32_t>(i));
    if (slot.filled != nullptr) runtime_.event_destroy(slot.filled);
  }
  slots_.clear();
  for (const auto& readers : events_) runtime_.event_destroy(readers->event);
  events_.clear();
  for (const Lane& lane : lanes_) runtime_.stream_destroy(lane.stream);
  lanes_.clear();
  if (base_ != nullptr && !memory_kept_) runtime_.unreserve(base_, reserved_bytes_);
  base_ = nullptr;
}

}  // namespace sida::cuda
