// Residency, rule by rule: small cases that read as the rules do. The simulator covers the rest.
#include "experts/residency.h"

#include <sstream>

#include "check.h"

using namespace sida;

namespace {

// A residency whose copies are done when the test says so.
struct Driver {
  Residency residency;
  std::vector<Command> copies;  // under way

  explicit Driver(int64_t slots, int lanes = 8, Eviction eviction = Eviction::next_use, int prefetch_layers = 1)
      : residency({3, 4, slots, lanes, eviction, prefetch_layers}) {}

  void pump() {
    while (const auto command = residency.next_command()) {
      if (command->kind == Command::Kind::give_back) {
        residency.given_back(command->slot, command->count);
      } else {
        copies.push_back(*command);
      }
    }
  }
  // Layer and expert of the copies that began now, as "0.1 0.2".
  std::string started() {
    const size_t before = copies.size();
    pump();
    std::ostringstream names;
    for (size_t i = before; i < copies.size(); ++i) {
      const Command& copy = copies[i];
      names << (i > before ? " " : "") << copy.expert.layer << "." << copy.expert.index << (copy.prefetch ? "p" : "");
    }
    return names.str();
  }
  void finish_copies() {
    while (!copies.empty()) {
      residency.copy_done(copies.front().slot);
      copies.erase(copies.begin());
      pump();
    }
  }
  DemandId demand(int32_t layer, std::vector<int32_t> experts, BatchId batch = 0, std::vector<int64_t> choices = {}) {
    const DemandId id = residency.demand(layer, experts, batch, choices);
    residency.set_waiting(id, true);
    return id;
  }
  // Demands, waits, computes, releases: the whole life of a layer.
  void serve(int32_t layer, std::vector<int32_t> experts, BatchId batch = 0) {
    const DemandId id = demand(layer, std::move(experts), batch);
    do {
      pump();
      finish_copies();
      residency.release(id, residency.take_ready(id));
    } while (!residency.exhausted(id));
    residency.finish(id);
  }
};

}  // namespace

SIDA_TEST(prefetch_goes_batch_by_batch_layer_by_layer_most_wanted_first) {
  Driver driver(12, 12);
  driver.residency.announce({{{0, {2, 1}}, {2, {3}}}});
  driver.residency.announce({{{0, {1, 0}}, {1, {1}}}});
  CHECK_EQ(driver.started(), "0.2p 0.1p 2.3p 0.0p 1.1p");
}

SIDA_TEST(demand_comes_before_prefetch) {
  Driver driver(12, 1);
  driver.residency.announce({{{0, {0, 1, 2}}}});
  CHECK_EQ(driver.started(), "0.0p");
  driver.demand(2, {3});
  driver.residency.copy_done(driver.copies[0].slot);
  CHECK_EQ(driver.started(), "2.3");
}

SIDA_TEST(waiting_demands_come_before_others_and_older_before_newer) {
  Driver driver(12, 1);
  (void)driver.residency.demand(0, std::vector<int32_t>{0}, 0);  // nobody waits for it
  driver.demand(1, {1});
  driver.demand(2, {2});
  CHECK_EQ(driver.started(), "1.1");
  driver.residency.copy_done(0);
  CHECK_EQ(driver.started(), "2.2");
  driver.residency.copy_done(1);
  CHECK_EQ(driver.started(), "0.0");
}

SIDA_TEST(next_use_evicts_what_is_announced_for_latest) {
  Driver driver(3);
  driver.serve(0, {0, 1, 2});
  driver.residency.announce({{{0, {1}}}});
  driver.residency.announce({{{0, {2}}}});
  driver.demand(1, {0});
  CHECK_EQ(driver.started(), "1.0");
  CHECK_EQ(driver.residency.counters()[0].evictions, 1);
  const DemandId kept = driver.demand(0, {1, 2});  // expert 0, announced by nobody, had to go
  CHECK_EQ(driver.residency.take_ready(kept).experts.size(), 2u);
}

SIDA_TEST(next_use_keeps_what_the_next_layers_want_where_turns_do_not_fit) {
  // Three layers take turns, each wants its two experts every time, and there are four slots: the layer that has just
  // run makes room, so every other run finds its experts.
  Driver driver(4);
  for (int turn = 0; turn < 5; ++turn) {
    for (const int32_t layer : {0, 1, 2}) driver.serve(layer, {0, 1});
  }
  int64_t hits = 0;
  for (const LayerCounters& counters : driver.residency.counters()) hits += counters.hits;
  CHECK_EQ(hits, 12);  // of 24 that the past can tell; LRU and LFU find none
}

SIDA_TEST(next_use_evicts_what_its_layer_wants_seldom) {
  Driver driver(3);
  driver.serve(0, {0, 1});
  for (int turn = 0; turn < 3; ++turn) driver.serve(0, {1});
  driver.serve(1, {2});
  driver.serve(1, {3});  // 1.2 was wanted in each run of its layer so far, 0.0 in one of four
  CHECK_EQ(driver.started(), "");
  const DemandId kept = driver.demand(0, {0, 1});
  CHECK_EQ(driver.residency.take_ready(kept).experts.size(), 1u);
  CHECK_EQ(driver.started(), "0.0");
}

SIDA_TEST(lru_lfu_and_fifo_evict_as_they_are_called) {
  const auto survivor = [](Eviction eviction) {
    Driver driver(2, 8, eviction);
    driver.serve(0, {0});
    driver.serve(0, {1});
    driver.serve(0, {0});
    driver.serve(0, {0});
    driver.serve(0, {1});  // 0: first in, used most; 1: used last
    driver.serve(0, {2});
    const DemandId both = driver.demand(0, {0, 1});
    const Wave wave = driver.residency.take_ready(both);
    return wave.experts.size() == 1 ? wave.experts[0] : -1;
  };
  CHECK_EQ(survivor(Eviction::fifo), 1);
  CHECK_EQ(survivor(Eviction::lru), 1);
  CHECK_EQ(survivor(Eviction::lfu), 0);
}

SIDA_TEST(a_prefetch_never_evicts_what_is_used_sooner) {
  Driver driver(2);
  driver.serve(0, {0, 1});
  driver.residency.announce({{{0, {0, 1}}, {1, {2}}}});
  CHECK_EQ(driver.started(), "");
}

SIDA_TEST(a_prefetch_waits_for_the_victim_that_the_optimum_would_take) {
  Driver driver(2, 8, Eviction::next_use, 0);
  driver.serve(0, {0});
  driver.serve(1, {1});
  // 0.0 is used now and never again, 1.1 in the end: 2.2 must take the place of 0.0, which is not free yet.
  const BatchId batch = driver.residency.announce({{{0, {0}}, {2, {2}}, {1, {1}}}});
  CHECK_EQ(driver.started(), "");
  const DemandId first = driver.demand(0, {0}, batch);
  const Wave wave = driver.residency.take_ready(first);
  CHECK_EQ(driver.started(), "");  // still computed from
  driver.residency.release(first, wave);
  CHECK_EQ(driver.started(), "2.2p");
}

SIDA_TEST(an_early_prefetch_waits_for_no_better_victim) {
  Driver driver(2, 8, Eviction::next_use, 1);
  driver.serve(0, {0});
  driver.serve(1, {1});
  // As above: with early prefetches 1.1, which is used latest, goes for the next layer's 2.2 while 0.0 is computed
  // from.
  const BatchId batch = driver.residency.announce({{{0, {0}}, {2, {2}}, {1, {1}}}});
  const DemandId first = driver.demand(0, {0}, batch);
  const Wave wave = driver.residency.take_ready(first);
  CHECK_EQ(driver.started(), "");
  driver.residency.set_early_prefetch(true);
  CHECK_EQ(driver.started(), "2.2p");
  driver.residency.release(first, wave);
  CHECK_EQ(driver.started(), "");  // 1.1 is not of the next layer
}

SIDA_TEST(what_a_table_had_named_is_counted_when_its_layer_runs) {
  Driver driver(12, 1);
  const BatchId batch = driver.residency.announce({{{0, {0, 1, 2}}, {1, {1}}}});
  driver.demand(0, {1, 3}, 0);  // another batch's
  CHECK_EQ(driver.residency.counters()[0].named, 0);
  driver.demand(0, {2, 0, 3}, batch);
  CHECK_EQ(driver.residency.counters()[0].named, 3);
  CHECK_EQ(driver.residency.counters()[0].named_wanted, 2);
  driver.demand(0, {1}, batch);  // its table has passed
  driver.residency.retire(batch);
  CHECK_EQ(driver.residency.counters()[0].named, 3);
  CHECK_EQ(driver.residency.counters()[1].named, 0);
}

SIDA_TEST(a_passed_or_retired_use_is_not_prefetched) {
  Driver driver(12, 1);
  const BatchId batch = driver.residency.announce({{{0, {0}}, {1, {1}}, {2, {2}}}});
  driver.demand(1, {3}, batch);
  CHECK_EQ(driver.started(), "1.3");
  CHECK_EQ(driver.residency.counters()[0].cancelled_prefetches, 1);
  CHECK_EQ(driver.residency.counters()[1].cancelled_prefetches, 1);
  driver.residency.retire(batch);
  driver.residency.retire(batch);
  CHECK_EQ(driver.residency.counters()[2].cancelled_prefetches, 1);
  driver.residency.copy_done(driver.copies[0].slot);
  CHECK_EQ(driver.started(), "");
}

SIDA_TEST(a_failure_reaches_every_demand_that_wants_the_expert_and_is_tried_again) {
  Driver driver(12);
  const DemandId one = driver.demand(0, {1}), two = driver.demand(0, {1, 2}), other = driver.demand(0, {3});
  CHECK_EQ(driver.started(), "0.1 0.2 0.3");
  driver.residency.copy_failed(driver.copies[0].slot, {ErrorKind::io, "why"});
  CHECK(driver.residency.failure(one) != nullptr && driver.residency.failure(two) != nullptr);
  CHECK(driver.residency.failure(other) == nullptr);
  CHECK_EQ(driver.residency.failure(one)->why, "why");
  CHECK_EQ(driver.started(), "");
  driver.demand(0, {1});
  CHECK_EQ(driver.started(), "0.1");
}

SIDA_TEST(counters_tell_hits_late_and_misses) {
  Driver driver(12);
  driver.residency.announce({{{0, {0, 1}}}});
  CHECK_EQ(driver.started(), "0.0p 0.1p");
  driver.residency.copy_done(driver.copies[0].slot);
  driver.demand(0, {0, 1, 2});
  const LayerCounters& count = driver.residency.counters()[0];
  CHECK_EQ(count.requested, 1);
  CHECK_EQ(count.unique, 3);
  CHECK_EQ(count.hits, 1);
  CHECK_EQ(count.late, 1);
  CHECK_EQ(count.misses, 1);
  CHECK_EQ(count.useful_prefetches, 2);
}

SIDA_TEST(low_bit_copies_serve_the_cheapest_that_nobody_reads_and_their_records_are_still_fetched) {
  Driver driver(12, 1);
  driver.residency.set_low_bit(500'000);
  const DemandId id = driver.demand(0, {0, 1, 2, 3}, 0, {2, 3, 1, 6});
  CHECK_EQ(driver.started(), "0.0");
  const Wave late = driver.residency.take_low_bit(id);  // six of twelve: not expert 3, which wants all six
  CHECK(late.low_bit && late.slots.empty());
  CHECK(late.experts == (std::vector<int32_t>{2, 1, 0}));
  CHECK(driver.residency.missing(id) == (std::vector<int32_t>{3}));
  CHECK(driver.residency.take_low_bit(id).experts.empty());
  CHECK_EQ(driver.residency.counters()[0].choices, 12);
  CHECK_EQ(driver.residency.counters()[0].low_bit_choices, 6);
  driver.finish_copies();  // what is waited for first, then what was served meanwhile, in that order
  CHECK_EQ(driver.residency.take_ready(id).experts.size(), 1u);
  driver.residency.finish(id);
  CHECK_EQ(driver.residency.counters()[0].loads, 4);
  driver.demand(0, {0, 1, 2, 3});
  CHECK_EQ(driver.residency.counters()[0].hits, 4);
}

SIDA_TEST(what_low_bit_copies_served_is_fetched_after_demands_and_before_prefetches) {
  Driver driver(12, 1);
  driver.residency.set_low_bit(1'000'000);
  driver.residency.announce({{{2, {0}}}});
  CHECK_EQ(driver.started(), "2.0p");
  driver.residency.announce({{{2, {1}}}});
  const DemandId first = driver.demand(0, {0, 1}, 0, {1, 1});
  CHECK_EQ(driver.residency.take_low_bit(first).experts.size(), 2u);
  const DemandId second = driver.demand(1, {3});
  driver.finish_copies();
  CHECK_EQ(driver.residency.take_ready(second).experts.size(), 1u);
  CHECK_EQ(driver.residency.counters()[0].loads, 2);
  Driver order(12, 1);
  order.residency.set_low_bit(1'000'000);
  const DemandId late = order.demand(0, {0, 1}, 0, {1, 1});
  CHECK_EQ(order.residency.take_low_bit(late).experts.size(), 2u);
  order.demand(1, {3});
  order.residency.announce({{{2, {1}}}});
  std::string all = order.started();
  for (int i = 0; i < 3; ++i) {
    order.residency.copy_done(order.copies.back().slot);
    all += " " + order.started();
  }
  CHECK_EQ(all, "1.3 0.0 0.1 2.1p");
}

SIDA_TEST(without_choices_or_a_share_nothing_is_served_by_low_bit_copies) {
  Driver driver(12, 1);
  CHECK(driver.residency.take_low_bit(driver.demand(0, {0, 1}, 0, {1, 1})).experts.empty());
  driver.residency.set_low_bit(1'000'000);
  CHECK(driver.residency.take_low_bit(driver.demand(0, {0, 1})).experts.empty());
  CHECK_THROWS(driver.residency.set_low_bit(-1), Error, "-1 millionths, expected 0 to 1000000");
  CHECK_THROWS(driver.residency.demand(0, std::vector<int32_t>{0}, 0, std::vector<int64_t>{0}), Error, "0 choices");
}

SIDA_TEST(an_expert_whose_read_failed_is_waited_for) {
  Driver driver(12, 1);
  driver.residency.set_low_bit(1'000'000);
  const DemandId first = driver.demand(0, {0}, 0, {1});
  CHECK_EQ(driver.started(), "0.0");
  CHECK_EQ(driver.residency.take_low_bit(first).experts.size(), 1u);
  driver.residency.copy_failed(driver.copies[0].slot, {ErrorKind::io, "gone"});
  const DemandId second = driver.demand(0, {0}, 0, {1});
  CHECK(driver.residency.take_low_bit(second).experts.empty());
  driver.pump();
  driver.residency.copy_failed(driver.copies[1].slot, {ErrorKind::io, "gone"});
  CHECK(driver.residency.failure(second) != nullptr);
}

// A twentieth of the choices, of at most 8192 of them saved up: 409 choices after any number of hits.
SIDA_TEST(hits_save_up_for_a_bounded_number_of_misses) {
  Driver driver(12, 1);
  driver.residency.set_low_bit(50'000);
  driver.serve(0, {0});
  for (int i = 0; i < 100; ++i) {
    const DemandId hit = driver.demand(0, {0}, 0, {1000});
    CHECK_EQ(driver.residency.take_ready(hit).experts.size(), 1u);
    driver.residency.finish(hit);
  }
  const DemandId miss = driver.demand(1, {0, 1, 2}, 0, {200, 209, 1});
  CHECK(driver.residency.take_low_bit(miss).experts == (std::vector<int32_t>{2, 0}));
  CHECK_EQ(driver.residency.counters()[1].low_bit_choices, 201);
}

SIDA_TEST(neighbouring_slots_are_given_back_together) {
  Driver driver(12, 8, Eviction::lru);  // those used longest ago lie side by side
  driver.serve(0, {0, 1, 2, 3});
  driver.serve(1, {0, 1, 2, 3});
  driver.residency.set_budget(2);
  const auto command = driver.residency.next_command();
  CHECK(command.has_value() && command->kind == Command::Kind::give_back);
  CHECK_EQ(command->count, 6);
  CHECK_EQ(driver.residency.committed(), 8);  // until they are
  driver.residency.given_back(command->slot, command->count);
  CHECK_EQ(driver.residency.committed(), 2);
}

SIDA_TEST(wrong_events_change_nothing) {
  Driver driver(2);
  CHECK_THROWS(driver.residency.demand(0, std::vector<int32_t>{0, 4}, 0), Error, "no expert 4 in MoE layer 0");
  CHECK_THROWS(driver.residency.announce({{{1, {0}}, {5, {0}}}}), Error, "no MoE layer 5");
  CHECK_THROWS(driver.residency.retire(1), Error, "batch 1 was not announced");
  CHECK_THROWS(driver.residency.copy_done(0), Error, "no copy under way");
  CHECK_THROWS(driver.residency.set_budget(13), Error, "13 slots, expected 1 to 12");
  CHECK_THROWS(Residency({.layers = 0, .experts = 4, .slots = 1}), Error, "0 MoE layers");
  CHECK_THROWS(parse_eviction("none"), Error, "'none'");
  CHECK_EQ(driver.started(), "");
  CHECK_EQ(driver.residency.counters()[0].requested, 0);
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
