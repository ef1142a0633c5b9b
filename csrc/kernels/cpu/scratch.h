// Working memory of the kernels' drivers, kept from call to call by each calling thread: fresh pages would cost more
// than a small call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace sida::cpu {

inline constexpr int64_t cache_line = 64;

inline int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > capacity_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(cache_line, round_up(count * 4, cache_line))));
      capacity_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

// Takes the thread's scratch for one call. A call nested in this one (a thread pool may run other work in a waiting
// thread) finds none and makes its own.
class ScopedScratch {
 public:
  ScopedScratch() : scratch_(std::exchange(kept(), Scratch())) {}
  ~ScopedScratch() { kept() = std::move(scratch_); }
  ScopedScratch(const ScopedScratch&) = delete;
  ScopedScratch& operator=(const ScopedScratch&) = delete;
  float* floats(int64_t count) { return scratch_.floats(count); }

 private:
  static Scratch& kept() {
    static thread_local Scratch scratch;
    return scratch;
  }
  Scratch scratch_;
};

}  // namespace sida::cpu
