// The checks of the kernels for bfloat16 pairs are only worth what they find: every planted bug of
// mutants/bf16_mutations.cmake must be caught, and the code without one must not be.
#include <iostream>

#include "bf16_case.h"

namespace sida::test {
extern int mutation;
extern const char* const mutation_names[];
extern const int mutations;

namespace {

std::optional<std::string> find_violation() {
  const PairKernels tables{emulated_amx_kernels(), emulated_amx_fast_kernels(), emulated_dot_kernels()};
  std::optional<std::string> found = class_violation(tables.amx);
  for (uint64_t seed = 1; !found && seed <= 25; ++seed) found = violation(tables, seed);
  for (uint64_t seed = 1; !found && seed <= 4; ++seed) {
    found = layer_violation(tables.amx, false, seed);
    if (!found) found = layer_violation(tables.amx_fast, true, seed);
    if (!found) found = layer_violation(tables.dot, true, seed);
  }
  take_faults();
  tile_unit().release();
  return found;
}

}  // namespace
}  // namespace sida::test

int main() {
  using namespace sida::test;
  int passed = 0, failed = 0;
  for (mutation = 0; mutation <= mutations; ++mutation) {
    const std::optional<std::string> found = find_violation();
    const bool right = found.has_value() == (mutation > 0);
    (right ? passed : failed)++;
    std::cout << (right ? "" : "WRONG: ") << mutation_names[mutation] << ": " << found.value_or("nothing found")
              << "\n";
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && mutations >= 15 ? 0 : 1;
}
