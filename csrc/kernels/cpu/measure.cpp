// Measures the arithmetic peak of the instruction set in force.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/kernels.h"

namespace sida::cpu {

double measure_multiply_add_rate(int threads) {
  if (threads < 1) fail(ErrorKind::invalid, "threads is ", threads, ", expected at least 1");
  using Clock = std::chrono::steady_clock;
  constexpr int64_t rounds = 1 << 20;
  const Kernels& set = kernels();
  std::atomic<int> ready{0};
  std::atomic<float> sink{0.0f};
  std::vector<double> best(threads, 0.0);
  std::vector<std::jthread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      // All begin together: a core that is alone may run at a higher clock.
      ++ready;
      while (ready.load() < threads) std::this_thread::yield();
      for (int i = 0; i < 8; ++i) {
        const auto begin = Clock::now();
        sink = set.multiply_add(rounds);
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        best[thread] = std::max(best[thread], 2.0 * static_cast<double>(rounds * set.multiply_adds) / seconds);
      }
    });
  }
  for (std::jthread& thread : pool) thread.join();
  double rate = 0.0;
  for (const double one : best) rate += one;
  return rate;
}

}  // namespace sida::cpu
