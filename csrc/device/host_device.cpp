#include "device/host_device.h"

#include <condition_variable>
#include <mutex>
#include <set>
#include <utility>

#include "device/slab.h"

namespace sida {

struct HostDevice::Work final : LaneWork {
  Work(std::shared_ptr<RecordSource> from, int64_t slots, int64_t slot_bytes)
      : source(std::move(from)), slab(slots, slot_bytes) {}

  void run(const LaneJob& job, int) override {
    wait_until_populated(job);
    if (job.kind == LaneJob::Kind::give_back) {
      slab.give_back(job.slot, job.count);
    } else {
      slab.commit(job.slot);
      source->read(job.record, slab.slot(job.slot));
    }
  }

  bool idle(int) override {
    std::unique_lock lock(mutex);
    if (to_populate.empty()) return false;
    const int32_t slot = *to_populate.begin();
    to_populate.erase(to_populate.begin());
    populating.insert(slot);
    lock.unlock();
    try {
      slab.populate(slot);
    } catch (const Error&) {
      // Whoever fills the slot asks the system again, and is told.
    }
    lock.lock();
    populating.erase(slot);
    populated.notify_all();
    return true;
  }

  void interrupt() override {
    {
      const std::lock_guard lock(mutex);
      to_populate.clear();
    }
    source->interrupt();
  }

  // A slot's flag and pages belong to one lane at a time.
  void wait_until_populated(const LaneJob& job) {
    std::unique_lock lock(mutex);
    to_populate.erase(to_populate.lower_bound(job.slot), to_populate.lower_bound(job.slot + job.count));
    populated.wait(lock, [&] {
      const auto first = populating.lower_bound(job.slot);
      return first == populating.end() || *first >= job.slot + job.count;
    });
  }

  const std::shared_ptr<RecordSource> source;
  Slab slab;
  std::mutex mutex;
  std::condition_variable populated;
  std::set<int32_t> to_populate;  // slots
  std::set<int32_t> populating;
};

HostDevice::HostDevice(std::shared_ptr<RecordSource> source, int64_t slots, int64_t slot_bytes, int64_t commit_now)
    : work_(std::make_shared<Work>(std::move(source), slots, slot_bytes)), lanes_(work_) {
  for (int64_t slot = 0; slot < commit_now; ++slot) work_->slab.commit(slot);
}

void HostDevice::start(int lanes, std::function<void(const JobDone&)> done) {
  lanes_.start(lanes, std::move(done));
}
void HostDevice::submit(const LaneJob& job) {
  if (job.kind != LaneJob::Kind::populate) {
    lanes_.submit(job);
    return;
  }
  {
    const std::lock_guard lock(work_->mutex);
    for (int32_t slot = job.slot; slot < job.slot + job.count; ++slot) work_->to_populate.insert(slot);
  }
  lanes_.wake();
}
bool HostDevice::stop(std::chrono::milliseconds limit) {
  return lanes_.stop(limit);
}
int64_t HostDevice::lane_restarts() const {
  return lanes_.lane_restarts();
}
void* HostDevice::slot_base() const {
  return work_->slab.base();
}
int64_t HostDevice::slot_bytes() const {
  return work_->slab.slot_bytes();
}
void HostDevice::free_memory() {
  work_->slab.give_back(0, work_->slab.slots());
}

}  // namespace sida
