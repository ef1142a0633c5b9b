// Matrices rounded to int4 and mxfp4 and back, for packing: what the kernels multiply with, no kernel themselves.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/moe_ffn.h"

namespace sida {

struct GroupRounding {
  DType to;  // int4 or mxfp4
  int64_t rows, columns;
  const float* weight;      // [rows, columns] contiguous, finite; for int4 at most 8 times float16's largest
  const float* importance;  // [columns], what a column's squared errors count; null: all the same
  uint8_t* values;          // [rows, 16 * groups]
  void* scale;              // [rows, groups] of float16 (int4) or bytes (mxfp4)
};

// Each group of 32 columns gets the scale with the least squared error of those tried, and the values nearest to it.
//   int4   the scales that put the group's largest value at -8 and down to 0.72 of it, then the best one for the values
//          that came out
//   mxfp4  three neighbouring powers of two
// A column's group is padded with zeros.
void round_groups(const GroupRounding& args, const ParallelFor& parallel);

// The stored weights, exactly: out [rows, columns] of float32.
struct GroupExpansion {
  DType from;  // int4 or mxfp4
  int64_t rows, columns;
  const uint8_t* values;
  const void* scale;
  float* out;
};
void expand_groups(const GroupExpansion& args, const ParallelFor& parallel);

}  // namespace sida
