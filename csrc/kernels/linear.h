// One matrix times tokens: out[t] = w @ x[t] + bias.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/moe_ffn.h"

namespace sida {

struct LinearArgs {
  int64_t tokens, columns, rows;  // at least one column
  DType x_dtype;                  // f32, bf16 or f16; out has the same
  DType w_dtype;                  // any
  const void* x;                  // [tokens, columns], rows contiguous
  int64_t x_row_stride;           // elements
  ExpertMatrix w;                 // one "slot": [rows, columns], its scales and its bias
  void* out;                      // [tokens, rows] contiguous
};

namespace cpu {

// Sums, precision and bits are those of moe_ffn's products: a row of `out` depends on its token alone.
void linear(const LinearArgs& args, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace sida
