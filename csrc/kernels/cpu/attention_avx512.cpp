// Attention compiled for AVX-512.
#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/attention_kernel.h"

namespace sida::cpu {

const AttentionKernels* avx512_attention() noexcept {
  return &AttentionTable<Simd>::table;
}

}  // namespace sida::cpu
