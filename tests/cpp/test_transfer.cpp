// TransferEngine on a host device and a real file: waves, budgets, prefetches, threads, tiers, closing.
#include "experts/transfer.h"

#include <atomic>
#include <random>
#include <thread>

#include "check.h"
#include "device/host_device.h"
#include "device/lane_pool.h"
#include "device/thread_slice.h"
#include "experts/tier_source.h"
#include "serve.h"
#include "store_file.h"

using namespace sida;
using namespace sida::test;

namespace {

EngineOptions options(int64_t slots, int lanes = 2) {
  EngineOptions made{slots};
  made.lanes = lanes;
  made.wait_deadline = std::chrono::milliseconds(120'000);
  return made;
}

}  // namespace

SIDA_TEST(demand_brings_the_right_bytes_for_every_expert) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(24));
  for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 8));
  const LayerCounters first = total(engine.stats());
  CHECK_EQ(first.misses, 24);
  CHECK_EQ(first.bytes_read, 24 * file.layout().format.record_bytes());
  for (int32_t layer = 0; layer < 3; ++layer) CHECK_EQ(serve(engine, file, layer, range(0, 8)), 1);
  CHECK_EQ(total(engine.stats()).hits, 24);
  CHECK_EQ(total(engine.stats()).loads, 24);
}

SIDA_TEST(one_slot_serves_a_whole_layer_in_waves) {
  for (const char* eviction : {"fifo", "lru", "lfu", "next_use"}) {
    const StoreFile file;
    EngineOptions one = options(1, 4);
    one.eviction = eviction;
    TransferEngine engine(file.open(), one);
    CHECK_EQ(serve(engine, file, 1, range(0, 8)), 8);
    CHECK_EQ(serve(engine, file, 2, range(0, 8)), 8);
    CHECK_EQ(engine.stats().peak_slots, 1);
  }
}

SIDA_TEST(resident_experts_come_first_and_are_pinned_until_released) {
  const StoreFile file;
  GatedEngine gated(file, options(2, 1));
  TransferEngine& engine = gated.engine;
  gated.gate->let(1);
  serve(engine, file, 0, {3});
  const Demanded demand(engine, 0, {1, 2, 3});
  const Wave first = engine.next_wave(demand.id);
  CHECK_EQ(first.experts.size(), 1u);
  CHECK_EQ(first.experts[0], 3);
  gated.gate->open();
  const Wave second = engine.next_wave(demand.id);  // the other slot, while the first is held
  CHECK_EQ(second.experts.size(), 1u);
  CHECK(file.holds(slot_of(engine, first.slots[0]), {0, 3}));
  engine.release(demand.id, second);
  const Wave third = engine.next_wave(demand.id);
  CHECK_EQ(third.experts.size(), 1u);
  CHECK(file.holds(slot_of(engine, first.slots[0]), {0, 3}));
  CHECK(engine.next_wave(demand.id).experts.empty());
}

SIDA_TEST(a_layer_computes_in_the_order_of_arrival) {
  const StoreFile file;
  for (const int32_t last : {0, 1, 2}) {
    GatedEngine gated(file, options(3, 3));
    TransferEngine& engine = gated.engine;
    gated.gate->hold(last);
    gated.gate->open();
    const Demanded demand(engine, 0, {0, 1, 2});
    std::set<int32_t> left{0, 1, 2};
    while (left.size() > 1) {
      const Wave wave = engine.next_wave(demand.id);
      for (const int32_t expert : wave.experts) left.erase(expert);
      if (wave.experts.empty() || left.count(last) == 0) break;
    }
    CHECK_EQ(left.size(), 1u);
    CHECK_EQ(left.count(last), 1u);
    gated.gate->let_go(last);
    CHECK(engine.next_wave(demand.id).experts == std::vector<int32_t>{last});
  }
}

SIDA_TEST(many_threads_share_one_slot_without_a_deadlock) {
  const StoreFile file;
  for (const int64_t slots : {1, 2, 5}) {
    TransferEngine engine(file.open(), options(slots, 3));
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&, thread] {
        std::mt19937 random(static_cast<unsigned>(thread));
        for (int i = 0; i < 12; ++i) {
          const int32_t begin = static_cast<int32_t>(random() % 8);
          serve(engine, file, static_cast<int32_t>(random() % 3), range(begin, 8));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    const EngineStats stats = engine.stats();
    CHECK(stats.peak_slots <= slots);
    const LayerCounters sum = total(stats);
    CHECK_EQ(sum.unique, sum.hits + sum.late + sum.misses);
  }
}

SIDA_TEST(one_thread_waits_for_its_demands_in_any_order) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(1));
  const Demanded older(engine, 0, {0}), newer(engine, 1, {1});
  const Wave wave = engine.next_wave(newer.id);  // though the only slot was first filled for the older one
  CHECK_EQ(wave.experts.size(), 1u);
  CHECK(file.holds(slot_of(engine, wave.slots[0]), {1, 1}));
  engine.release(newer.id, wave);
  CHECK_EQ(engine.next_wave(older.id).experts.size(), 1u);
}

SIDA_TEST(announced_experts_are_there_before_they_are_demanded) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(12));
  const BatchId batch = engine.announce({{{0, {1, 2}}, {1, {3, 4}}, {2, {5}}}});
  CHECK(eventually([&] { return total(engine.stats()).loads == 5; }));
  serve(engine, file, 0, {1, 2}, batch);
  serve(engine, file, 1, {3, 4}, batch);
  serve(engine, file, 2, {5}, batch);
  engine.retire(batch);
  const LayerCounters sum = total(engine.stats());
  CHECK_EQ(sum.hits, 5);
  CHECK_EQ(sum.useful_prefetches, 5);
  CHECK_EQ(sum.misses + sum.late, 0);
}

SIDA_TEST(a_passed_prefetch_is_cancelled_before_it_starts) {
  const StoreFile file;
  GatedEngine gated(file, options(12, 1));
  TransferEngine& engine = gated.engine;
  const BatchId batch = engine.announce({{{0, {1, 2, 3, 4}}, {1, {1, 2, 3, 4}}}});
  CHECK(eventually([&] { return gated.gate->begun() == 1; }));
  engine.retire(batch);  // one read is under way, seven are not
  CHECK_EQ(total(engine.stats()).cancelled_prefetches, 7);
  gated.gate->open();
  serve(engine, file, 2, {0});
  CHECK_EQ(total(engine.stats()).loads, 2);
  CHECK_EQ(gated.gate->begun(), 2);
}

SIDA_TEST(demand_overtakes_prefetch) {
  const StoreFile file;
  GatedEngine gated(file, options(20, 1));
  TransferEngine& engine = gated.engine;
  engine.announce({{{0, range(0, 8)}, {1, range(0, 8)}}});
  CHECK(eventually([&] { return gated.gate->begun() == 1; }));
  const Demanded demand(engine, 2, {7});
  gated.gate->let(2);  // the read under way, and then not one of the fifteen that were announced before
  const Wave wave = engine.next_wave(demand.id);
  CHECK_EQ(wave.experts.size(), 1u);
  CHECK_EQ(total(engine.stats()).loads, 2);
}

SIDA_TEST(a_wrong_table_costs_time_only) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(3));
  for (int round = 0; round < 10; ++round) {
    const BatchId batch = engine.announce({{{0, {0, 1}}, {1, {2, 3}}, {2, {4, 5}}}});
    for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, {6, 7, 1}, batch);
    engine.retire(batch);
  }
}

SIDA_TEST(budget_is_refused_below_one_slot_with_the_smallest_that_works) {
  const StoreFile file;
  const std::string smallest = std::to_string(file.layout().format.record_bytes()) + " bytes";
  CHECK_THROWS(TransferEngine(file.open(), options(0)), Error, smallest);
  CHECK_THROWS(TransferEngine(file.open(), options(25)), Error, "25 slots, expected 1 to 24");
  TransferEngine engine(file.open(), options(2));
  CHECK_THROWS(engine.set_budget(0), Error, smallest);
  CHECK_THROWS(engine.set_budget(-1), Error, smallest);
  CHECK_EQ(engine.budget(), 2);
}

SIDA_TEST(bad_options_and_arguments_are_refused_by_name) {
  const StoreFile file;
  EngineOptions bad = options(2);
  bad.eviction = "random";
  CHECK_THROWS(TransferEngine(file.open(), bad), Error, "'random', expected fifo, lru, lfu or next_use");
  CHECK_THROWS(TransferEngine(file.open(), options(2, 0)), Error, "lanes is 0");
  bad = options(2);
  bad.read_bytes = 100;
  CHECK_THROWS(TransferEngine(file.open(), bad), Error, "read_bytes is 100");
  bad = options(2);
  bad.faults.fail_every = -1;
  CHECK_THROWS(TransferEngine(file.open(), bad), Error, "faults");
  TransferEngine engine(file.open(), options(2));
  CHECK_THROWS(engine.demand(3, range(0, 1)), Error, "no MoE layer 3");
  CHECK_THROWS(engine.demand(0, range(7, 9)), Error, "no expert 8");
  CHECK_THROWS(engine.demand(0, std::vector<int32_t>{1, 1}), Error, "twice");
  CHECK_THROWS(engine.demand(0, range(0, 1), 7), Error, "batch 7 was not announced");
  CHECK_THROWS(engine.announce({{{0, {9}}}}), Error, "no expert 9");
  CHECK_THROWS(engine.next_wave(99), Error, "demand 99 is not under way");
  serve(engine, file, 0, range(0, 8));
}

SIDA_TEST(budget_shrinks_while_pinned_and_gives_memory_back) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(16));
  const Demanded demand(engine, 0, range(0, 8));
  std::vector<Wave> waves;
  for (size_t have = 0; have < 8;) {
    waves.push_back(engine.next_wave(demand.id));
    have += waves.back().experts.size();
  }
  serve(engine, file, 1, range(0, 8));
  CHECK_EQ(engine.stats().committed_slots, 16);
  engine.set_budget(2);
  CHECK(eventually([&] { return engine.stats().committed_slots == 8; }));  // what is pinned stays
  for (const Wave& wave : waves) {
    for (size_t i = 0; i < wave.experts.size(); ++i) {
      CHECK(file.holds(slot_of(engine, wave.slots[i]), {0, wave.experts[i]}));
    }
    engine.release(demand.id, wave);
  }
  CHECK(eventually([&] { return engine.stats().committed_slots == 2; }));
  CHECK(serve(engine, file, 2, range(0, 8)) >= 4);
  engine.set_budget(24);
  for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 8));
  CHECK_EQ(engine.stats().committed_slots, 24);
}

SIDA_TEST(memory_asked_for_at_the_start_counts_and_is_given_back) {
  for (int round = 0; round < 20; ++round) {
    const StoreFile file;
    EngineOptions populated = options(20, 1 + round % 3);
    populated.populate = true;
    TransferEngine engine(file.open(), populated);
    CHECK_EQ(engine.stats().committed_slots, 20);
    if (round % 4 == 0) serve(engine, file, 2, range(0, 8));  // while slots are still being backed, or not
    if (round % 2 == 0) {
      engine.set_budget(3);
      CHECK(eventually([&] { return engine.stats().committed_slots == 3; }));
    }
    serve(engine, file, 1, range(0, 8));
    engine.set_budget(24);
    for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 8));
    CHECK_EQ(engine.stats().committed_slots, 24);
    CHECK_EQ(engine.stats().peak_slots, 24);
  }
}

SIDA_TEST(budgets_change_under_load) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(24, 3));
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    std::mt19937 random(5);
    while (!stop) {
      engine.set_budget(1 + random() % 24);
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    }
  });
  std::mt19937 random(6);
  for (int round = 0; round < 60; ++round) {
    const BatchId batch = engine.announce({{{0, range(0, 4)}, {1, range(2, 6)}, {2, range(4, 8)}}});
    for (int32_t layer = 0; layer < 3; ++layer) {
      const int32_t begin = static_cast<int32_t>(random() % 8);
      serve(engine, file, layer, range(begin, 8), batch);
    }
    engine.retire(batch);
  }
  stop = true;
  changer.join();
}

SIDA_TEST(a_wait_ends_at_its_deadline_with_the_reason) {
  const StoreFile file;
  EngineOptions hung = options(2, 1);
  hung.faults.delay_us_min = hung.faults.delay_us_max = 3'600'000'000;
  hung.wait_deadline = std::chrono::milliseconds(60);
  TransferEngine engine(file.open(), hung);
  const Demanded demand(engine, 1, {4, 5});
  CHECK_THROWS(engine.next_wave(demand.id), Error, "waited 60 ms for 2 experts of encoder.block.1 (first: expert 4)");
  CHECK_THROWS(engine.next_wave(demand.id), Error, "1 copies are under way, 1 are queued");
}

SIDA_TEST(a_caller_that_holds_every_slot_is_told) {
  const StoreFile file;
  EngineOptions one = options(1);
  one.wait_deadline = std::chrono::milliseconds(60);
  TransferEngine engine(file.open(), one);
  const Demanded demand(engine, 0, {0, 1});
  const Wave wave = patient_wave(engine, demand.id);  // a read may take longer than the deadline
  CHECK_EQ(wave.experts.size(), 1u);
  CHECK_THROWS(engine.next_wave(demand.id), Error, "1 are pinned by waves that were not released");
  engine.release(demand.id, wave);
  CHECK_EQ(patient_wave(engine, demand.id).experts.size(), 1u);
}

SIDA_TEST(an_interrupt_ends_the_wait) {
  const StoreFile file;
  GatedEngine gated(file, options(2, 1));
  TransferEngine& engine = gated.engine;
  {
    const Demanded demand(engine, 0, {0});
    int asked = 0;
    CHECK_THROWS(engine.next_wave(demand.id, [&] { return ++asked == 2; }), Error, "interrupted while encoder.block.0");
    CHECK_EQ(asked, 2);
  }
  gated.gate->open();
  serve(engine, file, 0, {0, 1});  // and the engine goes on
}

SIDA_TEST(close_wakes_waiters_and_is_idempotent) {
  const StoreFile file;
  EngineOptions hung = options(2, 1);
  hung.faults.delay_us_min = hung.faults.delay_us_max = 3'600'000'000;
  TransferEngine engine(file.open(), hung);
  std::thread waiter([&] {
    const Demanded demand(engine, 0, {0});
    CHECK_THROWS(engine.next_wave(demand.id), Error, "closed");
  });
  CHECK(eventually([&] { return total(engine.stats()).requested == 1; }));
  engine.close();
  engine.close();
  waiter.join();
  CHECK_THROWS(engine.demand(0, range(0, 1)), Error, "closed");
  CHECK_THROWS(engine.announce({}), Error, "closed");
  CHECK_THROWS(engine.set_budget(1), Error, "closed");
  CHECK_EQ(total(engine.stats()).requested, 1);
}

SIDA_TEST(close_waits_for_what_is_computed_from) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(2));
  const DemandId demand = engine.demand(0, range(0, 1));
  const Wave wave = engine.next_wave(demand);
  std::thread closer([&] { engine.close(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(file.holds(slot_of(engine, wave.slots[0]), {0, 0}));
  engine.finish(demand);
  closer.join();
}

SIDA_TEST(two_tiers_run_on_the_same_engine) {
  const StoreFile file;
  const auto store = file.open();
  const auto pool = std::make_shared<TransferEngine>(store, options(10));
  const auto top =
      std::make_shared<HostDevice>(std::make_shared<TierSource>(pool, 8), 24, pool->format().record_bytes());
  TransferEngine engine(store, top, options(3));
  for (int round = 0; round < 3; ++round) {
    for (int32_t layer = 0; layer < 3; ++layer) serve(engine, file, layer, range(0, 3));
  }
  CHECK_EQ(total(pool->stats()).loads, 9);    // each was read from the disk once
  CHECK_EQ(total(engine.stats()).loads, 27);  // and copied up every time
  engine.close();
  pool->close();
}

SIDA_TEST(a_layer_that_would_wait_is_served_by_low_bit_copies) {
  const StoreFile file;
  GatedEngine gated(file, options(24, 1));
  TransferEngine& engine = gated.engine;
  engine.set_max_low_bit(0.5);
  gated.gate->let(1);
  serve(engine, file, 0, {0});
  const std::vector<int32_t> experts{0, 1, 2, 3};
  const std::vector<int64_t> choices{10, 1, 9, 5};
  const DemandId demand = engine.demand(0, experts, 0, choices);
  const Wave first = engine.next_wave(demand);
  CHECK(!first.low_bit && first.experts == (std::vector<int32_t>{0}));
  engine.release(demand, first);
  const Wave late = engine.next_wave(demand);  // 12 of 25: not expert 2, and 1 is being read
  CHECK(late.low_bit && late.slots.empty() && late.experts == (std::vector<int32_t>{3, 1}));
  gated.gate->open();
  const Wave last = engine.next_wave(demand);
  CHECK(!last.low_bit && last.experts == (std::vector<int32_t>{2}));
  CHECK(engine.next_wave(demand).experts.empty());
  engine.finish(demand);
  CHECK(eventually([&] { return total(engine.stats()).loads == 4; }));  // what copies served is read all the same
  CHECK_EQ(total(engine.stats()).choices, 25);
  CHECK_EQ(total(engine.stats()).low_bit_choices, 6);
  CHECK_EQ(serve(engine, file, 0, experts), 1);
  CHECK_THROWS(engine.set_max_low_bit(1.5), Error, "max_low_bit is 1.5, expected a share of 0 to 1");
  CHECK_THROWS(engine.set_max_low_bit(-0.5), Error, "max_low_bit is -0.5");
}

// Whatever the reads take: what is not there when a layer begins is late, and is there for the next layer.
SIDA_TEST(a_settled_engine_decides_by_the_demands_alone) {
  std::string expected;
  for (const int64_t delay_us : {0, 300, 3000}) {
    const StoreFile file;
    EngineOptions slow = options(3, 1);
    slow.faults = {.seed = 1, .delay_us_max = delay_us, .delay_us_min = delay_us / 2};
    TransferEngine engine(file.open(), slow);
    engine.set_settled(true);
    engine.set_max_low_bit(0.4);
    std::string order;
    std::mt19937 random(5);
    for (int step = 0; step < 60; ++step) {
      const auto layer = static_cast<int32_t>(random() % 3), expert = static_cast<int32_t>(random() % 4);
      const std::vector<int32_t> experts{expert, expert + 1};
      const DemandId demand = engine.demand(layer, experts, 0, std::vector<int64_t>{1, 2});
      while (true) {
        const Wave wave = engine.next_wave(demand);
        if (wave.experts.empty()) break;
        // The two arrive one by one or together, with time; which of them are late does not change.
        if (wave.low_bit) order += std::to_string(step) + ":" + std::to_string(wave.experts.size()) + " ";
        if (!wave.low_bit) engine.release(demand, wave);
      }
      engine.finish(demand);
    }
    if (expected.empty()) expected = order;
    CHECK(!order.empty() && order == expected);
    CHECK(total(engine.stats()).low_bit_choices <= total(engine.stats()).choices * 4 / 10);
  }
}

SIDA_TEST(all_experts_are_loaded_where_all_have_a_slot) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(24));
  engine.load_all();
  CHECK_EQ(total(engine.stats()).loads, 24);
  for (int32_t layer = 0; layer < 3; ++layer) CHECK_EQ(serve(engine, file, layer, range(0, 8)), 1);
  CHECK_EQ(total(engine.stats()).hits, 24);
  TransferEngine small(file.open(), options(23));
  CHECK_THROWS(small.load_all(), Error, "23 slots, expected one for each of the 24 experts");
}

SIDA_TEST(stalls_are_counted_by_layer) {
  const StoreFile file;
  GatedEngine gated(file, options(24, 1));
  TransferEngine& engine = gated.engine;
  {
    const Demanded demand(engine, 1, {0});
    const auto let_it_wait = [&] {  // asked from inside the wait: both clocks run by now
      CHECK(eventually([&] { return gated.gate->begun() == 1; }));
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      gated.gate->open();
      return false;
    };
    CHECK_EQ(engine.next_wave(demand.id, let_it_wait).experts.size(), 1u);
  }
  serve(engine, file, 1, {0});
  const EngineStats stats = engine.stats();
  CHECK(stats.layers[1].stall_seconds >= 0.002);
  CHECK_EQ(stats.stalls[1].size(), 1u);
  CHECK(stats.stalls[0].empty());
  CHECK(stats.read_seconds >= 0.002);
  engine.reset_stats();
  CHECK_EQ(total(engine.stats()).stall_seconds, 0.0);
  CHECK_EQ(total(engine.stats()).hits, 0);
}

SIDA_TEST(trace_tells_copies_and_stalls) {
  const StoreFile file;
  TransferEngine engine(file.open(), options(4));
  engine.trace().set_on(true);
  serve(engine, file, 2, {1, 5});
  int copies = 0;
  const Trace::Taken taken = engine.trace().take();
  for (const TraceEvent& event : taken.events) {
    CHECK_EQ(event.layer, 2);
    CHECK(event.begin_ns <= event.end_ns);
    if (event.kind == TraceEvent::Kind::copy) ++copies;
  }
  CHECK_EQ(copies, 2);
  CHECK_EQ(taken.dropped, 0);
}

SIDA_TEST(a_lane_runs_as_soon_as_it_wakes_up) {
  struct Work final : LaneWork {
    void run(const LaneJob&, int) override { slice = thread_slice(); }
    void interrupt() override {}
    std::optional<std::chrono::nanoseconds> slice;
  };
  const auto usual = thread_slice();
  if (!usual) return;  // Linux before 6.12
  const auto work = std::make_shared<Work>();
  LanePool lanes(work);
  std::atomic<bool> ended = false;
  lanes.start(1, [&](const JobDone&) { ended = true; });
  lanes.submit({.kind = LaneJob::Kind::fill, .slot = 0});
  while (!ended) std::this_thread::yield();
  CHECK(work->slice.has_value());
  CHECK(*work->slice < *usual);
  CHECK(thread_slice() == usual);  // of the lane alone
}

int main(int argc, char** argv) {
  return run_all(argc, argv);
}
