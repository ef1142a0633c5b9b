// int8, int4 and mxfp4 weights through VPMADDUBSW, everything else as on AVX2.
#include "kernels/cpu/simd_avx2_bytes.h"

#include "kernels/cpu/kernel_bytes.h"

namespace sida::cpu {

const Kernels* avx2_bytes_kernels() noexcept {
  static const Kernels table = ByteKernels<SimdBytes, avx2_kernels>::make();
  return &table;
}

}  // namespace sida::cpu
