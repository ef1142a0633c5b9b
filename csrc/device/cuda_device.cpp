#include "device/cuda_device.h"

#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sida::cuda {

struct CudaDevice::Work final : LaneWork {
  // Copies of a lane that may be under way while it queues another: one, so that the link has work while the lane's
  // thread looks for the next record; none where a held record could keep another one out of host memory.
  static constexpr size_t ahead = 1;

  struct Copy {
    int32_t slot;
    int64_t record;
    std::unique_ptr<LentRecord> source;
  };

  Work(const RuntimeTable& runtime, int device, std::shared_ptr<RecordLender> from, int64_t slots, int64_t slot_bytes,
       int lanes)
      : lender(std::move(from)), copies(static_cast<size_t>(lanes)), slots(runtime, device, slots, slot_bytes, lanes) {}

  void begin(int) override { slots.use_device_on_lane(); }

  void run(const LaneJob& job, int lane) override {
    check_healthy();
    if (job.kind == LaneJob::Kind::give_back) {
      slots.give_back(job.slot, job.count);
      return;
    }
    std::deque<Copy>& own = copies[static_cast<size_t>(lane)];
    const size_t most = lender->holds_all() ? ahead : 0;
    while (own.size() > most) end_oldest(lane);
    std::unique_ptr<LentRecord> source = lender->lend(job.record);
    slots.fill(job.slot, lane, source->data(), static_cast<size_t>(slots.slot_bytes()));
    own.push_back({job.slot, job.record, std::move(source)});
  }

  bool idle(int lane) override {
    if (copies[static_cast<size_t>(lane)].empty()) return false;
    end_oldest(lane);
    return true;
  }

  void interrupt() override { lender->interrupt(); }

  void end_oldest(int lane) {
    std::deque<Copy>& own = copies[static_cast<size_t>(lane)];
    // Taken out first: whatever the wait says, it is asked once.
    const Copy copy = std::move(own.front());
    own.pop_front();
    try {
      slots.wait_source(copy.slot);
    } catch (const Error& error) {
      condemn(error.kind(), lender->name_of(copy.record) + ": " + error.what());
    }
  }

  void condemn(ErrorKind kind, std::string why) {
    const std::lock_guard lock(mutex);
    if (!broken) broken = LaneError{kind, std::move(why)};
  }

  void check_healthy() const {
    const std::lock_guard lock(mutex);
    if (broken) throw Error(broken->kind, broken->why);
  }

  const std::shared_ptr<RecordLender> lender;
  std::vector<std::deque<Copy>> copies;  // each touched by its lane, and by nobody else before the lanes have ended
  CudaSlots slots;                       // ends before `copies`: their records must outlive the copies
  mutable std::mutex mutex;
  std::optional<LaneError> broken;
};

CudaDevice::CudaDevice(const RuntimeTable& runtime, int device, std::shared_ptr<RecordLender> lender, int64_t slots,
                       int64_t slot_bytes, int lanes)
    : work_(std::make_shared<Work>(runtime, device, std::move(lender), slots, slot_bytes, lanes)), lanes_(work_) {}

CudaDevice::~CudaDevice() = default;

void CudaDevice::start(int lanes, std::function<void(const JobDone&)> done) {
  if (lanes != work_->slots.lanes()) {
    fail(ErrorKind::invalid, "lanes is ", lanes, ", but the CUDA device was made with ", work_->slots.lanes());
  }
  lanes_.start(lanes, std::move(done));
}
void CudaDevice::submit(const LaneJob& job) {
  lanes_.submit(job);
}
bool CudaDevice::stop(std::chrono::milliseconds limit) {
  return lanes_.stop(limit);
}
int64_t CudaDevice::lane_restarts() const {
  return lanes_.lane_restarts();
}
void* CudaDevice::slot_base() const {
  return work_->slots.slot(0);
}
int64_t CudaDevice::slot_bytes() const {
  return work_->slots.slot_bytes();
}
void CudaDevice::free_memory() {
  const auto return_sources = [&] {
    for (auto& lane : work_->copies) lane.clear();
  };
  try {
    work_->slots.close();
  } catch (...) {
    return_sources();
    throw;
  }
  return_sources();
}

CudaSlots& CudaDevice::slots() {
  return work_->slots;
}
void CudaDevice::condemn(const Error& why) {
  work_->slots.keep_memory();
  work_->condemn(why.kind(), why.what());
}
void CudaDevice::check_healthy() const {
  work_->check_healthy();
}

}  // namespace sida::cuda
