// The kernels that multiply bytes, bit for bit against their documented order on each set that this CPU has; and every
// planted bug of mutants/bytes_mutations.cmake must be caught. A bug in what one set alone includes is named after it.
#include <iostream>
#include <string_view>

#include "bytes_case.h"
#include "kernels/cpu/cpu_features.h"

namespace sida::test {
extern int mutation;
extern const char* const mutation_names[];
extern const int mutations;

namespace {

struct Set {
  std::string_view name;
  const cpu::Kernels* kernels;  // null: not of this CPU
};

std::vector<Set> byte_sets() {
  [[maybe_unused]] const cpu::CpuFeatures cpu = cpu::detect_cpu();
#if defined(__x86_64__)
  const bool has_avx2 = cpu::lacks_for_avx2(cpu).empty(), has_vnni = cpu::lacks_for_avx512_vnni(cpu).empty();
  return {{"avx2", has_avx2 ? cpu::avx2_bytes_kernels() : nullptr},
          {"avx512", has_vnni ? cpu::avx512_vnni_kernels() : nullptr}};
#elif defined(__aarch64__)
  return {{"neon", cpu::lacks_for_neon_dot(cpu).empty() ? cpu::neon_dot_kernels() : nullptr}};
#else
  return {};
#endif
}

// The set that a bug is named after has it alone.
bool concerns(std::string_view bug, const std::vector<Set>& sets, const Set& set) {
  for (const Set& other : sets) {
    if (bug.starts_with(std::string(other.name) + ": ")) return other.name == set.name;
  }
  return true;
}

}  // namespace
}  // namespace sida::test

int main() {
  using namespace sida;
  using namespace sida::test;
  constexpr uint64_t seeds = 120;
  const std::vector<Set> sets = byte_sets();
  int passed = 0, failed = 0, skipped = 0;
  for (mutation = 0; mutation <= mutations; ++mutation) {
    const std::string_view name = mutation_names[mutation];
    for (const Set& set : sets) {
      if (!concerns(name, sets, set)) continue;
      if (set.kernels == nullptr) {
        ++skipped;
        continue;
      }
      std::optional<std::string> found;
      for (uint64_t seed = 1; !found && seed <= seeds; ++seed) found = byte_violation(*set.kernels, seed);
      const bool right = found.has_value() == (mutation > 0);
      (right ? passed : failed)++;
      std::cout << (right ? "" : "WRONG: ") << name << ": "
                << found.value_or("nothing found on " + std::string(set.name)) << "\n";
    }
  }
  if (skipped > 0) std::cout << skipped << " of sets that this CPU lacks\n";
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  if (failed > 0 || mutations < 15) return 1;
  return passed == 0 ? 77 : 0;
}
