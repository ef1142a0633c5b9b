// Four lanes without intrinsics: what the compiler makes of them is SSE2 on x86-64.
#pragma once

#include "kernels/cpu/simd.h"

namespace sida::cpu {
namespace {

struct Simd {
  static constexpr const char* name = "scalar";
  static constexpr int lanes = 4;
  using Types = VectorOf<lanes>;
  using F = Types::F;
  using I = Types::I;

  static constexpr int64_t segment = 512;

  // Rows of a tile of `tokens` tokens: 16 registers hold the sums, one row of weights and one token.
  static constexpr int tile_tokens = 2;
  static constexpr int tile_rows(int tokens) { return tokens == 1 ? 6 : 4; }

  static F in_register(F value) { return value; }
  // A load that the compiler does not repeat.
  static F load_held(const float* from) { return in_register(load<Simd>(from)); }
  static F fma(F a, F b, F c) { return a * b + c; }
  // sum += a * b
  static void accumulate(F& sum, F a, F b) { sum = fma(a, b, sum); }
  // sum += a * the vector at x, sum += b * the one after it
  static void accumulate_two(F& sum, F a, F b, const float* x) {
    accumulate(sum, a, load<Simd>(x));
    accumulate(sum, b, load<Simd>(x + lanes));
  }
  // The upper 16 bits of each lane.
  static Types::U upper_halves(Types::U value) { return value & 0xffff0000u; }
  static F load_f16(const void* from) { return widen_f16<Simd>(*static_cast<const Types::HalfWordsAnywhere*>(from)); }
  static void store_f16(void* to, F value) {
    Types::HalfWords half;
    for (int i = 0; i < lanes; ++i) half[i] = narrow_f16(value[i]);
    *static_cast<Types::HalfWordsAnywhere*>(to) = half;
  }
  static Types::U load_u8(const void* from) { return load_u8_plain<Simd>(from); }
  static F load_i8(const void* from) {
    const Types::Bytes bytes = *static_cast<const Types::BytesAnywhere*>(from);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), F);
  }
  template <DType dtype>
  static void unfold_group(F (&weight)[32 / lanes], const char* at, F scale) {
    unfold_plain<Simd, dtype>(weight, at, scale);
  }
  static Float4 fold(F value) { return value; }
};

}  // namespace
}  // namespace sida::cpu
