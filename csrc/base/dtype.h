// Element types of weights and activations, shared by the engine and the kernels.
//
// int4 and mxfp4 are types of weights that share a scale over 32 neighbours of a row. Two lie in a byte, element 2i in
// the low half and 2i + 1 in the high one; a row is padded to a multiple of 32 elements, whose padding is never used.
//   int4   two's complement, -8 to 7, times a float16 scale: 4.5 bits a weight
//   mxfp4  e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times 2^(e - 127), e an unsigned byte (255: NaN):
//          4.25 bits a weight (OCP Microscaling Formats 1.0, section 5)
#pragma once

#include <cstdint>

namespace sida {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, int4 = 4, mxfp4 = 5 };

// Elements of a row that share a scale.
inline constexpr int64_t group_columns = 32;

constexpr bool is_grouped(DType dtype) {
  return dtype == DType::int4 || dtype == DType::mxfp4;
}

// Bytes of an element as a tensor holds it; of a pair of elements for int4 and mxfp4.
constexpr int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i8:
    case DType::int4:
    case DType::mxfp4:
      return 1;
  }
  return 0;
}

constexpr int64_t groups_of(int64_t columns) {
  return (columns + group_columns - 1) / group_columns;
}

// Bytes of a row of weights.
constexpr int64_t row_bytes(DType dtype, int64_t columns) {
  return is_grouped(dtype) ? groups_of(columns) * (group_columns / 2) : columns * element_bytes(dtype);
}

// Bytes of a group's scale.
constexpr int64_t group_scale_bytes(DType dtype) {
  return dtype == DType::int4 ? 2 : dtype == DType::mxfp4 ? 1 : 0;
}

// Bytes of all scales of a row: one for each group, for int8 one fp32, else none.
constexpr int64_t row_scale_bytes(DType dtype, int64_t columns) {
  return dtype == DType::i8 ? 4 : is_grouped(dtype) ? groups_of(columns) * group_scale_bytes(dtype) : 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i8:
      return "int8";
    case DType::int4:
      return "int4";
    case DType::mxfp4:
      return "mxfp4";
  }
  return "unknown";
}

}  // namespace sida
