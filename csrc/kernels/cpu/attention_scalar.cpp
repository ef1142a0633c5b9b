// Attention compiled for the plainest CPU of the architecture.
#include "kernels/cpu/simd_generic.h"

#include "kernels/cpu/attention_kernel.h"

namespace sida::cpu {

const AttentionKernels* scalar_attention() noexcept {
  return &AttentionTable<Simd>::table;
}

}  // namespace sida::cpu
