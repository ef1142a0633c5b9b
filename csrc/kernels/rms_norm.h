// Rows divided by the root of their mean square: out[r] = weight * (x[r] / sqrt(mean(x[r]^2) + eps)).
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/moe_ffn.h"

namespace sida {

struct RmsNormArgs {
  int64_t rows, columns;
  DType dtype;         // f32, bf16 or f16; of everything
  const void* x;       // [rows, columns] contiguous
  const void* weight;  // [columns]
  float eps;
  void* out;  // [rows, columns] contiguous
};

namespace cpu {

// In fp32, rounded before the weight and after it, as transformers' models do. A row's bits depend on that row alone
// and are the same on every instruction set.
void rms_norm(const RmsNormArgs& args, const ParallelFor& parallel);

}  // namespace cpu
}  // namespace sida
