// The faults that an engine meets, each through the real driver: the right result or a clear error, in bounded time,
// and the next batch is served correctly.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "check.h"
#include "device/host_device.h"
#include "experts/transfer.h"
#include "serve.h"
#include "store_file.h"

using namespace sida;
using namespace sida::test;

namespace {

EngineOptions with(Faults faults, int64_t slots = 4, int lanes = 2) {
  EngineOptions options{slots};
  options.lanes = lanes;
  options.faults = faults;
  options.wait_deadline = std::chrono::milliseconds(120'000);
  return options;
}

// Serves a layer; returns what the error said, or "".
std::string try_serve(TransferEngine& engine, const StoreFile& file, int32_t layer, const std::vector<int32_t>& experts,
                      ErrorKind* kind = nullptr) {
  try {
    serve(engine, file, layer, experts);
  } catch (const Error& error) {
    if (kind != nullptr) *kind = error.kind();
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

SIDA_TEST(short_reads_and_interrupted_calls_change_nothing) {
  const StoreFile file;
  Faults faults;
  faults.short_every = 2;
  faults.interrupt_every = 3;
  TransferEngine engine(file.open(), with(faults));
  for (int round = 0; round < 3; ++round) {
    for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 8));
  }
  CHECK_EQ(total(engine.stats()).failed_loads, 0);
}

SIDA_TEST(reads_that_never_get_on_end_in_an_error) {
  const StoreFile file(1, 2, {8, 32, DType::i8, false});  // one block: half of it is always less than a block
  Faults faults;
  faults.short_every = 1;
  TransferEngine engine(file.open(), with(faults, 2));
  CHECK(contains(try_serve(engine, file, 0, {0}), "less than a block"));
}

SIDA_TEST(a_failed_read_is_raised_by_name_and_tried_again) {
  const StoreFile file;
  Faults faults;
  faults.fail_every = 5;
  TransferEngine engine(file.open(), with(faults, 4, 1));
  int failed = 0, served = 0;
  for (int round = 0; round < 10; ++round) {
    ErrorKind kind{};
    const std::string said = try_serve(engine, file, 1, range(0, 8), &kind);
    if (said.empty()) {
      ++served;
      continue;
    }
    ++failed;
    CHECK(kind == ErrorKind::io);
    CHECK(contains(said, file.path()) && contains(said, "encoder.block.1 expert ") &&
          contains(said, "Input/output error"));
  }
  CHECK(failed > 0);
  CHECK_EQ(total(engine.stats()).failed_loads, failed);
  for (int32_t expert = 0; expert < 8; ++expert) {
    while (!try_serve(engine, file, 2, {expert}).empty()) {
    }
  }
}

SIDA_TEST(a_failed_prefetch_is_counted_and_the_demand_reads_again) {
  const StoreFile file;
  Faults faults;
  faults.fail_every = 2;
  TransferEngine engine(file.open(), with(faults, 8, 1));
  engine.announce({{{0, {1, 2, 3, 4}}}});
  // The fourth read fails after the third has been counted: wait for both counters.
  CHECK(eventually([&] {
    const auto counted = total(engine.stats());
    return counted.loads == 2 && counted.failed_loads == 2;
  }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_EQ(total(engine.stats()).failed_loads, 2);  // and not read in a circle
  std::string said;
  for (int tries = 0; tries < 3; ++tries) said = try_serve(engine, file, 0, {1, 2, 3, 4});
  CHECK_EQ(said, "");
}

SIDA_TEST(a_flipped_bit_is_found_at_every_load) {
  const StoreFile file;
  TransferEngine engine(file.open(), with({}));
  serve(engine, file, 2, {5});
  file.flip_bit(file.offset_of({2, 6}) + 9'999);
  ErrorKind kind{};
  for (int tries = 0; tries < 2; ++tries) {
    const std::string said = try_serve(engine, file, 2, {6}, &kind);
    CHECK(contains(said, file.path()) && contains(said, "encoder.block.2 expert 6") && contains(said, "checksum"));
    CHECK(kind == ErrorKind::store);
  }
  serve(engine, file, 2, {5, 7});
  file.flip_bit(file.offset_of({2, 6}) + 9'999);  // mended
  serve(engine, file, 2, {6});
}

SIDA_TEST(a_bit_flipped_on_the_way_is_found_and_read_again) {
  const StoreFile file;
  Faults faults;
  faults.flip_every = 3;
  TransferEngine engine(file.open(), with(faults, 8, 1));
  int failed = 0;
  for (int32_t expert = 0; expert < 8; ++expert) {
    if (!try_serve(engine, file, 0, {expert}).empty()) ++failed;
  }
  CHECK_EQ(failed, 2);
}

SIDA_TEST(a_truncated_file_is_told_from_a_short_read) {
  const StoreFile file;
  TransferEngine engine(file.open(), with({}, 2));
  serve(engine, file, 0, {0});
  file.truncate(file.offset_of({2, 7}) + 5000);
  const std::string said = try_serve(engine, file, 2, {7});
  CHECK(contains(said, "encoder.block.2 expert 7") && contains(said, "truncated while it was open"));
  serve(engine, file, 2, {6});
  file.truncate(100);
  CHECK(contains(try_serve(engine, file, 1, {1}), "truncated while it was open"));
}

SIDA_TEST(a_file_replaced_by_name_does_not_disturb_the_open_one) {
  const StoreFile file;
  TransferEngine engine(file.open(), with({}, 2));
  serve(engine, file, 0, {0});
  const std::string moved = file.path() + ".old";
  std::filesystem::rename(file.path(), moved);
  std::ofstream(file.path()) << "something else";
  serve(engine, file, 1, range(0, 8));
  std::filesystem::rename(moved, file.path());
}

SIDA_TEST(a_file_overwritten_in_place_is_refused) {
  const StoreFile file;
  TransferEngine engine(file.open(), with({}, 2));
  file.write(file.offset_of({1, 0}), std::string(static_cast<size_t>(file.layout().format.record_bytes()), 'x'));
  CHECK(contains(try_serve(engine, file, 1, {0}), "does not match its checksum"));
  serve(engine, file, 1, {1});
}

SIDA_TEST(a_disk_a_hundred_times_slower_costs_time_only) {
  const StoreFile file;
  Faults faults;
  faults.delay_us_min = faults.delay_us_max = 5'000;
  TransferEngine engine(file.open(), with(faults, 3, 3));
  const BatchId batch = engine.announce({{{0, range(0, 4)}, {1, range(4, 8)}}});
  serve(engine, file, 0, range(0, 4), batch);
  serve(engine, file, 1, range(4, 8), batch);
  CHECK(engine.stats().read_seconds >= 8 * 0.005);
}

SIDA_TEST(copies_end_in_any_order) {
  const StoreFile file;
  Faults faults;
  faults.seed = 11;
  faults.delay_us_max = 3'000;
  for (const int64_t slots : {2, 5, 12}) {
    TransferEngine engine(file.open(), with(faults, slots, 4));
    for (int round = 0; round < 4; ++round) {
      const BatchId batch = engine.announce({{{0, range(0, 4)}, {1, range(2, 7)}, {2, range(1, 8)}}});
      for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(layer, 8), batch);
      engine.retire(batch);
    }
  }
}

SIDA_TEST(a_dying_lane_is_an_error_and_is_replaced) {
  const StoreFile file;
  Faults faults;
  faults.die_every = 4;
  TransferEngine engine(file.open(), with(faults, 8, 1));
  int died = 0;
  for (int32_t expert = 0; expert < 8; ++expert) {
    ErrorKind kind{};
    const std::string said = try_serve(engine, file, 0, {expert}, &kind);
    if (said.empty()) continue;
    ++died;
    CHECK(contains(said, "lane 0 died") && kind == ErrorKind::internal);
  }
  CHECK_EQ(died, 2);
  CHECK_EQ(engine.stats().lane_restarts, 2);
  engine.reset_stats();
  CHECK_EQ(engine.stats().lane_restarts, 0);
  serve(engine, file, 0, {0, 1, 2});
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // which take memory of their own at any time
// What the limit RLIMIT_DATA counts of this process.
rlim_t data_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "VmData:") {
      rlim_t kilobytes = 0;
      status >> kilobytes;
      return kilobytes << 10;
    }
  }
  return 0;
}

SIDA_TEST(memory_that_the_system_refuses_is_an_error) {
  const StoreFile file(1, 4, {512, 2048, DType::f32, false});  // records of 8 MiB
  TransferEngine engine(file.open(), with({}, 4));
  serve(engine, file, 0, {0});
  rlimit before{};
  getrlimit(RLIMIT_DATA, &before);
  const rlimit little{data_bytes() + (4 << 20), before.rlim_max};  // enough for everything but a slot
  setrlimit(RLIMIT_DATA, &little);
  std::string said = try_serve(engine, file, 0, {1});
  setrlimit(RLIMIT_DATA, &before);
  CHECK(contains(said, "the system refused") && contains(said, "expert slot"));
  serve(engine, file, 0, range(0, 4));
}
#endif

SIDA_TEST(address_space_that_the_system_refuses_is_an_error) {
  const StoreFile file;
  class NoSource final : public RecordSource {
    void read(int64_t, void*) override {}
  };
  CHECK_THROWS(HostDevice(std::make_shared<NoSource>(), int64_t{1} << 40, int64_t{1} << 21), Error, "cannot reserve");
}

SIDA_TEST(a_budget_shrunk_below_what_is_in_flight) {
  const StoreFile file;
  GatedEngine gated(file, with({}, 8, 4));
  TransferEngine& engine = gated.engine;
  const Demanded demand(engine, 0, range(0, 8));
  CHECK(eventually([&] { return gated.gate->begun() == 4; }));  // four lanes read
  CHECK_EQ(engine.stats().committed_slots, 4);
  engine.set_budget(1);
  gated.gate->open();
  size_t served = 0;
  while (true) {
    const Wave wave = engine.next_wave(demand.id);
    if (wave.experts.empty()) break;
    served += wave.experts.size();
    for (size_t i = 0; i < wave.experts.size(); ++i) {
      CHECK(file.holds(slot_of(engine, wave.slots[i]), {0, wave.experts[i]}));
    }
    engine.release(demand.id, wave);
  }
  CHECK_EQ(served, 8u);
  CHECK(eventually([&] { return engine.stats().committed_slots == 1; }));
}

SIDA_TEST(a_consumer_that_leaves_in_the_middle) {
  const StoreFile file;
  Faults faults;
  faults.delay_us_max = 2'000;
  TransferEngine engine(file.open(), with(faults, 4, 3));
  for (int round = 0; round < 20; ++round) {
    const BatchId batch = engine.announce({{{0, range(0, 6)}, {1, range(0, 6)}}});
    const Demanded demand(engine, 0, range(0, 6), batch);
    const Wave wave = engine.next_wave(demand.id);
    CHECK(!wave.experts.empty());
    if (round % 2 == 0) engine.retire(batch);  // and leaves without release: finish() must do
  }
  for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 8));
}

SIDA_TEST(ctrl_c_in_the_middle_of_a_batch) {
  const StoreFile file;
  GatedEngine gated(file, with({}, 2, 1));
  TransferEngine& engine = gated.engine;
  gated.gate->let(2);
  {
    const Demanded demand(engine, 0, range(0, 8));
    std::atomic<bool> pressed{false};
    std::thread user([&] { pressed = eventually([&] { return gated.gate->begun() == 3; }); });
    const auto run = [&] {
      while (true) {
        const Wave wave = engine.next_wave(demand.id, [&] { return pressed.load(); });
        if (wave.experts.empty()) return;
        engine.release(demand.id, wave);
      }
    };
    CHECK_THROWS(run(), Error, "interrupted");
    user.join();
  }
  gated.gate->open();
  serve(engine, file, 1, range(0, 4));
}

SIDA_TEST(a_forked_child_is_told) {
  const StoreFile file;
  auto engine = std::make_unique<TransferEngine>(file.open(), with({}));
  serve(*engine, file, 0, range(0, 8));
  const pid_t child = ::fork();
  if (child == 0) {
    int wrong = 0;
    try {
      (void)engine->demand(0, range(0, 1));
      wrong |= 1;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::closed || !contains(error.what(), "cannot be used in its fork")) wrong |= 2;
    }
    try {
      engine->close();  // as at interpreter exit
      engine.reset();
    } catch (const Error&) {
      wrong |= 4;
    }
    ::_exit(wrong);
  }
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
  serve(*engine, file, 1, range(0, 8));
}

SIDA_TEST(close_during_copies) {
  const StoreFile file;
  Faults faults;
  faults.delay_us_min = faults.delay_us_max = 3'600'000'000;
  for (int lanes = 1; lanes <= 4; ++lanes) {
    TransferEngine engine(file.open(), with(faults, 8, lanes));
    engine.announce({{{0, range(0, 8)}}});
    const DemandId demand = engine.demand(1, range(0, 8));
    engine.close();
    CHECK_THROWS(engine.next_wave(demand), Error, "closed");
    engine.finish(demand);
  }
}

// A lane that hangs where nothing can wake it (a dead disk) is left behind; what it writes to stays.
SIDA_TEST(a_lane_that_hangs_does_not_hold_up_the_end) {
  class Stuck final : public RecordSource {
   public:
    std::atomic<bool> free{false}, done{false};
    void read(int64_t, void* into) override {
      while (!free) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      static_cast<char*>(into)[0] = 1;
      done = true;
    }
  };
  const StoreFile file;
  const auto stuck = std::make_shared<Stuck>();
  EngineOptions options = with({}, 2, 1);
  options.wait_deadline = std::chrono::milliseconds(50);
  {
    TransferEngine engine(file.open(), std::make_shared<HostDevice>(stuck, 24, file.layout().format.record_bytes()),
                          options);
    const DemandId demand = engine.demand(0, range(0, 1));
    CHECK_THROWS(engine.next_wave(demand), Error, "waited 50 ms");
    engine.finish(demand);
    CHECK_THROWS(engine.close(), Error, "a lane did not end");
    engine.close();
  }
  stuck->free = true;
  CHECK(eventually([&] { return stuck->done.load(); }));
}

SIDA_TEST(everything_at_once) {
  const StoreFile file;
  for (const uint64_t seed : {1, 2, 3}) {
    Faults faults;
    faults.seed = seed;
    faults.delay_us_max = 300;
    faults.fail_every = 17;
    faults.short_every = 5;
    faults.interrupt_every = 7;
    faults.flip_every = 23;
    faults.die_every = 41;
    TransferEngine engine(file.open(), with(faults, 5, 3));
    std::atomic<int> served{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 3; ++thread) {
      threads.emplace_back([&, thread] {
        std::mt19937 random(static_cast<unsigned>(seed * 10 + thread));
        for (int i = 0; i < 30; ++i) {
          const BatchId batch = engine.announce({{{static_cast<int32_t>(random() % 3), range(0, 5)}}});
          const int32_t begin = static_cast<int32_t>(random() % 8);
          if (try_serve(engine, file, static_cast<int32_t>(random() % 3), range(begin, 8)).empty()) ++served;
          if (random() % 4 == 0) engine.set_budget(1 + random() % 8);
          engine.retire(batch);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(served > 0);
  }
}

int main(int argc, char** argv) {
  return run_all(argc, argv);
}
