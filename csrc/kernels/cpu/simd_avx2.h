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

  // A shorter way than unfold_group, to the same values, for scales that are not extreme. Two bytes put a code among
  // the digits of a number whose upper half is the same for all; a fused multiply-add takes off what is too much:
  //
  //     int4     2^11 + c,             c: the weight's integer plus 8
  //     mxfp4    2^23 + 12 * 2^8 + u,  u: twice the weight's value plus 12, looked up (the 12s are what zeros give)
  //     weight = fma(number, unit, too much * -unit)
  //
  // `too much` has 9 digits where a unit, a float16, has 11, and 24 where it is a power of two: nothing is rounded.
  struct Units {
    F unit, offset;  // of a group, in all lanes; offset: too much * -unit
  };
  template <DType dtype>
  static Units units(F scale) {
    const F unit = dtype == DType::int4 ? scale : scale * 0.5f;
    return {unit, unit * (dtype == DType::int4 ? -2056.0f : -8391692.0f)};
  }
  // Whether a lane's scale is extreme: infinite or NaN, and for mxfp4 outside of 2^-100 to 2^100, where an offset could
  // be infinite or a unit denormal.
  template <DType dtype>
  static I is_extreme(F scale) {
    const auto bits = bits_as<Types::U>(scale) & 0x7fffffffu;
    if constexpr (dtype == DType::int4) return bits_as<I>(bits >= 0x7f800000u);
    return bits_as<I>(bits - (27u << 23) > (200u << 23));
  }

  static bool any(I mask) { return _mm256_testz_si256(bits_as<__m256i>(mask), bits_as<__m256i>(mask)) == 0; }

  //    order    bytes 0 to 3 and 8 to 11 | bytes 4 to 7 and 12 to 15, as the upper halves of words, and as the lower
  alignas(32) static constexpr int8_t as_upper[32] = {-1, 0, -1, 1, -1, 2, -1, 3, -1, 8,  -1, 9,  -1, 10, -1, 11,
                                                      -1, 4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15};
  alignas(32) static constexpr int8_t as_lower[32] = {0, -1, 1, -1, 2, -1, 3, -1, 8,  -1, 9,  -1, 10, -1, 11, -1,
                                                      4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1};
  alignas(32) static constexpr uint16_t sign_bits[16] = {0x8800, 0x8800, 0x8800, 0x8800, 0x8800, 0x8800,
                                                         0x8800, 0x8800, 0x8800, 0x8800, 0x8800, 0x8800,
                                                         0x8800, 0x8800, 0x8800, 0x8800};

  template <DType dtype>
  [[gnu::always_inline]] static void unfold_units(F (&weight)[4], const char* at, Units units) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    __m256i even, odd;
    // Some constants are operands in memory: a tile has no registers left for them.
    if constexpr (dtype == DType::int4) {
      __m256i words;
      asm("vpshufb %2, %1, %0\n\tvpxor %3, %0, %0" : "=&x"(words) : "x"(both), "m"(as_upper), "m"(sign_bits));
      even = _mm256_slli_epi16(words, 4);
      odd = _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xf000)));
    } else {
      __m256i words;
      asm("vpshufb %2, %1, %0" : "=x"(words) : "x"(both), "m"(as_lower));
      const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(raised_e2m1)));
      even = _mm256_shuffle_epi8(table, _mm256_and_si256(words, _mm256_set1_epi16(0x000f)));
      odd = _mm256_shuffle_epi8(table, _mm256_srli_epi16(words, 4));
    }
    const __m256i upper = _mm256_set1_epi16(dtype == DType::int4 ? 0x4500 : 0x4b00);
    const auto value = [&](__m256i number)
                           SIDA_INLINE { return fma(_mm256_castsi256_ps(number), units.unit, units.offset); };
    weight[0] = value(_mm256_unpacklo_epi16(even, upper));
    weight[1] = value(_mm256_unpacklo_epi16(odd, upper));
    weight[2] = value(_mm256_unpackhi_epi16(even, upper));
    weight[3] = value(_mm256_unpackhi_epi16(odd, upper));
  }

  // Adds the upper half to the lower one.
  static Float4 fold(F value) { return _mm256_castps256_ps128(value) + _mm256_extractf128_ps(value, 1); }
};

}  // namespace
}  // namespace sida::cpu
