// AVX-512's tiles over generic vectors.
#include "emulated/emulated_kernels.h"
#include "emulated/simd_wide.h"
#include "kernels/cpu/kernel_set.h"

namespace sida::test {

const cpu::Kernels* wide_kernels() noexcept {
  return &cpu::KernelSet<cpu::SimdWide>::table;
}

}  // namespace sida::test
