// The residency's own checks, as sanitizer builds have them after each event: bugs that break its state must be told by
// them before an outside model of it sees a wrong command, and right code must pass.
#include <iostream>
#include <map>
#include <string>

#include "base/check.h"
#include "residency_simulator.h"

namespace sida::test {
extern int mutation;
extern const char* const mutation_names[];
extern const int mutations;
}  // namespace sida::test

static_assert(sida::checked_build, "this program and the residency that it is linked with are built with SIDA_CHECKED");

int main() {
  using namespace sida::test;
  constexpr uint64_t seeds = 100;
  // What each of these is told by.
  std::map<std::string, std::string> expected{
      {"the code as it is", ""},
      {"a release is forgotten", "invariant is broken: expert"},
      {"an expert is handed out without a pin", "invariant is broken: expert"},
      {"the budget is off by one", "does not hold: committed_ <= budget_"},
      {"a slot given back is reused before it is back", "invariant is broken: returning is"},
      {"a failed copy keeps its slot", "invariant is broken: returning is"},
      {"a finished demand still wants its experts", "invariant is broken: expert"},
      {"a finished demand is still waited for", "invariant is broken: expert"},
      {"one copy too many at once", "does not hold: in_flight_ <= options_.lanes"},
      {"an evicted slot stays in the index",
       "does not hold: state.state == State::absent && expert_in_slot_[slot] < 0"},
      {"experts that others compute from are handed over twice", "invariant is broken: expert"},
      {"low-bit copies cost nothing", "millionths of one are left"},
      {"what a low-bit copy served is fetched twice", "invariant is broken: expert"},
      {"what a low-bit copy served is still waited for", "invariant is broken: expert"},
  };
  int passed = 0, failed = 0;
  for (mutation = 0; mutation <= mutations; ++mutation) {
    const auto found = expected.extract(mutation_names[mutation]);
    if (found.empty()) continue;
    std::string told;
    for (uint64_t seed = 1; told.empty() && seed <= seeds; ++seed) {
      told = simulate(make_scenario(seed)).violation.value_or("");
    }
    const bool right = found.mapped().empty() ? told.empty() : told.find(found.mapped()) != std::string::npos;
    (right ? passed : failed)++;
    std::cout << (right ? "" : "WRONG: ") << mutation_names[mutation] << ": " << (told.empty() ? "nothing" : told)
              << "\n";
  }
  for (const auto& [name, told] : expected) {
    ++failed;
    std::cout << "WRONG: no mutant is called '" << name << "'\n";
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 ? 0 : 1;
}
