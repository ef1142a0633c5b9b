// What the kernels fit to 32 registers of sixteen lanes, apart from the instructions.
#pragma once

#include "kernels/cpu/simd.h"

namespace sida::cpu {

struct Simd512Shape {
  static constexpr int lanes = 16;
  using Types = VectorOf<lanes>;
  using F = Types::F;
  using I = Types::I;

  static constexpr int64_t segment = 4096;

  // 32 registers: 24 sums, the tokens' vectors and one row of weights.
  static constexpr int tile_tokens = 4;
  static constexpr int tile_rows(int tokens) { return tokens == 4 ? 6 : 8; }
};

}  // namespace sida::cpu
