// Sixteen lanes: AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/simd_512_shape.h"

namespace sida::cpu {
namespace {

struct Simd : Simd512Shape {
  static constexpr const char* name = "avx512";

  // Hides from the compiler that the value could be loaded again.
  static F in_register(F value) {
    asm volatile("" : "+v"(value));
    return value;
  }
  // A load that stays where it is written: moved up, it would hold a register that the sums need.
  static F load_held(const float* from) {
    F value;
    asm volatile("vmovups %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const Types::FloatAnywhere*>(from)));
    return value;
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // sum += a * b, fused. Written as the instruction whose target is the sum: given the choice, the compiler moves sums
  // between registers and spills some.
  static void accumulate(F& sum, F a, F b) { asm volatile("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  // sum += a * the vector at x, sum += b * the one after it: together, as the compiler would move the sum between them.
  static void accumulate_two(F& sum, F a, F b, const float* x) {
    asm volatile("vfmadd231ps %3, %1, %0\n\tvfmadd231ps %4, %2, %0"
                 : "+&v"(sum)
                 : "v"(a), "v"(b), "m"(*reinterpret_cast<const Types::FloatAnywhere*>(x)),
                   "m"(*reinterpret_cast<const Types::FloatAnywhere*>(x + lanes)));
  }
  // The upper 16 bits of each lane.
  static Types::U upper_halves(Types::U value) { return value & 0xffff0000u; }
  static F load_f16(const void* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from))); }
  static void store_f16(void* to, F value) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_i8(const void* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
  static Types::U load_u8(const void* from) {
    return bits_as<Types::U>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
  // In one instruction, where the compiler takes five.
  static Types::U load_u16(const void* from) {
    return bits_as<Types::U>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
  }
  // A register holds all sixteen values of 4 bits: scaled, it is the table in which the weights are looked up.
  template <DType dtype>
  static void unfold_group(F (&weight)[2], const char* at, F scale) {
    const F values = dtype == DType::int4 ? F{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}
                                          : F{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    const F scaled = values * scale;
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    weight[0] = _mm512_permutexvar_ps(pairs, scaled);
    weight[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), scaled);
  }
  // Adds the upper half to the lower one, twice.
  static Float4 fold(F value) {
    const __m256 half = _mm512_castps512_ps256(value) + _mm512_extractf32x8_ps(value, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  }
};

}  // namespace
}  // namespace sida::cpu
