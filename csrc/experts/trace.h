// Trace: what happened when, for a timeline. Costs one relaxed load where it is off.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace sida {

struct TraceEvent {
  enum class Kind : int32_t { copy, stall, compute };
  Kind kind;
  int32_t lane;  // copy: lane; else 0
  int32_t layer;
  int32_t expert;            // copy: expert; compute: number of experts in the wave; stall: experts still missing
  uint64_t batch;            // 0: not announced
  int64_t begin_ns, end_ns;  // steady clock (the one of Python's time.perf_counter_ns)
};

class Trace {
 public:
  static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  bool on() const noexcept { return on_.load(std::memory_order_relaxed); }
  void set_on(bool on) noexcept { on_.store(on, std::memory_order_relaxed); }

  // Kept only while the trace is on; the oldest stay when `limit` events are reached, and the rest are counted.
  void record(const TraceEvent& event) {
    if (!on()) return;
    const std::lock_guard lock(mutex_);
    if (events_.size() < limit) {
      events_.push_back(event);
    } else {
      ++dropped_;
    }
  }

  struct Taken {
    std::vector<TraceEvent> events;
    int64_t dropped = 0;  // that did not fit
  };
  // Gives the events away and forgets them.
  [[nodiscard]] Taken take() {
    const std::lock_guard lock(mutex_);
    return {.events = std::exchange(events_, {}), .dropped = std::exchange(dropped_, 0)};
  }

  static constexpr size_t limit = 1'000'000;

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::vector<TraceEvent> events_;
  int64_t dropped_ = 0;
};

}  // namespace sida
