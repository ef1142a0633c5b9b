// int8, int4 and mxfp4 weights through VPDPBUSD, everything else as on AVX-512.
#include "kernels/cpu/simd_avx512_vnni.h"

#include "kernels/cpu/kernel_bytes.h"

namespace sida::cpu {

const Kernels* avx512_vnni_kernels() noexcept {
  static const Kernels table = ByteKernels<SimdVnni, avx512_kernels>::make();
  return &table;
}

}  // namespace sida::cpu
