// Four lanes: AArch64 NEON.
#pragma once

#include <arm_neon.h>

#include "kernels/cpu/simd.h"

namespace sida::cpu {
namespace {

struct Simd {
  static constexpr const char* name = "neon";
  static constexpr int lanes = 4;
  using Types = VectorOf<lanes>;
  using F = Types::F;
  using I = Types::I;

  static constexpr int64_t segment = 1024;

  // 32 registers: 24 sums, the tokens' vectors and one row of weights.
  static constexpr int tile_tokens = 4;
  static constexpr int tile_rows(int tokens) { return tokens == 4 ? 6 : 8; }

  // Hides from the compiler that the value could be loaded again.
  static F in_register(F value) {
    asm volatile("" : "+w"(value));
    return value;
  }
  // A load that the compiler does not repeat.
  static F load_held(const float* from) { return in_register(load<Simd>(from)); }
  static F fma(F a, F b, F c) { return reinterpret_cast<F>(vfmaq_f32(c, a, b)); }
  // sum += a * b
  static void accumulate(F& sum, F a, F b) { sum = fma(a, b, sum); }
  // The upper 16 bits of each lane.
  static Types::U upper_halves(Types::U value) { return value & 0xffff0000u; }
  static F load_f16(const void* from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(from))));
  }
  static void store_f16(void* to, F value) {
    vst1_u8(static_cast<uint8_t*>(to), vreinterpret_u8_f16(vcvt_f16_f32(value)));
  }
  static F load_i8(const void* from) {
    const Types::Bytes bytes = *static_cast<const Types::BytesAnywhere*>(from);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), F);
  }
  static Float4 fold(F value) { return value; }
};

}  // namespace
}  // namespace sida::cpu
