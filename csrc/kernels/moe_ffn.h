// The fused expert feed-forward of one MoE layer: one signature for every backend.
//
//   y[t, k]  = gate[t, k] * (wo[s] @ activation(wi[s] @ x[t] + wi_bias[s]) + wo_bias[s]),
//   s = slot_of_expert[expert_index[t, k]]; biases are optional
//   out[t]   = sum over k of y[t, k], in the order of k
//
// A layer may run in waves: each call computes the rows whose expert has a slot in that call's `slot_of_expert`.
// With top_k == 1 a wave writes its rows of `out` and leaves the others alone. With top_k > 1 it writes rows of
// `partials`, and `moe_ffn_combine` adds them up at the end, so that no sum depends on the order of the waves.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace sida {

// gelu_new is the tanh form. Names and aliases are in activation.h. swiglu_oai, GPT-OSS's, exists gated only: with g
// the gate and u the other half, (clamp(u, -7, 7) + 1) * min(g, 7) * sigmoid(1.702 min(g, 7)).
enum class Activation : int32_t {
  relu,
  gelu,
  gelu_new,
  silu,
  gelu_10,
  quick_gelu,
  sigmoid,
  tanh,
  relu2,
  relu6,
  leaky_relu,
  mish,
  hardswish,
  laplace,
  linear,
  softplus,
  sqrtsoftplus,
  swiglu_oai
};

// Runs body(context, i) for every i in [0, count) on the caller's thread pool and returns when all are done.
// `threads` is how many of them run at once at the most; the kernels cut their work by it, never their sums.
struct ParallelFor {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// A batch of expert matrices, one for each slot. Rows are contiguous; slots and rows may be strided.
struct ExpertMatrix {
  const void* data;
  int64_t slot_stride;           // elements (int4, mxfp4: pairs of them) between the first elements of two slots
  int64_t row_stride;            // the same between two rows
  const float* scale;            // int8 only: [slots, rows], one factor for each row; else null
  int64_t scale_slot_stride;     // elements between the scales of two slots
  const float* bias = nullptr;   // [slots, rows], added to a row's product; null: none
  int64_t bias_slot_stride = 0;  // elements between the biases of two slots
  // int4 and mxfp4 only, one scale for each group of 32 columns: [slots, rows, ceil(columns / 32)] of float16 or of
  // bytes.
  const void* group_scale = nullptr;
  int64_t group_scale_slot_stride = 0, group_scale_row_stride = 0;  // scales
};

struct MoeFfnArgs {
  int64_t tokens, top_k, d_model, d_ff;  // d_ff: width of the hidden layer (gated: wi has 2 * d_ff rows, gate first)
  int64_t num_experts, num_slots;
  DType x_dtype;                  // f32, bf16 or f16; out has the same
  DType w_dtype;                  // any
  const void* x;                  // [tokens, d_model], rows contiguous
  int64_t x_row_stride;           // elements
  const int32_t* expert_index;    // [tokens, top_k] contiguous; -1: no expert, contributes 0
  const float* gate;              // [tokens, top_k] contiguous
  ExpertMatrix wi;                // [slots, d_ff or 2 * d_ff, d_model]
  ExpertMatrix wo;                // [slots, d_model, d_ff]
  const int32_t* slot_of_expert;  // [num_experts]; -1: not in this wave, the row is left alone
  Activation activation;
  bool gated;
  void* out;        // [tokens, d_model] contiguous, zeroed by the caller before the first wave
  float* partials;  // [tokens, top_k, d_model] zeroed by the caller; null if and only if top_k == 1
};

namespace cpu {

// Computes one wave. Indices are checked by the caller: expert_index in [-1, num_experts), slots in [-1, num_slots).
void moe_ffn(const MoeFfnArgs& args, const ParallelFor& parallel);

// out[t] = sum over k of partials[t, k] in the order of k, rounded once. Only for top_k > 1.
void moe_ffn_combine(const MoeFfnArgs& args, const ParallelFor& parallel);

// The instruction set in force: the best of those taken by default that this CPU has, or the one that SIDA_CPU names.
// Throws Error(invalid) if SIDA_CPU names an unknown set or one that the build or the CPU lacks.
const char* instruction_set();
// Floating-point operations a second of `threads` threads that do fused multiply-adds in registers and nothing else, in
// the instruction set in force; the best of several tries. Takes some 50 ms.
double measure_multiply_add_rate(int threads);
// All that build and CPU have, best first; those that are not taken by default too.
std::vector<std::string> instruction_sets();

// exact: products of weights and activations as they are, sums in fp32. fast: activations (x and the hidden layer) are
// rounded, to bfloat16 where weights are bfloat16 and the instruction set in force multiplies such pairs, to 8 bits
// where weights are int8, int4 or mxfp4 (kernel_bytes.h).
enum class Precision : int32_t { exact, fast };
// For all calls of the process that begin afterwards; any thread may call it at any time.
// Throws Error(invalid), naming the set, if the instruction set in force has no `fast`.
void set_precision(Precision precision);
Precision precision();
// Those of the instruction set in force.
std::vector<Precision> precisions();

}  // namespace cpu
}  // namespace sida
