// The tensor-core kernels for bf16 activations with mxfp4 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels bf16_mxfp4_kernels(int block_t) {
  return gemm_kernels<bf16, mxfp4_pair>(block_t);
}

}  // namespace sida::cuda
