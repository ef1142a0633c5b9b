// The kernels of instruction sets that this machine may lack, over emulated instructions.
#pragma once

#include <string_view>

#include "kernels/cpu/kernels.h"

namespace sida::test {

// AVX-512's tiles over generic vectors.
const cpu::Kernels* wide_kernels() noexcept;
const cpu::Kernels* emulated_dot_kernels() noexcept;
const cpu::Kernels* emulated_amx_kernels() noexcept;
const cpu::Kernels* emulated_amx_fast_kernels() noexcept;

struct EmulatedSet {
  const cpu::Kernels* kernels;  // null: no such set
  bool rounds;                  // activations to bfloat16 where weights are
};

// "wide", "dot", "amx" or "amx-fast".
EmulatedSet emulated_set(std::string_view name);

}  // namespace sida::test
