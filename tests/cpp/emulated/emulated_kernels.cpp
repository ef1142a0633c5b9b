// The kernels for bfloat16 pairs over emulated instructions. mutants/bf16_mutations.cmake compiles this file a second
// time, with headers in which bugs are planted.
#include "emulated/emulated_kernels.h"
#include "emulated/emulated_tiles.h"
#include "emulated/simd_wide_dot.h"
#include "kernels/cpu/kernel_amx.h"
#include "kernels/cpu/kernel_dot.h"

namespace sida::test {

const cpu::Kernels* emulated_dot_kernels() noexcept {
  static const cpu::Kernels table = cpu::DotKernels<cpu::SimdWideDot, wide_kernels>::make();
  return &table;
}

const cpu::Kernels* emulated_amx_kernels() noexcept {
  static const cpu::Kernels table = cpu::AmxKernels<cpu::SimdWide, EmulatedTiles, wide_kernels, false>::make("amx");
  return &table;
}

const cpu::Kernels* emulated_amx_fast_kernels() noexcept {
  static const cpu::Kernels table = cpu::AmxKernels<cpu::SimdWide, EmulatedTiles, wide_kernels, true>::make("amx");
  return &table;
}

EmulatedSet emulated_set(std::string_view name) {
  if (name == "wide") return {wide_kernels(), false};
  if (name == "dot") return {emulated_dot_kernels(), true};
  if (name == "amx") return {emulated_amx_kernels(), false};
  if (name == "amx-fast") return {emulated_amx_fast_kernels(), true};
  return {nullptr, false};
}

}  // namespace sida::test
