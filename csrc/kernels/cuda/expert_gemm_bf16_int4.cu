// The tensor-core kernels for bf16 activations with int4 weights.
#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/gemm_table.cuh"

namespace sida::cuda {

LayerKernels bf16_int4_kernels(int block_t) {
  return gemm_kernels<bf16, int4_pair>(block_t);
}

}  // namespace sida::cuda
