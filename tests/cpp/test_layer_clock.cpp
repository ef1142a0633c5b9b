// What the past says of when an expert is wanted next, against sums made term by term.
#include <cmath>
#include <vector>

#include "check.h"
#include "experts/layer_clock.h"

using sida::LayerClock;
using sida::never_used;
using sida::UseWeight;

namespace {

bool near(double found, double expected) {
  return std::abs(found - expected) <= 1e-9 * std::max(1.0, std::abs(expected));
}

}  // namespace

SIDA_TEST(the_chance_is_the_share_of_runs_recent_ones_counting_more) {
  LayerClock clock(1);
  UseWeight weight = never_used;
  std::vector<bool> wanted;
  std::vector<double> ages;
  for (int run = 0; run < 400; ++run) {
    wanted.push_back(run % 3 == 0 && run < 250);
    const double share = run % 50 == 0 ? 1 : 1.0 / 16;  // a prompt, then tokens
    ages.push_back((ages.empty() ? 0 : ages.back()) + share);
    clock.run(0, share);
    if (wanted.back()) weight = clock.used(0, weight);
    double used = 0, all = 0;
    for (int past = 0; past <= run; ++past) {
      const double counts = std::exp2((ages[past] - ages[run]) / LayerClock::half_life);
      all += counts;
      if (wanted[past]) used += counts;
    }
    CHECK(near(clock.chance(0, weight), used / all));
  }
}

SIDA_TEST(what_was_wanted_always_is_expected_when_its_layer_runs_and_what_was_never_wanted_is_not) {
  LayerClock clock(3);
  UseWeight weights[3] = {never_used, never_used, never_used};
  for (int turn = 0; turn < 4; ++turn) {
    for (const int layer : {0, 1, 2}) {
      clock.run(layer, 1.0 / 16);
      weights[layer] = clock.used(layer, weights[layer]);
    }
  }
  CHECK(near(clock.wait(0, weights[0]), 1));
  CHECK(near(clock.wait(1, weights[1]), 2));
  CHECK(near(clock.wait(2, weights[2]), 3));
  for (const int layer : {0, 1, 2}) {
    CHECK_EQ(clock.turn(layer), 3);
    CHECK_EQ(clock.until_run(layer), layer + 1);
  }
  CHECK(std::isinf(clock.wait(0, never_used)));
  CHECK_EQ(clock.chance(0, never_used), 0);
}

SIDA_TEST(an_expert_of_every_other_run_is_expected_a_turn_later) {
  LayerClock clock(2);
  UseWeight weight = never_used;
  for (int turn = 0; turn < 2000; ++turn) {
    clock.run(0, 1.0 / 16);
    if (turn % 2 == 0) weight = clock.used(0, weight);
    clock.run(1, 1.0 / 16);
  }
  CHECK(std::abs(clock.chance(0, weight) - 0.5) < 0.01);
  CHECK(std::abs(clock.wait(0, weight) - (1 + 2)) < 0.1);
}

SIDA_TEST(a_layer_that_has_not_run_for_longer_than_its_turn_is_expected_later_and_later) {
  LayerClock clock(2);
  clock.run(0, 1.0 / 16);
  clock.run(1, 1.0 / 16);
  clock.run(0, 1.0 / 16);
  const UseWeight weight = clock.used(0, clock.used(0, never_used));
  CHECK(near(clock.wait(0, weight), 2));
  for (int run = 1; run <= 30; ++run) {
    clock.run(1, 1.0 / 16);
    CHECK(clock.wait(0, weight) >= (run < 2 ? 1 : run));
  }
}

SIDA_TEST(a_layer_that_never_ran_wants_nothing) {
  const LayerClock clock(2);
  CHECK_EQ(clock.chance(1, never_used), 0);
  CHECK(std::isinf(clock.wait(1, never_used)));
}

int main(int argc, char** argv) {
  return sida::test::run_all(argc, argv);
}
