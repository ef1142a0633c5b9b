#include "device/lane_pool.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device/thread_slice.h"

namespace sida {
namespace {

using Clock = std::chrono::steady_clock;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Runs `body`; what it throws becomes an error. `died` tells whether it was anything but an Error.
template <class Body>
std::optional<LaneError> error_of(const Body& body, int lane, bool* died) {
  *died = false;
  try {
    body();
    return std::nullopt;
  } catch (const Error& error) {
    return LaneError{error.kind(), error.what()};
  } catch (const std::exception& error) {
    *died = true;
    return LaneError{ErrorKind::internal, "lane " + std::to_string(lane) + " died: " + error.what()};
  } catch (...) {
    *died = true;
    return LaneError{ErrorKind::internal, "lane " + std::to_string(lane) + " died of an unknown exception"};
  }
}

}  // namespace

struct LanePool::Shared {
  explicit Shared(std::shared_ptr<LaneWork> given) : work(std::move(given)) {}

  const std::shared_ptr<LaneWork> work;
  std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<LaneJob> jobs;
  std::function<void(const JobDone&)> done;
  bool stopping = false;
  bool abandoned = false;  // stop() gave up: nobody is there to be told
  int running = 0;         // lanes that have not ended
  int telling = 0;         // lanes inside `done`
  int64_t restarts = 0, wakes = 0;
  std::vector<std::thread> threads;
};

LanePool::LanePool(std::shared_ptr<LaneWork> work) : shared_(std::make_shared<Shared>(std::move(work))) {}

LanePool::~LanePool() {
  (void)stop(std::chrono::milliseconds(1000));  // a lane that hangs was left behind with all that it uses
}

void LanePool::start(int lanes, std::function<void(const JobDone&)> done) {
  if (lanes < 1) fail(ErrorKind::invalid, "lanes is ", lanes, ", expected at least 1");
  const std::lock_guard lock(shared_->mutex);
  if (!shared_->threads.empty() || shared_->stopping) fail(ErrorKind::internal, "the lanes were started before");
  shared_->done = std::move(done);
  for (int lane = 0; lane < lanes; ++lane) {
    shared_->threads.emplace_back(run_lane, shared_, lane);
    ++shared_->running;
  }
}

void LanePool::submit(const LaneJob& job) {
  {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->stopping) return;
    shared_->jobs.push_back(job);
  }
  shared_->wake.notify_one();
}

void LanePool::wake() {
  {
    const std::lock_guard lock(shared_->mutex);
    ++shared_->wakes;
  }
  shared_->wake.notify_all();
}

void LanePool::run_lane(std::shared_ptr<Shared> shared, int lane) {
  take_short_slice();
  bool died = false, begun = false;
  const auto begin = [&] {
    if (!begun) shared->work->begin(lane);
    begun = true;
  };
  std::unique_lock lock(shared->mutex);
  while (true) {
    while (!shared->stopping && shared->jobs.empty()) {
      const int64_t wakes = shared->wakes;
      lock.unlock();
      bool busy = false;
      error_of(
          [&] {
            begin();
            busy = shared->work->idle(lane);
          },
          lane, &died);
      lock.lock();
      if (died) ++shared->restarts;
      if (busy) continue;
      shared->wake.wait(lock, [&] { return shared->stopping || !shared->jobs.empty() || shared->wakes != wakes; });
    }
    if (shared->stopping) break;
    JobDone told{shared->jobs.front(), lane, std::nullopt, 0, 0, 0};
    shared->jobs.pop_front();
    lock.unlock();
    told.begin_ns = now_ns();
    told.error = error_of(
        [&] {
          begin();
          shared->work->run(told.job, lane);
        },
        lane, &died);
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

bool LanePool::stop(std::chrono::milliseconds limit) {
  std::vector<std::thread> threads;
  bool all_ended;
  {
    std::unique_lock lock(shared_->mutex);
    if (shared_->abandoned) return false;
    shared_->stopping = true;
    shared_->jobs.clear();
    shared_->wake.notify_all();
    shared_->work->interrupt();
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

int64_t LanePool::lane_restarts() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->restarts;
}

}  // namespace sida
