// For top_k > 1: adds each token's choices in their order and rounds once.
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kernels.h"

namespace sida::cuda {

__global__ void __launch_bounds__(256) combine_kernel(const CombineParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t elements = p.tokens * p.d_model;
  for (int64_t i = thread * 8; i < elements; i += threads * 8) {
    const int count = static_cast<int>(min(elements - i, static_cast<int64_t>(8)));
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum[j] = 0.0f;
      if (j >= count) continue;
      const int64_t token = (i + j) / p.d_model, column = (i + j) % p.d_model;
      const float* choices = p.partials + token * p.top_k * p.d_model + column;
      for (int choice = 0; choice < p.top_k; ++choice) sum[j] += choices[static_cast<int64_t>(choice) * p.d_model];
    }
    store_eight(p.out, i, p.x_dtype, count, true, sum);
  }
}

}  // namespace sida::cuda
