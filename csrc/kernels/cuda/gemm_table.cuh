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
      return kernels_of_shape<Token, Weight, std::conditional_t<has_groups<Weight>, MediumGroupsShape, MediumShape>>(
          "expert_gemm<medium>");
    case LargeShape::block_t:
      // A large tile saves bytes of weights, of which 4 bits have few: a medium one does for them.
      if constexpr (!has_groups<Weight>) return kernels_of_shape<Token, Weight, LargeShape>("expert_gemm<large>");
      break;
  }
  fail(ErrorKind::internal, "no tensor-core kernel for ", dtype_name(ElementOf<Weight>::dtype), " weights has ",
       block_t, " tokens in a tile, expected 16, 64 or, but for 4-bit weights, 128");
}

}  // namespace sida::cuda
