// RMS norms for one `Simd`, made by including this after a simd_*.h; see kernels.h for what may stand here.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/rms_norm.h"

namespace sida::cpu {

template <class S, DType dtype>
struct RmsNormKernel {
  using F = typename S::F;
  // Columns whose squares are summed apart: as many on every instruction set, so that the bits are the same.
  static constexpr int block = 16;
  static constexpr int vectors = block / S::lanes;
  static constexpr int64_t element = dtype == DType::f32 ? 4 : 2, step = S::lanes * element;

  static F load(const char* from) { return load_as_float<S>(dtype, from); }

  static void square(const char* x, F (&sums)[vectors]) {
    unroll<vectors>([&](auto v) SIDA_INLINE {
      const F value = load(x + v.value * step);
      sums[v.value] = sums[v.value] + value * value;
    });
  }

  static void scale(const char* x, const char* weight, F factor, char* out) {
    unroll<vectors>([&](auto v) SIDA_INLINE {
      char scaled[step];
      store_rounded<S>(dtype, scaled, load(x + v.value * step) * factor);
      store_rounded<S>(dtype, out + v.value * step, load(weight + v.value * step) * load(scaled));
    });
  }

  static void rows(const RmsNormArgs& args, int64_t first, int64_t last) {
    const int64_t whole = args.columns - args.columns % block;
    const auto left = static_cast<size_t>((args.columns - whole) * element);
    const auto* const weight = static_cast<const char*>(args.weight);
    char last_weight[block * 4] = {};
    __builtin_memcpy(last_weight, weight + whole * element, left);
    for (int64_t row = first; row < last; ++row) {
      const char* const x = static_cast<const char*>(args.x) + row * args.columns * element;
      char* const out = static_cast<char*>(args.out) + row * args.columns * element;
      char last_x[block * 4] = {}, last_out[block * 4];  // filled up with zeros
      __builtin_memcpy(last_x, x + whole * element, left);
      F sums[vectors] = {};
      for (int64_t column = 0; column < whole; column += block) square(x + column * element, sums);
      if (left != 0) square(last_x, sums);
      float sum[block];
      unroll<vectors>([&](auto v) SIDA_INLINE { store<S>(sum + v.value * S::lanes, sums[v.value]); });
      for (int count = block / 2; count > 0; count /= 2) {
        for (int i = 0; i < count; ++i) sum[i] = sum[i] + sum[i + count];
      }
      const float mean = sum[0] / static_cast<float>(args.columns);
      const F factor = broadcast<S>(1.0f / __builtin_sqrtf(mean + args.eps));
      for (int64_t column = 0; column < whole; column += block) {
        scale(x + column * element, weight + column * element, factor, out + column * element);
      }
      if (left != 0) {
        scale(last_x, last_weight, factor, last_out);
        __builtin_memcpy(out + whole * element, last_out, left);
      }
    }
  }
};

}  // namespace sida::cpu
