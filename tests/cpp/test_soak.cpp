// Random batches, tables, budgets, cancels and faults for a while: `test_soak [--seconds N] [--deadline SECONDS]`. What
// is served is right throughout; memory, threads and open files stay as they were. A long run prints them as it goes.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <thread>

#include "base/error.h"
#include "check.h"
#include "experts/transfer.h"
#include "serve.h"
#include "store_file.h"

using namespace sida;
using namespace sida::test;

namespace {

double seconds_to_run = 3;
int64_t deadline_seconds = 60;  // of a wait; more where the whole process may be stopped for a while

int64_t entries(const char* folder) {
  int64_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

int64_t resident_kilobytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  int64_t kilobytes = 0;
  while (status >> word) {
    if (word == "VmRSS:") status >> kilobytes;
  }
  return kilobytes;
}

Faults draw_faults(std::mt19937& random) {
  Faults faults;
  faults.seed = random();
  faults.delay_us_max = random() % 300;
  const auto maybe = [&](int64_t least) { return random() % 2 == 0 ? 0 : least + static_cast<int64_t>(random() % 50); };
  faults.fail_every = maybe(10);
  faults.short_every = maybe(2);
  faults.interrupt_every = maybe(2);
  faults.flip_every = maybe(10);
  faults.die_every = maybe(10);
  return faults;
}

std::vector<int32_t> draw_experts(std::mt19937& random) {
  std::vector<int32_t> experts;
  for (int32_t i = 0; i < 8; ++i) {
    if (random() % 2 == 0) experts.push_back(i);
  }
  return experts;
}

// One consumer of the engine, as a stream of batches with tables that are often wrong.
void consume(TransferEngine& engine, const StoreFile& file, unsigned seed, int batches, std::atomic<int64_t>& served,
             std::atomic<int64_t>& failed) {
  std::mt19937 random(seed);
  for (int i = 0; i < batches; ++i) {
    std::vector<std::vector<int32_t>> wanted(3);
    AnnouncedBatch table;
    for (int32_t layer = 0; layer < 3; ++layer) {
      wanted[layer] = draw_experts(random);
      if (random() % 8 != 0) table.layers.push_back({layer, random() % 3 == 0 ? draw_experts(random) : wanted[layer]});
    }
    const BatchId batch = engine.announce(table);
    try {
      for (int32_t layer = 0; layer < 3; ++layer) {
        if (random() % 20 == 0) break;  // the consumer leaves
        if (random() % 20 == 0) {
          const Demanded abandoned(engine, layer, wanted[layer], batch);
          continue;
        }
        serve(engine, file, layer, wanted[layer], batch);
        ++served;
      }
    } catch (const Error& error) {
      const bool injected =
          error.kind() == ErrorKind::io || error.kind() == ErrorKind::store || error.kind() == ErrorKind::internal;
      if (!injected) std::cerr << error.what() << std::endl;
      CHECK(injected);
      ++failed;
    }
    engine.retire(batch);
    if (random() % 10 == 0) engine.set_budget(1 + random() % 24);
  }
}

}  // namespace

SIDA_TEST(a_long_run_is_right_and_flat) {
  const StoreFile file;
  std::mt19937 random(1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds_to_run);
  std::atomic<int64_t> served{0}, failed{0};
  int64_t files = 0, threads = 0;
  [[maybe_unused]] int64_t kilobytes = 0;
  int rounds = 0;
  const auto begin = std::chrono::steady_clock::now();
  const std::chrono::duration<double> every(std::max(1.0, seconds_to_run / 20));
  auto next_line = begin + every;
  while (std::chrono::steady_clock::now() < end || rounds < 5) {
    {
      EngineOptions options{static_cast<int64_t>(1 + random() % 24)};
      options.lanes = static_cast<int>(1 + random() % 4);
      options.eviction = std::vector<std::string>{"fifo", "lru", "lfu", "next_use"}[random() % 4];
      options.faults = draw_faults(random);
      options.wait_deadline = std::chrono::seconds(deadline_seconds);
      options.read_bytes = 4096 * static_cast<int64_t>(random() % 3);
      TransferEngine engine(file.open(), options);
      std::vector<std::thread> consumers;
      for (int i = 0; i < 2; ++i) {
        consumers.emplace_back(consume, std::ref(engine), std::cref(file), random(), 40, std::ref(served),
                               std::ref(failed));
      }
      for (std::thread& consumer : consumers) consumer.join();
      const LayerCounters sum = total(engine.stats());
      CHECK_EQ(sum.unique, sum.hits + sum.late + sum.misses);
    }
    if (++rounds == 4) {  // by now everything has been seen once
      files = entries("/proc/self/fd");
      threads = entries("/proc/self/task");
      kilobytes = resident_kilobytes();
    }
    if (std::chrono::steady_clock::now() >= next_line) {
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
      std::cout << static_cast<int>(passed.count()) << " s: " << rounds << " engines, " << served << " layers served, "
                << failed << " errors raised, " << resident_kilobytes() << " kB, " << entries("/proc/self/fd")
                << " files, " << entries("/proc/self/task") << " threads" << std::endl;
      next_line += std::chrono::duration_cast<std::chrono::steady_clock::duration>(every);
    }
  }
  CHECK(served > 0);
  CHECK(failed > 0);
  CHECK_EQ(entries("/proc/self/fd"), files);
  CHECK(eventually([&] { return entries("/proc/self/task") <= threads; }));
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // whose own memory grows with time
  CHECK(resident_kilobytes() < kilobytes + 16 * 1024);
#endif
  std::cout << rounds << " engines, " << served << " layers served" << std::endl;
}

int main(int argc, char** argv) {
  for (; argc >= 3; argc -= 2) {
    const char *const name = argv[argc - 2], *const value = argv[argc - 1];
    if (std::strcmp(name, "--seconds") == 0) {
      seconds_to_run = std::atof(value);
    } else if (std::strcmp(name, "--deadline") == 0) {
      deadline_seconds = std::atoll(value);
    } else {
      break;  // for run_all
    }
  }
  return run_all(argc, argv);
}
