// The CUDA backend's host interface: the layer of moe_ffn.h and the matrix of linear.h over device pointers, on the
// caller's stream.
//
// A layer, or one wave of it, is three launches for any top_k: plan, hidden, output. Nothing here allocates,
// synchronises or touches another stream; memory comes from the caller.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/heuristics.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"

namespace sida::cuda {

// Bytes of scratch that moe_ffn needs for these sizes. The scratch must be 256-byte aligned and may be reused by the
// next call on the same stream; its contents need not be kept or cleared.
int64_t workspace_bytes(const MoeFfnArgs& args, const Architecture& architecture);

// Computes one wave; semantics as cpu::moe_ffn. Wrong values cannot raise here: `error_rows` (null or two int32 on the
// device, INT32_MAX before the first call) receives the lowest row (token * top_k + choice) with an index or a slot
// out of range, and the lowest whose expert has slot -1; rows of either kind are left alone.
// With top_k > 1 there is nothing to combine afterwards (as cpu::moe_ffn_combine does): a wave leaves in `out`, for
// every token that it computed a row of, the sum of all its choices in `partials` so far, in their order and rounded
// once. Throws Error(invalid) for sizes that the kernels do not take and Error(internal) if a launch fails.
void moe_ffn(const MoeFfnArgs& args, const Architecture& architecture, void* workspace, int32_t* error_rows,
             cudaStream_t stream);

// One matrix times tokens, as cpu::linear: a plan of one expert and the output phase of a layer, two launches. Scratch
// and errors as above.
int64_t workspace_bytes(const LinearArgs& args, const Architecture& architecture);
void linear(const LinearArgs& args, const Architecture& architecture, void* workspace, cudaStream_t stream);

struct RouteArgs {
  int64_t sequences, length, experts;
  int64_t capacity;       // tokens of a sequence that an expert takes, 0 or more
  DType dtype, rounded;   // of the logits; that the probabilities are rounded to before the maximum is taken
  const void* logits;     // [sequences, length, experts] contiguous
  int32_t* expert_index;  // [sequences, length]: the most probable expert, -1 beyond its capacity
  float* gate;            // [sequences, length]: its rounded probability
};

void route_top1(const RouteArgs& args, cudaStream_t stream);

}  // namespace sida::cuda
