// The simulator: drives a Residency through random events and compares it with the model after each of them. A failing
// seed is a repro; shrink() makes it short.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "experts/residency.h"

namespace sida::test {

// One event. `kind` picks it, the other two pick among what is possible at that moment, so that any part of a list of
// steps is a list of steps.
struct Step {
  enum class Kind : uint8_t {
    announce,
    retire,
    demand,
    wait,
    stop_waiting,
    take,
    take_low_bit,
    release,
    finish,
    copy_done,
    copy_failed,
    given_back,
    set_budget,
    wrong_call
  };
  Kind kind;
  uint32_t a, b;
};

struct Scenario {
  uint64_t seed;
  ResidencyOptions options;
  int64_t low_bit_millionths = 0;
  std::vector<Step> steps;
};

Scenario make_scenario(uint64_t seed);

struct Outcome {
  int64_t events = 0;
  std::optional<std::string> violation;
};

// Runs the steps and then serves every demand to its end.
Outcome simulate(const Scenario& scenario);
// Leaves out what the violation does not need.
Scenario shrink(Scenario scenario);
std::string describe(const Scenario& scenario);

}  // namespace sida::test
