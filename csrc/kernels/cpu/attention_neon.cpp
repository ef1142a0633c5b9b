// Attention compiled for AArch64 NEON.
#include "kernels/cpu/simd_neon.h"

#include "kernels/cpu/attention_kernel.h"

namespace sida::cpu {

const AttentionKernels* neon_attention() noexcept {
  return &AttentionTable<Simd>::table;
}

}  // namespace sida::cpu
