// NEON with the dot products of Armv8.2 (FEAT_DotProd) for kernel_bytes.h: both operands are signed.
#pragma once

#include "kernels/cpu/simd_neon.h"

namespace sida::cpu {
namespace {

struct SimdDotProducts : Simd {
  using B = int8x16_t;
  static constexpr int byte_tile_tokens = 8;

  template <DType dtype>
  static constexpr int32_t offset = 0;
  template <DType dtype>
  static constexpr int parts = dtype == DType::i8 ? 8 : 4;

  // For every group of every row: a call of its own would put the sums of all tokens on the stack.
  [[gnu::always_inline]] static void load_parts(B* part, const char* at, int64_t row_bytes) {
    int32x4_t row[4];
    for (int i = 0; i < 4; ++i)
      row[i] = vreinterpretq_s32_s8(vld1q_s8(reinterpret_cast<const int8_t*>(at + i * row_bytes)));
    const int32x4_t even_a = vtrn1q_s32(row[0], row[1]), odd_a = vtrn2q_s32(row[0], row[1]);
    const int32x4_t even_b = vtrn1q_s32(row[2], row[3]), odd_b = vtrn2q_s32(row[2], row[3]);
    const auto halves = [](int32x4_t a, int32x4_t b, auto upper) SIDA_INLINE {
      const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
      return vreinterpretq_s8_s64(upper.value ? vtrn2q_s64(x, y) : vtrn1q_s64(x, y));
    };
    part[0] = halves(even_a, even_b, Index<0>());
    part[1] = halves(odd_a, odd_b, Index<0>());
    part[2] = halves(even_a, even_b, Index<1>());
    part[3] = halves(odd_a, odd_b, Index<1>());
  }

  template <DType dtype>
  [[gnu::always_inline]] static void load_group(B (&part)[parts<dtype>], const char* at, int64_t row_bytes) {
    load_parts(part, at, row_bytes);
    if constexpr (dtype == DType::i8) load_parts(part + 4, at + 16, row_bytes);
  }

  template <DType dtype>
  static void load_scales(F (&scale)[16 / group_scale_bytes(dtype)], const char* at, int64_t row_bytes) {
    B part[4];
    load_parts(part, at, row_bytes);
    unroll<4>([&](auto j) SIDA_INLINE {
      const uint32x4_t lane = vreinterpretq_u32_s8(part[j.value]);
      if constexpr (dtype == DType::int4) {
        const auto widened = [](uint16x4_t half)
                                 SIDA_INLINE { return reinterpret_cast<F>(vcvt_f32_f16(vreinterpret_f16_u16(half))); };
        scale[2 * j.value] = widened(vmovn_u32(lane));
        scale[2 * j.value + 1] = widened(vshrn_n_u32(lane, 16));
      } else {
        unroll<4>([&](auto i) SIDA_INLINE {
          scale[4 * j.value + i.value] = half_powers_of_two<Simd, i.value>(bits_as<Types::U>(lane));
        });
      }
    });
  }

  static void store_bytes(char* to, I value) {
    const int16x4_t halves = vmovn_s32(reinterpret_cast<int32x4_t>(value));
    vst1_lane_s32(reinterpret_cast<int32_t*>(to), vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  }

  template <DType dtype, int i>
  static B weight(const B (&part)[parts<dtype>]) {
    if constexpr (dtype == DType::i8) {
      return part[i];
    } else if constexpr (dtype == DType::int4) {
      return vshrq_n_s8(i % 2 == 0 ? vshlq_n_s8(part[i / 2], 4) : part[i / 2], 4);
    } else {
      const uint8x16_t both = vreinterpretq_u8_s8(part[i / 2]);
      return vqtbl1q_s8(vld1q_s8(doubled_e2m1), i % 2 == 0 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4));
    }
  }

  template <DType dtype, int N, class Weight>
  static void dot(I (&sum)[N], Weight weight, const char* x, const int32_t*) {
    unroll<N>([&](auto n) SIDA_INLINE { sum[n.value] = I{}; });
    unroll<8>([&](auto i) SIDA_INLINE {
      const B w = weight(i);
      unroll<N>([&](auto n) SIDA_INLINE {
        int32_t four;
        __builtin_memcpy(&four, x + n.value * group_columns + 4 * i.value, sizeof(four));
        sum[n.value] = reinterpret_cast<I>(
            vdotq_s32(reinterpret_cast<int32x4_t>(sum[n.value]), w, vreinterpretq_s8_s32(vdupq_n_s32(four))));
      });
    });
  }
};

}  // namespace
}  // namespace sida::cpu
