// Seeded simulation of Residency against its model: `test_simulator [--seeds N] [--from SEED]`.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "residency_simulator.h"

int main(int argc, char** argv) {
  using namespace sida::test;
  uint64_t seeds = 500, from = 1;
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--seeds") == 0) {
      seeds = std::strtoull(argv[++i], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--from") == 0) {
      from = std::strtoull(argv[++i], nullptr, 10);
    } else {
      std::cerr << "usage: test_simulator [--seeds N] [--from SEED]; found '" << argv[i] << "'" << std::endl;
      return 2;
    }
  }
  const auto begin = std::chrono::steady_clock::now();
  int64_t events = 0;
  uint64_t passed = 0, failed = 0;
  for (uint64_t seed = from; seed < from + seeds; ++seed) {
    const Scenario scenario = make_scenario(seed);
    const Outcome outcome = simulate(scenario);
    events += outcome.events;
    if (!outcome.violation) {
      ++passed;
      continue;
    }
    ++failed;
    const Scenario shorter = shrink(scenario);
    std::cerr << "seed " << seed << ": " << *outcome.violation << "\nshrunk to " << shorter.steps.size()
              << " steps: " << *simulate(shorter).violation << "\n"
              << describe(shorter) << "again: test_simulator --from " << seed << " --seeds 1" << std::endl;
    if (failed == 5) break;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::cout << events << " events in " << seconds << " s, " << static_cast<double>(events) / seconds * 60 / 1e6
            << " million a minute\n"
            << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && events > 0 ? 0 : 1;
}
