// The simulator is only worth what it finds: every planted bug of mutants/residency_mutations.cmake must be caught, and
// the code without one must not be.
#include <iostream>

#include "residency_simulator.h"

namespace sida::test {
extern int mutation;
extern const char* const mutation_names[];
extern const int mutations;
}  // namespace sida::test

int main() {
  using namespace sida::test;
  constexpr uint64_t seeds = 300;
  int passed = 0, failed = 0;
  for (mutation = 0; mutation <= mutations; ++mutation) {
    std::optional<std::string> found;
    uint64_t seed = 0;
    while (!found && seed < seeds) found = simulate(make_scenario(++seed)).violation;
    const bool right = found.has_value() == (mutation > 0);
    (right ? passed : failed)++;
    std::cout << (right ? "" : "WRONG: ") << mutation_names[mutation] << ": "
              << (found ? "seed " + std::to_string(seed) + ": " + *found : "nothing found") << "\n";
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && mutations >= 10 ? 0 : 1;
}
