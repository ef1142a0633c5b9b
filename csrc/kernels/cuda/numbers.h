// The 16-bit and the 4-bit element types as plain bits, so that the kernels need no toolkit header beyond the
// runtime's.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace sida::cuda {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// Pairs of 4-bit weights, as base/dtype.h lays them out.
struct int4_pair {
  uint8_t pair;
};

struct mxfp4_pair {
  uint8_t pair;
};

template <class Element>
struct ElementOf;
template <>
struct ElementOf<float> {
  static constexpr DType dtype = DType::f32;
};
template <>
struct ElementOf<bf16> {
  static constexpr DType dtype = DType::bf16;
};
template <>
struct ElementOf<f16> {
  static constexpr DType dtype = DType::f16;
};
template <>
struct ElementOf<int8_t> {
  static constexpr DType dtype = DType::i8;
};
template <>
struct ElementOf<int4_pair> {
  static constexpr DType dtype = DType::int4;
};
template <>
struct ElementOf<mxfp4_pair> {
  static constexpr DType dtype = DType::mxfp4;
};

}  // namespace sida::cuda
