// The tensor-core kernels for bf16 activations with bf16 or int8 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels bf16_kernels(DType w_dtype, int block_t) {
  return w_dtype == DType::i8 ? gemm_kernels<bf16, int8_t>(block_t) : gemm_kernels<bf16, bf16>(block_t);
}

}  // namespace sida::cuda
