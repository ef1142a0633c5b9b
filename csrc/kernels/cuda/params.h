// What the kernels of one layer are told: plain structs, passed by value, device pointers inside.
#pragma once

#include <cstdint>

#include "kernels/moe_ffn.h"

namespace sida::cuda {

// Up to block_t neighbouring positions of one expert.
struct alignas(16) TokenTile {
  int32_t slot;   // of the expert
  int32_t first;  // position of its first row
  int32_t count;  // of rows, at least 1
  int32_t unused;
};

// dispatch_plan's result. A *row* is a (token, choice) pair, token * top_k + choice; a *position* is its place after
// sorting by expert, rows of one expert in their own order.
struct Plan {
  int32_t* tile_count;       // [1]
  TokenTile* tiles;          // [max_tiles]
  int32_t* row_of_position;  // [tokens * top_k]
};

// Which slot each row's expert has in this wave.
struct Routing {
  const int32_t* expert_index;    // [rows]; null: every row goes to expert 0
  const int32_t* slot_of_expert;  // [num_experts]; null if and only if expert_index is: slot 0
  int32_t num_experts, num_slots;
};

struct PlanParams {
  Routing routing;
  int32_t rows, block_t, warps;
  Plan plan;
  int32_t* counters;  // zeroed for the output phase: tickets and arrivals
  int32_t counter_count;
  // Error words, null or two of them, set to INT32_MAX by the host: the lowest row whose expert_index (or whose
  // expert's slot) is out of range, and the lowest row whose expert is not resident.
  int32_t* error_rows;
};

enum class Phase { hidden, output };

// Both products of a layer: hidden = activation(wi x + wi_bias), out = gate * (wo hidden + wo_bias). A linear is the
// output phase alone, with its x as `hidden`.
struct LayerParams {
  int32_t top_k, d_model, d_ff;
  bool gated;
  Activation activation;
  DType x_dtype, w_dtype, hidden_dtype;
  // 16-byte accesses (4 bytes of 4-bit weights) are aligned; only the fp32 path and the epilogues of the output phase
  // ask.
  bool vector_x, vector_wi, vector_wo, vector_hidden, vector_out, vector_partials;
  Routing routing;
  const void* x;
  int64_t x_row_stride;
  const float* gate;  // [rows]; null: 1
  ExpertMatrix wi, wo;
  Plan plan;
  void* hidden;               // [positions, hidden_row_stride] of hidden_dtype: where the hidden phase writes
  const void* hidden_values;  // the same: where the output phase reads, also a linear's x
  int64_t hidden_row_stride;  // of a layer: d_ff rounded up to 8
  int32_t splits;             // of d_ff in the output phase
  float* split_sums;          // [splits, positions, split_row_stride]; null if splits == 1
  int64_t split_row_stride;   // d_model rounded up to 8
  int64_t positions;          // tokens * top_k
  int32_t* tickets;           // [max_tiles, output tiles]
  int32_t* arrivals;          // [tokens, output tiles]: rows of a token that are done; null if top_k == 1
  void* out;                  // [tokens, d_model]
  float* partials;            // [rows, d_model]; null if and only if top_k == 1
};

struct RouteParams {
  const void* logits;    // [sequences, length, experts] contiguous
  DType dtype, rounded;  // of the logits; that the probabilities are rounded to before the maximum is taken
  int32_t length, experts, capacity, warps;
  int32_t* expert_index;  // [sequences, length]; -1 beyond the capacity
  float* gate;            // [sequences, length]
};

}  // namespace sida::cuda
