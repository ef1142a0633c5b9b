// int8, int4 and mxfp4 weights through SDOT, everything else as on NEON.
#include "kernels/cpu/simd_neon_dot.h"

#include "kernels/cpu/kernel_bytes.h"

namespace sida::cpu {

const Kernels* neon_dot_kernels() noexcept {
  static const Kernels table = ByteKernels<SimdDotProducts, neon_kernels>::make();
  return &table;
}

}  // namespace sida::cpu
