// The instruction sets that this build has, and the rules by which one is chosen.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/kernels.h"

namespace sida::cpu {

struct InstructionSet {
  std::string_view name;
  const Kernels* (*exact)();
  std::string (*lacks)(const CpuFeatures&);
  // What set_precision("fast") computes with on this CPU; null: the set has no kernels that round activations.
  const Kernels* (*fast)(const CpuFeatures&);
  std::string (*lacks_for_fast)(const CpuFeatures&);
  // Asks the operating system for what it gives only when asked: empty, or why not. Null: nothing to ask for.
  std::string (*request)();
};

// Best first.
std::span<const InstructionSet> built_sets();

// The set that SIDA_CPU names, or the best that the CPU has where `wanted` is null or empty.
// Throws Error(invalid), naming what is missing and what there is, for a set that the build or the CPU lacks.
const InstructionSet& choose_set(const char* wanted, const CpuFeatures& cpu);

// Why the set has no "fast" on this CPU; empty: it has.
std::string lacks_for_fast(const InstructionSet& set, const CpuFeatures& cpu);

}  // namespace sida::cpu
