// Prints each layer kernel's tile, threads and dynamic shared memory, which the machine code does not tell.
// One line each: token type, weight type, weight rows and tokens of a tile, threads, bytes.
#include <cstdio>

#include "kernels/cuda/kernels.h"

int main() {
  using namespace sida;
  const auto print = [](const char* tokens, const char* weights, int block_t, const cuda::LayerKernels& kernels) {
    std::printf("%s %s %d %d %d %lld\n", tokens, weights, kernels.block_w, block_t, kernels.threads,
                static_cast<long long>(kernels.shared_bytes));
  };
  for (const int block_t : {16, 64, 128}) {
    print("bf16", "bf16", block_t, cuda::bf16_kernels(block_t));
    print("bf16", "int8", block_t, cuda::bf16_int8_kernels(block_t));
    print("f16", "f16", block_t, cuda::f16_kernels(block_t));
    print("f16", "int8", block_t, cuda::f16_int8_kernels(block_t));
  }
  for (const int block_t : {16, 64}) {
    print("bf16", "int4", block_t, cuda::bf16_int4_kernels(block_t));
    print("bf16", "mxfp4", block_t, cuda::bf16_mxfp4_kernels(block_t));
    print("f16", "int4", block_t, cuda::f16_int4_kernels(block_t));
    print("f16", "mxfp4", block_t, cuda::f16_mxfp4_kernels(block_t));
  }
  for (const int block_t : {16, 64}) print("f32", "any", block_t, cuda::f32_kernels(block_t));
}
