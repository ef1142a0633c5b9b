// Sixteen lanes without intrinsics, in the shape that the AVX-512 kernels have: their code, on any CPU.
#pragma once

#include "kernels/cpu/simd_512_shape.h"

namespace sida::cpu {
namespace {

struct SimdWide : Simd512Shape {
  static constexpr const char* name = "wide";

  static F in_register(F value) { return value; }
  static F load_held(const float* from) { return load<SimdWide>(from); }
  static F fma(F a, F b, F c) { return a * b + c; }
  static void accumulate(F& sum, F a, F b) { sum = fma(a, b, sum); }
  // sum += a * the vector at x, sum += b * the one after it
  static void accumulate_two(F& sum, F a, F b, const float* x) {
    accumulate(sum, a, load<SimdWide>(x));
    accumulate(sum, b, load<SimdWide>(x + lanes));
  }
  static Types::U upper_halves(Types::U value) { return value & 0xffff0000u; }
  static F load_f16(const void* from) {
    return widen_f16<SimdWide>(*static_cast<const Types::HalfWordsAnywhere*>(from));
  }
  static void store_f16(void* to, F value) {
    Types::HalfWords half;
    for (int i = 0; i < lanes; ++i) half[i] = narrow_f16(value[i]);
    *static_cast<Types::HalfWordsAnywhere*>(to) = half;
  }
  static Types::U load_u8(const void* from) { return load_u8_plain<SimdWide>(from); }
  static F load_i8(const void* from) {
    const Types::Bytes bytes = *static_cast<const Types::BytesAnywhere*>(from);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), F);
  }
  template <DType dtype>
  static void unfold_group(F (&weight)[32 / lanes], const char* at, F scale) {
    unfold_plain<SimdWide, dtype>(weight, at, scale);
  }
  static Float4 fold(F value) {
    Float4 sum;
    for (int i = 0; i < 4; ++i) sum[i] = (value[i] + value[i + 8]) + (value[i + 4] + value[i + 12]);
    return sum;
  }
};

}  // namespace
}  // namespace sida::cpu
