// Small kernels, each with one thing right or wrong, on which the harness itself is tested.
#pragma once

#include <cstdint>

namespace sida::cuda_test {

struct ToyParams {
  int variant;
  int32_t* in;
  int32_t* out;
};

// All take `variant`; toy_kernels.cu says what each does.
void barrier_kernel(ToyParams p);
void warp_kernel(ToyParams p);
void copy_kernel(ToyParams p);
void global_kernel(ToyParams p);
void ticket_kernel(ToyParams p);
void order_kernel(ToyParams p);
void ldmatrix_kernel(ToyParams p);
void mma_kernel(ToyParams p);
void widen_kernel(ToyParams p);

}  // namespace sida::cuda_test
