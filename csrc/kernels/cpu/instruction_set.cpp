// Chooses the kernels at run time: the widest vectors that CPU and operating system support, or what SIDA_CPU names,
// and of that set those of the precision that is asked for.
#include "kernels/cpu/instruction_set.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"

namespace sida::cpu {
namespace {

constexpr std::array<std::string_view, 5> known_names{"scalar", "avx2", "avx512", "amx", "neon"};

#if defined(__x86_64__)
constexpr const char* architecture = "x86-64";
const Kernels* fast_of_amx(const CpuFeatures&) {
  return amx_fast_kernels();
}
// CPUs with AMX start one VDPBF16PS a cycle and two FMAs: there pairs of bfloat16 take longer than widened weights.
const Kernels* fast_of_avx512(const CpuFeatures& cpu) {
  return lacks_for_avx512_bf16(cpu).empty() && !cpu.amx_bf16 ? avx512_bf16_kernels() : avx512_vnni_kernels();
}
const Kernels* fast_of_avx2(const CpuFeatures&) {
  return avx2_bytes_kernels();
}
constexpr InstructionSet sets[] = {
    {"amx", amx_kernels, lacks_for_amx, fast_of_amx, lacks_for_avx512_vnni, request_tile_registers},
    {"avx512", avx512_kernels, lacks_for_avx512, fast_of_avx512, lacks_for_avx512_vnni, nullptr},
    {"avx2", avx2_kernels, lacks_for_avx2, fast_of_avx2, lacks_nothing, nullptr},
    {"scalar", scalar_kernels, lacks_nothing, nullptr, nullptr, nullptr}};
#elif defined(__aarch64__)
constexpr const char* architecture = "AArch64";
const Kernels* fast_of_neon(const CpuFeatures&) {
  return neon_dot_kernels();
}
constexpr InstructionSet sets[] = {{"neon", neon_kernels, lacks_nothing, fast_of_neon, lacks_for_neon_dot, nullptr},
                                   {"scalar", scalar_kernels, lacks_nothing, nullptr, nullptr, nullptr}};
#else
constexpr const char* architecture = "this architecture";
constexpr InstructionSet sets[] = {{"scalar", scalar_kernels, lacks_nothing, nullptr, nullptr, nullptr}};
#endif

std::string available(const CpuFeatures& cpu) {
  std::string text;
  for (const InstructionSet& set : sets) {
    if (set.lacks(cpu).empty()) text.append(text.empty() ? "" : ", ").append(set.name);
  }
  return text;
}

// What a set needs of the system is asked for here. One that was named and is refused is an error; one that was not
// named is passed over, and `sida info` names what is in force.
const InstructionSet& choose_and_request(const char* wanted) {
  CpuFeatures cpu = detect_cpu();
  const InstructionSet& best = choose_set(wanted, cpu);
  if (best.request == nullptr) return best;
  const std::string refused = best.request();
  if (refused.empty()) return best;
  if (wanted != nullptr && *wanted != '\0') {
    fail(ErrorKind::invalid, "SIDA_CPU is '", best.name, "', but ", refused,
         "; unset it or choose another of: ", available(cpu));
  }
  cpu.amx_tile = false;  // tile registers are all that any set asks for
  return choose_set(wanted, cpu);
}

// What is in force in this process.
struct InForce {
  const InstructionSet& set;
  std::string why_not_fast;
  const Kernels* fast = nullptr;

  InForce() : set(choose_and_request(std::getenv("SIDA_CPU"))) {
    why_not_fast = lacks_for_fast(set, detect_cpu());
    if (why_not_fast.empty()) fast = set.fast(detect_cpu());
  }
};

const InForce& in_force() {
  // A throw leaves the static unset, so a caller who corrects SIDA_CPU can go on.
  static const InForce chosen;
  return chosen;
}

std::atomic<Precision> current_precision{Precision::exact};

}  // namespace

std::span<const InstructionSet> built_sets() {
  return sets;
}

std::string lacks_for_fast(const InstructionSet& set, const CpuFeatures& cpu) {
  if (set.fast == nullptr) return "kernels that round activations";
  return set.lacks_for_fast(cpu);
}

const InstructionSet& choose_set(const char* wanted, const CpuFeatures& cpu) {
  if (wanted == nullptr || *wanted == '\0') {
    // The last set is always supported.
    return *std::ranges::find_if(sets, [&](const InstructionSet& set) { return set.lacks(cpu).empty(); });
  }
  for (const InstructionSet& set : sets) {
    if (set.name != wanted) continue;
    const std::string missing = set.lacks(cpu);
    if (missing.empty()) return set;
    fail(ErrorKind::invalid, "SIDA_CPU is '", wanted, "', but this machine lacks ", missing,
         "; available here: ", available(cpu), "; unset it to use the best of them");
  }
  const bool is_known = std::ranges::find(known_names, std::string_view(wanted)) != known_names.end();
  fail(ErrorKind::invalid, "SIDA_CPU is '", wanted, "', ", is_known ? "which this build for " : "which no build has (",
       is_known ? architecture : "scalar, avx2, avx512, amx, neon", is_known ? " does not have" : ")",
       "; available here: ", available(cpu), "; unset it to use the best of them");
}

const Kernels& kernels() {
  const InForce& now = in_force();
  return current_precision.load(std::memory_order_relaxed) == Precision::fast ? *now.fast : *now.set.exact();
}

const char* instruction_set() {
  return in_force().set.exact()->name;
}

std::vector<std::string> instruction_sets() {
  const CpuFeatures cpu = detect_cpu();
  std::vector<std::string> names;
  for (const InstructionSet& set : sets) {
    if (set.lacks(cpu).empty()) names.emplace_back(set.name);
  }
  return names;
}

void set_precision(Precision precision) {
  const InForce& now = in_force();
  if (precision == Precision::fast && !now.why_not_fast.empty()) {
    fail(ErrorKind::invalid, "precision is 'fast', but the instruction set in force, ", now.set.name, ", lacks ",
         now.why_not_fast, ", so that it would change nothing; expected 'exact'");
  }
  current_precision.store(precision, std::memory_order_relaxed);
}

Precision precision() {
  return current_precision.load(std::memory_order_relaxed);
}

std::vector<Precision> precisions() {
  if (in_force().why_not_fast.empty()) return {Precision::exact, Precision::fast};
  return {Precision::exact};
}

}  // namespace sida::cpu
