// Attention compiled for AVX2, FMA and F16C.
#include "kernels/cpu/simd_avx2.h"

#include "kernels/cpu/attention_kernel.h"

namespace sida::cpu {

const AttentionKernels* avx2_attention() noexcept {
  return &AttentionTable<Simd>::table;
}

}  // namespace sida::cpu
