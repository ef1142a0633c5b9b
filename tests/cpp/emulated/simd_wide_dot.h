// SimdWide with VDPBF16PS for its multiply-add.
#pragma once

#include "emulated/bf16_arithmetic.h"
#include "emulated/simd_wide.h"

namespace sida::cpu {
namespace {

struct SimdWideDot : SimdWide {
  static constexpr int64_t segment = 2048;
  // For each lane: the product of the odd (upper) elements is added first, then that of the even ones.
  static void accumulate(F& sum, F a, F b) {
    const auto pairs_a = bits_as<Types::U>(a), pairs_b = bits_as<Types::U>(b);
    for (int i = 0; i < lanes; ++i) {
      const float odd = test::flushed_multiply_add(test::high_bf16(pairs_a[i]), test::high_bf16(pairs_b[i]), sum[i]);
      sum[i] = test::flushed_multiply_add(test::low_bf16(pairs_a[i]), test::low_bf16(pairs_b[i]), odd);
    }
  }
};

}  // namespace
}  // namespace sida::cpu
