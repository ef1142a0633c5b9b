// The kernels' entry points, for the host code that launches them.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/params.h"

namespace sida::cuda {

__global__ void dispatch_plan_kernel(PlanParams p);
__global__ void route_top1_kernel(RouteParams p);

// Both phases of a layer for one choice of types and tile.
struct LayerKernels {
  const char* name;
  void (*hidden)(LayerParams);
  void (*output)(LayerParams);
  int block_w, threads;
  int64_t shared_bytes;
};

// One source file each, so that they compile side by side.
LayerKernels bf16_kernels(int block_t);
LayerKernels bf16_int8_kernels(int block_t);
LayerKernels f16_kernels(int block_t);
LayerKernels f16_int8_kernels(int block_t);
LayerKernels bf16_int4_kernels(int block_t);
LayerKernels bf16_mxfp4_kernels(int block_t);
LayerKernels f16_int4_kernels(int block_t);
LayerKernels f16_mxfp4_kernels(int block_t);
LayerKernels f32_kernels(int block_t);

struct SimtShape {
  static constexpr int block_w = 64, block_k = 32, threads = 128;
};

}  // namespace sida::cuda
