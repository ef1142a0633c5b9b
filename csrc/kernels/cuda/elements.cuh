// Loads and stores of elements whose type is known at run time, one at a time or eight at once.
#pragma once

#include "kernels/cuda/ptx.cuh"

namespace sida::cuda {

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(int8_t value) {
  return static_cast<float>(value);
}

template <class Element>
__device__ inline Element from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bf16 from_float<bf16>(float value) {
  return to_bf16(value);
}
template <>
__device__ inline f16 from_float<f16>(float value) {
  return to_f16(value);
}

__device__ inline float load_element(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return to_float(static_cast<const bf16*>(data)[index]);
    case DType::f16:
      return to_float(static_cast<const f16*>(data)[index]);
    case DType::i8:
      return to_float(static_cast<const int8_t*>(data)[index]);
    case DType::int4:
    case DType::mxfp4:
      break;  // load_eight_of_group
  }
  return 0.0f;
}

// As is_grouped, on the device.
__device__ inline bool shares_factors(DType dtype) {
  return dtype == DType::int4 || dtype == DType::mxfp4;
}

// The factor of a group of mxfp4: 2^(byte - 127), the smallest one subnormal; 255 is NaN.
__device__ inline float power_of_two(uint8_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : static_cast<uint32_t>(byte) << 23);
}

__device__ inline float load_group_scale(const void* scales, int64_t index, DType dtype) {
  return dtype == DType::int4 ? to_float(static_cast<const f16*>(scales)[index])
                              : power_of_two(static_cast<const uint8_t*>(scales)[index]);
}

// A 4-bit weight without its group's factor.
__device__ inline float to_float(uint32_t nibble, DType dtype) {
  if (dtype == DType::int4) return static_cast<float>(static_cast<int>(nibble ^ 8) - 8);
  // e2m1 in the place of fp32's lowest exponents and highest bit of the mantissa is 2^-126 times too small.
  const float magnitude = __uint_as_float((nibble & 7) << 22) * 0x1p126f;
  return (nibble & 8) == 0 ? magnitude : -magnitude;
}

__device__ inline float round_to(float value, DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return to_float(to_bf16(value));
    case DType::f16:
      return to_float(to_f16(value));
    default:
      return value;
  }
}

// Eight elements of one row, moved as a whole.
template <class Element>
struct alignas(sizeof(Element) * 8 > 16 ? 16 : sizeof(Element) * 8) Eight {
  Element element[8];
};

template <class Element>
__device__ inline void load_eight_as(const void* data, int64_t index, float (&value)[8]) {
  const Eight<Element> eight = *reinterpret_cast<const Eight<Element>*>(static_cast<const Element*>(data) + index);
  for (int i = 0; i < 8; ++i) value[i] = to_float(eight.element[i]);
}

// Elements [index, index + count) of `data`, zeros after them. `vector`: index is so aligned that eight elements can be
// loaded at once.
__device__ inline void load_eight(const void* data, int64_t index, DType dtype, int count, bool vector,
                                  float (&value)[8]) {
  if (vector && count >= 8) {
    switch (dtype) {
      case DType::f32:
        return load_eight_as<float>(data, index, value);
      case DType::bf16:
        return load_eight_as<bf16>(data, index, value);
      case DType::f16:
        return load_eight_as<f16>(data, index, value);
      case DType::i8:
        return load_eight_as<int8_t>(data, index, value);
      case DType::int4:
      case DType::mxfp4:
        return;  // load_eight_of_group
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = i < count ? load_element(data, index + i, dtype) : 0.0f;
}

// Eight 4-bit weights of one group from byte `index` on, times its factor; zeros after the first `count`. The four
// bytes are in the row, which ends with its last group. `vector`: they are aligned.
__device__ inline void load_eight_of_group(const void* data, int64_t index, DType dtype, float scale, int count,
                                           bool vector, float (&value)[8]) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data) + index;
  uint32_t eight = 0;
  if (vector) {
    eight = *reinterpret_cast<const uint32_t*>(bytes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) eight |= static_cast<uint32_t>(bytes[i]) << (8 * i);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = i < count ? to_float(eight >> (4 * i) & 15, dtype) * scale : 0.0f;
}

template <class Element>
__device__ inline void store_eight_as(void* data, int64_t index, int count, bool vector, const float (&value)[8]) {
  Element* row = static_cast<Element*>(data) + index;
  if (vector && count >= 8) {
    Eight<Element> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.element[i] = from_float<Element>(value[i]);
    *reinterpret_cast<Eight<Element>*>(row) = eight;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) row[i] = from_float<Element>(value[i]);
  }
}

// Stores the first `count` values, rounded, at [index, index + count).
__device__ inline void store_eight(void* data, int64_t index, DType dtype, int count, bool vector,
                                   const float (&value)[8]) {
  switch (dtype) {
    case DType::f32:
      return store_eight_as<float>(data, index, count, vector, value);
    case DType::bf16:
      return store_eight_as<bf16>(data, index, count, vector, value);
    case DType::f16:
      return store_eight_as<f16>(data, index, count, vector, value);
    case DType::i8:
    case DType::int4:
    case DType::mxfp4:
      return;  // no kernel writes them
  }
}

}  // namespace sida::cuda
