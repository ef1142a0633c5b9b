// AVX-512 with AVX512_VNNI: a lane is four bytes of the operands and a 32-bit sum of the result.
#pragma once

#include "kernels/cpu/simd_avx512.h"

namespace sida::cpu {
namespace {

// What kernel_bytes.h asks of a Simd:
//   B                    a vector of bytes, four in each lane
//   byte_tile_tokens     the most tokens of a tile
//   offset<dtype>        what `weight` adds to a weight
//   parts<dtype>         vectors of a group of rows, as loaded
//   load_group<dtype>    loads them: part j has bytes [4 j, 4 j + 4) of row r at `at` in lane r
//   load_scales<dtype>   the scales in 16 bytes of each row, rows in lanes, as fp32; mxfp4's halved
//   store_bytes          integers from -127 to 127 as bytes
//   weight<dtype, i>     the weights that token bytes [4 i, 4 i + 4) are multiplied with
//   dot<dtype, N>        sum[n] = starts[n] and weight(i) . x[n][4 i ...] over all eight i, exactly
struct SimdVnni : Simd {
  using B = __m512i;
  static constexpr int byte_tile_tokens = 8;

  template <DType dtype>
  static constexpr int32_t offset = dtype == DType::i8     ? 128
                                    : dtype == DType::int4 ? 8
                                                           : 12;
  template <DType dtype>
  static constexpr int parts = dtype == DType::i8 ? 8 : 4;

  // For every group of every row: a call of its own would put the sums of all tokens on the stack.
  [[gnu::always_inline]] static void load_parts(B* part, const char* at, int64_t row_bytes) {
    B four[4];  // rows i, 4 + i, 8 + i and 12 + i
    unroll<lanes>([&](auto row) SIDA_INLINE {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      B& rows = four[row.value % 4];
      if constexpr (row.value < 4) {
        rows = _mm512_castsi128_si512(sixteen);
      } else {
        rows = _mm512_inserti32x4(rows, sixteen, row.value / 4);
      }
      at += row_bytes;
      // From row to row, and the compiler may not know: all rows' addresses would not fit in the registers.
      asm("" : "+r"(at));
    });
    const B low_a = _mm512_unpacklo_epi32(four[0], four[1]), high_a = _mm512_unpackhi_epi32(four[0], four[1]);
    const B low_b = _mm512_unpacklo_epi32(four[2], four[3]), high_b = _mm512_unpackhi_epi32(four[2], four[3]);
    part[0] = _mm512_unpacklo_epi64(low_a, low_b);
    part[1] = _mm512_unpackhi_epi64(low_a, low_b);
    part[2] = _mm512_unpacklo_epi64(high_a, high_b);
    part[3] = _mm512_unpackhi_epi64(high_a, high_b);
  }

  template <DType dtype>
  [[gnu::always_inline]] static void load_group(B (&part)[parts<dtype>], const char* at, int64_t row_bytes) {
    load_parts(part, at, row_bytes);
    if constexpr (dtype == DType::i8) load_parts(part + 4, at + 16, row_bytes);
    // Two's complement with its sign bit turned is the number plus 128, or plus 8.
    if constexpr (dtype != DType::mxfp4) {
      const B signs = _mm512_set1_epi8(static_cast<char>(dtype == DType::i8 ? 0x80 : 0x88));
      unroll<parts<dtype>>([&](auto j) SIDA_INLINE { part[j.value] = _mm512_xor_si512(part[j.value], signs); });
    }
  }

  template <DType dtype>
  static void load_scales(F (&scale)[16 / group_scale_bytes(dtype)], const char* at, int64_t row_bytes) {
    B part[4];
    load_parts(part, at, row_bytes);
    unroll<4>([&](auto j) SIDA_INLINE {
      if constexpr (dtype == DType::int4) {
        scale[2 * j.value] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(part[j.value]));
        scale[2 * j.value + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(part[j.value], 16)));
      } else {
        unroll<4>([&](auto i) SIDA_INLINE {
          scale[4 * j.value + i.value] = half_powers_of_two<Simd, i.value>(bits_as<Types::U>(part[j.value]));
        });
      }
    });
  }

  static void store_bytes(char* to, I value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits_as<B>(value)));
  }

  template <DType dtype, int i>
  static B weight(const B (&part)[parts<dtype>]) {
    if constexpr (dtype == DType::i8) {
      return part[i];
    } else {
      const B shifted = i % 2 == 0 ? part[i / 2] : _mm512_srli_epi16(part[i / 2], 4);
      const B code = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
      if constexpr (dtype == DType::int4) return code;
      return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(raised_e2m1))),
                                 code);
    }
  }

  template <DType dtype, int N, class Weight>
  static void dot(I (&sum)[N], Weight weight, const char* x, const int32_t* starts) {
    unroll<N>([&](auto n) SIDA_INLINE { sum[n.value] = starts[n.value] - I{}; });
    unroll<8>([&](auto i) SIDA_INLINE {
      const B w = weight(i);
      unroll<N>([&](auto n) SIDA_INLINE {
        asm("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(sum[n.value])
            : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x + n.value * group_columns + 4 * i.value)));
      });
    });
  }
};

}  // namespace
}  // namespace sida::cpu
