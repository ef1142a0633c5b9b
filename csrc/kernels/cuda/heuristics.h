// Which kernel and which tile a layer gets: plain host code without CUDA, so that it can be tested anywhere.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/linear.h"
#include "kernels/moe_ffn.h"

namespace sida::cuda {

struct Architecture {
  int compute_capability;  // 80, 86, 89, 90, 100, 120
  int multiprocessors;
  int64_t shared_per_block;  // bytes that a block may ask for
};

enum class Path { tensor_core, f32 };

struct Choice {
  Path path;
  const char* reason;  // why the fp32 path was taken; empty for tensor cores
  int block_t;         // tokens of a tile
  int splits;          // of d_ff in the second product
  bool operator==(const Choice& other) const {
    return path == other.path && block_t == other.block_t && splits == other.splits;
  }
};

// The choice depends on the layer's shape and the device alone, never on the slots of a wave: rows computed in
// different waves, or under another budget, get the same sums in the same order.
Choice choose(const MoeFfnArgs& args, const Architecture& architecture);
Choice choose(const LinearArgs& args, const Architecture& architecture);

// Tiles that `rows` rows over `experts` experts can need at the most.
int64_t max_tiles(int64_t rows, int64_t experts, int block_t);

// Whether every row of `matrix` begins at a multiple of `bytes` bytes and holds a whole number of them.
bool rows_aligned(const ExpertMatrix& matrix, int64_t row_elements, DType dtype, int64_t bytes);

}  // namespace sida::cuda
