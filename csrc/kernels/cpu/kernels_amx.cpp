// bfloat16 weights through AMX, everything else as on AVX-512, where activations may be rounded with AVX512_VNNI.
#include "kernels/cpu/simd_avx512.h"

#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/kernel_amx.h"

namespace sida::cpu {

const Kernels* amx_kernels() noexcept {
  static const Kernels table = AmxKernels<Simd, AmxTiles, avx512_kernels, false>::make("amx");
  return &table;
}

const Kernels* amx_fast_kernels() noexcept {
  static const Kernels table = AmxKernels<Simd, AmxTiles, avx512_vnni_kernels, true>::make("amx");
  return &table;
}

}  // namespace sida::cpu
