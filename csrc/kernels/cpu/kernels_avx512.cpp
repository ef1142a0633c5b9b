// The kernels compiled for AVX-512.
#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

const Kernels* avx512_kernels() noexcept {
  return &KernelSet<Simd>::table;
}

}  // namespace sida::cpu
