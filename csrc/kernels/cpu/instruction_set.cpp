// Chooses the kernels at run time: the widest vectors that CPU and operating system support, or what SIDA_CPU names.
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/kernels.h"

namespace sida::cpu {
namespace {

struct Choice {
  std::string_view name;
  const Kernels* (*kernels)();  // null: not compiled for this architecture
  bool (*is_supported)();
};

bool always() {
  return true;
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
constexpr Choice choices[] = {
    {"avx512", avx512_kernels, has_avx512}, {"avx2", avx2_kernels, has_avx2}, {"scalar", scalar_kernels, always}};
#elif defined(__aarch64__)
constexpr Choice choices[] = {{"neon", neon_kernels, always}, {"scalar", scalar_kernels, always}};
#else
constexpr Choice choices[] = {{"scalar", scalar_kernels, always}};
#endif

std::string available() {
  std::string text;
  for (const std::string& name : instruction_sets()) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

const Kernels* choose() {
  const char* const wanted = std::getenv("SIDA_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Choice& choice : choices) {
      if (choice.is_supported()) return choice.kernels();
    }
  }
  for (const Choice& choice : choices) {
    if (choice.name != wanted) continue;
    if (choice.is_supported()) return choice.kernels();
    fail(ErrorKind::invalid, "SIDA_CPU is '", wanted, "', which this CPU or its operating system does not support; ",
         "available here: ", available(), "; unset it to use the best of them");
  }
  fail(ErrorKind::invalid, "SIDA_CPU is '", wanted, "', which is unknown to this build; available here: ", available(),
       "; unset it to use the best of them");
}

}  // namespace

const Kernels& kernels() {
  // A throw leaves the static unset, so a caller who corrects SIDA_CPU can go on.
  static const Kernels* const chosen = choose();
  return *chosen;
}

const char* instruction_set() {
  return kernels().name;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices) {
    if (choice.is_supported()) names.emplace_back(choice.name);
  }
  return names;
}

}  // namespace sida::cpu
