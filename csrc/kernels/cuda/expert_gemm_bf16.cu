// The tensor-core kernels for bf16 activations with bf16 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels bf16_kernels(int block_t) {
  return gemm_kernels<bf16, bf16>(block_t);
}

}  // namespace sida::cuda
