// The tensor-core kernels for f16 activations with f16 or int8 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels f16_kernels(DType w_dtype, int block_t) {
  return w_dtype == DType::i8 ? gemm_kernels<f16, int8_t>(block_t) : gemm_kernels<f16, f16>(block_t);
}

}  // namespace sida::cuda
