// The kernels compiled for AVX2, FMA and F16C.
#include "kernels/cpu/simd_avx2.h"

#include "kernels/cpu/kernel_set.h"

namespace sida::cpu {

const Kernels* avx2_kernels() noexcept {
  return &KernelSet<Simd>::table;
}

}  // namespace sida::cpu
