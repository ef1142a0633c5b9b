// bfloat16 weights and tokens rounded to bfloat16 through VDPBF16PS, everything else as with AVX512_VNNI.
#include "kernels/cpu/simd_avx512_bf16.h"

#include "kernels/cpu/kernel_dot.h"

namespace sida::cpu {

const Kernels* avx512_bf16_kernels() noexcept {
  static const Kernels table = DotKernels<SimdDot, avx512_vnni_kernels>::make();
  return &table;
}

}  // namespace sida::cpu
