// Element types of weights and activations, shared by the engine and the kernels.
#pragma once

#include <cstdint>

namespace sida {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

constexpr int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i8:
      return 1;
  }
  return 0;
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
  }
  return "unknown";
}

}  // namespace sida
