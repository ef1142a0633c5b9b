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
  // A load that stays where it is written: moved up, it would hold a register that the sums need.
  static F load_held(const float* from) {
    F value;
    asm volatile("ldr %q0, %1" : "=w"(value) : "m"(*reinterpret_cast<const Types::FloatAnywhere*>(from)));
    return value;
  }
  static F fma(F a, F b, F c) { return reinterpret_cast<F>(vfmaq_f32(c, a, b)); }
  // sum += a * b, fused. Written as the instruction whose target is the sum: given the choice, the compiler moves sums
  // between registers and spills some.
  static void accumulate(F& sum, F a, F b) { asm volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(a), "w"(b)); }
  // sum += a * the vector at x, sum += b * the one after it
  static void accumulate_two(F& sum, F a, F b, const float* x) {
    accumulate(sum, a, load<Simd>(x));
    accumulate(sum, b, load<Simd>(x + lanes));
  }
  // The upper 16 bits of each lane. By immediates: a tile has no register left for a mask.
  static Types::U upper_halves(Types::U value) {
    asm("bic %0.4s, #255\n\tbic %0.4s, #255, lsl #8" : "+w"(value));
    return value;
  }
  static F load_f16(const void* from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(from))));
  }
  static void store_f16(void* to, F value) {
    vst1_u8(static_cast<uint8_t*>(to), vreinterpret_u8_f16(vcvt_f16_f32(value)));
  }
  static Types::U load_u8(const void* from) {
    uint32_t four;
    __builtin_memcpy(&four, from, sizeof(four));
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return reinterpret_cast<Types::U>(vmovl_u16(vget_low_u16(wide)));
  }
  static F load_i8(const void* from) {
    int32_t four;
    __builtin_memcpy(&four, from, sizeof(four));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  template <DType dtype>
  static void unfold_group(F (&weight)[8], const char* at, F scale) {
    const uint8x16_t pairs = vld1q_u8(reinterpret_cast<const uint8_t*>(at));
    const int8x16_t values = vld1q_s8(dtype == DType::int4 ? signed_nibbles : doubled_e2m1);
    const int8x16_t even = vqtbl1q_s8(values, vandq_u8(pairs, vdupq_n_u8(15)));
    const int8x16_t odd = vqtbl1q_s8(values, vshrq_n_u8(pairs, 4));
    const F unit = dtype == DType::int4 ? scale : scale * 0.5f;
    const int16x8_t wide[4] = {vmovl_s8(vget_low_s8(even)), vmovl_s8(vget_low_s8(odd)), vmovl_high_s8(even),
                               vmovl_high_s8(odd)};
    for (int half = 0; half < 2; ++half) {
      for (int parity = 0; parity < 2; ++parity) {
        const int16x8_t eight = wide[2 * half + parity];
        weight[4 * half + parity] = reinterpret_cast<F>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(eight)))) * unit;
        weight[4 * half + 2 + parity] = reinterpret_cast<F>(vcvtq_f32_s32(vmovl_high_s16(eight))) * unit;
      }
    }
  }
  static Float4 fold(F value) { return value; }
};

}  // namespace
}  // namespace sida::cpu
