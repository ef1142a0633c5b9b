// Eight lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/simd.h"

namespace sida::cpu {
namespace {

struct Simd {
  static constexpr const char* name = "avx2";
  static constexpr int lanes = 8;
  using Types = VectorOf<lanes>;
  using F = Types::F;
  using I = Types::I;

  static constexpr int64_t segment = 1024;

  // 16 registers: the sums, the tokens' vectors (or the rows', whichever are fewer) and one operand.
  static constexpr int tile_tokens = 6;
  static constexpr int tile_rows(int tokens) { return tokens == 1 ? 6 : tokens <= 3 ? 4 : 2; }

  // Hides from the compiler that the value could be loaded again.
  static F in_register(F value) {
    asm volatile("" : "+x"(value));
    return value;
  }
  // A load that stays where it is written: moved up, it would hold a register that the sums need.
  static F load_held(const float* from) {
    F value;
    asm volatile("vmovups %1, %0" : "=x"(value) : "m"(*reinterpret_cast<const Types::FloatAnywhere*>(from)));
    return value;
  }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // sum += a * b, fused. Written as the instruction whose target is the sum: given the choice, the compiler moves sums
  // between registers and spills some.
  static void accumulate(F& sum, F a, F b) { asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b)); }
  // sum += a * the vector at x, sum += b * the one after it: together, as the compiler would move the sum between them.
  static void accumulate_two(F& sum, F a, F b, const float* x) {
    asm volatile("vfmadd231ps %3, %1, %0\n\tvfmadd231ps %4, %2, %0"
                 : "+&x"(sum)
                 : "x"(a), "x"(b), "m"(*reinterpret_cast<const Types::FloatAnywhere*>(x)),
                   "m"(*reinterpret_cast<const Types::FloatAnywhere*>(x + lanes)));
  }
  // The upper 16 bits of each lane. The mask is an operand in memory: a tile has no register left for it.
  static Types::U upper_halves(Types::U value) {
    asm("vpand %1, %0, %0" : "+x"(value) : "m"(upper_mask));
    return value;
  }
  alignas(32) static constexpr uint32_t upper_mask[lanes] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                             0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
  static F load_f16(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }
  static void store_f16(void* to, F value) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_i8(const void* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
  }
  template <DType dtype>
  static void unfold_group(F (&weight)[4], const char* at, F scale) {
    if constexpr (dtype == DType::int4) {
      // The low half of a byte becomes the upper bits of a lane: its value times 2^28, taken off with the scale.
      const F small = scale * 0x1p-28f;
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * half)));
        weight[2 * half] = _mm256_cvtepi32_ps(_mm256_slli_epi32(pairs, 28)) * small;
        weight[2 * half + 1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 4)) * scale;
      }
    } else {
      const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), mask = _mm_set1_epi8(15);
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(doubled_e2m1));
      const __m128i even = _mm_shuffle_epi8(values, _mm_and_si128(pairs, mask));
      const __m128i odd = _mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(pairs, 4), mask));
      const F unit = scale * 0.5f;
      weight[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(even)) * unit;
      weight[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(odd)) * unit;
      weight[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(even, even))) * unit;
      weight[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(odd, odd))) * unit;
    }
  }
  // Adds the upper half to the lower one.
  static Float4 fold(F value) { return _mm256_castps256_ps128(value) + _mm256_extractf128_ps(value, 1); }
};

}  // namespace
}  // namespace sida::cpu
