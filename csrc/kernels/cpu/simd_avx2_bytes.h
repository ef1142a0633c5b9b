// AVX2's byte products for kernel_bytes.h.
#pragma once

#include "kernels/cpu/simd_avx2.h"

namespace sida::cpu {
namespace {

// VPMADDUBSW multiplies unsigned bytes by signed ones and adds pairs in 16 bits, which saturate. They never do here:
// |q| <= 127, so a pair of int4 (0 to 15) is at most 2 * 15 * 127 = 3,810 and eight of them 30,480; a pair of mxfp4 (0
// to 24) is at most 6,096 and four of them 24,384. A pair of int8 is taken as |w| (0 to 128) times q with w's sign, at
// most 2 * 128 * 127 = 32,512, and not added up in 16 bits.
struct SimdBytes : Simd {
  using B = __m256i;
  static constexpr int byte_tile_tokens = 4;

  template <DType dtype>
  static constexpr int32_t offset = dtype == DType::i8     ? 0
                                    : dtype == DType::int4 ? 8
                                                           : 12;
  template <DType dtype>
  static constexpr int parts = dtype == DType::i8 ? 8 : 4;

  // For every group of every row: a call of its own would put the sums of all tokens on the stack.
  [[gnu::always_inline]] static void load_parts(B* part, const char* at, int64_t row_bytes) {
    B four[4];  // rows i and 4 + i
    unroll<lanes>([&](auto row) SIDA_INLINE {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      B& rows = four[row.value % 4];
      rows = row.value < 4 ? _mm256_castsi128_si256(sixteen) : _mm256_inserti128_si256(rows, sixteen, 1);
      at += row_bytes;
      // From row to row, and the compiler may not know: all rows' addresses would not fit in the registers.
      asm("" : "+r"(at));
    });
    const B low_a = _mm256_unpacklo_epi32(four[0], four[1]), high_a = _mm256_unpackhi_epi32(four[0], four[1]);
    const B low_b = _mm256_unpacklo_epi32(four[2], four[3]), high_b = _mm256_unpackhi_epi32(four[2], four[3]);
    part[0] = _mm256_unpacklo_epi64(low_a, low_b);
    part[1] = _mm256_unpackhi_epi64(low_a, low_b);
    part[2] = _mm256_unpacklo_epi64(high_a, high_b);
    part[3] = _mm256_unpackhi_epi64(high_a, high_b);
  }

  template <DType dtype>
  [[gnu::always_inline]] static void load_group(B (&part)[parts<dtype>], const char* at, int64_t row_bytes) {
    load_parts(part, at, row_bytes);
    if constexpr (dtype == DType::i8) load_parts(part + 4, at + 16, row_bytes);
    // Two's complement with its sign bit turned is the number plus 8.
    if constexpr (dtype == DType::int4) {
      const B signs = _mm256_set1_epi8(static_cast<char>(0x88));
      unroll<4>([&](auto j) SIDA_INLINE { part[j.value] = _mm256_xor_si256(part[j.value], signs); });
    }
  }

  template <DType dtype>
  static void load_scales(F (&scale)[16 / group_scale_bytes(dtype)], const char* at, int64_t row_bytes) {
    B part[4];
    load_parts(part, at, row_bytes);
    unroll<4>([&](auto j) SIDA_INLINE {
      if constexpr (dtype == DType::int4) {
        const B low = _mm256_and_si256(part[j.value], _mm256_set1_epi32(0xffff));
        const B both = _mm256_packus_epi32(low, _mm256_srli_epi32(part[j.value], 16));
        const B in_order = _mm256_permute4x64_epi64(both, 0xd8);
        scale[2 * j.value] = _mm256_cvtph_ps(_mm256_castsi256_si128(in_order));
        scale[2 * j.value + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(in_order, 1));
      } else {
        unroll<4>([&](auto i) SIDA_INLINE {
          scale[4 * j.value + i.value] = half_powers_of_two<Simd, i.value>(bits_as<Types::U>(part[j.value]));
        });
      }
    });
  }

  static void store_bytes(char* to, I value) {
    const B whole = bits_as<B>(value);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
  }

  template <DType dtype, int i>
  static B weight(const B (&part)[parts<dtype>]) {
    if constexpr (dtype == DType::i8) {
      return part[i];
    } else {
      const B shifted = i % 2 == 0 ? part[i / 2] : _mm256_srli_epi16(part[i / 2], 4);
      const B code = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
      if constexpr (dtype == DType::int4) return code;
      return _mm256_shuffle_epi8(
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(raised_e2m1))), code);
    }
  }

  static B four_bytes(const char* at) {
    int32_t four;
    __builtin_memcpy(&four, at, sizeof(four));
    return _mm256_set1_epi32(four);
  }

  template <DType dtype, int N, class Weight>
  static void dot(I (&sum)[N], Weight weight, const char* x, const int32_t* starts) {
    const B ones = _mm256_set1_epi16(1);
    // Products that are added up in 16 bits.
    constexpr int chain = dtype == DType::int4 ? 8 : dtype == DType::mxfp4 ? 4 : 1;
    B pairs[N];
    unroll<8>([&](auto i) SIDA_INLINE {
      const B w = weight(i);
      unroll<N>([&](auto n) SIDA_INLINE {
        const B q = four_bytes(x + n.value * group_columns + 4 * i.value);
        B product;
        if constexpr (dtype == DType::i8) {
          product = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
        } else {
          product = _mm256_maddubs_epi16(w, q);
        }
        pairs[n.value] = i.value % chain == 0 ? product : _mm256_add_epi16(pairs[n.value], product);
        // In this order: with products of later steps in flight the sums would not fit in the registers.
        asm volatile("" : "+x"(pairs[n.value]));
        if constexpr (i.value % chain == chain - 1) {
          const I four = bits_as<I>(_mm256_madd_epi16(pairs[n.value], ones));
          sum[n.value] = i.value < chain ? four : sum[n.value] + four;
        }
      });
    });
    if constexpr (offset<dtype> != 0) {
      unroll<N>([&](auto n) SIDA_INLINE { sum[n.value] += starts[n.value] - I{}; });
    }
  }
};

}  // namespace
}  // namespace sida::cpu
