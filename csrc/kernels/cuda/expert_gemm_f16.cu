// The tensor-core kernels for fp16 activations with fp16 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels f16_kernels(int block_t) {
  return gemm_kernels<f16, f16>(block_t);
}

}  // namespace sida::cuda
