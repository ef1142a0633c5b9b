// The attention that every instruction set provides. As for kernels.h, nothing here may have external linkage.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace sida::cpu {

// Computes one head of one sequence; `memory`: fp32, `dim` and the span's keys, each rounded up to the lanes.
using AttendHead = void (*)(const AttentionArgs& args, int64_t sequence, int64_t head, float* memory);

struct AttentionKernels {
  int64_t lanes;
  AttendHead f32, bf16, f16;
};

const AttentionKernels* scalar_attention() noexcept;
const AttentionKernels* avx2_attention() noexcept;
const AttentionKernels* avx512_attention() noexcept;
const AttentionKernels* neon_attention() noexcept;

}  // namespace sida::cpu
