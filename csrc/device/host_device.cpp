#include "device/host_device.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "device/slab.h"

namespace sida {
namespace {

using Clock = std::chrono::steady_clock;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

}  // namespace

struct HostDevice::Shared {
  Shared(std::shared_ptr<RecordSource> source, int64_t slots, int64_t slot_bytes)
      : source(std::move(source)), slab(slots, slot_bytes) {}

  const std::shared_ptr<RecordSource> source;
  Slab slab;
  std::mutex mutex;
  std::condition_variable work, ended, populated;
  std::deque<LaneJob> jobs;
  std::set<int32_t> to_populate;  // slots
  std::set<int32_t> populating;
  std::function<void(const JobDone&)> done;
  bool stopping = false;
  bool abandoned = false;  // stop() gave up: nobody is there to be told
  int running = 0;         // lanes that have not ended
  int telling = 0;         // lanes inside `done`
  int64_t restarts = 0;
  std::vector<std::thread> threads;

  // A slot's flag and pages belong to one lane at a time. The lock is held.
  void wait_until_populated(const LaneJob& job, std::unique_lock<std::mutex>& lock) {
    to_populate.erase(to_populate.lower_bound(job.slot), to_populate.lower_bound(job.slot + job.count));
    populated.wait(lock, [&] {
      const auto first = populating.lower_bound(job.slot);
      return first == populating.end() || *first >= job.slot + job.count;
    });
  }

  void populate_one(std::unique_lock<std::mutex>& lock) {
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
  }

  void run(const LaneJob& job) {
    if (job.kind == LaneJob::Kind::give_back) {
      slab.give_back(job.slot, job.count);
    } else {
      slab.commit(job.slot);
      source->read(job.record, slab.slot(job.slot));
    }
  }
};

HostDevice::HostDevice(std::shared_ptr<RecordSource> source, int64_t slots, int64_t slot_bytes)
    : shared_(std::make_shared<Shared>(std::move(source), slots, slot_bytes)) {}

HostDevice::~HostDevice() {
  stop(std::chrono::milliseconds(1000));
}

void HostDevice::start(int lanes, std::function<void(const JobDone&)> done) {
  if (lanes < 1) fail(ErrorKind::invalid, "lanes is ", lanes, ", expected at least 1");
  const std::lock_guard lock(shared_->mutex);
  if (!shared_->threads.empty() || shared_->stopping) fail(ErrorKind::internal, "the lanes were started before");
  shared_->done = std::move(done);
  for (int lane = 0; lane < lanes; ++lane) {
    shared_->threads.emplace_back(run_lane, shared_, lane);
    ++shared_->running;
  }
}

void HostDevice::submit(const LaneJob& job) {
  {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->stopping) return;
    if (job.kind == LaneJob::Kind::populate) {
      for (int32_t slot = job.slot; slot < job.slot + job.count; ++slot) shared_->to_populate.insert(slot);
    } else {
      shared_->jobs.push_back(job);
    }
  }
  if (job.kind == LaneJob::Kind::populate) {
    shared_->work.notify_all();
  } else {
    shared_->work.notify_one();
  }
}

void HostDevice::run_lane(std::shared_ptr<Shared> shared, int lane) {
  std::unique_lock lock(shared->mutex);
  while (true) {
    shared->work.wait(lock, [&] { return shared->stopping || !shared->jobs.empty() || !shared->to_populate.empty(); });
    if (shared->stopping) break;
    if (shared->jobs.empty()) {
      shared->populate_one(lock);
      continue;
    }
    JobDone told{shared->jobs.front(), lane, std::nullopt, 0, 0, 0};
    shared->jobs.pop_front();
    shared->wait_until_populated(told.job, lock);
    lock.unlock();
    told.begin_ns = now_ns();
    bool died = false;
    try {
      shared->run(told.job);
    } catch (const Error& error) {
      told.error = LaneError{error.kind(), error.what()};
    } catch (const std::exception& error) {
      died = true;
      told.error = LaneError{ErrorKind::internal, "lane " + std::to_string(lane) + " died: " + error.what()};
    } catch (...) {
      died = true;
      told.error = LaneError{ErrorKind::internal, "lane " + std::to_string(lane) + " died of an unknown exception"};
    }
    told.end_ns = now_ns();
    told.seconds = static_cast<double>(told.end_ns - told.begin_ns) * 1e-9;
    lock.lock();
    if (died) ++shared->restarts;  // whatever it was, the next job finds a lane
    if (shared->abandoned) break;
    ++shared->telling;
    lock.unlock();
    shared->done(told);
    lock.lock();
    --shared->telling;
    shared->ended.notify_all();
  }
  --shared->running;
  shared->ended.notify_all();
}

bool HostDevice::stop(std::chrono::milliseconds limit) {
  std::vector<std::thread> threads;
  bool all_ended;
  {
    std::unique_lock lock(shared_->mutex);
    if (shared_->abandoned) return false;
    shared_->stopping = true;
    shared_->jobs.clear();
    shared_->to_populate.clear();
    shared_->work.notify_all();
    shared_->source->interrupt();
    all_ended = shared_->ended.wait_for(lock, limit, [&] { return shared_->running == 0; });
    if (!all_ended) {
      shared_->abandoned = true;
      shared_->ended.wait(lock, [&] { return shared_->telling == 0; });
    }
    threads.swap(shared_->threads);
  }
  for (std::thread& thread : threads) {
    if (all_ended) {
      thread.join();
    } else {
      thread.detach();
    }
  }
  return all_ended;
}

int64_t HostDevice::lane_restarts() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->restarts;
}

void* HostDevice::slot_base() const {
  return shared_->slab.base();
}
int64_t HostDevice::slot_bytes() const {
  return shared_->slab.slot_bytes();
}
void HostDevice::free_memory() {
  shared_->slab.give_back(0, shared_->slab.slots());
}

}  // namespace sida
