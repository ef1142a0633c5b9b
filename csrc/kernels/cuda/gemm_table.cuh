// Chooses among the instances of the tensor-core kernel, and thereby makes them.
#pragma once

#include "kernels/cuda/expert_gemm.cuh"
#include "kernels/cuda/kernels.h"

namespace sida::cuda {

template <class Token, class Weight, class Shape>
LayerKernels kernels_of_shape(const char* name) {
  return {name,
          expert_gemm<Token, Weight, Shape, Phase::hidden>,
          expert_gemm<Token, Weight, Shape, Phase::output>,
          Shape::block_w,
          Shape::threads,
          GemmMemory<Shape, Weight>::bytes};
}

template <class Token, class Weight>
LayerKernels gemm_kernels(int block_t) {
  switch (block_t) {
    case DecodeShape::block_t:
      return kernels_of_shape<Token, Weight, DecodeShape>("expert_gemm<decode>");
    case MediumShape::block_t:
      return kernels_of_shape<Token, Weight, MediumShape>("expert_gemm<medium>");
    case LargeShape::block_t:
      return kernels_of_shape<Token, Weight, LargeShape>("expert_gemm<large>");
  }
  fail(ErrorKind::internal, "no tensor-core kernel has ", block_t, " tokens in a tile, expected 16, 64 or 128");
}

}  // namespace sida::cuda
