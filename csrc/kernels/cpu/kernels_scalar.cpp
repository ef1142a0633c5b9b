// The kernels compiled for the plainest CPU of the architecture.
#include "kernels/cpu/simd_generic.h"

#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

const Kernels* scalar_kernels() noexcept {
  return &KernelSet<Simd>::table;
}

}  // namespace sida::cpu
