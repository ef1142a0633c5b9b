// Eight lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/simd.h"

namespace sida::cpu {
namespace {

// The two upper bytes of the sixteen values of 4 bits in fp32, whose lower ones are zero.
struct UpperBytes {
  alignas(16) int8_t upper[16], lower[16];
  constexpr UpperBytes(const int8_t (&codes)[16], float unit) : upper(), lower() {
    for (int i = 0; i < 16; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, codes[i] * unit);
      upper[i] = static_cast<int8_t>(bits >> 24);
      lower[i] = static_cast<int8_t>(bits >> 16 & 0xff);
    }
  }
};

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
  static Types::U load_u8(const void* from) {
    return bits_as<Types::U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
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
  static constexpr UpperBytes values =
      dtype == DType::int4 ? UpperBytes(signed_nibbles, 1.0f) : UpperBytes(doubled_e2m1, 0.5f);

  alignas(32) static constexpr int8_t spread[32] = {0, 1, 2, 3, 0, 1, 2, 3, 8,  9,  10, 11, 8,  9,  10, 11,
                                                    4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15, 12, 13, 14, 15};
  alignas(32) static constexpr int32_t shifts[8] = {0, 4, 0, 4, 0, 4, 0, 4};
  alignas(32) static constexpr uint32_t low_halves[8] = {0x0f0f0f0fu, 0x0f0f0f0fu, 0x0f0f0f0fu, 0x0f0f0f0fu,
                                                         0x0f0f0f0fu, 0x0f0f0f0fu, 0x0f0f0f0fu, 0x0f0f0f0fu};

  // A code's value is looked up as the two upper bytes of its fp32 form. Converting integers would take more
  // instructions, and such as only the units for products execute.
  //
  //    spread   bytes 0 to 3 twice, bytes 8 to 11 twice | bytes 4 to 7 twice, bytes 12 to 15 twice
  //    codes    the even columns of four bytes, then their odd ones
  template <DType dtype>
  static void unfold_group(F (&weight)[4], const char* at, F scale) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    // The constants are operands in memory: a tile has no registers left for them.
    __m256i codes;
    asm("vpshufb %2, %1, %0\n\tvpsrlvd %3, %0, %0\n\tvpand %4, %0, %0"
        : "=&x"(codes)
        : "x"(both), "m"(spread), "m"(shifts), "m"(low_halves));
    const auto table = [](const int8_t (&bytes)[16]) SIDA_INLINE {
      return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    };
    const __m256i upper = _mm256_shuffle_epi8(table(values<dtype>.upper), codes);
    const __m256i lower = _mm256_shuffle_epi8(table(values<dtype>.lower), codes);
    const __m256i first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
    const __m256i zero = _mm256_setzero_si256();
    weight[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, first)) * scale;
    weight[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, first)) * scale;
    weight[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, second)) * scale;
    weight[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, second)) * scale;
  }
  // Adds the upper half to the lower one.
  static Float4 fold(F value) { return _mm256_castps256_ps128(value) + _mm256_extractf128_ps(value, 1); }
};

}  // namespace
}  // namespace sida::cpu
