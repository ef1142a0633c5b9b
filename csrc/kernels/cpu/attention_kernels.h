// The attention, and the norms beside it, that every instruction set provides. As for kernels.h, nothing here may have
// external linkage.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/rms_norm.h"

namespace sida::cpu {

// Of the keys of a prompt that are turned at the most: they are fp32, for each thread.
inline constexpr int64_t most_turned = 1024;

// Whether a sequence has so many queries that its keys are turned first, so that a vector holds one dimension of many
// keys. Its results are the same.
static inline bool turns_keys(const AttentionSpan& span, int64_t together) {
  return span.last_query - span.first_query >= together && span.last - span.first <= most_turned;
}

// Computes one head of one sequence; `memory`: fp32, `together` times (`dim` and the span's keys), and where they are
// turned `dim` times the keys, each rounded up to the lanes.
using AttendHead = void (*)(const AttentionArgs& args, int64_t sequence, int64_t head, float* memory);

// Rows `first` to `last`.
using NormaliseRows = void (*)(const RmsNormArgs& args, int64_t first, int64_t last);

struct AttentionKernels {
  int64_t lanes;
  int64_t together;  // queries
  AttendHead f32, bf16, f16;
  NormaliseRows norm_f32, norm_bf16, norm_f16;
};

// Those of the instruction set in use.
const AttentionKernels& attention_kernels();

const AttentionKernels* scalar_attention() noexcept;
const AttentionKernels* avx2_attention() noexcept;
const AttentionKernels* avx512_attention() noexcept;
const AttentionKernels* neon_attention() noexcept;

}  // namespace sida::cpu
