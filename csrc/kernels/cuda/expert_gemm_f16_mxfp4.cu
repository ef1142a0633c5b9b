// The tensor-core kernels for fp16 activations with mxfp4 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels f16_mxfp4_kernels(int block_t) {
  return gemm_kernels<f16, mxfp4_pair>(block_t);
}

}  // namespace sida::cuda
