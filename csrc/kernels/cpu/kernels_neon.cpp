// The kernels compiled for AArch64 NEON.
#include "kernels/cpu/simd_neon.h"

#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

const Kernels* neon_kernels() noexcept {
  return &KernelSet<Simd>::table;
}

}  // namespace sida::cpu
