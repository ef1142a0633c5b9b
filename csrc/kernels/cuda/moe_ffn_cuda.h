// The CUDA backend's host interface: the layer of moe_ffn.h over device pointers, on the caller's stream.
//
// A layer is three launches (plan, hidden, output) and, for top_k > 1, a combine after its last wave. Nothing here
// allocates, synchronises or touches another stream; memory comes from the caller.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/heuristics.h"
#include "kernels/moe_ffn.h"

namespace sida::cuda {

// Bytes of scratch that moe_ffn needs for these sizes. The scratch must be 256-byte aligned and may be reused by the
// next call on the same stream; its contents need not be kept or cleared.
int64_t workspace_bytes(const MoeFfnArgs& args, const Architecture& architecture);

// Computes one wave; semantics as cpu::moe_ffn. Wrong values cannot raise here: `error_rows` (null or two int32 on the
// device, INT32_MAX before the first call) receives the lowest row (token * top_k + choice) with an index or a slot
// out of range, and the lowest whose expert has slot -1; rows of either kind are left alone.
// Throws Error(invalid) for sizes that the kernels do not take and Error(internal) if a launch fails.
void moe_ffn(const MoeFfnArgs& args, const Architecture& architecture, void* workspace, int32_t* error_rows,
             cudaStream_t stream);

// out[t] = sum over k of partials[t, k] in the order of k, rounded once. Only for top_k > 1.
void moe_ffn_combine(const MoeFfnArgs& args, cudaStream_t stream);

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
