// The arithmetic of VDPBF16PS and TDPBF16PS as the manual has it: fp32 multiply-adds rounded once, to nearest even,
// with denormal operands taken for zero and denormal results made zero, whatever the caller's modes are
// (Intel SDM volume 2: VDPBF16PS, "Operation" and "Description"; TDPBF16PS, the same).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace sida::test {

inline float flushed(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

inline float flushed_sum(float a, float b) {
  return flushed(flushed(a) + flushed(b));
}

// a * b + c. Products of bfloat16 are exact in double, and std::fma rounds their sum once.
inline float flushed_multiply_add(float a, float b, float c) {
  return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
}

inline float low_bf16(uint32_t pair) {
  return std::bit_cast<float>(pair << 16);
}

inline float high_bf16(uint32_t pair) {
  return std::bit_cast<float>(pair & 0xffff0000u);
}

}  // namespace sida::test
